import json
import os
import re
import shutil
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import TINY, changed, save_params, traced_steps

from jaxgpt.models import build_model
from jaxgpt.parallel.mesh import batch_sharding, make_mesh
from jaxgpt.training.checkpoint import (
    best_metric,
    check_saves,
    find_steps,
    open_checkpoints,
    restore_state,
    save_state,
    saved_steps,
)
from jaxgpt.training.step import abstract_state, create_state

MODEL = build_model(TINY.model, "cpu")
MESH = make_mesh(TINY)

CHECKPOINT = "jaxgpt.training.checkpoint"


STATE = create_state(MODEL, TINY, MESH)


def state_at(step, shift=0.0):
    state = jax.tree.map(jax.numpy.copy, STATE)  # a train step takes over its state
    params = jax.tree.map(lambda a: a + shift, state.params)
    return state.replace(step=state.step + step, params=params)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


def save(folder, metrics):
    with open_checkpoints(folder) as checkpoints:
        for step, metric in metrics.items():
            save_state(checkpoints, state_at(step), metric)


def restore(folder, which="latest", config=TINY, **options):
    abstract = abstract_state(build_model(config.model, "cpu"), config, MESH)
    return restore_state(folder, which, abstract, **options)


def is_of(state, step):
    expected = state_at(step)
    same = jax.tree.map(np.array_equal, state, expected)
    return jax.tree.structure(state) == jax.tree.structure(expected) and all(
        jax.tree.leaves(same)
    )


def test_the_state_comes_back_bit_for_bit(folder):
    state = state_at(7, shift=0.125).replace(skipped=np.int32(3))
    with open_checkpoints(folder) as checkpoints:
        save_state(checkpoints, state, None)
    restored = restore(folder, 7)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_a_save_in_the_background_is_of_the_state_it_was_given(folder):
    tokens = np.zeros((1, 8, TINY.model.block_size), np.int32)
    train_steps = traced_steps(MODEL, TINY, MESH).lower().compile()
    tokens = jax.device_put(tokens, batch_sharding(MESH, axis=1))
    state, given = state_at(0), {}
    for step in range(1, 6):
        with open_checkpoints(folder) as checkpoints:
            state, _ = train_steps(state, (tokens, tokens))  # takes over its state
            given[step] = jax.tree.map(np.array, jax.device_get(state))
            save_state(checkpoints, state, -float(step))
            state, _ = train_steps(state, (tokens, tokens + 1))
        restored = restore(folder, step * 2 - 1)
        jax.tree.map(np.testing.assert_array_equal, restored, given[step])


def test_the_best_and_the_latest_two_are_kept(folder):
    save(folder, {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: 1.5})
    assert saved_steps(folder) == [2, 4, 5]
    assert find_steps(folder, "best") == [2, 5, 4]
    assert find_steps(folder, "latest") == [5, 4, 2]
    assert find_steps(folder, "2") == find_steps(folder, 2) == [2]
    assert best_metric(folder) == 1.0
    save(folder, {6: 0.5})  # another time, the earlier ones' metrics still count
    assert saved_steps(folder) == [5, 6]


def test_a_checkpoint_that_was_not_evaluated_is_not_the_best(folder):
    save(folder, {1: 3.0, 2: None})
    assert find_steps(folder, "best") == [1, 2]
    assert find_steps(folder, "latest") == [2, 1]


def test_without_an_evaluated_checkpoint_the_best_is_the_latest(folder):
    save(folder, {1: None, 2: None})
    assert find_steps(folder, "best") == [2, 1]
    assert best_metric(folder) is None


def test_a_step_that_is_not_there_is_an_error_that_lists_those_that_are(folder):
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match="no checkpoint yet"):
            restore(folder, "best")
        folder.mkdir(exist_ok=True)
    save(folder, {4: 1.0})
    for which in ("3", "newest", "²"):
        with pytest.raises(ValueError, match="not one of: best, latest, 4"):
            restore(folder, which)


def alter(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "altered": alter,
}


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory):
    """Checkpoints 4 and 6, of which 6 is the better; to be copied."""
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    save(folder, {4: 1.0, 6: 0.5})
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_with_any_file_missing_cut_or_altered_nothing_else_than_was_saved_is_used(
    two_saved, tmp_path, capsys, damage
):
    paths = [path for path in (two_saved / "6").rglob("*") if path.is_file()]
    set_aside = []
    assert len(paths) > 20
    for path in paths:
        shutil.rmtree(tmp_path)
        shutil.copytree(two_saved, tmp_path)
        DAMAGES[damage](tmp_path / path.relative_to(two_saved))
        state, told = restore(tmp_path, resume=True), capsys.readouterr().err
        if state.step == 6:  # nothing that is read was in the file
            assert is_of(state, 6)
            assert told == ""
        else:
            assert is_of(state, 4)
            assert re.search(r"6 is damaged .*set aside as 6\.damaged", told)
            assert saved_steps(tmp_path) == [4]
            set_aside.append(path.relative_to(two_saved / "6"))
    for part in ("params", "progress"):
        found = {path.name for path in set_aside if path.parts[0] == part}
        assert "manifest.ocdbt" in found
        assert len(found - {"_METADATA"}) > 1  # files of the arrays
    assert Path("_CHECKPOINT_METADATA") in set_aside


def test_reading_takes_the_one_before_but_not_in_place_of_a_step_asked_for(
    two_saved, tmp_path, capsys
):
    shutil.copytree(two_saved, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "6" / "params" / "d")
    for which in ("best", "latest"):
        assert is_of(restore(tmp_path, which), 4)
        assert re.search(r"6 is damaged.*step 4 taken", capsys.readouterr().err)
    with pytest.raises(ValueError, match=r"6 is damaged .* bring it back"):
        restore(tmp_path, 6)
    assert saved_steps(tmp_path) == [4, 6]


def test_an_array_that_is_lost_and_read_as_zeros_is_found(folder, capsys):
    save(folder, {4: None})
    params = jax.tree.map(jax.numpy.ones_like, state_at(0).params)
    with open_checkpoints(folder) as checkpoints:
        save_state(checkpoints, state_at(6).replace(params=params), None)
        save_state(checkpoints, state_at(8, shift=-1.0), None)
    params = folder / "6" / "params"
    shutil.rmtree(params)
    lost = jax.tree.map(jax.numpy.zeros_like, state_at(0).params)
    with open_checkpoints(folder.with_name("zeros")) as checkpoints:
        save_params(checkpoints, 6, lost)
    shutil.copytree(folder.with_name("zeros") / "6" / "params", params)
    with pytest.raises(ValueError, match=r"6 is damaged \(params\.\S+ is not what was"):
        restore(folder, 6)


def params_of(folder, which):
    abstract = abstract_state(MODEL, TINY, MESH).replace(opt_state=None)
    return restore_state(folder, which, abstract)


def test_parameters_can_be_read_though_the_optimizers_state_has_changed(
    two_saved, tmp_path
):
    shutil.copytree(two_saved, tmp_path, dirs_exist_ok=True)
    alter(tmp_path / "6" / "progress" / "_METADATA")
    state = params_of(tmp_path, "latest")
    assert (state.step, state.opt_state) == (6, None)
    assert restore(tmp_path).step == 4


def test_parameters_alone_can_be_read_but_not_resumed(folder):
    params = state_at(0).params
    with open_checkpoints(folder) as checkpoints:
        save_params(checkpoints, 3, params)
    for state in (restore(folder), params_of(folder, 3)):
        assert (state.step, state.opt_state) == (3, None)
        jax.tree.map(np.testing.assert_array_equal, state.params, params)
    with pytest.raises(ValueError, match=r"3 has parameters but no optimizer state"):
        restore(folder, resume=True)
    assert saved_steps(folder) == [3]


def test_a_damaged_figure_makes_no_worse_checkpoint_the_best_silently(
    folder, two_saved, capsys
):
    shutil.copytree(two_saved, folder)
    path = folder / "6" / "_CHECKPOINT_METADATA"
    path.write_text(path.read_text().replace('"figure": 0.5', '"figure": 7.5'))
    assert find_steps(folder, "best") == [6, 4]  # to be told of
    assert is_of(restore(folder, "best"), 4)
    assert re.search(r"6 is damaged.*step 4 taken", capsys.readouterr().err)
    assert best_metric(folder) == 1.0
    save(folder, {8: None, 10: None})  # though it can't be read, saving goes on
    assert saved_steps(folder) == [4, 8, 10]


def test_what_one_process_cannot_read_none_uses(two_saved, monkeypatch, capsys):
    found = iter([True])
    monkeypatch.setattr(f"{CHECKPOINT}.any_failed", lambda own: next(found, own))
    assert is_of(restore(two_saved), 4)
    assert "6 is damaged (another process can't read it)" in capsys.readouterr().err


def made_old(saved, val_loss=None):
    """Makes a checkpoint what it was before there were records."""
    path = saved / "_CHECKPOINT_METADATA"
    metadata = json.loads(path.read_text())
    path.write_text(json.dumps(metadata | {"custom_metadata": {}}))
    if val_loss:
        (saved / "metrics").mkdir()
        (saved / "metrics" / "metrics").write_text(json.dumps({"val_loss": val_loss}))
    files = [str(path.relative_to(saved)) for path in saved.rglob("*")]
    (saved / "digests.json").write_text(json.dumps({name: [0, ""] for name in files}))


def test_checkpoints_of_older_versions_are_read_and_rank_by_their_losses(
    folder, capsys
):
    save(folder, {4: None, 6: None})
    made_old(folder / "4", 1.0)
    made_old(folder / "6", 2.0)
    for which, step in (("best", 4), ("latest", 6), ("4", 4)):
        assert is_of(restore(folder, which), step)
        (line,) = capsys.readouterr().err.splitlines()
        assert re.search(rf"/{step} is of an older version.* not checked", line)
    assert is_of(restore(folder, resume=True), 6)
    assert params_of(folder, "best").step == 4
    assert best_metric(folder) == 1.0
    save(folder, {8: 1.5, 10: None})
    assert saved_steps(folder) == [4, 8, 10]
    (folder / "4" / "metrics" / "metrics").unlink()
    assert is_of(restore(folder, "best"), 8)
    assert re.search(r"4 is damaged.*step 8 taken", capsys.readouterr().err)


def test_a_folder_may_be_given_relative_to_where_one_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(Path("checkpoints"), {4: 1.0, 6: 2.0})
    assert is_of(restore(Path("checkpoints"), resume=True), 6)
    made_old(Path("checkpoints/6"))
    assert is_of(restore(Path("checkpoints"), resume=True), 6)
    assert params_of(Path("checkpoints"), "best").step == 4


def test_a_checkpoint_under_the_name_of_another_step_is_refused(two_saved, tmp_path):
    shutil.copytree(two_saved / "6", tmp_path / "8")
    with pytest.raises(ValueError, match="8 is of step 6; give it its name back"):
        restore(tmp_path)
    with pytest.raises(ValueError, match="8 is of step 6; give it its name back"):
        restore(tmp_path, 8, resume=True)


def test_a_save_that_orbax_declines_is_an_error(folder):
    save(folder, {4: 1.0})
    with (
        open_checkpoints(folder) as checkpoints,
        pytest.raises(OSError, match="there is a checkpoint of a step after 2"),
    ):
        save_state(checkpoints, state_at(2), None)


def test_if_no_checkpoint_is_whole_all_are_listed_and_stay(two_saved, tmp_path):
    shutil.copytree(two_saved, tmp_path, dirs_exist_ok=True)
    alter(tmp_path / "4" / "_CHECKPOINT_METADATA")
    shutil.rmtree(tmp_path / "6" / "progress")
    shutil.copytree(tmp_path / "6", tmp_path / "9", dirs_exist_ok=True)
    (tmp_path / "9" / "_CHECKPOINT_METADATA").unlink()
    (tmp_path / "12").mkdir()
    for resume in (False, True):
        with pytest.raises(ValueError, match=r"copy, or .*") as error:
            restore(tmp_path, resume=resume)
        told = re.findall(r"/(\d+) is damaged", str(error.value))
        assert told == ["12", "9", "6", "4"]
    assert saved_steps(tmp_path) == [4, 6, 9, 12]


def test_training_goes_on_beside_what_was_set_aside(two_saved, tmp_path):
    shutil.copytree(two_saved, tmp_path, dirs_exist_ok=True)
    for _ in range(2):  # the step that is saved anew may be damaged anew
        alter(tmp_path / "6" / "params" / "manifest.ocdbt")
        assert restore(tmp_path, resume=True).step == 4
        assert (tmp_path / "6.damaged").is_dir()
        save(tmp_path, {6: 0.5})
        assert is_of(restore(tmp_path), 6)


def test_a_save_that_fails_is_told_of_at_the_next_step(folder, monkeypatch):
    def fail(*args, **options):
        raise OSError(28, "No space left on device")

    save(folder, {2: 1.0})
    monkeypatch.setattr("orbax.checkpoint.StandardCheckpointHandler.finalize", fail)
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
    assert is_of(restore(folder, resume=True), 2)


def test_memory_is_given_back_once_after_each_save(folder, monkeypatch):
    given = []
    monkeypatch.setattr(f"{CHECKPOINT}.release_memory", lambda: given.append(True))
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


def test_a_lost_process_is_told_of_as_such_and_a_full_disk_as_one(folder, monkeypatch):
    def lose(*args, **options):
        raise RuntimeError("the other process is gone")

    with open_checkpoints(folder) as checkpoints:
        monkeypatch.setattr(checkpoints, "save", lose)
        with pytest.raises(OSError, match=r"could not be saved \(the other"):
            save_state(checkpoints, state_at(2), None)
        monkeypatch.setattr(f"{CHECKPOINT}.several_processes", lambda: True)
        with pytest.raises(RuntimeError, match=r"^the other process is gone"):
            save_state(checkpoints, state_at(2), None)


def test_want_of_memory_is_no_damage(two_saved, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    shutil.copytree(two_saved, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(f"{CHECKPOINT}.ocp.StandardCheckpointHandler.restore", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"^RESOURCE_EXHAUSTED"):
        restore(tmp_path, resume=True)
    assert saved_steps(tmp_path) == [4, 6]
