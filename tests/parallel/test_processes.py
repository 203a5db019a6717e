"""Several real processes over loopback, as hosts of a pod or a cluster would be."""

import signal
import socket
import time

import numpy as np
import pytest
from conftest import finish, start_script

from jaxgpt.parallel.processes import join_processes
from jaxgpt.training.monitor import read_rows

MINUTE = 60
SHORT = ("--train.max-steps", 40, "--train.eval-interval", 20)


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start_two(run_dir, *arguments, each=((), ())):
    """Starts two processes of 2 devices, with flags; `each` has one's own arguments."""
    address = f"127.0.0.1:{free_port()}"
    return [
        start_script(
            *("train.py", "smoke", "--out-dir", run_dir, "--num-processes", 2),
            *("--coordinator-address", address, "--process-id", index),
            *("--train.steps-per-call", 1, *SHORT, *arguments, *each[index]),
            JAX_NUM_CPU_DEVICES="2",
        )
        for index in range(2)
    ]


def wait_for_step(run_dir, step):
    metrics = run_dir / "metrics.jsonl"
    for _ in range(4 * MINUTE):
        if any(row["step"] >= step for row in read_rows(metrics)):
            return
        time.sleep(0.25)
    raise AssertionError(f"step {step} was not reached")


def losses(run_dir):
    rows = read_rows(run_dir / "metrics.jsonl")
    return [row["loss"] for row in rows if row["event"] == "train"]


def assert_trained_as(run_dir, expected):
    assert len(losses(run_dir)) == len(expected)
    np.testing.assert_allclose(losses(run_dir), expected, rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Losses of one process's smoke run on one device."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    single_device_mesh = ("--out-dir", run_dir, "--mesh.data", 1)
    finish(start_script("train.py", "smoke", *single_device_mesh, *SHORT))
    assert len(losses(run_dir)) == 40
    return losses(run_dir)


def test_slurm_tasks_find_each_other_and_train_as_one_process(tmp_path, alone):
    job = {
        "SLURM_JOB_ID": str(free_port()),  # of which JAX makes a port
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "JAX_NUM_CPU_DEVICES": "2",
    }
    sharded = ("--mesh.data", 1, "--mesh.fsdp", 2, "--mesh.tensor", 2)
    tasks = [
        start_script(
            *("train.py", "smoke", "--out-dir", tmp_path / "run", *sharded, *SHORT),
            **job,
            SLURM_PROCID=str(index),
            SLURM_LOCALID=str(index),
        )
        for index in range(2)
    ]
    (_, first), (_, second) = map(finish, tasks)
    assert "2 processes, 4 devices" in first
    assert "step 40/40" in first
    assert "sample it with: python generate.py" in first
    assert "step" not in second  # the first alone writes
    assert_trained_as(tmp_path / "run", alone)
    sample = ("generate.py", "--run-dir", tmp_path / "run", "--max-new-tokens", 5)
    out, _ = finish(start_script(*sample, "--prompt", "ROMEO:"))
    assert out.startswith("ROMEO:")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_other_and_the_run_resumes(
    tmp_path, alone, victim
):
    run_dir = tmp_path / "run"
    processes = start_two(run_dir, "--train.checkpoint-interval", 10)
    wait_for_step(run_dir, 15)
    processes[victim].kill()
    started = time.monotonic()
    _, err = processes[1 - victim].communicate(timeout=MINUTE)
    assert time.monotonic() - started < MINUTE
    assert processes[1 - victim].returncode not in (0, None)
    ours = "another process of the run has ended" in err
    assert ours or "another task died" in err  # which JAX says if it knows first
    processes[victim].communicate()
    for process in start_two(run_dir, "--resume"):
        finish(process)
    assert_trained_as(run_dir, alone)


def test_a_signal_to_one_process_saves_and_stops_all(tmp_path, alone):
    run_dir = tmp_path / "run"
    processes = start_two(run_dir)
    wait_for_step(run_dir, 10)
    processes[1].send_signal(signal.SIGTERM)
    (_, first), _ = (finish(process, code=143) for process in processes)
    assert f"go on with: python train.py --out-dir {run_dir} --resume" in first
    stopped = len(losses(run_dir))
    assert stopped < 40
    assert (run_dir / "checkpoints" / str(stopped)).is_dir()
    # Goes on with one process, on as many devices as there are.
    finish(start_script("train.py", "--out-dir", run_dir, "--resume"))
    assert_trained_as(run_dir, alone)


def test_processes_that_cannot_share_a_run_are_refused(tmp_path):
    seeds = (("--train.seed", 1), ("--train.seed", 2))
    for process in start_two(tmp_path / "run", each=seeds):
        _, err = finish(process, code=1)
        assert "error: process 1 has other settings or another corpus" in err
    folders = (("--out-dir", tmp_path / "here"), ("--out-dir", tmp_path / "there"))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "lock").touch()
    for process in start_two(tmp_path / "run", "--overwrite", each=folders):
        _, err = finish(process, code=1)
        assert "is not the same directory for all processes; give an --out" in err
    (tmp_path / "run" / "config.json").touch()
    (_, first), (_, second) = (
        finish(process, code=1) for process in start_two(tmp_path / "run")
    )
    assert "already holds a run" in first
    assert "process 0 could not claim" in second


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((None, None, 0), "--num-processes and --process-id go together"),
        (("host:1", 2, None), "--num-processes and --process-id go together"),
        (("host", 2, 0), "--coordinator-address host must be HOST:PORT"),
    ],
)
def test_flags_of_processes_that_cannot_be_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        join_processes(*given)


def test_a_task_that_cannot_find_the_others_says_what_to_give():
    launched = {"OMPI_COMM_WORLD_SIZE": "2"}  # in a way that JAX does not know
    _, err = finish(start_script("train.py", "smoke", **launched), code=1)
    assert "JAX can't find the others; give --coordinator-address" in err
