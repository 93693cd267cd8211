"""Training: files, curves, resuming and errors, on a tiny data set; and, where it is there, on the real one."""

import contextlib
import copy
import csv
import errno
import functools
import io
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.parse
import urllib.request
from pathlib import Path
from unittest import mock

import pytest
import torch
from PIL import Image

import data
import train
from loss import CrossEntropyLoss

SCRIPT = Path(train.__file__)
# 60 random images in place of CIFAR-10, and a net to match
TINY = """
import torch, data, train
def load(root):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (60, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (60,), generator=generator)
    return (images[:40], labels[:40]), (images[40:], labels[40:])
data.load_cifar10 = load
for recipe in train.RECIPES.values():
    recipe["widths"] = (8, 8, 8)
torch.set_num_threads(1)
"""


def tiny(cwd, *flags, code=""):
    """Run train.py with `flags` on the tiny set, in the folder `cwd`, after `code`; exit code and what it printed."""
    out, err, here = io.StringIO(), io.StringIO(), Path.cwd()
    argv = ["train.py", "--batch-size", "16", *map(str, flags)]
    recipes = {name: {**recipe} for name, recipe in train.RECIPES.items()}
    with (
        mock.patch.object(sys, "argv", argv),
        mock.patch.object(data, "load_cifar10"),
        mock.patch.object(train, "RECIPES", recipes),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        exec(TINY + code, {})
        os.chdir(cwd)
        try:
            train.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            os.chdir(here)
    return subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())


def tiny_process(cwd, *flags, code):
    """The same in a process of its own, for what changes more than this module; forked, as importing takes seconds."""
    reader, writer = os.pipe()  # no file: on a full disk there is no room for one
    pid = os.fork()
    if pid == 0:
        try:
            outcome = tiny(cwd, *flags, code=code)
            os.write(writer, json.dumps([outcome.returncode, outcome.stdout, outcome.stderr]).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as file:
        outcome = json.load(file)
    os.waitpid(pid, 0)
    return subprocess.CompletedProcess(flags, *outcome)


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def results(folder):
    """What two equal runs must agree in, bit for bit: the metrics but for the seconds, and all that is saved."""
    metrics = [{key: value for key, value in row.items() if key != "train_seconds"} for row in rows(folder)]
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    return metrics, [*checkpoint["model"].values(), *tensors(checkpoint["optimizer"]), checkpoint["generator"]]


def tensors(state):
    """All tensors in a state, however it is nested."""
    if torch.is_tensor(state):
        return [state]
    inner = state.values() if isinstance(state, dict) else state if isinstance(state, list) else ()
    return [tensor for value in inner for tensor in tensors(value)]


def agree(one, other):
    (metrics, saved), (other_metrics, other_saved) = results(one), results(other)
    return metrics == other_metrics and all(map(torch.equal, saved, other_saved)) and len(saved) == len(other_saved)


def scalars(folder):
    """[(tag, step, value)] of a run, read by TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return sorted((tag, e.step, e.value) for tag in events.Tags()["scalars"] for e in events.Scalars(tag))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run of three epochs."""
    cwd = tmp_path_factory.mktemp("finished")
    outcome = tiny(cwd, "--lr", "1e-3", "--epochs", 3)
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stderr == ""  # no warning either
    return cwd / "experiments" / "baseline-lr0.001-none-seed0"


# ---------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("recipe", train.RECIPES)
def test_a_tiny_set_is_learnt_to_zero_error(recipe):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (30, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.arange(30) % 10
    settings = {**train.RECIPES[recipe], "seed": 0, "widths": (16, 16, 16), "batch_size": 30}
    settings["lr"] /= 2
    model, optimizer = train.build(settings, images)
    inputs = data.normalize(data.to_float(images))
    for _ in range(100):
        train.train_step(model, optimizer, CrossEntropyLoss(), inputs, labels, "fp32")
    assert train.evaluate(model, images, labels, "fp32")[1] == 1


def test_a_step_in_parts_is_the_step_of_the_whole_batch():
    generator, sizes = torch.Generator().manual_seed(0), []
    images, labels = torch.randn(501, 3, 2, 2, generator=generator), torch.arange(501) % 10
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 10))
    reference = copy.deepcopy(model)
    model.register_forward_hook(lambda module, inputs, outputs: sizes.append(len(outputs)))
    sgd, reference_sgd = (torch.optim.SGD(net.parameters(), lr=0.5) for net in (model, reference))
    for _ in range(2):  # the second step shows whether gradients of the first are left over
        logits, loss = train.train_step(model, sgd, CrossEntropyLoss(), images, labels, "fp32")
        expected_logits = reference(images)
        expected_loss = torch.nn.functional.cross_entropy(expected_logits, labels)
        reference_sgd.zero_grad()
        expected_loss.backward()
        reference_sgd.step()
        torch.testing.assert_close(logits, expected_logits.detach(), rtol=1e-5, atol=1e-6)
        assert loss == pytest.approx(expected_loss.item(), rel=1e-5)
        torch.testing.assert_close([*model.parameters()], [*reference.parameters()], rtol=1e-5, atol=1e-6)
    assert sizes == [167] * 6


def test_evaluate_is_the_mean_over_all_images_in_evaluation_mode():
    settings = {**train.RECIPES["baseline"], "seed": 0, "lr": 1e-2, "widths": (8, 8, 8)}
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (1003, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (1003,), generator=generator)
    inputs = data.normalize(data.to_float(images))
    model, optimizer = train.build(settings, images)
    for _ in range(20):  # until it no longer says the same of all
        train.train_step(model, optimizer, CrossEntropyLoss(), inputs[:250], labels[:250], "fp32")
    loss, accuracy, accuracy_tta = train.evaluate(model, images, labels, "fp32", tta=True)
    with torch.no_grad():
        logits = model.eval()(inputs)
        averaged = sum(weight * model(view) for view, weight in train.views(inputs))
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert accuracy == (logits.argmax(1) == labels).double().mean().item()
    assert accuracy_tta == (averaged.argmax(1) == labels).double().mean().item() != accuracy


def test_views_are_mirrored_and_shifted_by_a_pixel_and_weigh_one_with_the_plain_one():
    image = torch.rand(1, 3, 32, 32)
    plain, mirrored, *shifted = train.views(image)
    assert torch.equal(plain[0], image) and torch.equal(mirrored[0], image.flip(3))
    assert [weight for _, weight in (plain, mirrored, *shifted)] == [0.25] * 2 + [0.125] * 4
    inside, outside = slice(1, 32), slice(0, 31)
    assert torch.equal(shifted[0][0][..., inside, inside], image[..., outside, outside])
    assert torch.equal(shifted[2][0][..., outside, outside], image[..., inside, inside])
    for plain, flipped in (shifted[:2], shifted[2:]):
        assert torch.equal(plain[0].flip(3), flipped[0])


@pytest.mark.parametrize("shape", [(8, 8), (5, 30), (30, 5)])
def test_orthogonalize_keeps_singular_vectors_and_evens_out_singular_values(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    core = u.T @ train.orthogonalize(matrix, steps=5) @ vh.T
    values = core.diagonal()
    assert (core - torch.diag(values)).abs().max() < 1e-9
    assert values.min() > 0.3
    assert values.max() < 1.3


def test_muon_steps_filters_along_the_orthogonalized_nesterov_gradient_at_a_fixed_norm_and_the_rest_as_sgd_does():
    filters, shift, linear = (torch.randn(shape, requires_grad=True) for shape in ((4, 3, 3, 3), (4,), (2, 5)))
    frozen = torch.randn(4)
    optimizer = train.Muon([filters, frozen, shift, linear], lr=0.1, batch_size=20)
    references = [parameter.detach().clone().requires_grad_() for parameter in (shift, linear)]
    groups = [
        {"params": reference, "lr": 2 * factor} for reference, factor in zip(references, (1 / 4, 3.3 / 25), strict=True)
    ]
    sgd = torch.optim.SGD(groups, momentum=0.85, nesterov=True)
    velocity = torch.zeros(4, 27)
    for _ in range(3):
        expected = filters.detach().flatten(1) * 2 / filters.detach().norm()
        filters.grad, shift.grad, linear.grad = torch.randn(4, 3, 3, 3), torch.randn(4), torch.randn(2, 5)
        gradient = filters.grad.flatten(1)
        velocity = 0.6 * velocity + gradient
        expected -= 0.1 * train.orthogonalize(gradient + 0.6 * velocity)
        for parameter, reference in zip((shift, linear), references, strict=True):
            reference.grad = parameter.grad.clone()
            reference.data.mul_(1 - 2e-5)
        optimizer.step()
        sgd.step()
        torch.testing.assert_close(filters.detach().flatten(1), expected)
        torch.testing.assert_close([shift, linear], references, rtol=1e-6, atol=1e-7)
    filters.grad, shift.grad, before = torch.randn(4, 3, 3, 3), None, shift.clone()
    optimizer.step()
    assert torch.equal(shift, before)  # without a gradient nothing moves, whatever the velocity


def test_rate_falls_linearly_and_pictures_grow_and_epochs_may_be_a_fraction(tmp_path, monkeypatch):
    seen, train_step = [], train.train_step

    def spy(model, optimizer, criterion, images, labels, precision):
        seen.append((optimizer.lr, *images.shape[2:], model.stem.bias.requires_grad))
        return train_step(model, optimizer, criterion, images, labels, precision)

    monkeypatch.setattr(train, "train_step", spy)
    monkeypatch.setitem(train.RECIPES["quick"], "sizes", ((17, 0.5), (25, 0.75)))
    outcome = tiny(tmp_path, "--recipe", "quick", "--epochs", 1.5, "--lr", 0.8, "--name", "run")
    assert outcome.returncode == 0, outcome.stderr
    # 40 images in batches of 16 are 3 steps an epoch, so 4 in all
    sizes, stem = (17, 17, 25, 32), (True, True, False, False)
    assert seen == [(pytest.approx(0.8 * (1 - i / 4)), sizes[i], sizes[i], stem[i]) for i in range(4)]
    assert [float(row["epoch"]) for row in rows(tmp_path / "experiments/run")] == [1, 4 / 3]


# ------------------------------------------------------------------------------------------------- files and curves


def test_metrics_csv(finished):
    table = rows(finished)
    assert list(table[0]) == list(train.COLUMNS)
    assert [row["step"] for row in table] == ["3", "6", "9"]
    for row in table:
        assert all(math.isfinite(float(value)) for value in row.values())
        assert all(0 <= float(row[f"{part}_accuracy"]) <= 1 for part in ("train", "val"))
    assert float(table[0]["train_seconds"]) < float(table[-1]["train_seconds"])


def test_training_accuracy_in_metrics_counts_the_images(finished):
    # 40 training images and 20 to validate on: every accuracy is a whole number of them
    for row in rows(finished):
        assert float(row["train_accuracy"]) * 40 == pytest.approx(round(float(row["train_accuracy"]) * 40))
        assert float(row["val_accuracy"]) * 20 == pytest.approx(round(float(row["val_accuracy"]) * 20))


def test_only_the_last_row_has_an_accuracy_with_test_time_augmentation(tmp_path):
    assert tiny(tmp_path, "--recipe", "best", "--epochs", 2, "--name", "run").returncode == 0
    first, last = rows(tmp_path / "experiments/run")
    assert first["val_accuracy_tta"] == ""
    assert 0 <= float(last["val_accuracy_tta"]) <= 1


def test_config_says_enough_to_run_it_again(finished):
    config = json.loads((finished / "config.json").read_text())
    expected = {"recipe": "baseline", "lr": 1e-3, "epochs": 3, "batch_size": 16, "augment": "none", "seed": 0}
    assert expected.items() <= config.items()
    assert torch.__version__.startswith(config["versions"]["torch"])
    assert "--lr 1e-3" in config["command"]
    assert config["precision"] in ("fp32", "bf16")


def test_the_events_hold_the_metrics(finished):
    expected = [
        (f"{metric}/{part}", int(row["step"]), pytest.approx(float(row[f"{part}_{metric}"])))
        for metric in ("accuracy", "loss")
        for part in ("train", "val")
        for row in rows(finished)
    ]
    expected[6:6] = [("learning_rate", step, pytest.approx(1e-3)) for step in (0, 3, 6, 9)]
    assert scalars(finished) == expected


def test_the_learning_rate_of_muon_falls_linearly_to_0(tmp_path):
    assert tiny(tmp_path, "--recipe", "quick", "--lr", 0.2, "--epochs", 2, "--name", "run").returncode == 0
    points = [(step, value) for tag, step, value in scalars(tmp_path / "experiments/run") if tag == "learning_rate"]
    assert points == [(0, pytest.approx(0.2)), (3, pytest.approx(0.1)), (6, 0)]


def ask_tensorboard(address, run, query, posted=None):
    body = json.dumps(posted).encode() if posted else None
    request = urllib.request.Request(address + query.format(run), body, {"Content-Type": "application/json"})
    answer = urllib.request.urlopen(request, timeout=30).read().decode()
    return json.loads(answer) if answer[:1] in "[{" else answer


def test_tensorboard_serves_curves_images_graph_and_settings(finished):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", finished.parent, "--port", str(port)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            for line in server.stderr:  # it says when it is ready
                if "Press CTRL+C" in line:
                    break
            ask = functools.partial(ask_tensorboard, f"http://127.0.0.1:{port}/data/plugin/", finished.name)
            curves = {"loss/train", "loss/val", "accuracy/train", "accuracy/val"}
            assert set(ask("scalars/tags")[finished.name]) == {*curves, "learning_rate"}
            assert [step for _, step, _ in ask("scalars/scalars?run={}&tag=loss/val")] == [3, 6, 9]
            (images,) = ask("images/tags")[finished.name]
            assert len(ask(f"images/images?run={{}}&tag={urllib.parse.quote(images)}")) == 1
            graph = ask("graphs/graph?run={}&conceptual=false")
            assert "Conv2d" in graph and "BatchNorm2d" in graph and "Linear" in graph
            asked = {"allowedStatuses": ["STATUS_SUCCESS"], "startIndex": 0, "sliceSize": 10}
            table = ask("hparams/session_groups", asked)
            (run,) = table["sessionGroups"]
            assert run["hparams"].items() >= {"lr": 1e-3, "recipe": "baseline", "seed": 0}.items()
            final = {metric["name"]["tag"]: metric["value"] for metric in run["metricValues"]}
            last = rows(finished)[-1]
            assert final == {tag: pytest.approx(float(last["_".join(tag.split("/")[::-1])])) for tag in curves}
        finally:
            server.kill()


def test_curves_show_every_run(finished, tmp_path):
    with Image.open(finished.parent / "curves.png") as picture:
        assert min(picture.size) > 400
    for name in ("$_$", "b"):  # the first is no formula
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").write_text((finished / "metrics.csv").read_text())
    (tmp_path / "begun").mkdir()
    train.write_csv(tmp_path / "begun" / "metrics.csv", train.COLUMNS, [])  # in its first epoch: nothing to show yet
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "metrics.csv").write_text("time,value\n1,2\n")
    for name, damage in (
        ("short", lambda raw: raw[:-20]),
        ("latin", lambda raw: b"\xe9" + raw),
        ("empty", lambda raw: b""),
        ("long", lambda raw: raw + b"1" * 200_000),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").write_bytes(damage((finished / "metrics.csv").read_bytes()))
    runs = train.finished_epochs(tmp_path)
    assert list(runs) == ["$_$", "b"] and runs["b"] == rows(finished)
    pictures = []
    for shown in (rows(finished), rows(finished)[:1]):
        train.draw_curves(tmp_path / "curves.png", {**runs, "b": shown})
        with Image.open(tmp_path / "curves.png") as picture:
            pictures.append(picture.tobytes())
    assert pictures[0] != pictures[1]


def test_the_same_run_once_more_gets_a_folder_of_its_own_and_the_same_numbers(finished):
    kept = (finished / "metrics.csv").read_bytes()
    assert tiny(finished.parent.parent, "--lr", "1e-3", "--epochs", 3).returncode == 0
    again = finished.with_name(finished.name + "-2")
    assert (finished / "metrics.csv").read_bytes() == kept
    assert agree(finished, again)


def test_another_seed_gives_other_numbers(finished, tmp_path):
    assert tiny(tmp_path, "--lr", "1e-3", "--epochs", 3, "--seed", 1, "--name", "run").returncode == 0
    assert not agree(finished, tmp_path / "experiments/run")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    train.write(path, lambda file: file.write(b"old"))
    monkeypatch.setattr(train.os, "fsync", mock.Mock(side_effect=OSError(errno.ENOSPC, "disk full")))
    with pytest.raises(OSError, match="disk full"):
        train.write(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


# ----------------------------------------------------------------------------------------------- stopping, resuming


def mortal(cwd, *flags, kill_at=math.inf):
    """The same in a forked process that kills itself at its `kill_at`-th function call or return, be it in Python or C.

    So every moment of a run can be hit, and hit again. Returns the status of os.waitpid; a run that came to its end
    leaves their number, and those at which it entered and left train.write, in `cwd`/moments.
    """
    pid = os.fork()
    if pid == 0:
        moments, saving = 0, []

        def count(frame, event, argument):
            nonlocal moments
            moments += 1
            if moments >= kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if frame.f_code is train.write.__code__ and event in ("call", "return"):
                saving.append(moments)

        # tqdm's lock is shared with forked processes: killed while it holds it, this one would lock us out for ever
        train.tqdm.set_lock(threading.RLock())
        code = 1
        try:
            sys.setprofile(count)
            code = tiny(cwd, *flags).returncode
            sys.setprofile(None)
            (cwd / "moments").write_text(json.dumps([moments, saving]))
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    return status


def moments_of(cwd, *flags):
    """All moments of an uninterrupted run, and those in which it saves something."""
    assert mortal(cwd, *flags) == 0
    moments, saving = json.loads((cwd / "moments").read_text())
    return range(1, moments), [moment for pair in zip(*[iter(saving)] * 2, strict=True) for moment in range(*pair)]


@pytest.mark.parametrize("recipe", ["baseline", "quick"])
@pytest.mark.usefixtures("finished")  # so that all is imported before the moments are counted
def test_a_killed_run_resumes_to_the_very_same_end(tmp_path, recipe, request):
    flags = ("--recipe", recipe, "--augment", "both", "--epochs", 3, "--name", "run")
    (whole := tmp_path / "whole").mkdir()
    everywhere, saving = moments_of(whole, *flags)
    chance = random.Random(0)
    for number in range(60 if request.config.getoption("--long") else 3):
        (cwd := tmp_path / str(number)).mkdir()
        folder = cwd / "experiments/run"
        # The first kill is anywhere or while something is saved; some are killed again after they have been resumed
        status = mortal(cwd, *flags, kill_at=chance.choice(everywhere if number % 2 else saving))
        assert status == signal.SIGKILL
        if folder.exists() and number % 3 == 0:
            mortal(cwd, *flags, "--resume", kill_at=chance.choice(everywhere) // 2)
        begun = folder.exists()  # a folder that can be seen can be resumed
        outcome = tiny(cwd, *flags, *(["--resume"] if begun else []))
        assert outcome.returncode == 0, outcome
        assert agree(whole / "experiments/run", folder)
        assert scalars(whole / "experiments/run") == scalars(folder)  # no point twice, none missing
        assert (cwd / "experiments/curves.png").exists() and not list(folder.glob("*.part"))


def test_ctrl_c_and_sigterm_say_how_to_go_on(tmp_path):
    for number, name in ((signal.SIGINT, "int"), (signal.SIGTERM, "term")):
        code = f"import os\ntrain.evaluate = lambda *a, **k: os.kill(os.getpid(), {int(number)})"
        outcome = tiny_process(tmp_path, "--name", name, code=code)
        assert outcome.returncode == 130
        assert "--resume" in outcome.stderr
        assert "Traceback" not in outcome.stderr


# ------------------------------------------------------------------------------------------------------------ errors


def complaint(outcome, code):
    assert outcome.returncode == code, outcome
    assert "Traceback" not in outcome.stderr
    return outcome.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "flags, says",
    [
        (("--lr", "0"), "--lr"),
        (("--lr", "nan"), "--lr: nan is not a finite number above 0"),
        (("--lr", "much"), "--lr"),
        (("--epochs", "-1"), "--epochs"),
        (("--epochs", "inf"), "--epochs"),
        (("--epochs", "1e300"), "--epochs"),
        (("--lr", "1e999"), "--lr"),
        (("--batch-size", "1e3"), "--batch-size"),
        (("--batch-size", "9" * 5000), "--batch-size"),
        (("--seed", "9" * 30), "--seed"),
        (("--seed", "9" * 400), "--seed"),
        (("--batch-size", "1"), "--batch-size: 1 is not a whole number from 2 to 50,000"),
        (("--batch-size", "2.5"), "--batch-size"),
        (("--seed", "-1"), "--seed"),
        (("--augment", "sideways"), "--augment"),
        (("--recipe", "cake"), "--recipe"),
        (("--device", "abacus"), "--device"),
        (("--name", "../elsewhere"), "--name"),
        (("--name", ""), "--name"),
        (("--resume",), "nothing to resume"),
        (("--colour",), "--colour"),
    ],
)
def test_misuse_gets_one_line_that_names_it(tmp_path, flags, says):
    outcome = tiny(tmp_path, *flags)
    assert says in complaint(outcome, 2)
    assert len(outcome.stderr.strip().splitlines()) <= 2  # argparse's line of usage comes first
    assert not list(tmp_path.iterdir())


def test_a_device_that_is_not_there(tmp_path):
    assert "cuda" in complaint(tiny(tmp_path, "--device", "cuda"), 2)


def test_a_name_in_use_is_not_overwritten(finished):
    line = complaint(tiny(finished.parent.parent, "--name", finished.name), 2)
    assert finished.name in line and "--name" in line


def test_a_name_may_have_spaces_and_dots(tmp_path):
    for name in ("my 1st run", "..dots", "-minus"):
        assert tiny(tmp_path, f"--name={name}", "--epochs", 1).returncode == 0
        assert len(rows(tmp_path / "experiments" / name)) == 1


def test_of_two_runs_that_start_at_once_under_one_name_the_second_is_told_so(tmp_path):
    code = """
import os
import sys
load = data.load_cifar10
def load_while_the_other_starts(root):
    os.makedirs("experiments/run")
    open("experiments/run/config.json", "w").write("of the other")
    return load(root)
data.load_cifar10 = load_while_the_other_starts
"""
    assert "experiments/run is there already" in complaint(tiny_process(tmp_path, "--name", "run", code=code), 2)
    assert [path.name for path in (tmp_path / "experiments").iterdir()] == ["run"]
    assert [path.name for path in (tmp_path / "experiments/run").iterdir()] == ["config.json"]
    assert (tmp_path / "experiments/run/config.json").read_text() == "of the other"


def test_a_run_that_is_still_going_on_cannot_be_resumed_beside_it(finished):
    before = {path: path.read_bytes() for path in finished.iterdir()}
    with train.claim(finished):
        assert "in use" in complaint(tiny(finished.parent.parent, "--name", finished.name, "--resume"), 2)
    assert {path: path.read_bytes() for path in finished.iterdir()} == before
    assert tiny(finished.parent.parent, "--name", finished.name, "--resume").returncode == 0


@pytest.mark.parametrize("blocks, begins", [(0, False), (1, False), (40, False), (120, True)])
def test_a_full_disk_names_what_could_not_be_written_and_the_run_goes_on_once_there_is_room(tmp_path, blocks, begins):
    flags = ("--epochs", 2, "--name", "run")
    assert tiny(tmp_path, "--epochs", 2, "--name", "whole").returncode == 0
    code = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({blocks} * 512, -1))
"""  # no file may grow beyond that: writing fails as it does on a full disk
    line = complaint(tiny_process(tmp_path, *flags, code=code), 1)
    assert "File too large: " in line and "experiments" in line
    folder = tmp_path / "experiments/run"
    assert folder.exists() == begins  # begun, there is room for the first checkpoint, and not for Adam's moments
    assert not list(tmp_path.glob("experiments/.*")) and not list(folder.glob("*.part"))
    assert tiny(tmp_path, *flags, *(["--resume"] if folder.exists() else [])).returncode == 0
    assert agree(tmp_path / "experiments/whole", folder)


def test_events_that_find_the_disk_full_end_the_run_in_one_line(tmp_path):
    code = f"""{TINY}
import sys, tensorboardX.record_writer
tensorboardX.record_writer.open_file = lambda path: open("/dev/full", "wb")  # all that is flushed fails
sys.argv[1:] = ["--name", "run", "--epochs", "1", "--batch-size", "16"]
train.main()
"""
    command = [sys.executable, "-c", code]  # a process of its own, to see what it says at its exit
    outcome = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": SCRIPT.parent}, capture_output=True, text=True
    )
    assert outcome.stderr.splitlines() == [
        f"train.py: [Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}: 'experiments/run'"
    ]


def tampered(finished, cwd, tamper):
    """A copy of the finished run as the run "run" of the folder `cwd`, with its checkpoint changed by `tamper`."""
    folder = cwd / "experiments/run"
    shutil.copytree(finished, folder)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    tamper(state)
    torch.save(state, folder / "checkpoint.pt")
    return folder


@pytest.mark.parametrize(
    "tamper",
    [
        lambda state: state["model"].popitem(),
        lambda state: state["model"].update({"head.bias": torch.zeros(11)}),
        lambda state: state["optimizer"].clear(),
        lambda state: state.pop("step"),
        lambda state: state.update(rows=3),
        lambda state: state.update(generator=torch.zeros(3)),
        lambda state: state["settings"].pop("lr"),
        lambda state: state["settings"].update(widths="wide"),
        lambda state: state.clear(),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(finished, tmp_path, tamper):
    folder = tampered(finished, tmp_path, tamper)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert "checkpoint.pt" in complaint(tiny(tmp_path, "--name", "run", "--resume"), 2)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_run_of_a_device_that_is_gone_goes_on_on_another(finished, tmp_path):
    tampered(finished, tmp_path, lambda state: state["settings"].update(device="cuda"))
    assert "--device" in complaint(tiny(tmp_path, "--name", "run", "--resume"), 2)
    assert tiny(tmp_path, "--name", "run", "--resume", "--device", "cpu").returncode == 0


def test_a_run_goes_on_in_its_own_precision(finished, tmp_path):
    tampered(finished, tmp_path, lambda state: state["settings"].update(precision="bf16"))
    for flags in ((), ("--device", "cpu")):  # saying what holds anyway changes nothing
        assert " bf16," in tiny(tmp_path, "--name", "run", "--resume", *flags).stdout


def test_where_files_cannot_be_locked_training_goes_on_without(tmp_path):
    code = """
import errno
def flock(file, how): raise OSError(errno.ENOSYS, "Function not implemented")
train.fcntl.flock = flock
"""
    assert tiny_process(tmp_path, "--epochs", 1, code=code).returncode == 0


def test_resume_finds_the_newest_of_a_name(tmp_path):
    for _ in range(3):
        assert tiny(tmp_path, "--epochs", 1).returncode == 0
    *older, newest = sorted(path.parent for path in tmp_path.glob("experiments/*/metrics.csv"))
    for folder in older:
        shutil.rmtree(folder)
    outcome = tiny(tmp_path, "--epochs", 1, "--resume")
    assert outcome.returncode == 0 and newest.name.endswith("-3") and f"{newest.name} on" in outcome.stdout
    assert tiny(tmp_path, "--epochs", 1).returncode == 0  # takes the first free name, that of the oldest
    outcome = tiny(tmp_path, "--epochs", 1, "--resume")
    assert outcome.returncode == 0 and f"{older[0].name} on" in outcome.stdout


@pytest.mark.parametrize(
    "error", ["MemoryError()", "RuntimeError('DefaultCPUAllocator: can\\'t allocate memory: you tried ...')"]
)
def test_out_of_memory_says_what_to_lower(finished, tmp_path, error):
    code = f"def fail(*arguments): raise {error}\ntrain.train_step = fail"
    assert "--batch-size" in complaint(tiny_process(tmp_path, code=code), 1)
    resume = ("--name", finished.name, "--resume")
    line = complaint(tiny_process(finished.parent.parent, *resume, code=code.replace("train_step", "build")), 1)
    assert "--batch-size" in line  # and not that the checkpoint were no good


def test_resuming_with_other_settings_or_a_broken_checkpoint_is_refused(finished, tmp_path):
    contradicting = tiny(finished.parent.parent, "--name", finished.name, "--resume", "--lr", "0.5")
    line = complaint(contradicting, 2)
    assert "--lr" in line and "--name" in line
    (tmp_path / "experiments/broken").mkdir(parents=True)
    whole = (finished / "checkpoint.pt").read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"not a checkpoint"):
        (tmp_path / "experiments/broken/checkpoint.pt").write_bytes(broken)
        assert "checkpoint.pt" in complaint(tiny(tmp_path, "--name", "broken", "--resume"), 2)


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_checkpoint(tmp_path):
    outcome = tiny(tmp_path, "--lr", "1e30", "--name", "run")
    line = complaint(outcome, 1)
    assert re.search(r"loss is (nan|inf) at step \d+", line) and "--lr" in line
    assert torch.load(tmp_path / "experiments/run/checkpoint.pt", weights_only=True)["step"] == 0


def test_a_net_that_the_last_step_of_an_epoch_has_broken_is_not_saved(tmp_path):
    code = "train.evaluate = lambda *arguments, **options: (float('nan'), 0.1, None)"
    line = complaint(tiny_process(tmp_path, "--name", "run", code=code), 1)
    assert "validation loss is nan" in line and "--lr" in line
    assert torch.load(tmp_path / "experiments/run/checkpoint.pt", weights_only=True)["step"] == 0


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert "file" in complaint(tiny(tmp_path, "--experiments", "file"), 1)


def test_help_explains_every_flag_with_its_default(tmp_path):
    text = tiny(tmp_path, "--help").stdout
    flags = re.findall(r"^  (--[a-z-]+)", text, re.MULTILINE)
    assert set(flags) == {
        "--recipe", "--lr", "--epochs", "--batch-size", "--augment", "--seed", "--device", "--data", "--experiments",
        "--name", "--resume",
    }  # fmt: skip
    assert text.count("(default:") == len(flags) - 1  # --resume is off unless it is given


# --------------------------------------------------------------------------------------------------------- real data


@pytest.mark.real_data
def test_some_seconds_on_the_real_cifar10_give_more_than_60_percent(tmp_path):
    command = [sys.executable, SCRIPT, "--recipe", "quick", "--epochs", "0.3", "--data", SCRIPT.parent / "datasets"]
    outcome = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    (row,) = rows(next(tmp_path.glob("experiments/*/metrics.csv")).parent)
    assert float(row["val_accuracy"]) > 0.6
