"""Training and its settings, on a tiny data set; and `quick`, where it is there, on the real one."""

import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, complain, config, load_tiny, raising, rows, scalars, seeded

import data
import network
import train
from loss import CrossEntropyLoss


# ------------------------------------------------------------------------------------------------------------- training
def settings_of(*flags):
    """The settings of a command line, in fp32."""
    return train.read_settings([*flags, "--precision", "fp32"])


@pytest.mark.parametrize("recipe", [name for name in train.RECIPES if name != "best"])  # three nets like dinner's
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


def test_test_time_augmentation_averages_views_of_the_least_certain_quarter_of_images(half_trained):
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
def test_a_curve_point_is_the_mean_over_the_images_since_the_last_point(monkeypatch, first, steps, ends):
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


# ------------------------------------------------------------------------------------------------------------- settings
def test_every_setting_has_a_flag_and_appears_in_run_name_config_and_events(tiny, tmp_path):
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
def test_invalid_arguments_print_one_line_and_create_nothing(tiny, tmp_path, flags, says):
    outcome = tiny(*flags.split())
    assert says in complain(outcome, 2)
    assert len(outcome.stderr.strip().splitlines()) <= 2  # argparse's line of usage comes first
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("recipe", train.RECIPES)
def test_help_shows_each_flag_with_its_value_in_the_chosen_recipe(tiny, recipe):
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


def test_the_baseline_trains_a_randomly_initialized_net_with_adam():
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


def test_whiten_makes_convolutions_start_as_the_identity():
    model, _ = build("--whiten")
    (first, second, third), x = (group[0] for group in model.groups), torch.randn(2, 24, 8, 8, generator=seeded())
    assert torch.equal(model.stem.weight[2::4], -model.stem.weight[::4])
    assert torch.equal(first(x), x)
    assert torch.equal(second(x)[:, :24], x) and second(x)[:, 24:].std() > 0.1  # the other filters stay random
    assert torch.equal(third(second(x)), second(x)[:, :20])


def test_muon_freezes_scales_speeds_up_statistics_and_shrinks_the_head():
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


@pytest.mark.parametrize("flag, precision", [("fp32", "fp32"), ("bf16", "bf16")])
def test_precision_flag_overrides_auto(tiny, tmp_path, before, flag, precision):
    seen = set()
    before(train, "train_step", lambda *given: seen.add(given[-1]))
    before(train, "evaluate", lambda *given: seen.add(given[3]))
    assert tiny("--epochs", 1, "--precision", flag).returncode == 0
    assert seen == {precision}


# ------------------------------------------------------------------------------------------------------------ real data
@pytest.mark.real_data
def test_quick_recipe_gets_75_percent_on_the_real_cifar10(tmp_path):
    command = [sys.executable, ROOT / "train.py", "--recipe", "quick", "--data", ROOT / "datasets"]
    variables = os.environ | {"OMP_NUM_THREADS": "2"}  # the other tests have one thread
    outcome = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    (row,) = rows(next(tmp_path.glob("experiments/*/metrics.csv")).parent)
    assert float(row["val_accuracy"]) >= 0.75
