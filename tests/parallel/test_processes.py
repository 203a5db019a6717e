"""Several real processes over loopback, as hosts of a pod or a cluster would be."""

import itertools
import re
import signal
import socket

import numpy as np
import pytest
from conftest import finish, losses, start_script

from jaxgpt.parallel.processes import join_processes

LIMIT = 1200  # seconds, against hanging only
SHORT = ("--train.max-steps", 40, "--train.eval-interval", 20)
# train.py, except that the process sends itself a signal before it reads a step.
SIGNALLED = """
import os, train
from jaxgpt import exits

def read_batches(source, steps, *args, read=train.read_batches):
    if steps.start == {step}:
        os.kill(os.getpid(), {number})
    return read(source, steps, *args)

train.read_batches = read_batches
with exits.plain_errors():
    train.main()
"""


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start_two(
    run_dir, *arguments, preset="smoke", each=((), ()), signalled=None, **how
):
    """Starts two processes of 2 devices.

    `each` has the flags of one process alone. The process `signalled` gets the signal
    `number` before it reads the batch of `step`.
    """
    flags = ("--out-dir", run_dir, "--num-processes", 2, "--train.steps-per-call", 1)
    flags += ("--coordinator-address", f"127.0.0.1:{free_port()}", *SHORT, *arguments)
    scripts = [["train.py"], ["train.py"]]
    if signalled is not None:
        scripts[signalled] = ["-c", SIGNALLED.format(**how)]
    return [
        start_script(
            *(*scripts[index], preset, *flags, "--process-id", index, *each[index]),
            JAX_NUM_CPU_DEVICES="2",
        )
        for index in range(2)
    ]


def finish_all(started, code=0):
    """Waits for all to exit with `code`; returns what each wrote to stderr."""
    return [finish(process, code, timeout=LIMIT)[1] for process in started]


def assert_trained_as(run_dir, expected):
    assert losses(run_dir).keys() == expected.keys()
    found = list(losses(run_dir).values())
    np.testing.assert_allclose(found, list(expected.values()), rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def alone(make_once):
    """Losses of one process's smoke run on one device."""

    def make(folder):
        flags = ("--out-dir", folder / "run", "--mesh.data", 1, *SHORT)
        finish_all([start_script("train.py", "smoke", *flags)])

    found = losses(make_once("alone", make) / "run")
    assert len(found) == 40
    return found


@pytest.mark.processes
def test_slurm_tasks_find_each_other_and_train_as_one_process(tmp_path, alone):
    job = {
        "SLURM_JOB_ID": str(free_port()),  # JAX derives a port from it
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "JAX_NUM_CPU_DEVICES": "2",
    }
    sharded = ("--mesh.data", 1, "--mesh.fsdp", 2, "--mesh.tensor", 2)
    command = ("train.py", "smoke", "--out-dir", tmp_path / "run", *sharded, *SHORT)
    tasks = [
        start_script(*command, **job, SLURM_PROCID=str(i), SLURM_LOCALID=str(i))
        for i in range(2)
    ]
    first, second = finish_all(tasks)
    assert "2 processes, 4 devices" in first
    assert "step 40/40" in first
    assert "step" not in second  # only the first one logs
    assert_trained_as(tmp_path / "run", alone)
    sample = ("generate.py", "--run-dir", tmp_path / "run", "--max-new-tokens", 5)
    out, _ = finish(start_script(*sample, "--prompt", "ROMEO:"), timeout=LIMIT)
    assert out.startswith("ROMEO:")


@pytest.mark.processes
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_and_the_run_resumes(tmp_path, alone, victim):
    run_dir = tmp_path / "run"
    every_10 = ("--train.checkpoint-interval", 10)
    kill = {"signalled": victim, "number": signal.SIGKILL, "step": 25}
    started = start_two(run_dir, *every_10, **kill)
    _, err = started[1 - victim].communicate(timeout=LIMIT)
    assert started[1 - victim].returncode != 0
    assert "--resume" in err or "task died" in err  # JAX may end the process first
    finish(started[victim], code=-signal.SIGKILL, timeout=LIMIT)
    first, _ = finish_all(start_two(run_dir, "--resume"))
    # To begin the save at step 20, that of step 10 must have been complete.
    assert re.search(r"from step [12]0\b", first)
    assert_trained_as(run_dir, alone)


@pytest.mark.processes
def test_a_signal_to_one_process_saves_and_stops_all(tmp_path, alone):
    run_dir = tmp_path / "run"
    started = start_two(run_dir, signalled=1, number=signal.SIGTERM, step=10)
    first, _ = finish_all(started, code=128 + signal.SIGTERM)
    assert f"python train.py --out-dir {run_dir} --resume" in first
    stopped = max(losses(run_dir))
    assert 10 < stopped < 40
    assert (run_dir / "checkpoints" / str(stopped)).is_dir()
    # One process can resume it, on any number of devices.
    finish_all([start_script("train.py", "--out-dir", run_dir, "--resume")])
    assert_trained_as(run_dir, alone)


@pytest.mark.processes
@pytest.mark.slow
def test_two_processes_train_by_ppo_as_one(tiny_run, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    words = itertools.product("Tobern t,", repeat=3)
    prompts.write_text("\n".join(f'{{"prompt": "{"".join(w)}"}}' for w in words))
    flags = ("--init-from", tiny_run, "--data.path", prompts, "--data.batch-size", 32)
    flags += ("--reward", "distinct-words", "--ppo.max-new-tokens", 4)
    flags += ("--ppo.end", "sentence", "--train.max-steps", 4)
    one = ("train.py", "ppo", *flags, "--mesh.data", 1, "--out-dir", tmp_path / "one")
    finish(start_script(*one), timeout=LIMIT)
    finish_all(start_two(tmp_path / "two", *flags, preset="ppo"))
    assert len(losses(tmp_path / "two")) == 4
    assert_trained_as(tmp_path / "two", losses(tmp_path / "one"))


@pytest.mark.processes
def test_processes_that_cannot_share_a_run_all_exit_with_an_error(tmp_path):
    seeds = (("--train.seed", 1), ("--train.seed", 2))
    for err in finish_all(start_two(tmp_path / "run", each=seeds), code=1):
        assert "error: process 1 " in err
    here, there = tmp_path / "here", tmp_path / "there"
    there.mkdir()
    (there / "lock").touch()
    folders = (("--out-dir", here), ("--out-dir", there))
    started = start_two(tmp_path / "run", "--overwrite", each=folders)
    first, second = finish_all(started, code=1)
    assert f"error: {here} " in first
    assert f"error: {there} " in second
    (tmp_path / "run" / "config.json").touch()
    first, second = finish_all(start_two(tmp_path / "run"), code=1)
    assert f"error: {tmp_path / 'run'} " in first
    assert "error: process 0 " in second


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((None, None, 0), "--coordinator-address, --num-processes and --process-id"),
        (("host:1", 2, None), "--coordinator-address, --num-processes and --process"),
        (("host", 2, 0), "--coordinator-address host "),
        (("host:1", 2, 2), "--process-id 2 .* --num-processes 2"),
    ],
)
def test_flags_that_are_missing_or_invalid_are_an_error(given, message):
    with pytest.raises(ValueError, match=message):
        join_processes(*given)


def test_a_task_that_cannot_find_the_others_is_an_error_that_names_the_flags():
    launched = {"OMPI_COMM_WORLD_SIZE": "2"}  # in a way that JAX does not know
    _, err = finish(start_script("train.py", "smoke", **launched), 1, timeout=LIMIT)
    assert "--coordinator-address, --num-processes and --process-id" in err
