"""Speed, always as a ratio of two things that are measured in turn in the same run: seconds alone say little.

    python tests/bench.py            what needs no training, in a few minutes
    python tests/bench.py --train    also what the recipes cost, after `python results/make.py speed`

These costs are comparable between machines: scaled seconds are those of a machine whose best matrix product runs at 850
GFLOP/s, and a unit is 0.29 PFLOP, the arithmetic of airbench94, K. Jordan's speed-run to 94%.
"""

import argparse
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
from results import runs  # noqa: E402


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
    """The share of an epoch's time that goes into shuffling, augmenting, resizing and normalizing."""
    settings = train.read_settings(["--recipe", recipe])
    train_set, _ = data.load_cifar10(ROOT / "datasets")
    model, optimizer = train.build(settings, data.normalize(data.to_float(train_set[0][:2000])))
    criterion = loss.CrossEntropyLoss(label_smoothing=settings.label_smoothing)
    precision = train.choose_precision("cpu")
    loader = data.Loader(*train_set, settings.batch_size, settings.augment, torch.Generator())
    data_seconds = step_seconds = done = 0
    for size, share in (*settings.sizes.items(), (data.SIZE, 1)):
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
    theirs = [sys.executable, "-c", "import os, torch; os._exit(0)"]  # both end without cleaning up
    for _ in range(6):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-c", FIRST_STEP, "--recipe", recipe, "--experiments", folder]
            start = time.perf_counter()
            reading = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stderr
            ours = time.perf_counter() - start - float(reading)
        pairs.append(ours / seconds(lambda: subprocess.run(theirs, check=True)))
    return f"{statistics.median(pairs[1:]):6.2f}   ({min(pairs[1:]):.2f} to {max(pairs[1:]):.2f}, 5 pairs)"


def three_runs(together):
    """Seconds that three short runs take as whole commands, started together or one after the other."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    start, processes = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(3):
            command = [sys.executable, "train.py", "--recipe", "quick", "--epochs", "0.1", "--seed", str(seed)]
            command += ["--experiments", folder]
            processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL))
            if not together:
                processes[-1].wait()
        if any(process.wait() for process in processes):
            sys.exit("bench.py: a run failed")
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description="Measure speed, as ratios.")
    parser.add_argument("--train", action="store_true", help="also train what results/runs.csv lacks of the recipes")
    options = parser.parse_args()
    threads = torch.get_num_threads()
    print(f"{processor()}, {torch.backends.cpu.get_cpu_capability()}, {threads} threads")
    print(f"Python {platform.python_version()}, PyTorch {torch.__version__}, NumPy {np.__version__}")
    print(f"matrix product: {runs.measure_gflops():.0f} GFLOP/s, precision {train.choose_precision('cpu')}\n")

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
    for recipe in ("baseline", "quick"):  # the other recipes start as quick does
        print(f"  {recipe:24} {first_step(recipe)}", flush=True)
    print("three runs of quick --epochs 0.1 at once / one after the other, as whole commands")
    ratios = [three_runs(together=True) / three_runs(together=False) for _ in range(3)]
    print(f"  {'':24} {statistics.median(ratios):6.2f}   ({min(ratios):.2f} to {max(ratios):.2f}, 3 pairs)", flush=True)
    print("loading, augmenting and resizing: share of an epoch")
    for recipe in ("quick", "best"):
        print(f"  {recipe:24} {data_share(recipe)}", flush=True)
    if options.train:
        print(
            "training: median seconds * GFLOP/s of the matrix product, over 850 GFLOP/s (scaled) and 0.29 PFLOP (units)"
        )
        runs.complete("speed")
        rows = runs.read_rows()
        for name, run in runs.LADDER.items():
            pairs = zip(runs.find(rows, run, "train_seconds"), runs.find(rows, run, "gflops"), strict=True)
            work = statistics.median(seconds * gflops for seconds, gflops in pairs)
            print(f"  {name:24} {work / 850:6.1f} s   {work / 290e3:5.2f} units")


if __name__ == "__main__":
    main()
