"""python tests/bench.py: time batch norm and cross entropy against PyTorch's, and write results/measured.csv."""

import statistics
import sys
import timeit
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bn
import loss
from results import make


def compare(what, ours, theirs):
    """Add a row to measured.csv: how many times as long as `theirs` the call `ours` takes, a median of 100 pairs."""
    pairs = [(timeit.timeit(ours, number=1), timeit.timeit(theirs, number=1)) for _ in range(100)]
    value = f"{statistics.median(a / b for a, b in pairs):.2f}"
    print(f"{what} takes {value} times as long as PyTorch's", flush=True)
    rows = [row for row in make.read_table("measured.csv") if row["what"] != what]
    rows.append({"what": what, "value": value, "how": "python tests/bench.py (time over PyTorch's, one thread)"})
    make.write_table("measured.csv", rows)


torch.set_num_threads(1)
for shape in ((64, 16), (256, 256), (1024, 784), (4096, 256), (8192, 1024)):
    x = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    inputs, gradient = torch.tensor(x, requires_grad=True), torch.tensor(x)
    one, other = bn.BatchNorm(shape[1]), torch.nn.BatchNorm1d(shape[1])
    asked = inputs, other.weight, other.bias
    calls = lambda: (one.forward(x), one.backward(x)), lambda: torch.autograd.grad(other(inputs), asked, gradient)
    compare(f"batch norm, {shape[0]} x {shape[1]}", *calls)
for count in (256, 2000, 50_000):
    logits, labels = torch.randn(count, 10, requires_grad=True), torch.arange(count) % 10
    one, other = loss.CrossEntropyLoss(), torch.nn.CrossEntropyLoss()
    compare(
        f"cross entropy, {count} x 10", lambda: one(logits, labels).backward(), lambda: other(logits, labels).backward()
    )
