"""What surrounds a run fails: a full disk, a folder not to be written, a signal."""

import re
import shutil
import signal
import sys
import time

import pytest
from conftest import finish, start_script

from jaxgpt import load_run
from jaxgpt.training.monitor import read_rows

SMOKE = ("train.py", "smoke", "--out-dir")


def limited(setup, *arguments):
    """Starts a script after `setup`, Python code that takes something from it."""
    start = (
        f"{setup}; import os, sys; x = sys.executable; os.execv(x, [x, *sys.argv[1:]])"
    )
    return start_script("-c", start, *arguments)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def steps_logged(run_dir):
    rows = read_rows(run_dir / "metrics.jsonl")
    return [row["step"] for row in rows if row["event"] == "train"]


def test_a_full_disk_leaves_the_checkpoints_there_are_and_the_run_goes_on_later(
    smoke, tmp_path
):
    run_dir = tmp_path / "run"
    shutil.copytree(smoke[0], run_dir)
    before = contents(run_dir / "checkpoints")
    longer = (*SMOKE, run_dir, "--resume", "--train.max-steps", "150")
    # No file may be longer than 100 KB: Orbax puts the optimizer's 600 into one file or
    # a few, as it happens, and the parameters' 300 too.
    no_room = "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (100_000, 100_000))"
    _, err = finish(limited(no_room, *longer), code=1)
    last = err.splitlines()[-1]
    assert re.match("error: .*could not be saved .*too large.*room.*--resume$", last)
    assert "Traceback" not in err
    after = contents(run_dir / "checkpoints")
    assert {path: after.get(path) for path in before} == before
    finish(start_script(*longer))
    assert load_run(run_dir, "latest").step == 150
    assert steps_logged(run_dir) == list(range(1, 151))


def test_rows_that_find_no_room_stop_the_run_with_a_word(tmp_path):
    no_room = "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (8_000, 8_000))"
    run_dir = tmp_path / "run"
    _, err = finish(limited(no_room, *SMOKE, run_dir), code=1)
    assert re.search("^error: no room is left; make some, and go on", err, re.MULTILINE)
    finish(start_script(*SMOKE, run_dir, "--resume"))
    assert steps_logged(run_dir) == list(range(1, 101))


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_folder_that_may_not_be_written_is_named(tmp_path):
    tmp_path.chmod(0o555)
    # Takes from root the right to write anywhere; others have none (prctl's 24).
    drop = "import ctypes; [ctypes.CDLL(None).prctl(24, n) for n in (1, 2)]"
    try:
        _, err = finish(limited(drop, *SMOKE, tmp_path / "run"), code=1)
    finally:
        tmp_path.chmod(0o755)
    (line,) = err.splitlines()
    assert re.match("error: the permissions forbid it; .*run'$", line)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_a_signal_while_the_run_starts_or_ends_exits_as_in_its_middle(
    smoke, tmp_path, number, status
):
    run_dir = tmp_path / "run"
    shutil.copytree(smoke[0], run_dir)
    # All steps are made: what is left is the evaluation of the whole split.
    process = start_script(*SMOKE, run_dir, "--resume")
    while "resuming" not in (line := process.stderr.readline()):
        assert line or process.poll() is None
    sent = time.monotonic()
    process.send_signal(number)
    _, err = finish(process, status)
    assert time.monotonic() - sent < 10
    assert f"go on with: python train.py --out-dir {run_dir} --resume" in err
    assert "Traceback" not in err
    before = contents(run_dir / "checkpoints")
    finish(start_script(*SMOKE, run_dir, "--resume"))
    assert contents(run_dir / "checkpoints") == before
    rows = read_rows(run_dir / "metrics.jsonl")
    assert [row["event"] for row in rows].count("done") == 1
