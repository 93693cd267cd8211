"""A run that is stopped or killed goes on bit for bit; what does not fit it is refused, and nothing is lost."""

import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, agree, complain, config, list_files, raising, rows, scalars, unix

import data
import train


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
def test_resume_starts_a_new_run_if_the_settings_differ(tiny, tmp_path, flags):
    assert tiny(*flags.split()).returncode == 0
    outcome = tiny("--resume")
    assert "starts" in outcome.stdout and len([*tmp_path.glob("experiments/*/metrics.csv")]) == 2


def test_resume_continues_the_highest_number_whatever_the_dates(finished, copy, tiny):
    name = "baseline-lr0.001-none-epochs=3-seed0"
    for date, ending in enumerate(("-2", "-10", "")):
        os.utime(copy(name=name + ending) / "checkpoint.pt", (date, date))
    assert f"{name}-10 on" in tiny("--epochs", 3, "--resume").stdout


def test_resume_restarts_the_newest_run_if_it_has_no_checkpoint(tiny, before):
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
    outcome = subprocess.run([sys.executable, ROOT / "train.py"], env=environment, capture_output=True, text=True)
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


def test_a_run_finished_with_tta_can_be_trained_longer(tiny, tmp_path):
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
    (lambda saved: saved.clear(), "is damaged or not a checkpoint"),
])  # fmt: skip
def test_a_checkpoint_of_another_net_is_refused_with_the_reason(copy, tiny, tmp_path, change, says):
    copy(change)
    before = list_files(tmp_path)
    assert says in complain(tiny("--name", "run", "--resume"), 2)
    assert list_files(tmp_path) == before


def test_an_unreadable_checkpoint_prints_permission_denied_not_damaged(copy, tiny, before):
    copy()
    before(Path, "read_bytes", raising(PermissionError(13, "Permission denied", "checkpoint.pt")))
    line = complain(tiny("--name", "run", "--resume"), 1)
    assert "Permission denied: checkpoint.pt" in line and "damaged" not in line


@pytest.mark.parametrize("problem", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_checkpoint_too_large_for_memory_prints_out_of_memory_not_damaged(copy, tiny, before, problem):
    copy()
    before(torch, "load", raising(problem))
    line = complain(tiny("--name", "run", "--resume"), 1)
    assert "out of memory" in line and "damaged" not in line


def test_an_error_in_the_net_keeps_its_own_traceback(copy, tiny, before):
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


def test_a_checkpoint_with_code_is_refused_without_running_the_code(copy, monkeypatch, tmp_path):
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
