"""Full disks, lost memory, odd environments, several runs at once: a line, or training goes on."""

import ast
import errno
import io
import math
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import filelock
import pytest
import torch
from conftest import ROOT, agree, complain, list_files, make_tiny, raising, rows, scalars, unix
from filelock import FileLock
from PIL import Image

import data
import train


@pytest.mark.parametrize("problem", [
    MemoryError(), torch.cuda.OutOfMemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
])  # fmt: skip
def test_running_out_of_memory_names_the_settings_to_lower(tiny, before, problem):
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
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, "-c", code, *flags]
    return subprocess.run(command, cwd=cwd, env=os.environ | variables, stdout=subprocess.PIPE)


def test_a_run_with_a_japanese_name_trains_on_an_ascii_terminal(tmp_path):
    # to Python, the name is not even text; and a notebook hands on its MPLBACKEND
    variables = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    outcome = run_process(tmp_path, "--name", "実験", "--epochs", "1", MPLBACKEND="nonsense", **variables)
    assert outcome.returncode == 0
    assert b"run experiments/??" in outcome.stdout.replace(b"\\", b"/")
    assert len(rows(tmp_path / "experiments/実験")) == 1
    with Image.open(tmp_path / "experiments/curves.png") as picture:
        assert min(picture.size) > 400


def test_letters_that_the_terminal_lacks_print_as_question_marks(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    data.prepare_script()
    print("実験", flush=True)
    assert raw.getvalue().rstrip() == b"??"


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
def test_runs_on_a_gpu_or_with_omp_num_threads_set_take_no_turns(turns, monkeypatch, device, threads):
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
    ast.parse((ROOT / name).read_text(encoding="utf-8"), feature_version=(3, 8))  # so far it gets, at least
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    monkeypatch.setattr(sys, "version", "3.9.1 (main)")
    with pytest.raises(SystemExit, match=f"^{name} needs Python 3.10 or newer, this is 3.9.1$"):
        runpy.run_path(str(ROOT / name))


def test_a_notebook_keeps_its_signal_handlers(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython", sys)
    monkeypatch.setattr(signal, "signal", lambda *given: pytest.fail("a handler was replaced"))
    assert tiny("--epochs", 1).returncode == 0


def test_training_in_a_notebook_shows_progress(
    tiny, monkeypatch
):  # and a log does not: of the finished run, stderr is empty
    monkeypatch.setitem(sys.modules, "IPython", sys)
    assert "0/3 [" in tiny("--epochs", 1).stderr
