"""The runs that README's numbers come from: the list of them, how they are trained, and their measurements.

Every run is a command line of train.py and a row of runs.csv. Delete the row to measure it again. A row whose
settings or train.FORMAT have changed does not count. (make.py and tests/bench.py import this.)
"""

import csv
import hashlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from filelock import FileLock, Timeout

import data
import train

ROOT = Path(train.__file__).parent
RESULTS = ROOT / "results"
REPORT = ROOT / "experiments" / "report"
MEASURED = ("step", "train_seconds", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_accuracy_tta")
COSTS = ("whole_seconds", "peak_gib", "gflops")
COLUMNS = ("run", "seed", "settings", *MEASURED, *COSTS)

# The quick recipe taken apart: each trick adds to those before it. The first trains the same net the baseline's way.
PLAIN = "--recipe quick --sizes= --label-smoothing 0"
TRICKS = {
    "Adam at 1e-3": f"{PLAIN} --no-mirror --no-whiten --optimizer adam --lr 1e-3",
    "Muon, rate falling to 0": f"{PLAIN} --no-mirror --no-whiten",
    "whitened stem, identity start": f"{PLAIN} --no-mirror",
    "mirrored filters": PLAIN,
    "label smoothing": "--recipe quick --sizes=",
    "small pictures first: `quick`": "--recipe quick",
}
LADDER = {"baseline": "--lr 1e-3"} | {name: f"--recipe {name}" for name in [*train.RECIPES][1:]}
AUGMENTATIONS = {"none": "--lr 1e-3"} | {name: f"--lr 1e-3 --augment {name}" for name in data.AUGMENTATIONS[1:]}
RATES = {rate: f"--lr {rate}" for rate in ("1e-3", "1e-4", "1e-5")}

# study: {run, as flags of train.py: number of seeds}. The longest study comes last.
STUDIES = {
    "rates": dict(zip(RATES.values(), (3, 1, 1), strict=True)),
    "tricks": dict.fromkeys(TRICKS.values(), 10),
    "augmentation": dict.fromkeys(AUGMENTATIONS.values(), 3),
    "speed": {run: 3 for run in LADDER.values()} | {LADDER["quick"]: 10},
}

# Runs a command, and prints its seconds and its peak memory. It is a process of its own, because a program's peak
# memory counts as at least its parent's: make.py has loaded PyTorch, and this has loaded next to nothing.
STOPWATCH = """
import resource, subprocess, sys, time
start = time.perf_counter()
code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


# --------------------------------------------------------------------------------------------------------- training
def measure_gflops():
    """A yardstick between machines: GFLOP/s of the best of six 2048 x 2048 matrix products, in bf16 or fp32."""
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[train.choose_precision("cpu")]
    matrix = torch.ones(2048, 2048, dtype=dtype)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(seconds) / 1e9


def find_folder(run, seed):
    return REPORT / re.sub(r"[^\w.-]+", "_", f"{run} seed{seed}".replace("--", ""))


def fingerprint(settings):
    """A short text that changes with train.FORMAT and every setting but seed, device and precision."""
    kept = {key: settings[key] for key in train.BASELINE}
    for key in ("seed", "device", "precision"):
        del kept[key]
    text = json.dumps([train.FORMAT, kept])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def is_current(row):
    """Whether a run would have the same settings today."""
    return row["settings"] == fingerprint(vars(train.read_settings(shlex.split(row["run"]))))


def train_once(run, seed):
    """Train by that command line, in a process of its own. Returns the row for runs.csv."""
    folder = find_folder(run, seed)
    if folder.exists():
        try:
            with FileLock(folder / ".lock", timeout=0):
                shutil.rmtree(folder)
        except Timeout:
            sys.exit(f"make.py: {folder} is in use: wait until its run has ended")
    command = [sys.executable, "train.py", *shlex.split(run), "--seed", str(seed)]
    command += ["--device", "cpu", "--experiments", str(REPORT), "--name", folder.name]
    print(f"{run} --seed {seed}", flush=True)
    before = measure_gflops()
    stopwatch = [sys.executable, "-c", STOPWATCH]
    watched = subprocess.run(stopwatch + command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if watched.returncode:
        sys.exit(f"make.py: failed: {shlex.join(command)}")
    seconds, peak = map(float, watched.stdout.split())
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes or kibibytes
    costs = {"whole_seconds": seconds, "peak_gib": peak / unit, "gflops": (before + measure_gflops()) / 2}
    config = json.loads((folder / "config.json").read_text())
    with open(folder / "metrics.csv", newline="") as file:
        measured = list(csv.DictReader(file))[-1]
    row = {"run": run, "seed": str(seed), "settings": fingerprint(config)}
    row |= {column: measured.get(column, "") for column in MEASURED}
    return row | {name: f"{cost:.2f}" for name, cost in costs.items()}


def read_rows():
    """The rows of results/runs.csv whose settings are still the same today."""
    path = RESULTS / "runs.csv"
    if not path.exists():
        return []
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    if rows and tuple(rows[0]) != COLUMNS:
        sys.exit(f"make.py: {path} has other columns than {', '.join(COLUMNS)}: remove it, to train everything again")
    current = [row for row in rows if is_current(row)]
    if len(current) < len(rows):
        print(f"{path.name}: {len(rows) - len(current)} rows of older settings do not count")
    return current


def write_rows(rows):
    table = csv.DictWriter(text := io.StringIO(), COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    data.write_file(RESULTS / "runs.csv", text.getvalue().encode())


def complete(study):
    """Train the runs of a study that are missing from results/runs.csv; each finished run is added at once."""
    rows = read_rows()
    for run, seeds in STUDIES[study].items():
        for seed in map(str, range(seeds)):
            if any(row["run"] == run and row["seed"] == seed for row in rows):
                continue
            row = train_once(run, seed)
            rows = [*read_rows(), row]  # by now, another make.py may have added some
            write_rows(rows)
            print(f"  {float(row['val_accuracy']):.2%} in {float(row['train_seconds']):.1f} s", flush=True)


def find(rows, run, column):
    """The values of a column of runs.csv for each seed of a run; empty if the run does not measure it."""
    texts = [row[column] for row in rows if row["run"] == run]
    return [float(text) for text in texts] if any(texts) else []
