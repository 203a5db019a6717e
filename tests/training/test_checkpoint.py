import os
import re
import shutil
import time

import jax
import numpy as np
import pytest
from conftest import TINY, changed

from jaxgpt.models import build_model
from jaxgpt.parallel.mesh import make_mesh
from jaxgpt.training.checkpoint import (
    check_saves,
    find_step,
    newest_whole,
    open_checkpoints,
    restore_state,
    save_state,
    val_loss,
)
from jaxgpt.training.step import compile_train_steps, create_state

MODEL = build_model(TINY.model, "cpu")
MESH = make_mesh(TINY)

CHECKPOINT = "jaxgpt.training.checkpoint"


def state_at(step, shift=0.0):
    state = create_state(MODEL, TINY, MESH)
    params = jax.tree.map(lambda a: a + shift, state.params)
    return state.replace(step=state.step + step, params=params)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


def save(folder, losses):
    with open_checkpoints(folder) as checkpoints:
        for step, loss in losses.items():
            save_state(checkpoints, state_at(step), loss)


def restore(folder, step, config=TINY):
    return restore_state(folder, step, build_model(config.model, "cpu"), config, MESH)


def saved_steps(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def test_the_state_comes_back_bit_for_bit(folder):
    state = state_at(7, shift=0.125).replace(skipped=np.int32(3))
    with open_checkpoints(folder) as checkpoints:
        save_state(checkpoints, state, None)
    restored = restore(folder, 7)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_a_save_in_the_background_is_of_the_state_it_was_given(folder):
    tokens = np.zeros((1, 8, TINY.model.block_size), np.int32)
    train_steps = compile_train_steps(MODEL, TINY, MESH, 1)  # takes over its state
    state, given = state_at(0), {}
    for step in range(1, 6):
        with open_checkpoints(folder) as checkpoints:
            state, _ = train_steps(state, (tokens, tokens))
            given[step] = jax.tree.map(np.array, jax.device_get(state))
            save_state(checkpoints, state, -float(step))
            state, _ = train_steps(state, (tokens, tokens + 1))
        restored = restore(folder, step * 2 - 1)
        jax.tree.map(np.testing.assert_array_equal, restored, given[step])


def test_the_best_and_the_latest_two_are_kept(folder):
    save(folder, {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: 1.5})
    assert saved_steps(folder) == [2, 4, 5]
    assert find_step(folder, "best") == 2
    assert find_step(folder, "latest") == 5
    assert find_step(folder, "2") == find_step(folder, 2) == 2


def test_a_checkpoint_that_was_not_evaluated_is_not_the_best(folder):
    save(folder, {1: 3.0, 2: None})
    assert find_step(folder, "best") == 1
    assert find_step(folder, "latest") == 2


def test_without_an_evaluated_checkpoint_the_best_is_the_latest(folder):
    save(folder, {2: None})
    assert find_step(folder, "best") == 2


def test_a_step_that_is_not_there_is_an_error_that_lists_those_that_are(folder):
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match="no checkpoint yet"):
        find_step(folder, "best")
    save(folder, {4: 1.0})
    for which in ("3", "newest", "²"):
        with pytest.raises(ValueError, match="not one of: best, latest, 4"):
            find_step(folder, which)


def alter(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "is missing|has no": lambda path: path.unlink(),
    "bytes, not|as it was": lambda path: os.truncate(path, path.stat().st_size // 2),
    "not what was saved|as it was|is missing": alter,
}
WRITTEN_LAST = {"_CHECKPOINT_METADATA", "commit_success.txt"}


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory):
    """Checkpoints 4 and 6, of which 6 is the better; to be copied."""
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    save(folder, {4: 1.0, 6: 0.5})
    return folder


@pytest.mark.parametrize("message", DAMAGES)
def test_any_file_that_is_missing_cut_or_altered_is_found_and_the_one_before_taken(
    two_saved, tmp_path, capsys, message
):
    paths = [path for path in (two_saved / "6").rglob("*") if path.is_file()]
    assert len(paths) > 20
    for path in paths:
        shutil.rmtree(tmp_path)
        shutil.copytree(two_saved, tmp_path)
        damaged = tmp_path / path.relative_to(two_saved)
        DAMAGES[message](damaged)
        if path.name in WRITTEN_LAST:  # Orbax's own notes, which nothing reads
            assert restore(tmp_path, 6).step == 6
            continue
        assert newest_whole(tmp_path) == 4
        told = capsys.readouterr().err
        assert re.search(message, told), (damaged, told)
        assert saved_steps(tmp_path) == [4]
        assert (tmp_path / "6.damaged").is_dir()


@pytest.mark.parametrize("part", ["params/_METADATA", "metrics/metrics"])
def test_reading_takes_the_one_before_but_not_in_place_of_a_step_asked_for(
    two_saved, tmp_path, capsys, part
):
    shutil.copytree(two_saved, tmp_path, dirs_exist_ok=True)
    alter(tmp_path / "6" / part)
    for which in ("best", "latest"):
        assert find_step(tmp_path, which) == 4
        assert re.search(r"6 is damaged.*step 4 is taken", capsys.readouterr().err)
    with pytest.raises(ValueError, match=r"6 is damaged: .* bring it back"):
        find_step(tmp_path, 6)
    assert saved_steps(tmp_path) == [4, 6]


def test_parameters_can_be_read_though_the_optimizers_state_has_changed(
    two_saved, tmp_path
):
    shutil.copytree(two_saved, tmp_path, dirs_exist_ok=True)
    alter(tmp_path / "6" / "progress" / "_METADATA")
    assert find_step(tmp_path, "latest") == 6
    assert find_step(tmp_path, "latest", ("params", "progress")) == 4


def test_the_order_of_the_best_is_the_same_for_a_process_that_reads_nothing(
    two_saved, tmp_path, monkeypatch
):
    shutil.copytree(two_saved, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr("jaxgpt.training.checkpoint.process_share", lambda names: [])
    assert val_loss(tmp_path, 6) == 0.5
    (tmp_path / "6" / "metrics" / "metrics").write_text('{"val_loss": 7.5}')
    assert val_loss(tmp_path, 6) is None


def test_a_checkpoint_under_the_name_of_another_step_is_refused(two_saved, tmp_path):
    shutil.copytree(two_saved / "6", tmp_path / "8")
    with pytest.raises(ValueError, match="8 is of step 6; give it its name back"):
        restore(tmp_path, 8)


def test_a_save_that_orbax_declines_is_an_error(folder):
    save(folder, {4: 1.0})
    with (
        open_checkpoints(folder) as checkpoints,
        pytest.raises(OSError, match="there is a checkpoint of a step after 2"),
    ):
        save_state(checkpoints, state_at(2), None)


def test_if_no_checkpoint_is_whole_all_are_listed_and_stay(two_saved, tmp_path):
    shutil.copytree(two_saved, tmp_path, dirs_exist_ok=True)
    (tmp_path / "4" / "digests.json").write_text("{}")
    shutil.rmtree(tmp_path / "6" / "progress")
    shutil.copytree(tmp_path / "6", tmp_path / "9", dirs_exist_ok=True)
    (tmp_path / "9" / "digests.json").unlink()
    (tmp_path / "12").mkdir()
    everything = r"12 is damaged.*9 is damaged.*6 is damaged.*4 is damaged"
    with pytest.raises(ValueError, match=rf"none .* is whole: .*{everything}"):
        newest_whole(tmp_path)
    with pytest.raises(ValueError, match=r"12 is damaged.*9 is.*6 is.*4 is damaged"):
        find_step(tmp_path, "latest")
    assert saved_steps(tmp_path) == [4, 6, 9, 12]


def test_training_goes_on_beside_what_was_set_aside(two_saved, tmp_path):
    shutil.copytree(two_saved, tmp_path, dirs_exist_ok=True)
    for _ in range(2):  # the step that is saved anew may be damaged anew
        alter(tmp_path / "6" / "params" / "manifest.ocdbt")
        assert newest_whole(tmp_path) == 4
        save(tmp_path, {6: 0.5})
        assert restore(tmp_path, 6).step == 6
    assert newest_whole(tmp_path / "nowhere") is None


def test_a_save_that_fails_is_told_of_at_the_next_step(folder, monkeypatch):
    def fail(path):
        raise OSError(28, "No space left on device")

    save(folder, {2: 1.0})
    monkeypatch.setattr(f"{CHECKPOINT}._sha256s", fail)
    message = r"could not be saved \(.*No space left.* are kept"
    with open_checkpoints(folder) as checkpoints:
        save_state(checkpoints, state_at(4), None)
        while checkpoints.is_saving_in_progress():
            time.sleep(0.01)
        with pytest.raises(OSError, match=message):
            check_saves(checkpoints, 2)
    with pytest.raises(OSError, match=message), open_checkpoints(folder) as checkpoints:
        save_state(checkpoints, state_at(4), None)
    monkeypatch.undo()
    assert newest_whole(folder) == 2


def test_memory_is_given_back_once_after_each_save(folder, monkeypatch):
    given = []
    monkeypatch.setattr(f"{CHECKPOINT}.give_back_memory", lambda: given.append(True))
    with open_checkpoints(folder) as checkpoints:
        saved = check_saves(checkpoints, None)
        for step in (2, 4):
            save_state(checkpoints, state_at(step), None)
            checkpoints.wait_until_finished()
            for _ in range(2):
                saved = check_saves(checkpoints, saved)
            assert saved == step
            assert len(given) == step / 2


def test_a_checkpoint_of_another_config_names_the_first_parameter(folder):
    save(folder, {4: 1.0})
    other = changed(TINY, model={"n_embd": 32})
    with pytest.raises(ValueError, match=r"another config: h\.attn\.c_attn\.kernel is"):
        restore(folder, 4, other)
    biased = changed(TINY, model={"bias": True})
    with pytest.raises(ValueError, match=r"c_attn\.bias is missing there"):
        restore(folder, 4, biased)


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
    with (
        pytest.raises((ValueError, RuntimeError), match=error),
        open_checkpoints(tmp_path),
    ):
        pass
