import os
import shutil

import jax
import numpy as np
import pytest
from conftest import TINY, changed

from jaxgpt.models import build_model
from jaxgpt.training.checkpoint import (
    find_step,
    open_checkpoints,
    restore_state,
    save_state,
)
from jaxgpt.training.sharding import make_mesh
from jaxgpt.training.step import compile_train_steps, create_state

MODEL = build_model(TINY.model)
MESH = make_mesh(TINY)


def state_at(step, shift=0.0):
    state = create_state(MODEL, TINY, MESH)
    params = jax.tree.map(lambda a: a + shift, state.params)
    return state.replace(step=state.step + step, params=params)


@pytest.fixture
def checkpoints(tmp_path):
    with open_checkpoints(tmp_path / "checkpoints", create=True) as manager:
        yield manager


def save(checkpoints, losses):
    for step, loss in losses.items():
        save_state(checkpoints, state_at(step), loss)
    checkpoints.wait_until_finished()


def test_the_state_comes_back_bit_for_bit(checkpoints):
    state = state_at(7, shift=0.125)
    save_state(checkpoints, state, None)
    checkpoints.wait_until_finished()
    restored = restore_state(checkpoints, 7, MODEL, TINY, MESH)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_a_save_in_the_background_is_of_the_state_it_was_given(checkpoints):
    tokens = np.zeros((1, 8, TINY.model.block_size), np.int32)
    train_steps = compile_train_steps(MODEL, TINY, MESH, 1)  # takes over its state
    state, given = state_at(0), {}
    for step in range(1, 6):
        state, _ = train_steps(state, (tokens, tokens))
        given[step] = jax.tree.map(np.array, jax.device_get(state))
        save_state(checkpoints, state, -float(step))
        state, _ = train_steps(state, (tokens, tokens + 1))
        checkpoints.wait_until_finished()
        restored = restore_state(checkpoints, step * 2 - 1, MODEL, TINY, MESH)
        jax.tree.map(np.testing.assert_array_equal, restored, given[step])


def test_the_best_and_the_latest_are_kept(checkpoints):
    save(checkpoints, {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: 1.5})
    assert sorted(checkpoints.all_steps()) == [2, 5]
    assert find_step(checkpoints, "best") == 2
    assert find_step(checkpoints, "latest") == 5
    assert find_step(checkpoints, "2") == find_step(checkpoints, 2) == 2


def test_a_checkpoint_that_was_not_evaluated_is_not_the_best(checkpoints):
    save(checkpoints, {1: 3.0, 2: None})
    assert find_step(checkpoints, "best") == 1
    assert find_step(checkpoints, "latest") == 2


def test_without_an_evaluated_checkpoint_the_best_is_the_latest(checkpoints):
    save(checkpoints, {2: None})
    assert find_step(checkpoints, "best") == 2


def test_a_step_that_is_not_there_is_an_error_that_lists_those_that_are(checkpoints):
    with pytest.raises(FileNotFoundError, match="no checkpoint yet"):
        find_step(checkpoints, "best")
    save(checkpoints, {4: 1.0})
    for which in ("3", "newest", "²"):
        with pytest.raises(ValueError, match="not one of: best, latest, 4"):
            find_step(checkpoints, which)


@pytest.mark.parametrize(
    "damage",
    [
        lambda step: shutil.rmtree(step / "params"),
        lambda step: shutil.rmtree(step / "progress"),
        lambda step: (step / "params" / "_METADATA").write_text(""),
        lambda step: [os.truncate(p, 10) for p in (step / "params" / "d").iterdir()],
        lambda step: (step.parent / "9").mkdir(),
    ],
    ids=["no params", "no progress", "torn metadata", "torn data", "empty step"],
)
@pytest.mark.filterwarnings("ignore")  # Orbax leaves threads of its own behind
def test_a_damaged_checkpoint_is_named(checkpoints, damage):
    save(checkpoints, {4: 1.0})
    damage(checkpoints.directory / "4")
    with open_checkpoints(checkpoints.directory) as reopened:
        step = find_step(reopened, "latest")
        with pytest.raises(ValueError, match=rf"checkpoints/{step} is damaged"):
            restore_state(reopened, step, MODEL, TINY, MESH)


def test_a_checkpoint_of_another_config_names_the_first_parameter(checkpoints):
    save(checkpoints, {4: 1.0})
    other = changed(TINY, model={"n_embd": 32})
    with pytest.raises(ValueError, match=r"another config: h\.attn\.c_attn\.kernel is"):
        restore_state(checkpoints, 4, build_model(other.model), other, MESH)
    biased = changed(TINY, model={"bias": True})
    with pytest.raises(ValueError, match=r"c_attn\.bias is missing there"):
        restore_state(checkpoints, 4, build_model(biased.model), biased, MESH)


@pytest.mark.parametrize(
    ("several", "error"), [(False, "is damaged"), (True, "^the other process is gone")]
)
def test_a_lost_process_is_no_damage_of_the_checkpoints(
    tmp_path, monkeypatch, several, error
):
    def lose(*args, **options):
        raise RuntimeError("the other process is gone")

    where = "jaxgpt.training.checkpoint"
    monkeypatch.setattr(f"{where}.several_processes", lambda: several)
    monkeypatch.setattr(f"{where}.ocp.CheckpointManager", lose)
    with pytest.raises((ValueError, RuntimeError), match=error):
        open_checkpoints(tmp_path)
