"""Training: files, curves, resuming and errors, on a tiny data set; and, where it is there, on the real one."""

import ast
import contextlib
import csv
import errno
import itertools
import json
import math
import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import filelock
import matplotlib
import pytest
import tensorboardX.record_writer
import torch
from conftest import complain, load_tiny, make_tiny, raising, seeded, unix
from filelock import FileLock
from PIL import Image

import data
import network
import train
import visualize_aug
from loss import CrossEntropyLoss

SCRIPT = Path(train.__file__)


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def config(folder):
    return json.loads((folder / "config.json").read_text())


def results(folder):
    """What two equal runs must agree in, bit for bit: what was measured but for the times, and all that is saved."""
    metrics = [{key: value for key, value in row.items() if key != "train_seconds"} for row in rows(folder)]
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    points = [{key: value for key, value in point.items() if key != "time"} for point in checkpoint["points"]]
    saved = [checkpoint[key] for key in ("model", "optimizers", "generator")]
    return metrics, points, json.dumps(saved, default=torch.Tensor.tolist)


def agree(one, other):
    return results(one) == results(other)


def scalars(folder):
    """[(tag, step, value)] of a run, read by TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return sorted((tag, point.step, point.value) for tag in events.Tags()["scalars"] for point in events.Scalars(tag))


def list_files(folder):
    """{path: bytes} of all in a folder, the empty folders too; but the lock file, which some filelocks delete."""
    paths = [path for path in folder.rglob("*") if path.name != ".lock"]
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


# ---------------------------------------------------------------------------------------------------------- training
def settings_of(*flags):
    """The settings of a command line, in fp32."""
    return train.read_settings([*flags, "--precision", "fp32"])


@pytest.mark.parametrize("recipe", [name for name in train.RECIPES if name != "best"])  # which is dinner three times
def test_training_fits_ten_images_perfectly(recipe):
    images, labels = torch.randint(256, (10, 3, 32, 32), dtype=torch.uint8, generator=seeded()), torch.arange(10)
    inputs = data.normalize(data.to_float(images))
    settings = settings_of("--recipe", recipe, "--widths", "16,16,16", "--batch-size", "10")
    settings.lr /= 2
    torch.manual_seed(0)
    model, optimizer = train.build(settings, inputs)
    for _ in range(100):
        train.train_step(model, optimizer, CrossEntropyLoss(), inputs, labels, "fp32")
    assert train.evaluate(model, images, labels, "fp32")["val_accuracy"] == 1


@pytest.fixture
def half_trained():
    """A net that no longer says the same of all images, and 260 images with labels."""
    images = torch.randint(256, (260, 3, 32, 32), dtype=torch.uint8, generator=seeded())
    labels, inputs = torch.randint(10, (260,), generator=seeded()), data.normalize(data.to_float(images))
    torch.manual_seed(0)
    model, optimizer = train.build(settings_of("--lr", "1e-2", "--widths", "8,8,8"), inputs)
    for _ in range(40):
        train.train_step(model, optimizer, CrossEntropyLoss(), inputs[:40], labels[:40], "fp32")
    return model, images, labels


def test_evaluate_returns_means_over_all_images_in_evaluation_mode(half_trained):
    model, images, labels = half_trained
    result = train.evaluate(model, images, labels, "fp32")
    with torch.no_grad():
        logits = model.eval()(data.normalize(data.to_float(images)))
    assert list(result) == ["val_loss", "val_accuracy"]
    assert result["val_loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert result["val_accuracy"] == (logits.argmax(1) == labels).double().mean().item()


def test_test_time_augmentation_averages_views_for_the_least_certain_quarter(half_trained):
    model, images, labels = half_trained
    result = train.evaluate(model, images, labels, "fp32", tta=True)
    inputs = data.normalize(data.to_float(images))
    with torch.no_grad():
        logits = model.eval()(inputs)
        averaged = sum(weight * model(view) for view, weight in data.views(inputs))
    sureness = logits.softmax(1).amax(1)
    sure = sureness >= sureness.sort().values[len(labels) // 4]
    averaged[sure] = logits[sure]
    expected = (averaged.argmax(1) == labels).double().mean().item()
    assert result["val_accuracy_tta"] == expected != result["val_accuracy"]


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_restores_the_mode_of_the_net(half_trained, training):
    model, images, labels = half_trained
    model.train(training)
    train.evaluate(model, images[:20], labels[:20], "fp32")
    assert model.training == training


def test_muon_rate_falls_to_zero_and_images_grow(tiny, tmp_path, before):
    def look(model, optimizer, criterion, images, *others):
        seen.append((optimizer.param_groups[0]["lr"], *images.shape[2:]))

    seen = []
    before(train, "train_step", look)
    flags = "--recipe dinner --epochs 1.5 --lr 0.8 --name run --sizes 16:0.5,24:0.75"
    assert tiny(*flags.split()).returncode == 0
    # 40 images in batches of 16 are 3 steps per epoch, so 4 in all
    rates, sizes = [pytest.approx(0.8 * (1 - step / 4)) for step in range(4)], (16, 16, 24, 32)
    assert seen == [*zip(rates, sizes, sizes, strict=True)]
    first, last = rows(folder := tmp_path / "experiments/run")
    assert [float(row["epoch"]) for row in (first, last)] == [1, 4 / 3]
    assert first["val_accuracy_tta"] == "" and 0 <= float(last["val_accuracy_tta"]) <= 1  # takes time, so once only
    points = [(step, rate) for tag, step, rate in scalars(folder) if tag == "learning_rate/train"]
    assert points == [*zip(range(1, 5), rates, strict=True)]


@pytest.mark.parametrize("first, steps, ends", [(0, 1000, [*range(2, 49, 2), 49]), (3, 10, [5, 7, 9, 10])])
def test_a_curve_point_is_the_mean_since_the_last_point(monkeypatch, first, steps, ends):
    images, labels = torch.zeros(98, 3, 32, 32, dtype=torch.uint8), torch.arange(98) % 10
    logits = 3 * torch.randn(98, 10, generator=seeded())
    done = []  # the labels of each step

    def step(model, optimizer, criterion, some, own, precision):
        start = sum(map(len, done))
        done.append(own)
        return logits[start : start + len(own)], 0.5

    monkeypatch.setattr(train, "train_step", step)
    loader = data.Loader(images, labels, 2, "none", seeded())  # 49 steps per epoch
    points = []
    model = network.Ensemble([torch.nn.Identity()])
    given = model, [FakeOptimizer()], [loader], settings_of(), first, steps, points.append
    step, means = train.train_epoch(*given)
    assert [point["step"] for point in points] == ends and step == ends[-1]
    own, start = torch.cat(done), 0
    losses = torch.nn.functional.cross_entropy(logits[: len(own)].double(), own, reduction="none")
    measured = torch.stack((losses, (logits[: len(own)].argmax(1) == own).double()))
    for point in points:
        end = sum(map(len, done[: point["step"] - first]))
        point_means = point["train_loss"], point["train_accuracy"]
        assert point_means == pytest.approx(measured[:, start:end].mean(1).tolist(), rel=1e-6)
        assert point["epoch"] == point["step"] / len(loader)
        start = end
    assert [*means.values()] == pytest.approx(measured.mean(1).tolist(), rel=1e-6)


class FakeOptimizer:
    param_groups = ({},)


def record(monkeypatch, name):
    """The (arguments, result) of all calls of a function of train.py from now on."""
    calls, function = [], getattr(train, name)

    def call(*arguments):
        calls.append((arguments, function(*arguments)))
        return calls[-1][1]

    monkeypatch.setattr(train, name, call)
    return calls


def test_label_smoothing_affects_the_minimized_but_not_the_logged_loss(tiny, tmp_path, monkeypatch):
    steps = record(monkeypatch, "train_step")
    assert tiny("--epochs", 1, "--label-smoothing", 0.5, "--name", "run").returncode == 0
    for (*_, labels, _), (logits, loss) in steps:
        smoothed = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.5)
        assert loss == pytest.approx(smoothed.item(), rel=1e-5)
    labels, logits = (torch.cat(parts) for parts in zip(*((call[0][4], call[1][0]) for call in steps), strict=True))
    expected = torch.nn.functional.cross_entropy(logits.double(), labels).item()
    assert float(rows(tmp_path / "experiments/run")[0]["train_loss"]) == pytest.approx(expected, rel=1e-6)


def test_whitening_sees_training_images_only(tiny, monkeypatch):
    builds = record(monkeypatch, "build")
    assert tiny("--epochs", 1).returncode == 0
    (((_, images), _),) = builds
    assert torch.equal(images, data.normalize(data.to_float(load_tiny(None)[0][0])))


def test_evaluation_uses_the_precision_of_the_run(tiny, monkeypatch):
    forwards = record(monkeypatch, "forward")
    assert tiny("--epochs", 1, "--precision", "bf16").returncode == 0
    assert {precision for (_, _, precision), _ in forwards} == {"bf16"}


def test_seed_changes_the_order_of_the_images(tiny, monkeypatch):
    orders = []
    for seed in (0, 0, 1):
        steps = record(monkeypatch, "train_step")
        assert tiny("--epochs", 1, "--seed", seed).returncode == 0
        orders.append(torch.cat([labels for (*_, labels, _), _ in steps]))
    assert torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])


def test_each_net_of_an_ensemble_learns_each_image_in_an_order_of_its_own(tiny, tmp_path, monkeypatch):
    steps, builds = record(monkeypatch, "train_step"), record(monkeypatch, "build")
    assert tiny("--epochs", 1, "--nets", 2, "--name", "run").returncode == 0
    orders = []
    for turn, (_, pair) in enumerate(builds):
        own = steps[turn::2]
        assert all(given[:2] == pair for given, _ in own)  # the net and its optimizer
        orders.append(torch.cat([given[4] for given, _ in own]))
    labels = load_tiny(None)[0][1]
    assert all(torch.equal(order.sort().values, labels.sort().values) for order in orders)
    assert not torch.equal(*orders)
    right = torch.cat([logits.argmax(1) == given[4] for given, (logits, _) in steps])
    (row,) = rows(tmp_path / "experiments/run")
    assert float(row["train_accuracy"]) == pytest.approx(right.double().mean().item())
    result = train.evaluate(train.load(tmp_path / "experiments/run"), *load_tiny(None)[1], "fp32")
    assert result["val_loss"] == pytest.approx(float(row["val_loss"]), rel=1e-5)


def test_nets_of_an_ensemble_start_from_different_weights(tiny, monkeypatch, before):
    builds = record(monkeypatch, "build")
    before(train, "train_step", raising(KeyboardInterrupt()))
    assert tiny("--nets", 2).returncode == 130
    one, other = (net.groups[0][0].weight for _, (net, _) in builds)
    assert not torch.equal(one, other)


def test_train_seconds_exclude_validation(tiny, tmp_path, monkeypatch, before):
    clock = [0]
    monkeypatch.setattr(train.time, "perf_counter", lambda: clock[0])
    before(train, "train_step", lambda *_: clock.append(clock.pop() + 1))
    before(train, "evaluate", lambda *_: clock.append(clock.pop() + 100))
    assert tiny("--epochs", 2, "--name", "run").returncode == 0
    assert [float(row["train_seconds"]) for row in rows(tmp_path / "experiments/run")] == [3, 6]


def test_each_epoch_prints_a_line_with_its_metrics(tiny, tmp_path):
    outcome = tiny("--epochs", 1, "--tta", "--name", "run")
    (row,) = rows(tmp_path / "experiments/run")
    loss, accuracy, val_loss, val_accuracy, tta = (float(value) for value in [*row.values()][3:])
    assert outcome.stdout.splitlines()[1].startswith(
        f"step 3 of 3 (epoch 1): training loss {loss:.4f}, accuracy {accuracy:.2%}, validation loss {val_loss:.4f}, "
        f"accuracy {val_accuracy:.2%}, with test-time augmentation {tta:.2%}, "
    )


def test_held_out_validates_on_the_last_training_images_and_trains_on_the_rest(tiny, tmp_path, before):
    (images, labels), _ = load_tiny(None)
    trained, validated = [], []
    before(train, "train_step", lambda *given: trained.extend(given[4].tolist()))
    before(train, "evaluate", lambda *given: validated.extend(given[1:3]))
    assert tiny("--epochs", 1, "--held-out", 15).returncode == 0
    assert sorted(trained) == sorted(labels[:25].tolist())
    assert torch.equal(validated[0], images[25:]) and torch.equal(validated[1], labels[25:])
    assert (tmp_path / "experiments/baseline-lr0.001-none-epochs=1-held-out=15-seed0/metrics.csv").exists()


# ---------------------------------------------------------------------------------------------------------- settings
def test_every_setting_has_a_flag_and_is_in_name_config_and_events(tiny, tmp_path):
    flags = "--epochs 1 --lr 0.1 --widths 8,12 --optimizer muon --mirror --whiten --sizes 16:0.2,24:0.6 --nets 2 --tta"
    flags = (*flags.split(), "--label-smoothing", "0.1")
    assert tiny(*flags).returncode == 0
    folder = next((tmp_path / "experiments").glob("*/checkpoint.pt")).parent
    assert folder.name == (
        "baseline-lr0.1-none-epochs=1-widths=8,12-nets=2-sizes=16,0.2,24,0.6-whiten-mirror-optimizer=muon-label-smoothing=0.1-tta-seed0"
    )
    expected = {"widths": [8, 12], "nets": 2, "optimizer": "muon", "label_smoothing": 0.1}
    expected["sizes"] = {"16": 0.2, "24": 0.6}
    assert config(folder).items() >= expected.items()
    assert [net.head.weight.shape for net in train.load(folder).nets] == [(10, 12), (10, 12)]
    events = b"".join(path.read_bytes() for path in folder.glob("events.*"))
    assert b"label_smoothing" in events and b"16:0.2,24:0.6" in events
    assert "is finished" in tiny(*flags, "--resume").stdout  # what it holds was read the same


def test_a_flag_overrides_the_recipe_before_or_after_it():
    for flags in ("--lr 0.5 --recipe quick --no-mirror", "--no-mirror --recipe quick --lr 0.5"):
        settings = settings_of(*flags.split())
        assert (settings.lr, settings.mirror, settings.epochs) == (0.5, False, 0.38)


MISUSE = {  # flags: what the line says
    "--lr 0": "--lr: 0 must be from", "--lr nan": "--lr: nan must be from", "--lr 1e999": "--lr",
    "--lr much": "--lr: invalid float value: 'much'",
    "--epochs -1": "--epochs", "--epochs inf": "--epochs", "--batch-size 1": "--batch-size: 1 must be from 2 to 50,000",
    "--epochs 1e300": "--epochs: 1e300 must be from 1e-06 to 1,000,000", "--batch-size 1e3": "--batch-size",
    "--batch-size 2.5": "--batch-size", "--seed -1": "--seed",
    f"--seed {30 * '9'}": "--seed",
    "--held-out 49999": "--held-out: 49999 must be from 0 to 49,998", "--held-out .5": "--held-out",
    "--label-smoothing 1.5": "--label-smoothing", "--label-smoothing nan": "--label-smoothing: nan must be from 0 to 1",
    "--sizes 24:0.5,12:0.6": "--sizes: 12 must be from 16 to 64", "--sizes 24:nan": "--sizes: nan must be from 0 to 1",
    "--sizes 24:0.6,20:0.2": "--sizes: 24:0.6,20:0.2 must have each size once, and growing shares",
    "--sizes 16:0.2,24:0.5,16:0.7": "each size once", "--sizes 20": "--sizes", "--sizes 20:a": "--sizes",
    "--widths 8,8,8,8": "8,8,8,8 has more than 3 widths", "--widths 8,0": "--widths: 0 must be from 1",
    "--widths 8,x": "--widths: invalid widths value: '8,x'", "--widths=": "--widths", "--mirror maybe": "maybe",
    "--mirror": "needs --whiten", "--recipe quick --widths 8,6": "--widths divisible by 4",
    "--recipe quick --sizes 20:0.5": "--sizes divisible by 8", "--set tta=true": "--set",
    "--device cuda:1": "CUDA_VISIBLE_DEVICES=1", "--precision fp16": "--precision",
    "--augment sideways": "--augment", "--recipe cake": "--recipe", "--colour": "--colour",
    "--device abacus": "--device", "--device cuda": "cuda cannot be used (",
    "--name ../elsewhere": "--name", "--name ..\\elsewhere --resume": "--name", "--name=": "--name",
}  # fmt: skip


@pytest.mark.parametrize("flags, says", MISUSE.items(), ids=lambda text: text[:30])
def test_misuse_prints_one_line_and_creates_nothing(tiny, tmp_path, flags, says):
    outcome = tiny(*flags.split())
    assert says in complain(outcome, 2)
    assert len(outcome.stderr.strip().splitlines()) <= 2  # argparse's line of usage comes first
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("recipe", train.RECIPES)
def test_help_shows_each_flag_with_the_recipes_value(tiny, recipe):
    text = " ".join(tiny("--recipe", recipe, "--help").stdout.split())
    flags = set(re.findall(r" (--[a-z-]+)", text))
    settings = vars(settings_of("--recipe", recipe))
    assert flags >= {"--" + key.replace("_", "-") for key in settings}
    assert text.count("(default: ") == len(settings) - 1  # --resume is off unless it is given
    assert f"(default: {settings['lr']})" in text and f"(default: {settings['mirror']})" in text


# ----------------------------------------------------------------------------------------------- net, device, precision
def build(*flags):
    images = torch.randn(20, 3, 12, 12, generator=seeded())
    torch.manual_seed(3)
    return train.build(settings_of("--widths", "24,32,20", *flags), images)


def test_the_baseline_trains_a_random_net_with_adam():
    model, adam = build("--lr", "0.1")
    assert isinstance(adam, torch.optim.Adam) and adam.defaults["lr"] == 0.1
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.stem.weight.is_contiguous(memory_format=torch.channels_last)  # twice as fast on a CPU


def test_seed_changes_the_initial_weights(tiny, monkeypatch, before):
    builds = record(monkeypatch, "build")
    before(train, "train_step", raising(KeyboardInterrupt()))
    for seed in (0, 0, 1):
        assert tiny("--epochs", 1, "--seed", seed).returncode == 130
    weights, same, other = (net.groups[0][0].weight for _, (net, _) in builds)
    assert torch.equal(weights, same) and not torch.equal(weights, other)


def test_with_whiten_convolutions_start_as_the_identity():
    model, _ = build("--whiten")
    (first, second, third), x = (group[0] for group in model.groups), torch.randn(2, 24, 8, 8, generator=seeded())
    assert torch.equal(model.stem.weight[2::4], -model.stem.weight[::4])
    assert torch.equal(first(x), x)
    assert torch.equal(second(x)[:, :24], x) and second(x)[:, 24:].std() > 0.1  # the other filters stay random
    assert torch.equal(third(second(x)), second(x)[:, :20])


def test_with_muon_scales_are_frozen_statistics_fast_and_the_head_small():
    model, muon = build("--optimizer", "muon", "--whiten", "--lr", "0.1", "--batch-size", "20")
    norms = {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.BatchNorm2d)}
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert len(norms) == 6
    assert frozen == {"stem.weight", "stem.bias", "head.bias", *(f"{name}.weight" for name in norms)}
    assert all((layer.weight == 1).all() and layer.momentum == 0.2 for layer in norms.values())
    assert not model.head.bias.any()
    assert model.head.weight.std().item() == pytest.approx(1 / 20, rel=0.2)
    assert (muon.param_groups[0]["lr"], muon.batch_size, len(muon.state_dict()["velocities"])) == (0.1, 20, 13)


def fail_on_cuda(monkeypatch):
    """PyTorch sees a card of NVIDIA and cannot compute on it."""

    def make(*shape, device):
        if device == "cuda":
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nMore lines")
        if device == "mps":
            raise RuntimeError("no such device")
        return zeros(*shape)

    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", make)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_auto_device_warns_about_an_unsupported_gpu_and_uses_the_cpu(monkeypatch, capsys):
    fail_on_cuda(monkeypatch)
    assert train.find_device("auto") == "cpu"
    reason = "cuda cannot be used (CUDA error: no kernel image is available for execution on the device)"
    assert capsys.readouterr().out.splitlines() == [f"{reason}: continuing without it"]


def test_device_cuda_is_refused_on_an_unsupported_gpu(monkeypatch):
    fail_on_cuda(monkeypatch)
    with pytest.raises(train.UsageError, match=r"^cuda cannot be used .*no kernel image.*: try --device auto$"):
        train.find_device("cuda")


def test_auto_device_prints_nothing_on_a_machine_without_gpu(capsys):
    assert train.find_device("auto") == train.find_device("cpu") == "cpu"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("busy", [range(0), range(20, 45)])  # products during which the machine does something else
@pytest.mark.parametrize("bf16, expected", [(0.5, "bf16"), (0.9, "fp32"), (14, "fp32")])
def test_auto_precision_is_the_faster_one_despite_a_busy_moment(busy, bf16, expected, monkeypatch):
    products = []

    def time_product(statement, globals, number):
        dtype = globals["matrix"].dtype
        products.append(dtype)
        return {torch.float32: 1, torch.bfloat16: bf16}[dtype] * (30 if len(products) - 1 in busy else 1)

    monkeypatch.setattr(train.timeit, "timeit", time_product)
    assert train.choose_precision("cpu") == expected and len(products) > 20


# ------------------------------------------------------------------------------------------------- files and curves
def test_metrics_csv_has_a_row_per_epoch_with_means_over_all_images(finished):
    table = rows(finished)
    points = torch.load(finished / "checkpoint.pt", weights_only=True)["points"]
    training = [point for point in points if "train_loss" in point]
    assert ",".join(table[0]) == "epoch,step,train_seconds,train_loss,train_accuracy,val_loss,val_accuracy"
    assert [row["step"] for row in table] == ["3", "6", "9"]
    assert float(table[0]["train_seconds"]) < float(table[-1]["train_seconds"])
    for epoch, row in enumerate(table):
        assert all(math.isfinite(float(value)) for value in row.values())
        # 40 training images and 20 to validate on: every accuracy is a whole number of them
        for part, count in (("train", 40), ("val", 20)):
            right = float(row[f"{part}_accuracy"]) * count
            assert right == pytest.approx(round(right)) and 0 <= right <= count
        for metric in ("train_loss", "train_accuracy"):  # the mean over the epoch's points
            parts = zip((16, 16, 8), training[3 * epoch : 3 * epoch + 3], strict=True)
            assert sum(size * point[metric] for size, point in parts) / 40 == pytest.approx(float(row[metric]))


def test_tensorboard_events_have_every_point_and_validation(finished):
    points = torch.load(finished / "checkpoint.pt", weights_only=True)["points"]
    training = [point for point in points if "train_loss" in point]
    logged = [("learning_rate/train", step, 1e-3) for step in range(1, 10)]
    for metric, (part, measured) in itertools.product(
        ("accuracy", "loss"), {"train": training, "val": rows(finished)}.items()
    ):
        logged += [(f"{metric}/{part}", int(row["step"]), float(row[f"{part}_{metric}"])) for row in measured]
    assert scalars(finished) == [pytest.approx(one) for one in sorted(logged)]


def test_config_json_has_the_command_that_repeats_the_run(finished):
    expected = {"recipe": "baseline", "lr": 1e-3, "epochs": 3, "batch_size": 16, "augment": "none", "seed": 0}
    expected |= {"command": "python train.py --lr 1e-3 --epochs 3", "threads": 1, "precision": "fp32"}
    assert expected.items() <= config(finished).items()
    assert config(finished)["versions"]["torch"] == torch.__version__


def test_tensorboard_shows_points_before_the_first_epoch_ends(tiny, tmp_path, before):
    seen = []
    before(train, "train_step", lambda *_: seen.append(len(scalars(tmp_path / "experiments/run"))), [2])
    assert tiny("--epochs", 1, "--name", "run").returncode == 0
    assert seen == [3]  # loss, accuracy and rate of the first step


def draw(runs):
    """The matplotlib figure of these runs, laid out."""
    figure = train.draw_curves(runs)
    figure.draw_without_rendering()
    return figure


def curves(epochs):
    points, ends = [i / 20 for i in range(1, round(20 * epochs) + 1)], [*range(1, math.ceil(epochs)), epochs]
    training = {f"train_{metric}": (points, [1 / (1 + point) for point in points]) for metric in train.METRICS}
    return training | {f"val_{metric}": (ends, [0.4] * len(ends)) for metric in train.METRICS}


@pytest.mark.parametrize("epochs", [0.6, 7])
def test_curves_png_shows_points_within_epochs_and_ticks_at_whole_epochs(epochs):
    run = curves(epochs)
    for panel, metric in zip(draw({"run": run}).axes, train.METRICS, strict=True):
        training, validation = panel.get_lines()
        assert ([*training.get_xdata()], [*training.get_ydata()]) == run[f"train_{metric}"]
        assert ([*validation.get_xdata()], [*validation.get_ydata()]) == run[f"val_{metric}"]
        low, high = panel.get_xlim()
        ticks = [tick for tick in panel.get_xticks() if low <= tick <= high]
        assert len(ticks) >= 2 and all(tick == int(tick) for tick in ticks)


def test_curves_png_gives_35_runs_different_styles():
    figure = draw({f"run {number}": curves(1) for number in range(35)})
    for lines in (figure.axes[0].get_lines()[::2], figure.axes[0].get_lines()[1::2]):
        looks = {(line.get_color(), line.get_marker()) for line in lines}
        assert len(looks) == 35 and len({color for color, _ in looks}) == 7


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("name", ["W" * 20, "W" * 255, "実" * 80], ids=["20", "255", "80"])
def test_curves_png_has_room_for_long_names(name):
    figure = draw({name + ending: curves(1) for ending in "ab"})
    legend = figure.legends[0].get_window_extent()
    assert legend.x0 >= 0 and legend.x1 <= figure.bbox.x1
    first, second = (text.get_text() for text in figure.legends[0].get_texts())
    assert first != second and first.startswith(" " + name[:28])


def test_curves_png_shows_runs_of_any_name(finished, copy, tiny, tmp_path):
    for name in ("$_$", "_b"):  # for matplotlib, a formula and a hidden label
        copy(name=name)
    runs = train.read_curves(tmp_path / "experiments")
    assert list(runs) == ["$_$", "_b"]
    expected = [float(row["val_loss"]) for row in rows(finished)]
    assert runs["_b"]["val_loss"] == ([1, 2, 3], pytest.approx(expected))
    outcome = tiny("--epochs", 1)
    assert outcome.returncode == 0 and outcome.stderr == ""


def test_curves_png_shows_runs_of_an_older_format(copy, tmp_path):
    def make_old(saved):
        saved["format"] = 5
        saved["points"] = [point for point in saved["points"] if "train_loss" in point]  # validation was in the rows

    copy(make_old)
    runs = train.read_curves(tmp_path / "experiments")
    assert [len(values) for _, values in runs["run"].values()] == [9, 3, 9, 3]


@pytest.mark.parametrize("change", [
    lambda saved: saved.clear(),  # of another program
    lambda saved: saved.pop("rows"),
    lambda saved: saved["rows"].clear(),
    lambda saved: saved.update(points=[3]),
])  # fmt: skip
def test_curves_png_warning_names_a_checkpoint_it_leaves_out(copy, tiny, tmp_path, change):
    copy(change, name="foreign")
    outcome = tiny("--epochs", 1, "--name", "run")
    assert outcome.returncode == 0
    assert outcome.stderr.startswith("train.py: curves.png leaves out experiments/foreign (")
    assert (tmp_path / "experiments/curves.png").exists()


def test_same_seed_gives_the_same_bits_and_another_seed_different_ones(finished, tiny, tmp_path):
    for seed in (0, 1):
        assert tiny("--lr", "1e-3", "--epochs", 3, "--seed", seed, "--name", seed).returncode == 0
    assert agree(finished, tmp_path / "experiments/0")
    assert not agree(finished, tmp_path / "experiments/1")


def test_repeating_a_command_makes_a_folder_with_the_next_number(tiny, tmp_path):
    for _ in range(3):
        assert tiny("--epochs", 1).returncode == 0
    first, second, third = sorted(path.parent for path in tmp_path.glob("experiments/*/metrics.csv"))
    assert (second.name, third.name) == (f"{first.name}-2", f"{first.name}-3")


def test_a_new_folder_gets_the_highest_number_even_if_a_lower_one_is_free(copy, tiny, tmp_path):
    name = "baseline-lr0.001-none-epochs=1-seed0"
    copy(name=f"{name}-3")
    assert tiny("--epochs", 1).returncode == 0
    assert (tmp_path / f"experiments/{name}-4").exists()


@pytest.mark.parametrize("call, error, calls, patience, written", [
    ("fsync", errno.ENOSPC, [1], 0, b"old"),
    ("fsync", errno.EINVAL, [1], 0, b"new"),  # a file system that cannot
    ("replace", errno.EACCES, [1, 2], 0, b"old"),  # Windows, while another program has the file open
    ("replace", errno.EACCES, [1, 2], 60, b"new"),
])  # fmt: skip
def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch, before, call, error, calls, patience, written):
    data.write_file(path := tmp_path / "file", b"old")
    before(os, call, raising(OSError(error, os.strerror(error))), calls)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    fails = pytest.raises(OSError, match=f"{os.strerror(error)}.*file")
    with fails if written == b"old" else contextlib.nullcontext():
        data.write_file(path, b"new", patience)
    assert path.read_bytes() == written and list(tmp_path.iterdir()) == [path]


def list_complaints(outcome):
    assert outcome.returncode == 0 and "finished" in outcome.stdout
    return [line.split(" (")[0] for line in outcome.stderr.strip().splitlines()]


@pytest.mark.parametrize("name", ["metrics.csv", "config.json"])
def test_an_unwritable_table_warns_and_is_written_later(finished, tiny, tmp_path, before, name):
    folder = tmp_path / "experiments/run"
    (folder / name).mkdir(parents=True)
    before(train, "evaluate", lambda *_: (folder / name).rmdir(), [2])
    outcome = tiny("--epochs", 3, "--name", "run", "--resume")
    # at the start and after the first epoch
    assert list_complaints(outcome) == 2 * [f"train.py: cannot write experiments/run/{name}"]
    assert rows(folder)[-1]["val_loss"] == rows(finished)[-1]["val_loss"] and config(folder)["epochs"] == 3


@unix
def test_events_on_a_full_disk_warn_once_per_epoch_and_are_written_later(finished, tiny, tmp_path, monkeypatch, before):
    # what is written waits in memory until it is flushed, and then the disk is full
    place, open_file = tensorboardX.record_writer, tensorboardX.record_writer.open_file
    monkeypatch.setattr(place, "open_file", lambda path: open("/dev/full", "wb"))  # noqa: SIM115
    before(train, "evaluate", lambda *_: monkeypatch.setattr(place, "open_file", open_file), [2])
    outcome = tiny("--epochs", 3, "--name", "run")
    assert list_complaints(outcome) == 2 * ["train.py: cannot write experiments/run/events"]
    assert scalars(finished) == scalars(tmp_path / "experiments/run")


def break_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


def use_latex(monkeypatch):
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)
    monkeypatch.setenv("PATH", "")


@pytest.mark.parametrize("accident", [break_matplotlib, use_latex])
def test_training_survives_a_failure_to_draw_curves_png(tmp_path, monkeypatch, accident):
    tiny = make_tiny(monkeypatch, tmp_path, draw=True)
    accident(monkeypatch)
    assert list_complaints(tiny("--epochs", 1)) == ["train.py: cannot write experiments/curves.png"]


def test_load_returns_the_trained_net_in_evaluation_mode(finished):
    model = train.load(finished)
    assert not model.training and {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    result, last = train.evaluate(model, *load_tiny(None)[1], "fp32"), rows(finished)[-1]
    assert result["val_accuracy"] == float(last["val_accuracy"])
    assert result["val_loss"] == pytest.approx(float(last["val_loss"]), rel=0.02)


def test_readmes_snippet_classifies_a_picture(finished, tmp_path, monkeypatch, capsys):
    readme = (SCRIPT.parent / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    (folder,) = re.findall(r'train\.load\("(.*?)"\)', code)
    (picture,) = re.findall(r'read\("(.*?)"\)', code)
    shutil.copytree(finished, tmp_path / folder)
    with Image.open(SCRIPT.parent / "Lenna.png") as lenna:  # wide, with bars of noise that the middle square cuts off
        wide = Image.effect_noise((1024, 512), 200).convert("RGB")
        wide.paste(lenna, (256, 0))
    wide.convert("RGB").save(tmp_path / picture, "PNG")
    monkeypatch.chdir(tmp_path)
    exec(code, names := {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(line.split()[0].endswith("%") and line.split()[1] in data.CLASSES for line in lines)
    lenna = data.to_float(visualize_aug.read(SCRIPT.parent / "Lenna.png"))
    expected = train.load(folder)(data.normalize(data.resize(lenna, 32)))
    torch.testing.assert_close(names["logits"], expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------- TensorBoard
class TensorBoard:
    """A TensorBoard server over a folder of runs, asked for the curves of one, until `stack` is left."""

    def __init__(self, experiments, fast, stack):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", experiments, "--port", str(port)]
        command += [f"--load_fast={fast}", "--reload_interval=1"]
        stack.callback(subprocess.Popen(command, stderr=subprocess.DEVNULL).kill)
        self.address = f"http://127.0.0.1:{port}/data/plugin/"

    def ask(self, query, posted=None):
        body = json.dumps(posted).encode() if posted else None
        request = urllib.request.Request(self.address + query, body, {"Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(request, timeout=30))

    def wait_for(self, run, step):
        """[(tag, step, value, wall time)] of a run once the last step of loss/val is this one."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, IndexError):  # before it has started, and before it has read
                if self.ask(f"scalars/scalars?run={run}&tag=loss/val")[-1][1] == step:
                    tags = self.ask("scalars/tags")[run]
                    shown = {tag: self.ask(f"scalars/scalars?run={run}&tag={tag}") for tag in tags}
                    return sorted((tag, *point[1:], point[0]) for tag in shown for point in shown[tag])
            threading.Event().wait(0.1)
        raise TimeoutError(f"TensorBoard does not show step {step}")


def test_tensorboard_left_open_shows_a_run_stopped_and_resumed(finished, tiny, tmp_path, before):
    folder, flags = tmp_path / "experiments/run", ("--epochs", 3, "--name", "run")
    before(train, "train_step", raising(KeyboardInterrupt()), [9])  # the third epoch's points will be logged again
    assert tiny(*flags).returncode == 130
    assert ("loss/train", 8) in [point[:2] for point in scalars(folder)]
    (first,) = folder.glob("events.*")
    first.write_bytes(first.read_bytes()[:-3])  # the writer was killed in the middle of a record
    with contextlib.ExitStack() as stack:
        both = [TensorBoard(tmp_path / "experiments", fast, stack) for fast in ("auto", "false")]
        earlier = [point for point in both[0].wait_for("run", 6) if point[1] <= 6]
        both[1].wait_for("run", 6)
        assert tiny(*flags, "--resume").returncode == 0
        both += [TensorBoard(tmp_path / "experiments", fast, stack) for fast in ("auto", "false")]
        for board in both:
            shown = board.wait_for("run", 9)
            assert [point[:3] for point in shown] == [pytest.approx(point) for point in scalars(finished)]
            assert [point for point in shown if point[1] <= 6] == earlier  # at the time at which it was measured
        assert first.exists()
        asked = {"allowedStatuses": ["STATUS_SUCCESS"], "startIndex": 0, "sliceSize": 10}
        (run,) = board.ask("hparams/session_groups", asked)["sessionGroups"]
        assert run["hparams"].items() >= {"lr": 1e-3, "recipe": "baseline", "seed": 0, "widths": "8,8,8"}.items()
        final = {metric["name"]["tag"]: metric["value"] for metric in run["metricValues"]}
        for metric in train.METRICS:
            assert final[f"{metric}/val"] == pytest.approx(float(rows(folder)[-1][f"val_{metric}"]))


# ----------------------------------------------------------------------------------------------- stopping, resuming
def run_and_die(tiny, cwd, *flags, kill_at):
    """Run train.py in a process of its own that kills itself at its boundary number `kill_at`; the number it reached.

    Boundaries are: before and after each file is written, before a written file takes its place, before each step of
    training, and before each write of events.
    """
    count = multiprocessing.get_context("fork").Value("i", 0)
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        return count.value

    def pass_boundary():
        count.value += 1
        if count.value == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(place, name, after=False):
        function = getattr(place, name)

        def call(*arguments, **options):
            pass_boundary()
            result = function(*arguments, **options)
            if after:
                pass_boundary()
            return result

        setattr(place, name, call)

    train.tqdm.set_lock(threading.RLock())  # the shared one would stay locked if a killed process held it
    wrap(data, "write_file", after=True)
    wrap(os, "replace")
    wrap(train, "train_step")
    wrap(train.Events, "write")
    tiny(*flags, cwd=cwd)
    os._exit(0)


@unix
@pytest.mark.parametrize("recipe", ["baseline", "quick"])
@pytest.mark.usefixtures("finished")  # so that all is imported before processes are forked
def test_a_killed_run_resumes_bit_for_bit(tiny, tmp_path, recipe):
    nets = 2 if recipe == "baseline" else 1
    flags = ("--recipe", recipe, "--augment", "both", "--nets", nets, "--epochs", 1.4, "--name", "run", "--resume")
    whole = tmp_path / "whole"
    whole.mkdir()
    boundaries = run_and_die(tiny, whole, *flags, kill_at=0)
    assert boundaries > 30
    for kill_at in range(1, boundaries + 1, 1 if recipe == "quick" else 5):
        cwd = tmp_path / str(kill_at)
        cwd.mkdir()
        assert run_and_die(tiny, cwd, *flags, kill_at=kill_at) == kill_at
        if kill_at % 3 == 0:
            run_and_die(tiny, cwd, *flags, kill_at=kill_at // 2)  # some are killed again
        assert tiny(*flags, cwd=cwd).returncode == 0
        assert agree(whole / "experiments/run", cwd / "experiments/run")
        assert scalars(whole / "experiments/run") == scalars(cwd / "experiments/run")  # no point twice, none missing
        assert sorted(path.name for path in (cwd / "experiments").iterdir()) == ["curves.png", "run"]


def test_resume_starts_a_run_without_checkpoint_from_scratch(tiny, before):
    before(train, "train_step", raising(KeyboardInterrupt()), [2])  # a folder, and nothing to go on with
    assert tiny("--epochs", 1).returncode == 130
    outcome = tiny("--epochs", 1, "--resume")
    assert outcome.returncode == 0 and "seed0 on cpu, 1 threads, fp32: starts" in outcome.stdout


def test_resume_continues_after_the_last_finished_epoch(finished, tiny, tmp_path, before):
    flags = ("--epochs", 3, "--name", "run", "--resume")
    before(train, "train_step", raising(KeyboardInterrupt()), [5])
    assert tiny(*flags).returncode == 130
    outcome = tiny(*flags)
    assert outcome.returncode == 0 and "continues after step 3 of 9" in outcome.stdout.splitlines()[0]
    assert agree(finished, tmp_path / "experiments/run")


def test_event_files_stay_in_order_when_the_clock_goes_back(tiny, tmp_path, monkeypatch, before):
    before(train, "train_step", raising(KeyboardInterrupt()), [5])
    assert tiny("--epochs", 2, "--name", "run").returncode == 130
    (first,) = tmp_path.glob("experiments/run/events.*")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 86_400)
    assert tiny("--epochs", 2, "--name", "run", "--resume").returncode == 0
    files = sorted(tmp_path.glob("experiments/run/events.*"))
    assert len(files) == 2 and files[0] == first  # TensorBoard reads them in this order


def test_resume_leaves_a_finished_run_unchanged(copy, tiny):
    folder = copy()
    before = (folder / "checkpoint.pt").read_bytes()
    outcome = tiny("--name", "run", "--resume")
    assert outcome.returncode == 0 and "is finished" in outcome.stdout.splitlines()[0]
    assert (folder / "checkpoint.pt").read_bytes() == before


def test_temporary_files_of_killed_runs_are_removed(copy, tiny):
    folder = copy()
    for path in (folder / "checkpoint.pt.1-1.part", folder.parent / "curves.png.1-1.part"):
        path.touch()
    assert tiny("--name", "run", "--resume").returncode == 0
    assert not [*folder.parent.rglob("*.part")]


@pytest.mark.parametrize("flags", ["--batch-size 8 --epochs 1", "--epochs 1", "--held-out 10", "--precision fp32"])
def test_resume_never_continues_a_run_with_different_settings(tiny, tmp_path, flags):
    assert tiny(*flags.split()).returncode == 0
    outcome = tiny("--resume")
    assert "starts" in outcome.stdout and len([*tmp_path.glob("experiments/*/metrics.csv")]) == 2


def test_resume_continues_the_highest_number_whatever_the_dates(finished, copy, tiny):
    name = "baseline-lr0.001-none-epochs=3-seed0"
    for date, ending in enumerate(("-2", "-10", "")):
        os.utime(copy(name=name + ending) / "checkpoint.pt", (date, date))
    assert f"{name}-10 on" in tiny("--epochs", 3, "--resume").stdout


def test_resume_prefers_the_newest_run_even_without_a_checkpoint(tiny, before):
    assert tiny("--epochs", 1).returncode == 0
    before(train, "train_step", raising(KeyboardInterrupt()), [2])
    assert tiny("--epochs", 1).returncode == 130
    outcome = tiny("--epochs", 1, "--resume")
    assert "seed0-2 on cpu" in outcome.stdout and "starts" in outcome.stdout


def test_resume_skips_a_folder_it_cannot_write_to(copy, tiny, monkeypatch):
    name = "baseline-lr0.001-none-epochs=1-seed0"
    mates = copy(name=f"{name}-2")
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != mates.name)
    assert f"{name}-3 on" in tiny("--epochs", 1, "--resume").stdout


def test_ctrl_c_prints_the_command_that_resumes_this_run(tiny, tmp_path, before):
    assert tiny("--epochs", 1).returncode == 0
    before(train, "train_step", raising(KeyboardInterrupt()), [2])
    command = shlex.split(complain(tiny("--epochs", 1), 130))
    assert command[:2] == ["python", "train.py"] and command[-2].endswith("seed0-2") and command[-1] == "--resume"
    assert "seed0-2 on cpu" in tiny(*command[2:]).stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_sigint_and_sigterm_exit_with_130(tiny, before, monkeypatch, number):
    before(train, "evaluate", lambda *_: signal.raise_signal(number))
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert tiny().returncode == 130
    assert signal.getsignal(number) == signal.SIG_DFL  # a second one ends it at once
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
        signal.signal(number, handler)


@unix
def test_ctrl_c_during_import_shows_no_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    outcome = subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True)
    assert outcome.returncode == -signal.SIGINT and outcome.stderr == ""


def test_resuming_with_more_epochs_equals_a_longer_run(copy, tiny, before):
    whole = (folder := copy()).with_name("whole")
    assert tiny("--epochs", 5, "--name", "whole").returncode == 0
    before(train, "train_step", raising(KeyboardInterrupt()), [4])  # in the fifth epoch
    assert tiny("--name", "run", "--resume", "--epochs", 5).returncode == 130
    outcome = tiny("--name", "run", "--resume")  # it is one of five epochs now
    assert outcome.returncode == 0 and "continues after step 12 of 15" in outcome.stdout
    assert agree(whole, folder) and scalars(whole) == scalars(folder)
    first, further = config(folder)["command"].split(" && ")
    assert config(folder)["epochs"] == 5 and first.endswith("--epochs 3") and further.endswith("--resume --epochs 5")


# ------------------------------------------------------------------------------------------------------------ errors
@pytest.mark.parametrize("problem", [
    MemoryError(), torch.cuda.OutOfMemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
])  # fmt: skip
def test_running_out_of_memory_prints_what_helps(tiny, before, problem):
    before(train, "evaluate", raising(problem))
    assert "out of memory" in (line := complain(tiny(), 1)) and "--widths" in line


def test_a_name_claimed_by_another_run_meanwhile_is_refused(copy, tiny, tmp_path, before):
    files = {}
    before(data, "load_cifar10", lambda root: copy() and files.update(list_files(tmp_path)))
    line = complain(tiny("--name", "run"), 2)
    assert "experiments/run is there already" in line and "--name" in line and "--resume" in line
    assert list_files(tmp_path) == files


def test_resume_refuses_a_run_that_is_still_running(copy, tiny, tmp_path):
    folder = copy()
    before = list_files(tmp_path)
    with FileLock(folder / ".lock"):
        assert "in use" in (line := complain(tiny("--name", "run", "--resume"), 2)) and "wait" in line
    assert list_files(tmp_path) == before
    assert tiny("--name", "run", "--resume").returncode == 0


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_training_works_on_a_file_system_without_locks(tiny, monkeypatch, code):
    def refuse(lock, timeout):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(FileLock, "acquire", refuse)
    outcome = tiny("--epochs", 1)
    assert outcome.returncode == 0 and "cannot be locked" in outcome.stdout


CONTRADICTIONS = {  # flags: the stored and the given value that the line names
    "--lr 0.5": "--lr=0.001, not --lr=0.5",
    "--recipe quick": "--recipe=baseline, not --recipe=quick",
    "--tta": "--no-tta, not --tta",
    "--widths 8,8": "--widths=8,8,8, not --widths=8,8",
    "--sizes 24:0.5": "--sizes=, not --sizes=24:0.5",
    "--seed 1": "--seed=0, not --seed=1",
    "--epochs 2": "--epochs=3, not --epochs=2",
    "--precision bf16": "--precision=fp32, not --precision=bf16",
}


@pytest.mark.parametrize("flags, says", CONTRADICTIONS.items())
def test_resume_refuses_a_conflicting_flag_and_shows_both_values(copy, tiny, tmp_path, flags, says):
    copy()
    before = list_files(tmp_path)
    line = complain(tiny("--name", "run", "--resume", *flags.split()), 2)
    assert f"experiments/run was started with {says}" in line
    assert "continue it with --name=run and without that flag" in line
    assert list_files(tmp_path) == before


def test_resume_refuses_a_run_whose_recipe_has_changed(tiny, tmp_path, monkeypatch):
    assert tiny("--epochs", 1).returncode == 0
    monkeypatch.setitem(train.BASELINE, "label_smoothing", (0.3, ""))
    before = list_files(tmp_path)
    line = complain(tiny("--epochs", 1, "--resume"), 2)
    assert "started with --label-smoothing=0, not --label-smoothing=0.3" in line
    assert list_files(tmp_path) == before
    name = re.search("--name=[^ ]+", line)[0]
    assert tiny(name, "--resume").returncode == 0  # as it was


def test_resume_gives_settings_missing_in_old_runs_their_default(copy, tiny):
    copy(lambda saved: saved["settings"].pop("tta"))
    assert "is finished" in tiny("--name", "run", "--resume").stdout


def test_more_epochs_continue_after_test_time_augmentation(tiny, tmp_path):
    assert tiny("--epochs", 1, "--tta", "--name", "run").returncode == 0
    assert tiny("--epochs", 3, "--name", "run", "--resume").returncode == 0
    assert [row["val_accuracy_tta"] != "" for row in rows(tmp_path / "experiments/run")] == [True, False, True]


@pytest.mark.parametrize("change", [
    lambda saved: saved["settings"].update(optimizer="muon"),
    lambda saved: saved["settings"].update(sizes={24: 0.5}),  # when its images grow depends on the epochs
    lambda saved: saved["rows"][-1].update(epoch=2.5),  # from the middle of an epoch it cannot go on
])  # fmt: skip
def test_more_epochs_are_refused_if_the_schedule_depends_on_them(copy, tiny, tmp_path, change):
    copy(change)
    before = list_files(tmp_path)
    assert "--epochs=3, not --epochs=4" in complain(tiny("--name", "run", "--resume", "--epochs", 4), 2)
    assert list_files(tmp_path) == before


@pytest.mark.parametrize("change, says", [
    (lambda saved: saved["settings"].update(device="cuda"), "try --device auto"),
    (lambda saved: saved["model"].update({"nets.0.head.bias": torch.zeros(11)}), "does not fit this net and optimizer"),
    (lambda saved: saved["optimizers"].clear(), "does not fit this net and optimizer"),
    (lambda saved: saved.update(generator=torch.zeros(3, dtype=torch.uint8)), "does not fit this net and optimizer"),
    (lambda saved: saved.update(format=1), "saved by another version of this code (format 1"),
    (lambda saved: saved.clear(), "is damaged, or no checkpoint"),
])  # fmt: skip
def test_a_checkpoint_of_another_net_is_refused_with_the_reason(copy, tiny, tmp_path, change, says):
    copy(change)
    before = list_files(tmp_path)
    assert says in complain(tiny("--name", "run", "--resume"), 2)
    assert list_files(tmp_path) == before


def test_a_checkpoint_without_read_permission_is_not_called_damaged(copy, tiny, before):
    copy()
    before(Path, "read_bytes", raising(PermissionError(13, "Permission denied", "checkpoint.pt")))
    line = complain(tiny("--name", "run", "--resume"), 1)
    assert "Permission denied: checkpoint.pt" in line and "damaged" not in line


@pytest.mark.parametrize("problem", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_checkpoint_too_large_for_memory_is_not_called_damaged(copy, tiny, before, problem):
    copy()
    before(torch, "load", raising(problem))
    line = complain(tiny("--name", "run", "--resume"), 1)
    assert "out of memory" in line and "damaged" not in line


def test_an_error_in_the_net_is_not_blamed_on_the_checkpoint(copy, tiny, before):
    copy()
    before(train.Ensemble, "load_state_dict", raising(TypeError("mine")))
    with pytest.raises(TypeError, match="mine"):
        tiny("--name", "run", "--resume")


@pytest.mark.parametrize("share", [0, 0.5, None])
def test_resume_and_load_refuse_a_damaged_checkpoint(copy, tiny, share):
    raw = (path := copy() / "checkpoint.pt").read_bytes()
    path.write_bytes(b"not a checkpoint" if share is None else raw[: int(share * len(raw))])
    assert "checkpoint.pt is damaged" in complain(tiny("--name", "run", "--resume"), 2)
    with pytest.raises(train.UsageError, match=r"checkpoint\.pt is damaged"):
        train.load(path.parent)


def test_load_treats_an_unknown_tilde_user_as_a_folder():
    with pytest.raises(train.UsageError, match=r"no run at .*nobody-here"):
        train.load("~nobody-here/run")


def test_load_error_names_the_folder_without_a_run(tmp_path):
    with pytest.raises(train.UsageError, match=r"^no run at .*nowhere"):
        train.load(tmp_path / "nowhere")


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_a_checkpoint_with_code_is_refused_and_never_runs_it(copy, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    folder = copy(lambda saved: saved.update(extra=Malicious()))
    with pytest.raises(train.UsageError):
        train.load(folder)
    assert train.read_curves(folder.parent) == {} and not Path("executed").exists()


@pytest.mark.parametrize(
    "device, flag, precision", [("cpu", "", "bf16"), ("cpu", "--device auto", "bf16"), ("cuda", "--device cpu", "fp32")]
)
def test_a_resumed_run_keeps_its_precision_unless_the_device_changes(finished, copy, tiny, device, flag, precision):
    folder = copy(lambda saved: saved["settings"].update(device=device, precision="bf16"))
    assert f" {precision}:" in tiny("--name", "run", "--resume", "--epochs", 4, *flag.split()).stdout
    expected = config(finished) | {"precision": precision, "epochs": 4, "command": config(folder)["command"]}
    assert config(folder) == expected and len(rows(folder)) == 4


@pytest.mark.parametrize("flag, precision", [("fp32", "fp32"), ("bf16", "bf16")])
def test_precision_flag_overrides_auto(tiny, tmp_path, before, flag, precision):
    seen = set()
    before(train, "train_step", lambda *given: seen.add(given[-1]))
    before(train, "evaluate", lambda *given: seen.add(given[3]))
    assert tiny("--epochs", 1, "--precision", flag).returncode == 0
    assert seen == {precision}


@unix
@pytest.mark.parametrize("kilobytes", [0, 1, 60])
def test_a_full_disk_prints_a_line_and_resume_continues_later(finished, tiny, tmp_path, kilobytes):
    import resource

    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, before[1]))  # no file may grow beyond that
    try:
        outcome = tiny("--epochs", 3, "--name", "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    line = complain(outcome, 1)
    assert "File too large: experiments/run/checkpoint.pt" in line and "--resume" in line
    folder = tmp_path / "experiments/run"
    assert not list(folder.glob("*.part")) and not (folder / "checkpoint.pt").exists()
    assert tiny("--epochs", 3, "--name", "run", "--resume").returncode == 0
    assert agree(finished, folder) and scalars(finished) == scalars(folder)


def test_a_nan_loss_is_not_saved_and_unlocks_the_folder(tmp_path, monkeypatch, capsys):
    make_tiny(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--lr", "1e30", "--name", "run"])
    with pytest.raises(SystemExit) as kept:  # as a notebook keeps it, and with it all that the call has held
        train.main()
    assert kept.value.code == 1
    assert re.search(r"loss is (nan|inf) at step \d+: .*--lr", capsys.readouterr().err)
    assert not (tmp_path / "experiments/run/checkpoint.pt").exists()
    FileLock(tmp_path / "experiments/run/.lock").acquire(timeout=0)


def test_a_net_broken_by_the_last_step_of_an_epoch_is_not_saved(copy, tiny, monkeypatch):
    before = (path := copy() / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(train, "evaluate", lambda *arguments: {"val_loss": math.nan, "val_accuracy": 0.1})
    line = complain(tiny("--name", "run", "--resume", "--epochs", 4), 1)
    assert "validation loss is not finite" in line and "--lr" in line
    assert path.read_bytes() == before


@unix
def test_a_dangling_link_as_experiments_folder_prints_a_line(tiny, tmp_path):
    (tmp_path / "experiments").symlink_to(tmp_path / "unmounted")
    assert "File exists: experiments" in complain(tiny("--resume"), 1)


def test_error_names_a_folder_that_cannot_be_created(tiny, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert "file" in complain(tiny("--experiments", "file"), 1)


def test_experiments_may_start_with_a_tilde_and_names_have_spaces_and_dots(tiny, tmp_path, monkeypatch):
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path / "home"))
    for name in ("my 1st run", "..dots", "-minus"):
        assert tiny(f"--name={name}", "--epochs", 1, "--experiments=~/runs").returncode == 0
        assert len(rows(tmp_path / "home/runs" / name)) == 1 and train.load(f"~/runs/{name}")
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def run_process(cwd, *flags, **variables):
    """train.py on the tiny set in a process of its own, without standard error."""
    code = "import os, sys; os.name == 'nt' or os.close(2); sys.stderr = None; import conftest, pytest, train; "
    code += "conftest.make_tiny(pytest.MonkeyPatch(), draw=True); train.main()"
    variables["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parent), str(SCRIPT.parent / "tests")])
    command = [sys.executable, "-c", code, *flags]
    return subprocess.run(command, cwd=cwd, env=os.environ | variables, stdout=subprocess.PIPE)


@pytest.mark.parametrize("variables", [
    {"MPLBACKEND": "nonsense", "PYTHONIOENCODING": "ascii"},  # as a notebook and an old terminal hand them on
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},  # the name is not even text to Python
])  # fmt: skip
def test_training_works_in_an_odd_environment_with_a_japanese_name(tmp_path, variables):
    outcome = run_process(tmp_path, "--name", "実験", "--epochs", "1", **variables)
    assert outcome.returncode == 0
    assert b"run experiments/??" in outcome.stdout.replace(b"\\", b"/")
    assert len(rows(tmp_path / "experiments/実験")) == 1
    with Image.open(tmp_path / "experiments/curves.png") as picture:
        assert min(picture.size) > 400


# --------------------------------------------------------------------------------------------------- several at once
@pytest.fixture
def turns(monkeypatch, tmp_path):
    """Runs take turns, as on a user's machine, with locks in `tmp_path`."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return SimpleNamespace(device="cpu")


def is_locked(path):
    try:
        FileLock(path).acquire(timeout=0).lock.release()
    except filelock.Timeout:
        return True
    return False


def test_runs_on_one_cpu_take_turns_by_the_epoch(turns, tmp_path):
    order = []

    def run():
        with train.take_turn(turns):
            order.append("other")

    with ThreadPoolExecutor(1) as pool:
        with train.take_turn(turns):
            other = pool.submit(run)
            while not is_locked(next(tmp_path.iterdir()) / "queue"):  # until it is the next
                pass
            order.append("one")
        with train.take_turn(turns):
            order.append("one")
        other.result()
    assert order == ["one", "other", "one"]


def test_a_waiting_run_names_the_process_that_trains(turns, capsys, monkeypatch):
    acquire = FileLock.acquire
    monkeypatch.setattr(FileLock, "acquire", lambda lock, timeout=-1: acquire(lock, timeout if timeout < 0 else 0.1))
    done = threading.Event()

    def wait():
        with train.take_turn(turns):
            done.set()

    with ThreadPoolExecutor(1) as pool:
        with train.take_turn(turns):
            waiter = pool.submit(wait)
            while not (line := capsys.readouterr().out):
                assert not done.wait(0.1)
        waiter.result()
    assert f"waiting for process {os.getpid()}" in line and "OMP_NUM_THREADS" in line


@pytest.mark.parametrize("device, threads", [("cuda", None), ("cpu", "1")])
def test_runs_on_a_gpu_or_with_omp_num_threads_take_no_turns(turns, monkeypatch, device, threads):
    if threads:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    with train.take_turn(SimpleNamespace(device=device)), train.take_turn(SimpleNamespace(device=device)):
        assert not Path(tempfile.tempdir, "train.py-0").exists()


def test_runs_take_no_turns_if_locks_cannot_be_created(turns, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with train.take_turn(turns), train.take_turn(turns):
        pass


@pytest.mark.parametrize("name", ["train.py", "bn.py", "visualize_aug.py"])
def test_an_old_python_prints_the_version_it_needs(monkeypatch, name):
    ast.parse((SCRIPT.parent / name).read_text(encoding="utf-8"), feature_version=(3, 8))  # so far it gets, at least
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    monkeypatch.setattr(sys, "version", "3.9.1 (main)")
    with pytest.raises(SystemExit, match=f"^{name} needs Python 3.10 or newer, this is 3.9.1$"):
        runpy.run_path(str(SCRIPT.parent / name))


def test_a_notebook_keeps_its_signal_handlers(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython", sys)
    monkeypatch.setattr(signal, "signal", lambda *given: pytest.fail("a handler was replaced"))
    assert tiny("--epochs", 1).returncode == 0


def test_a_notebook_sees_progress(tiny, monkeypatch):  # and a log does not: of the finished run, stderr is empty
    monkeypatch.setitem(sys.modules, "IPython", sys)
    assert "0/3 [" in tiny("--epochs", 1).stderr


# --------------------------------------------------------------------------------------------------------- real data
@pytest.mark.real_data
def test_quick_recipe_gets_75_percent_on_the_real_cifar10(tmp_path):
    command = [sys.executable, SCRIPT, "--recipe", "quick", "--data", SCRIPT.parent / "datasets"]
    variables = os.environ | {"OMP_NUM_THREADS": "2"}  # the other tests have one thread
    outcome = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    (row,) = rows(next(tmp_path.glob("experiments/*/metrics.csv")).parent)
    assert float(row["val_accuracy"]) >= 0.75
