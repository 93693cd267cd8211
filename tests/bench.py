"""Speed, always as a ratio of two things that are measured in turn in the same run: seconds alone say little.

    python tests/bench.py            what needs no training, in a few minutes
    python tests/bench.py --train    also the recipes: every line of results/speed.csv that is not there yet

The yardstick that travels between machines is the rate of the best of six matrix products, 2048 x 2048, in the faster
of bf16 and fp32. "Scaled" seconds are seconds * rate / 850 GFLOP/s; a "unit" is 0.29 PFLOP (the arithmetic of the
speed-run that is known for 94%, K. Jordan's airbench94) at that rate.
"""

import argparse
import csv
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before NumPy is imported; PyTorch has threads of its own

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import bn  # noqa: E402
import data  # noqa: E402
import loss  # noqa: E402
import train  # noqa: E402

SPEED = ROOT / "results" / "speed.csv"
COLUMNS = [
    "recipe", "epochs", "seed", "val_accuracy", "val_accuracy_tta", "train_seconds", "whole_seconds", "peak_gib",
    "gflops",
]  # fmt: skip
# (recipe, epochs, seeds); what takes longest comes last. Those with one seed are the curve of accuracy against time.
RUNS = [
    ("quick", train.RECIPES["quick"]["epochs"], range(10)),
    ("quick", 1.5, [0]), ("quick", 3, [0]), ("quick", 6, [0]), ("best", 2, [0]), ("best", 4, [0]),
    ("best", train.RECIPES["best"]["epochs"], range(5)),
]  # fmt: skip


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def ratio(ours, theirs, budget=3.0):
    """The median of ours / theirs, quartiles, over pairs measured in turn for `budget` seconds (at least five)."""
    pairs, start = [], time.perf_counter()
    for _ in range(3):
        ours(), theirs()
    while len(pairs) < 5 or time.perf_counter() - start < budget:
        pairs.append(seconds(ours) / seconds(theirs))
    low, middle, high = statistics.quantiles(pairs, n=4)
    return f"{middle:6.2f}   ({low:.2f} to {high:.2f}, {len(pairs)} pairs)"


def rate():
    """GFLOP/s of the best of six 2048 x 2048 matrix products, in the faster of bf16 and fp32."""
    best = 0
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(2048, 2048, dtype=dtype)
        best = max(best, 2 * 2048**3 / min(seconds(lambda a=a: a @ a) for _ in range(6)) / 1e9)
    return best


def processor():
    cpuinfo = Path("/proc/cpuinfo")  # Linux; elsewhere the standard library knows it
    models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    return models[0].split(":")[1].strip() if models else platform.processor()


def batch_norm(shape):
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal(shape, dtype=np.float32), rng.standard_normal(shape, dtype=np.float32)
    tensor, gradient = torch.tensor(x, requires_grad=True), torch.tensor(dy)
    ours, theirs = bn.BatchNorm(shape[1]), torch.nn.BatchNorm1d(shape[1])

    def run_ours():
        ours.forward(x)
        ours.backward(dy)

    def run_theirs():
        tensor.grad = theirs.weight.grad = theirs.bias.grad = None
        theirs(tensor).backward(gradient)

    return ratio(run_ours, run_theirs)


def cross_entropy(samples, smoothing):
    logits = torch.randn(samples, 10, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets = torch.arange(samples) % 10

    def run(criterion):
        logits.grad = None
        criterion(logits, targets).backward()

    ours = loss.CrossEntropyLoss(label_smoothing=smoothing)
    theirs = torch.nn.CrossEntropyLoss(label_smoothing=smoothing)
    return ratio(lambda: run(ours), lambda: run(theirs))


def data_share(recipe, steps=6):
    """The share of an epoch's time that goes into shuffling, augmenting, resizing and normalising."""
    settings = {**train.RECIPES[recipe], "seed": 0}
    train_set, _ = data.load_cifar10(ROOT / "datasets")
    model, optimizer = train.build(settings, train_set[0])
    criterion, precision = loss.CrossEntropyLoss(label_smoothing=0.2), train.fastest_precision("cpu")
    loader = data.Loader(*train_set, settings["batch_size"], settings["augment"], torch.Generator())
    data_seconds = step_seconds = done = 0
    for size, share in (*settings["sizes"], (32, 1)):
        batches = iter(loader)
        loading = stepping = 0
        for step in range(steps + 2):
            start = time.perf_counter()
            images, labels = next(batches)
            images = data.resize(images, size)
            loaded = time.perf_counter()
            train.train_step(model, optimizer, criterion, images, labels, precision)
            if step >= 2:  # the first ones of a size also choose how to compute it
                loading += loaded - start
                stepping += time.perf_counter() - loaded
        data_seconds += loading * (share - done)
        step_seconds += stepping * (share - done)
        done = share
    return f"{data_seconds / (data_seconds + step_seconds):6.1%}"


FIRST_STEP = """
import os, sys, time
import data, train
load = data.load_cifar10
def timed(root):
    start = time.perf_counter()
    result = load(root)
    print(time.perf_counter() - start, file=sys.stderr)
    return result
data.load_cifar10 = timed
train.train_step = lambda *arguments: os._exit(0)
train.main()
"""


def first_step(recipe):
    """From the prompt to the first step less the time to read the data, against `import torch`: pairs of processes."""
    pairs = []
    for _ in range(6):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-c", FIRST_STEP, "--recipe", recipe, "--experiments", folder]
            start = time.perf_counter()
            reading = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stderr
            ours = time.perf_counter() - start - float(reading)
        pairs.append(ours / seconds(lambda: subprocess.run([sys.executable, "-c", "import torch"], check=True)))
    return f"{statistics.median(pairs[1:]):6.2f}   ({min(pairs[1:]):.2f} to {max(pairs[1:]):.2f}, 5 pairs)"


def train_once(recipe, epochs, seed):
    """One run of train.py as its user would start it, as a row of results/speed.csv."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", "--experiments", folder, "--name", "run"]
        command += ["--recipe", recipe, "--epochs", str(epochs), "--seed", str(seed)]
        gflops, start = rate(), time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"bench.py: failed: {' '.join(command)}")
        whole_seconds = time.perf_counter() - start
        with open(Path(folder, "run", "metrics.csv"), newline="") as file:
            last = list(csv.DictReader(file))[-1]
    row = {**last, "recipe": recipe, "epochs": epochs, "seed": seed}
    row |= {"train_seconds": f"{float(last['train_seconds']):.1f}", "whole_seconds": f"{whole_seconds:.1f}"}
    row |= {"peak_gib": f"{usage.ru_maxrss / 2**20:.2f}", "gflops": f"{(gflops + rate()) / 2:.0f}"}
    return {column: row.get(column, "") for column in COLUMNS}


def recipes():
    """Train what results/speed.csv does not hold yet, then print its summary."""
    rows = []
    if SPEED.exists():
        with open(SPEED, newline="") as file:
            rows = list(csv.DictReader(file))
    had = {(row["recipe"], float(row["epochs"]), int(row["seed"])) for row in rows}
    for recipe, epochs, seeds in RUNS:
        for seed in seeds:
            if (recipe, float(epochs), seed) not in had:
                rows.append(train_once(recipe, epochs, seed))
                print("  ".join(str(value) for value in rows[-1].values()), flush=True)
                with open(SPEED, "w", newline="") as file:
                    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                    writer.writeheader()
                    writer.writerows(rows)
    print("recipe  epochs  seeds  val accuracy, mean  lowest  spread  with tta  | ", end="")
    print("train s  scaled s  units  whole s  GiB")
    for recipe, epochs, _ in RUNS:
        group = [row for row in rows if (row["recipe"], float(row["epochs"])) == (recipe, float(epochs))]
        accuracy = [float(row["val_accuracy"]) for row in group]
        tta = [float(row["val_accuracy_tta"]) for row in group if row["val_accuracy_tta"]]
        work = [float(row["train_seconds"]) * float(row["gflops"]) for row in group]
        middle = {key: statistics.median(float(row[key]) for row in group) for key in COLUMNS[5:8]}
        print(
            f"{recipe:6}  {epochs:6}  {len(group):5}  {statistics.mean(accuracy):18.2%}  {min(accuracy):6.2%}  "
            f"{statistics.stdev(accuracy) if len(group) > 1 else 0:6.2%}  "
            f"{f'{statistics.mean(tta):.2%}' if tta else '':>8}  | {middle['train_seconds']:7.1f}  "
            f"{statistics.median(work) / 850:8.1f}  {statistics.median(work) / 290e3:5.2f}  "
            f"{middle['whole_seconds']:7.1f}  {middle['peak_gib']:.2f}"
        )


def main():
    parser = argparse.ArgumentParser(description="Measure speed, as ratios.")
    parser.add_argument("--train", action="store_true", help="also train the recipes (more than an hour)")
    options = parser.parse_args()
    threads = torch.get_num_threads()
    print(f"{processor()}, {torch.backends.cpu.get_cpu_capability()}, {threads} threads")
    print(f"Python {platform.python_version()}, PyTorch {torch.__version__}, NumPy {np.__version__}")
    print(f"matrix product: {rate():.0f} GFLOP/s, precision {train.fastest_precision('cpu')}\n")

    print("batch norm, forward + backward, float32, one thread: time of bn.BatchNorm / torch.nn.BatchNorm1d")
    torch.set_num_threads(1)
    for shape in ((64, 16), (256, 256), (1024, 784), (4096, 256), (8192, 1024)):
        print(f"  {shape[0]:6} x {shape[1]:<6}          {batch_norm(shape)}", flush=True)
    torch.set_num_threads(threads)
    print(f"cross entropy, forward + backward, {threads} threads: loss.CrossEntropyLoss / torch.nn.CrossEntropyLoss")
    for samples in (256, 2000, 50_000):
        for smoothing in (0.0, 0.2):
            print(f"  {samples:6} x 10, smoothing {smoothing} {cross_entropy(samples, smoothing)}", flush=True)
    print("from the prompt to the first training step, less reading the data: python train.py / import torch")
    for recipe in train.RECIPES:
        print(f"  {recipe:24} {first_step(recipe)}", flush=True)
    print("loading, augmenting and resizing: share of an epoch")
    for recipe in ("quick", "best"):
        print(f"  {recipe:24} {data_share(recipe)}", flush=True)
    if options.train:
        print("training: every figure of results/speed.csv")
        recipes()


if __name__ == "__main__":
    main()
