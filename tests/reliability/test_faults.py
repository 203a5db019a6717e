"""The surroundings of a run fail: a full disk, a read-only folder, a signal."""

import re
import shutil
import signal
import sys

import pytest
from conftest import contents, finish, start_script

from jaxgpt import load_run
from jaxgpt.training.monitor import read_rows

SMOKE = ("train.py", "smoke", "--out-dir")


def limited(setup, *arguments):
    """Starts a script after `setup`, Python code that limits its process."""
    start = "import os, sys; x = sys.executable; os.execv(x, [x, *sys.argv[1:]])"
    return start_script("-c", f"{setup}; {start}", *arguments)


def full_disk(size, *arguments):
    """Starts a script that can't write files of more than so many bytes."""
    setup = f"import resource as r; r.setrlimit(r.RLIMIT_FSIZE, ({size}, {size}))"
    return limited(setup, *arguments)


def steps_logged(run_dir):
    rows = read_rows(run_dir / "metrics.jsonl")
    return [row["step"] for row in rows if row["event"] == "train"]


@pytest.mark.processes
def test_a_full_disk_keeps_earlier_checkpoints_and_the_run_resumes(smoke, tmp_path):
    run_dir = shutil.copytree(smoke[0], tmp_path / "run")
    before = contents(run_dir / "checkpoints")
    longer = (*SMOKE, run_dir, "--resume", "--train.max-steps", "110")
    # Orbax puts the optimizer's 600 KB into one file or a few, and the 300 KB of
    # parameters too.
    _, err = finish(full_disk(100_000, *longer), code=1)
    assert re.match("error: .*--resume", err.splitlines()[-1])
    assert "Traceback" not in err
    assert before.items() <= contents(run_dir / "checkpoints").items()
    finish(start_script(*longer))
    assert load_run(run_dir, "latest").step == 110
    assert steps_logged(run_dir) == list(range(1, 111))


@pytest.mark.processes
def test_a_disk_too_full_for_metrics_stops_the_run_and_it_resumes(tmp_path):
    run_dir = tmp_path / "run"
    _, err = finish(full_disk(8_000, *SMOKE, run_dir), code=1)
    assert err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in err
    assert 0 < len(steps_logged(run_dir)) < 100
    finish(start_script(*SMOKE, run_dir, "--resume"))
    assert steps_logged(run_dir) == list(range(1, 101))


@pytest.mark.skipif(sys.platform != "linux", reason="prctl exists only on Linux")
def test_a_folder_without_write_permission_is_named(tmp_path):
    tmp_path.chmod(0o555)
    # Root may write anywhere; 24 (PR_CAPBSET_DROP) takes that right from it.
    drop = "import ctypes; [ctypes.CDLL(None).prctl(24, n) for n in (1, 2)]"
    try:
        _, err = finish(limited(drop, *SMOKE, tmp_path / "run"), code=1)
    finally:
        tmp_path.chmod(0o755)
    (line,) = err.splitlines()
    assert re.match(f"error: .*{tmp_path / 'run'}", line)


SIGNALLED = """
import os, train
from jaxgpt import exits
from jaxgpt.training import evaluation

make_losses_step = evaluation.make_losses_step

def signalled(*arguments):
    os.kill(os.getpid(), {number})
    return make_losses_step(*arguments)

evaluation.make_losses_step = signalled
with exits.plain_errors():
    train.main()
"""


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_after_the_last_step_keeps_the_run(smoke, tmp_path, number):
    run_dir = shutil.copytree(smoke[0], tmp_path / "run")
    resume = (*SMOKE, run_dir, "--resume")  # only the evaluation is left to do
    script = SIGNALLED.format(number=int(number))  # after the last step
    _, err = finish(start_script("-c", script, *resume[1:]), 128 + number)
    assert f"python train.py --out-dir {run_dir} --resume" in err
    assert "Traceback" not in err
    before = contents(run_dir / "checkpoints")
    finish(start_script(*resume))
    assert contents(run_dir / "checkpoints") == before
    events = [row["event"] for row in read_rows(run_dir / "metrics.jsonl")]
    assert events.count("done") == 1
