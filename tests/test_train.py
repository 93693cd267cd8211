"""Training, the files of a run, resuming, and what goes wrong: train.py on a tiny set; and `quick` on the real one."""

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT, complain, load_tiny, make_tiny, seeded
from filelock import FileLock, Timeout
from PIL import Image
from tensorboard import program
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F

import data
import train
from network import ConvNet, Ensemble, Muon

RUN = Path("experiments/run")  # the folder of `--name run`; `tiny` works in a folder of its own


def read_settings(flags):
    return train.read_settings([*flags.split(), "--device", "cpu", "--precision", "fp32"])[0]


def rows(folder=RUN):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def numbers(column, folder=RUN):
    return [float(row[column]) for row in rows(folder)]


def scalars(folder=RUN):
    """{(curve, step): value}, as TensorBoard's own reader shows a run."""
    events = EventAccumulator(str(folder)).Reload()
    points = [(tag, point.step, point.value) for tag in events.Tags()["scalars"] for point in events.Scalars(tag)]
    shown = {(tag, step): value for tag, step, value in points}
    assert len(shown) == len(points)  # each step once
    return shown


def collect(folder=RUN):
    """All in which equal runs agree, bit for bit: what was measured, except for the seconds, and what was saved."""
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    table = [{name: value for name, value in row.items() if name != "train_seconds"} for row in rows(folder)]
    progress = [saved["progress"][key] for key in ("step", "epoch", "curves")]
    states = [saved[key] for key in ("model", "optimizer", "generator")]
    return table, progress, json.dumps(states, default=torch.Tensor.tolist), scalars(folder)


def copy_run(finished, change=lambda saved: None, folder=RUN):
    """Copy the finished run; `change` may change what its checkpoint holds."""
    shutil.copytree(finished, folder)
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    change(saved)
    torch.save(saved, folder / "checkpoint.pt")


def make_run(folder, flags):
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_tiny(monkeypatch, folder)(f"{flags} --name run")
    return folder / RUN


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a finished run of three epochs of three steps, to be read and not to be changed."""
    return make_run(tmp_path_factory.mktemp("finished"), "--epochs 3")


# --------------------------------------------------------------------------------------------------------- training
@pytest.mark.parametrize("recipe", train.RECIPES)
def test_every_recipe_learns_ten_images_by_heart(recipe, tiny, monkeypatch):
    squares = 255 * torch.randint(2, (10, 3, 4, 4), dtype=torch.uint8, generator=seeded(4))
    images, labels = squares.repeat_interleave(8, 2).repeat_interleave(8, 3), torch.arange(10)
    often = images.repeat(16, 1, 1, 1), labels.repeat(16)
    monkeypatch.setattr(data, "load_cifar10", lambda *_: (often, (images, labels)))
    outcome = tiny(f"--recipe {recipe} --epochs 5 --widths 24 24 24 --batch-size 20 --name run")
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert numbers("val_accuracy")[-1] == 1


def test_a_step_descends_pytorchs_smoothed_loss_and_logs_the_plain_one():
    settings = read_settings("--label-smoothing 0.5 --lr 0.1")
    images, labels = load_tiny()[0]
    net, twin = ConvNet((8, 8)), ConvNet((8, 8))
    twin.load_state_dict(net.state_dict())
    optimizer, reference = (torch.optim.SGD(one.parameters(), 0.1) for one in (net, twin))
    loader = data.Loader(images, labels, 40, "none", seeded())
    for step in range(2):  # in the second one, the gradients of the first are gone
        _, means = train.train_epoch(Ensemble([net]), optimizer, [loader], settings, step, 2, lambda *_: None)
        logits = twin(data.normalize(images))
        assert means["train_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
        reference.zero_grad()
        F.cross_entropy(logits, labels, label_smoothing=0.5).backward()
        reference.step()
        torch.testing.assert_close(net.state_dict(), twin.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("begin, steps, ends", [(0, 1000, range(2, 49, 2)), (48, 53, [2, 4, 5])])  # of 48 an epoch
def test_about_twenty_times_an_epoch_a_point_is_the_mean_over_all_images_and_nets_since_the_last(begin, steps, ends):
    settings = read_settings("--lr 1e-9")  # so the nets stay as they are
    images, labels = load_tiny()[0]
    images, labels = images.repeat(3, 1, 1, 1)[:97], labels.repeat(3)[:97]  # 47 batches of 2 images and one of 3
    model = Ensemble([ConvNet((8, 8)), ConvNet((8, 8))])
    generators = seeded(), seeded()
    loaders, same = ([data.Loader(images, labels, 2, "none", one) for _ in model.nets] for one in generators)
    measured = []  # for each step, (losses, hits) of both nets
    for batches in zip(*same):
        logits = torch.cat([net(inputs) for net, (inputs, _) in zip(model.nets, batches)]).detach()
        targets = torch.cat([targets for _, targets in batches])
        losses = F.cross_entropy(logits, targets, reduction="none")
        measured.append(torch.stack([losses, logits.argmax(1) == targets]).double())

    def means(first, last):
        loss, accuracy = torch.cat(measured[first:last], dim=1).mean(1).tolist()
        return {"train_loss": pytest.approx(loss), "train_accuracy": pytest.approx(accuracy)}

    points = []
    model.eval()  # from which an epoch returns to training mode
    optimizer = torch.optim.SGD(model.parameters())
    given = model, optimizer, loaders, settings, begin, steps, lambda *point: points.append(point)
    assert train.train_epoch(*given) == (begin + ends[-1], means(0, ends[-1]))
    assert points == [(begin + last, means(first, last)) for first, last in zip([0, *ends], ends)]


@pytest.mark.parametrize("kind", [torch.optim.Adam, Muon])
@pytest.mark.parametrize("flags, rates, sizes", [
    ("--decay --sizes 16:0.5 24:0.75", [0.8, 0.6, 0.4, 0.2], [16, 16, 24, 32]),
    ("", [0.8, 0.8, 0.8, 0.8], [32, 32, 32, 32]),
])  # fmt: skip
def test_the_rate_falls_to_0_and_the_images_grow_or_both_are_constant(kind, flags, rates, sizes, tiny, before):
    seen = []
    before(train, "backpropagate", lambda net, criterion, images, *_: seen.append([*images.shape[2:]]))
    before(kind, "step", lambda self, *_: seen[-1].append(self.param_groups[0]["lr"]))
    tiny(f"--optimizer {kind.__name__.lower()} --lr 0.8 {flags} --epochs 1.4")  # 1.4 times 3 steps
    assert seen == [[size, size, pytest.approx(rate)] for size, rate in zip(sizes, rates)]


@pytest.mark.parametrize("epochs, steps", [(1e-6, 1), (0.4, 1), (0.6, 2), (1.4, 4)])
def test_epochs_may_be_a_fraction_but_a_run_has_at_least_one_step(epochs, steps, tiny):
    tiny(f"--epochs {epochs} --name run")
    assert (numbers("step")[-1], numbers("epoch")[-1]) == (steps, pytest.approx(steps / 3))


@pytest.mark.parametrize("flags, preparations", [
    ("", []),
    ("--whiten", ["whiten", "start_as_identity"]),
    ("--optimizer muon", ["freeze_scales", "follow_faster", "start_undecided"]),
])  # fmt: skip
def test_the_baseline_is_adam_on_random_weights_and_whitening_and_muon_prepare_the_net(flags, preparations):
    images = data.normalize(load_tiny()[0][0])
    torch.manual_seed(3)
    model, optimizer = train.build(read_settings(f"{flags} --widths 32 24 --lr 0.3 --batch-size 50"), images)
    torch.manual_seed(3)
    expected = ConvNet((32, 24))
    for name in preparations:
        getattr(expected, name)(*[images] * (name == "whiten"))
    (net,) = model.nets
    torch.testing.assert_close(net.state_dict(), expected.state_dict(), rtol=1e-5, atol=1e-5)
    assert [one.requires_grad for one in net.parameters()] == [one.requires_grad for one in expected.parameters()]
    assert net.groups[0][2].momentum == expected.groups[0][2].momentum
    assert net.stem.weight.is_contiguous(memory_format=torch.channels_last)  # up to twice as fast on a CPU
    assert type(optimizer) is (Muon if "muon" in flags else torch.optim.Adam)
    assert (optimizer.param_groups[0]["lr"], getattr(optimizer, "batch_size", 50)) == (0.3, 50)


def test_each_net_of_an_ensemble_has_weights_of_its_own_and_sees_each_image_in_an_order_of_its_own(tiny, before):
    seen = []
    before(train, "backpropagate", lambda net, criterion, *batch: seen.append((net.head.weight.sum(), batch[1])))
    tiny("--nets 2 --epochs 1")
    assert seen[0][0] != seen[1][0]  # in the first step
    one, other = (torch.cat([labels for _, labels in seen[first::2]]).tolist() for first in (0, 1))
    assert one != other
    assert sorted(one) == sorted(other) == sorted(load_tiny()[0][1].tolist())


def test_validation_is_a_mean_over_all_images_and_tta_averages_views_of_the_least_certain_quarter(finished, before):
    images = torch.randint(256, (260, 3, 32, 32), dtype=torch.uint8, generator=seeded())  # more than one part
    labels = torch.randint(10, (260,), generator=seeded())
    model = train.load(finished)
    inputs = data.normalize(images)
    with torch.no_grad():
        logits = model(inputs)
        averaged = sum(weight * model(view) for view, weight in data.views(inputs))
    expected = {"val_loss": pytest.approx(F.cross_entropy(logits, labels).item())}
    expected["val_accuracy"] = (logits.argmax(1) == labels).double().mean().item()
    assert train.evaluate(model.train(), images, labels, "fp32", tta=False) == expected  # in evaluation mode
    certainty = logits.softmax(1).amax(1)
    unsure = certainty <= certainty.sort().values[64]  # 65 of 260
    logits[unsure] = averaged[unsure]
    expected["val_accuracy_tta"] = (logits.argmax(1) == labels).double().mean().item()
    before(train, "accuracy", lambda *given: torch.testing.assert_close(given, (logits, labels)))
    assert train.evaluate(model, images, labels, "fp32", tta=True) == expected


def test_held_out_images_are_validated_on_and_neither_trained_on_nor_whitened_by(tiny, before):
    (images, labels), _ = load_tiny()
    seen = []
    before(train, "build", lambda settings, sample: seen.append(sample))
    before(data, "Loader", lambda *given: seen.extend(given[:2]))
    before(train, "evaluate", lambda model, *given: seen.extend(given[:2]))
    tiny("--held-out 15 --epochs 1")
    expected = data.normalize(images[:25]), images[:25], labels[:25], images[25:], labels[25:]
    torch.testing.assert_close(tuple(seen), expected)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(finished, tiny):
    tiny("--epochs 3 --name run")
    assert collect() == collect(finished)
    tiny("--epochs 3 --name other --seed 1")
    one, other = train.load(finished).state_dict(), train.load(RUN.parent / "other").state_dict()
    assert not any(torch.equal(one[name], other[name]) for name in one if name.endswith("weight"))


@pytest.mark.parametrize("device, found, precision", [
    ("cpu", {"avx512_bf16": True}, "bf16"), ("cpu", {"avx512_bf16": False}, "fp32"),
    ("cpu", {"neon": True, "bf16": True}, "fp32"),  # ARM
    ("cuda", (8, 0), "bf16"), ("cuda", (7, 5), "fp32"), ("mps", None, "fp32"),
])  # fmt: skip
def test_auto_precision_is_bf16_where_the_processor_computes_in_it(device, found, precision, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: found)
    assert train.choose_precision(Mock(precision="auto", device=device)) == precision


@pytest.mark.parametrize("flag, used", [("", "bf16"), ("--precision fp32", "fp32")])
def test_training_and_validation_compute_in_the_precision_of_the_run(flag, used, tiny, before, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    seen = []
    before(train, "backpropagate", lambda *given: seen.append(given[4]))
    before(train, "compute_logits", lambda *given: seen.append(given[2]))
    tiny(f"--epochs 1 {flag}")
    assert seen == [used] * 4  # three steps, and one part of the images to validate on


def test_train_seconds_count_setup_and_steps_but_not_validation_and_go_on_after_a_resume(tiny, before, monkeypatch):
    clock = [5]
    monkeypatch.setattr(train.time, "perf_counter", lambda: clock[0])
    for name, seconds in ("build", 10), ("backpropagate", 1), ("evaluate", 100):
        before(train, name, lambda *_, seconds=seconds: clock.append(clock.pop() + seconds))
    tiny("--epochs 1 --name run")
    tiny(f"--epochs 2 --resume {RUN}")
    assert numbers("train_seconds") == [13, 16]


@pytest.mark.real_data
def test_quick_reaches_75_percent_and_draws_its_curves_also_in_a_notebook(quick):
    assert numbers("val_accuracy", quick)[-1] >= 0.75
    assert (quick.parent / "curves.png").exists()


# ------------------------------------------------------------------------------------------------------------- runs
def test_a_recipe_is_a_line_of_flags_which_help_shows_and_any_flag_beside_it_wins(tiny, monkeypatch):
    monkeypatch.setitem(train.RECIPES, "mine", "--lr 0.2 --whiten --mirror --epochs 7")
    for flags in "--lr 0.5 --recipe mine --no-mirror", "--no-mirror --recipe mine --lr 0.5":
        settings = read_settings(flags)
        assert (settings.lr, settings.mirror, settings.epochs, settings.whiten) == (0.5, False, 7, True)
    shown = tiny("--recipe mine --help").stdout
    assert "(default: 7.0)" in shown and "(default: True)" in shown and "(default: False)" in shown
    monkeypatch.setitem(train.RECIPES, "mine", "--epoch-number 7")
    assert "--epoch-number" in complain(tiny("--recipe mine"), 2)


@pytest.mark.parametrize("flags, name", [
    ("--data elsewhere --seed 3 --augment both --lr 1e-5", "mine-lr1e-05-both-seed3"),
    ("--no-mirror --sizes 16:0.2 24:0.5 --label-smoothing 0.1",
     "mine-lr0.2-none-sizes=16,0.2,24,0.5-mirror=False-label_smoothing=0.1-seed0"),
])  # fmt: skip
def test_the_folder_of_a_run_says_how_it_differs_from_its_recipe(flags, name, tmp_path, monkeypatch):
    monkeypatch.setitem(train.RECIPES, "mine", "--lr 0.2 --whiten --mirror")
    experiments = tmp_path / "new" / "experiments"
    settings, _ = train.read_settings([*flags.split(), "--recipe", "mine", "--experiments", str(experiments)])
    assert train.make_folder(settings) == experiments / name


def test_the_same_command_again_makes_a_new_folder_and_a_taken_name_or_none_to_resume_is_refused(tiny):
    for flags in 3 * ["--epochs 1"] + ["--epochs 1 --name Übung"]:
        assert tiny(flags).returncode == 0
    old = {path.parent.name: path.read_bytes() for path in Path().rglob("checkpoint.pt")}
    name = "baseline-lr0.001-none-epochs=1.0-seed0"
    assert old.keys() == {name, f"{name}-2", f"{name}-3", "Übung"}
    assert "--name" in complain(tiny("--epochs 2 --name Übung"), 1)
    assert "checkpoint.pt" in complain(tiny("--epochs 2 --resume="), 1)
    assert old == {path.parent.name: path.read_bytes() for path in Path().rglob("checkpoint.pt")}


def test_config_json_and_the_first_points_in_tensorboard_are_there_while_the_first_epoch_goes_on(tiny, before):
    seen = []
    before(train, "backpropagate", lambda *_: seen.extend([(RUN / "config.json").read_text(), scalars()]), [2])
    tiny("--lr 0.01 --sizes 16:0.5 --epochs 1 --name run")
    config = json.loads(seen[0])
    assert config.items() >= {"lr": 0.01, "sizes": [[16, 0.5]], "batch_size": 16, "precision": "fp32"}.items()
    assert config["command"] == "python train.py --lr 0.01 --sizes 16:0.5 --epochs 1 --name run"
    assert torch.__version__ in config["versions"] and "1 threads" in config["versions"]
    assert seen[1].keys() == {("loss/train", 1), ("accuracy/train", 1)}


def test_metrics_csv_has_a_row_for_each_epoch_and_tensorboard_each_point_once(finished):
    columns = ["epoch", "step", "train_seconds", "train_loss", "train_accuracy", "val_loss", "val_accuracy"]
    assert list(rows(finished)[0]) == columns
    assert (numbers("epoch", finished), numbers("step", finished)) == ([1, 2, 3], [3, 6, 9])
    shown = scalars(finished)
    assert len(shown) == 2 * (9 + 3)
    for metric in train.METRICS:
        for epoch, row in enumerate(rows(finished)):
            assert shown[f"{metric}/val", 3 * epoch + 3] == pytest.approx(float(row[f"val_{metric}"]))
            parts = [shown[f"{metric}/train", 3 * epoch + step] for step in (1, 2, 3)]
            mean = (16 * parts[0] + 16 * parts[1] + 8 * parts[2]) / 40
            assert mean == pytest.approx(float(row[f"train_{metric}"]))


def test_a_tensorboard_server_shows_the_runs(finished):
    board = program.TensorBoard()
    board.configure(argv=[None, "--logdir", str(finished.parent), "--port", "0"])
    address = board.launch()
    for _ in range(9999):  # until it has read the files
        with urllib.request.urlopen(f"{address}data/plugin/scalars/tags", timeout=30) as answer:
            shown = json.load(answer)
        if shown:
            break
    assert shown["run"].keys() == {"loss/train", "loss/val", "accuracy/train", "accuracy/val"}


def test_a_new_metric_is_one_entry_and_reaches_table_and_tensorboard(tiny, monkeypatch):
    monkeypatch.setitem(train.METRICS, "label", lambda logits, labels: labels.double())
    tiny("--epochs 1 --name run")
    for part, (_, labels) in zip(("train", "val"), load_tiny()):
        assert numbers(f"{part}_label") == [pytest.approx(labels.double().mean().item())]
        assert (f"label/{part}", 3) in scalars()


def test_curves_png_shows_all_runs_with_points_and_whole_checkpoints(finished, tmp_path, capsys):
    copy_run(finished, lambda saved: saved["progress"]["curves"].pop("val_accuracy"), tmp_path / "old")
    copy_run(finished, lambda saved: saved["progress"]["curves"].clear(), tmp_path / "begun")
    copy_run(finished, lambda saved: saved.clear(), tmp_path / "damaged")
    copy_run(finished, folder=tmp_path / "whole")
    figure = train.draw_curves(train.read_curves(tmp_path))
    figure.savefig(tmp_path / "curves.png")
    assert "damaged" in capsys.readouterr().err
    for panel, metric, count in zip(figure.axes, ("loss", "accuracy"), (2, 1)):
        assert len(panel.lines) == 2 * count
        training, validation = panel.lines[-2:]
        assert training.get_xdata() == pytest.approx([step / 3 for step in range(1, 10)])
        assert validation.get_xdata() == pytest.approx([1, 2, 3])
        assert validation.get_ydata() == pytest.approx(numbers(f"val_{metric}", finished))


def test_load_returns_the_trained_net_with_which_readmes_snippet_classifies_a_picture(finished, tiny, capsys):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    folder, picture = re.findall(r'(?:load|read)\("(.*?)"', code)
    shutil.copytree(finished, folder)
    lenna = Image.open(ROOT / "Lenna.png").convert("RGB")
    lenna.save(picture, "PNG")
    exec(code, {})
    model = train.load(folder)
    assert train.evaluate(model, *load_tiny()[1], "fp32", tta=False)["val_loss"] == numbers("val_loss", finished)[-1]
    pixels = torch.frombuffer(bytearray(lenna.reduce(16).tobytes()), dtype=torch.uint8)
    logits = model(data.normalize(pixels.view(1, 32, 32, 3).permute(0, 3, 1, 2)))
    best = [data.CLASSES[number] for number in logits[0].argsort(descending=True)]
    assert re.findall(r"\d+% (\w+)", capsys.readouterr().out) == best[:3]


@pytest.fixture
def is_held(monkeypatch, tmp_path):
    """Runs take turns, as on a user's machine, with the lock in `tmp_path`; the function says whether one holds it."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def ask():
        try:
            with FileLock(*tmp_path.glob("train.py-*.lock"), timeout=0):
                return False
        except Timeout:
            return True

    return ask


def test_a_run_on_a_cpu_waits_for_another_one_and_says_so(is_held, capsys):
    def wait():
        with train.take_turn("cpu"):
            return is_held()

    with ThreadPoolExecutor(1) as pool:
        with train.take_turn("cpu"):
            waiting = pool.submit(wait)
            while "OMP_NUM_THREADS" not in capsys.readouterr().out:
                assert not waiting.done()
        assert waiting.result()


def test_a_turn_is_an_epoch_with_its_validation(is_held, tiny, before):
    seen = []
    for name in ("backpropagate", "evaluate", "describe"):
        before(train, name, lambda *_, name=name: seen.append((name, is_held())))
    tiny("--epochs 2")
    assert seen == 2 * [*3 * [("backpropagate", True)], ("evaluate", True), ("describe", False)]


@pytest.mark.usefixtures("is_held")
def test_no_run_waits_on_a_gpu_or_with_omp_num_threads_set_or_where_there_can_be_no_lock(monkeypatch, tmp_path):
    with train.take_turn("cpu"), train.take_turn("cuda"):
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        with train.take_turn("cpu"):
            monkeypatch.delenv("OMP_NUM_THREADS")
            (tmp_path / "file").touch()
            monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
            with train.take_turn("cpu"):
                pass


# --------------------------------------------------------------------------------------------------------- resuming
@pytest.fixture(scope="module", params=["--epochs 2.4", "--recipe best --augment both --nets 2 --epochs 2.4"])
def whole(request, tmp_path_factory):
    """Flags of a run, and all in which one that is stopped and resumed must agree with it."""
    return request.param, collect(make_run(tmp_path_factory.mktemp("whole"), request.param))


@pytest.mark.parametrize("place, name, call", [
    (train, "backpropagate", 2), (train, "write_events", 5), (train, "evaluate", 2), (data, "write_file", 3),
    (train, "describe", 2),
])  # fmt: skip
def test_a_run_stopped_anywhere_resumes_to_the_bits_of_one_never_stopped(whole, place, name, call, tiny, before):
    flags, expected = whole
    before(place, name, Mock(side_effect=KeyboardInterrupt), [call])
    assert tiny(f"{flags} --name run").returncode == 130
    assert tiny(f"--resume {RUN}").returncode == 0
    assert collect() == expected


KILLED = """
import os, pytest, conftest, train
monkeypatch = pytest.MonkeyPatch()
tiny = conftest.make_tiny(monkeypatch, ".")
conftest.run_before(monkeypatch, train, "backpropagate", lambda *_: os.kill(os.getpid(), 9), [5])
tiny("--epochs 3 --name run")
"""


def test_a_killed_run_resumed_ends_in_the_same_bits(finished, tiny):
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    assert subprocess.run([sys.executable, "-c", KILLED], env=variables).returncode in (-9, 9)  # on Windows, 9
    assert len(rows()) == 1
    assert tiny(f"--resume {RUN}").returncode == 0
    assert collect() == collect(finished)


def test_ctrl_c_exits_with_130_and_prints_the_command_that_goes_on(finished, tiny, before):
    before(train, "build", Mock(side_effect=KeyboardInterrupt), [1])
    before(train, "backpropagate", Mock(side_effect=KeyboardInterrupt), [5])
    assert tiny("--epochs 3 --name run").returncode == 130  # nothing is saved yet: the name stays free
    outcome = tiny("--epochs 3 --name run")
    assert outcome.returncode == 130
    python, script, *flags = shlex.split(outcome.stdout.splitlines()[-1].split(": ")[1])
    assert (python, script) == ("python", "train.py")
    assert tiny(" ".join(flags)).returncode == 0
    assert collect() == collect(finished)


def test_a_finished_run_resumed_stays_as_it_is_and_with_more_epochs_ends_as_a_longer_one(finished, tiny):
    copy_run(finished)
    (RUN / "metrics.csv").unlink()
    assert tiny(f"--resume {RUN}").returncode == 0
    assert collect() == collect(finished)
    assert tiny(f"--resume {RUN} --epochs 4.4").returncode == 0
    tiny("--epochs 4.4 --name longer")
    assert collect() == collect(RUN.parent / "longer")


def test_more_epochs_keep_the_earlier_accuracy_with_test_time_augmentation(tiny):
    for flags in "--epochs 2 --tta --name run", f"--resume {RUN} --epochs 4":
        assert tiny(flags).stderr == ""
    assert [row["val_accuracy_tta"] != "" for row in rows()] == [False, True, False, True]


@pytest.mark.parametrize("begun, flag, old, new", [
    ({}, "--lr", "0.001", "0.01"), ({}, "--epochs", "3.0", "2.0"), ({"decay": True}, "--epochs", "3.0", "4.0"),
    ({"sizes": [(16, 0.5)]}, "--epochs", "3.0", "4.0"), ({"epochs": 2.5}, "--epochs", "2.5", "4.0"),
])  # fmt: skip
def test_a_flag_that_would_change_an_earlier_step_is_refused_with_both_values(begun, flag, old, new, finished, tiny):
    copy_run(finished, lambda saved: saved["settings"].update(begun))
    line = complain(tiny(f"--resume {RUN} {flag} {new}"), 2)
    assert flag in line and old in line and new in line


@pytest.mark.parametrize("begun, bf16, flags, used", [
    ("cpu bf16", False, "", "bf16"), ("cpu fp32", True, "", "fp32"),  # as it was asked for
    ("cpu auto", False, "", "fp32"), ("cpu auto", True, "", "bf16"), ("cuda auto", False, "", "fp32"),
    ("cpu bf16", True, "--precision fp32", "fp32"), ("cuda fp32", False, "--device cpu --precision bf16", "bf16"),
])  # fmt: skip
def test_a_run_may_go_on_with_another_device_precision_or_data(begun, bf16, flags, used, finished, tiny, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": bf16})
    copy_run(finished, lambda saved: saved["settings"].update(zip(("device", "precision"), begun.split())))
    assert tiny(f"--resume {RUN} --epochs 4 --data elsewhere {flags}").returncode == 0
    config = json.loads((RUN / "config.json").read_text())
    assert (config["device"], config["precision"]) == ("cpu", used)


# -------------------------------------------------------------------------------------------------- what goes wrong
@pytest.mark.parametrize("flags", [
    "--lr nan", "--lr 9e-10", "--lr 1001", "--epochs 9e-7", "--epochs 1000001", "--batch-size 1", "--batch-size 50001",
    "--widths 0", "--widths 4097", "--nets 0", "--nets 101", "--label-smoothing -0.1", "--label-smoothing 1.1",
    "--held-out -5", "--held-out 49999", "--seed -1", "--seed 2147483648", "--sizes 15:0.5", "--sizes 65:1",
    "--sizes 16:1.1", "--sizes 16:0.6 24:0.2", "--sizes 24", "--mirror", "--widths 12 --mirror --whiten",
    "--sizes 20:0.5 --mirror --whiten", "--device cuda", "--recipe cake", "--colour red",
    "--widths 8 8 8 8", "--precision fp8", "--optimizer sgd", "--augment blur",
])  # fmt: skip
def test_misuse_gets_one_line_that_names_the_flag_and_makes_no_folder(flags, tiny, tmp_path):
    assert flags.split()[0] in complain(tiny(flags), 2)
    assert not list(tmp_path.iterdir())


class Code:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_the_ends_of_all_ranges_are_accepted():
    read_settings("--lr 1e-9 --epochs 1e-6 --batch-size 2 --widths 1 --label-smoothing 0 --seed 0 --sizes 16:0")
    read_settings("--lr 1e3 --epochs 1e6 --batch-size 50000 --widths 4096 --label-smoothing 1 --sizes 64:1 --nets 100")
    read_settings("--held-out 49998 --seed 2147483647")


@pytest.mark.parametrize("word, change", [
    ("missing", lambda path, raw, saved: path.unlink()),
    ("damaged", lambda path, raw, saved: path.write_bytes(raw[:-100])),
    ("damaged", lambda path, raw, saved: path.write_bytes(raw.replace(bytes(saved["generator"][99:107]), b"12345678"))),
    ("damaged", lambda path, raw, saved: torch.save(saved | {"code": Code()}, path)),
    ("format", lambda path, raw, saved: torch.save({"format": train.FORMAT - 1}, path)),
    ("fit", lambda path, raw, saved: torch.save(saved | {"model": {}}, path)),
    ("fit", lambda path, raw, saved: torch.save(saved | {"optimizer": {}}, path)),
])  # fmt: skip
def test_an_unusable_checkpoint_gets_a_line_that_says_why_and_code_in_it_is_not_run(word, change, finished, tiny):
    copy_run(finished)
    path = RUN / "checkpoint.pt"
    change(path, path.read_bytes(), torch.load(path, weights_only=True))
    line = complain(tiny(f"--resume {RUN}"), 1)
    assert "checkpoint.pt" in line and word in line
    assert not Path("executed").exists()


def test_a_full_disk_ends_the_run_in_a_line_and_it_goes_on_later(finished, tiny, before):
    before(os, "fsync", Mock(side_effect=OSError("No space left")), range(2, 7))  # after the first checkpoint
    outcome = tiny("--epochs 3 --name run")
    assert (outcome.returncode, outcome.stderr.count("\n")) == (1, 2)  # TensorBoard's events have failed before
    assert "No space left" in outcome.stderr.splitlines()[-1]
    assert not list(RUN.glob("*.part"))
    assert tiny(f"--resume {RUN}").returncode == 0
    assert collect() == collect(finished)


@pytest.mark.parametrize("function, named", [
    ("write_config", "config.json"), ("write_metrics", "metrics.csv"), ("open_events", "TensorBoard"),
    ("write_events", "TensorBoard"), ("draw_curves", "curves.png"),
])  # fmt: skip
def test_whatever_else_fails_to_be_written_gets_a_line_and_the_run_goes_on(function, named, finished, tiny, before):
    before(train, function, Mock(side_effect=OSError("No space left")))
    outcome = tiny("--epochs 3 --name run")
    assert outcome.returncode == 0
    (line,) = outcome.stderr.splitlines()
    assert named in line and "No space left" in line
    torch.testing.assert_close(train.load(RUN).state_dict(), train.load(finished).state_dict(), rtol=0, atol=0)


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(finished, tiny, monkeypatch):
    copy_run(finished)
    monkeypatch.setitem(train.METRICS, "loss", lambda logits, labels: labels * float("nan"))
    assert "--lr" in complain(tiny(f"--resume {RUN} --epochs 4"), 1)
    torch.testing.assert_close(train.load(RUN).state_dict(), train.load(finished).state_dict(), rtol=0, atol=0)
