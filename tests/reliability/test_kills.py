"""A real train.py is killed at random moments; the resumed run must be the same.

`pytest --full -m processes tests/reliability/test_kills.py` kills it 20 times, not 4.
"""

import hashlib
import itertools
import os
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import ROOT, finish, start_script

from jaxgpt.run import load_state
from jaxgpt.training.checkpoint import find_steps, saved_steps
from jaxgpt.training.monitor import read_rows

pytestmark = pytest.mark.processes
SMOKE = (
    *("train.py", "smoke", "--train.steps-per-call", "1"),
    *("--data.gradient-accumulation-steps", "2", "--train.eval-iters", "20"),
    *("--train.eval-interval", "20", "--train.checkpoint-interval", "5"),
)


def rows_of(run_dir, event):
    return [r for r in read_rows(run_dir / "metrics.jsonl") if r["event"] == event]


# Conditions to kill a run, each true in one part of its loop after so many steps.


def in_steps(run_dir, after):
    return len(rows_of(run_dir, "train")) >= after


def in_a_save(run_dir, after):
    saves = (run_dir / "checkpoints").glob("*.orbax-checkpoint-tmp*")
    return in_steps(run_dir, after) and any(saves)


def in_an_evaluation(run_dir, after):
    steps, evaluated = (len(rows_of(run_dir, event)) for event in ("train", "eval"))
    return steps >= after and steps == 20 * evaluated


def in_the_start(run_dir, after):
    """While it imports, compiles or evaluates for the first time."""
    return (run_dir / ("lock", "config.json", "metrics.jsonl")[after % 3]).exists()


MOMENTS = (in_steps, in_a_save, in_an_evaluation, in_the_start)


def pytest_generate_tests(metafunc):
    if "kill" in metafunc.fixturenames:
        count = 20 if metafunc.config.getoption("full") else len(MOMENTS)
        metafunc.parametrize("kill", range(count))


def outcome(run_dir):
    """What a run leaves, except times: its state, its rows and its best step."""
    _, state, _ = load_state(run_dir, "latest")
    leaves = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state))
    rows = [
        {name: row[name] for name in row if not name.endswith(("_second", "_seconds"))}
        for row in read_rows(run_dir / "metrics.jsonl")
    ]
    best = find_steps(run_dir / "checkpoints", "best")[0]
    return hashlib.sha256(leaves).hexdigest(), rows, best


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    finish(start_script(*SMOKE, "--out-dir", run_dir))
    for event, steps in (("train", range(1, 101)), ("eval", range(0, 101, 20))):
        assert [row["step"] for row in rows_of(run_dir, event)] == list(steps)
    return outcome(run_dir)


def test_a_killed_and_resumed_run_equals_the_uninterrupted_one(
    uninterrupted, kill, tmp_path
):
    run_dir, moment = tmp_path / "run", MOMENTS[kill % len(MOMENTS)]
    after = random.Random(kill).randint(1, 95)
    process = start_script(*SMOKE, "--out-dir", run_dir)
    while not moment(run_dir, after) and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    saved = max(saved_steps(run_dir / "checkpoints"), default=0)
    _, err = finish(start_script(*SMOKE, "--out-dir", run_dir, "--resume"))
    if saved:  # no step before the checkpoint is repeated
        assert f"resuming {run_dir} from step {saved}\n" in err
    assert outcome(run_dir) == uninterrupted
    assert not list(run_dir.glob("**/*tmp*"))


def test_a_killed_ppo_run_equals_the_uninterrupted_one(tiny_run, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    words = itertools.product("Tobern t,", repeat=3)
    prompts.write_text("\n".join(f'{{"prompt": "{"".join(w)}"}}' for w in words))
    flags = (
        *("train.py", "ppo", "--init-from", tiny_run, "--data.path", prompts),
        *("--reward", "distinct-words", "--ppo.max-new-tokens", "4"),
        *("--ppo.end", "sentence"),
        *("--ppo.kl-target", "0.1", "--ppo.kl-horizon", "1000"),
        *("--data.batch-size", "32", "--train.max-steps", "8"),
        *("--train.eval-interval", "4", "--train.checkpoint-interval", "1"),
    )
    finish(start_script(*flags, "--out-dir", tmp_path / "whole"))
    run_dir = tmp_path / "run"
    process = start_script(*flags, "--out-dir", run_dir)
    while not in_steps(run_dir, 3) and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    finish(start_script("train.py", "--out-dir", run_dir, "--resume"))
    assert outcome(run_dir) == outcome(tmp_path / "whole")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no terminals of Unix")
def test_a_closed_terminal_leaves_a_checkpoint_of_the_last_step(tmp_path):
    pty = pytest.importorskip("pty")
    run_dir, never = tmp_path / "run", 10**6
    names = ("max-steps", "eval-interval", "checkpoint-interval")
    master, terminal = pty.openpty()
    # The run needs a session of its own, whose controlling terminal this is.
    start = (
        "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", start, *SMOKE, "--out-dir", run_dir]
        + [f"--train.{name}={never}" for name in names],
        cwd=ROOT,
        **dict.fromkeys(("stdin", "stdout", "stderr"), terminal),
        start_new_session=True,
    )
    os.close(terminal)
    while not in_steps(run_dir, 5):
        assert os.read(master, 10_000)  # the progress bar
    os.close(master)
    assert process.wait(timeout=1200) == 128 + signal.SIGHUP
    last = rows_of(run_dir, "train")[-1]["step"]
    assert saved_steps(run_dir / "checkpoints")[-1] == last < never
