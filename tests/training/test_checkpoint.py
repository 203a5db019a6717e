import json
import os
import re
import shutil
import time
from pathlib import Path
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, changed, contents, mesh_of, save_params, traced_steps

from jaxgpt.models import build_model
from jaxgpt.parallel.mesh import batch_sharding
from jaxgpt.training import checkpoint
from jaxgpt.training.step import abstract_state, create_state

CONFIG = changed(
    TINY, model={"n_layer": 1}, mesh={"data": 2}, train={"max_skipped_steps": 5}
)
MODEL, MESH = build_model(CONFIG.model, "cpu"), mesh_of(CONFIG)
STATE, ABSTRACT = (make(MODEL, CONFIG, MESH) for make in (create_state, abstract_state))
PARAMS_ONLY = ABSTRACT.replace(opt_state=None)


def state_at(step):
    return STATE.replace(step=STATE.step + step)


def save(folder, metrics):
    with checkpoint.open_checkpoints(folder) as checkpoints:
        for step, metric in metrics.items():
            checkpoint.save_state(checkpoints, state_at(step), metric)


def restore(folder, which="latest", abstract=ABSTRACT, **options):
    return checkpoint.restore_state(folder, which, abstract, **options)


def assert_equal(state, expected):
    jax.tree.map(np.testing.assert_array_equal, state, expected)


def test_a_restored_state_equals_the_saved_one_although_training_went_on(tmp_path):
    train_steps, saved = traced_steps(MODEL, CONFIG, MESH).lower().compile(), {}
    tokens = np.zeros((1, 8, CONFIG.model.block_size), np.int32)
    tokens = jax.device_put(tokens, batch_sharding(MESH, axis=1))
    state = jax.tree.map(jnp.copy, STATE.replace(skipped=STATE.skipped + 3))
    for step in range(1, 6):
        with checkpoint.open_checkpoints(tmp_path) as checkpoints:
            state, _ = train_steps(state, (tokens, tokens))  # donates its state
            saved[step] = jax.tree.map(np.array, jax.device_get(state))
            checkpoint.save_state(checkpoints, state, -float(step))
            state, _ = train_steps(state, (tokens, tokens + 1))
        assert_equal(restore(tmp_path, step * 2 - 1), saved[step])
    assert saved[5].skipped == 3


def test_the_best_and_the_latest_two_are_kept_and_unevaluated_ones_rank_last(tmp_path):
    save(tmp_path, {1: None, 2: None})
    assert checkpoint.find_steps(tmp_path, "best") == [2, 1]
    assert checkpoint.best_metric(tmp_path) is None
    save(tmp_path, {3: 3.0, 4: None})
    assert checkpoint.find_steps(tmp_path, "best") == [3, 4]
    save(tmp_path, {5: 1.0, 6: 2.0, 7: None, 8: 1.5})
    assert checkpoint.saved_steps(tmp_path) == [5, 7, 8]
    assert checkpoint.find_steps(tmp_path, "best") == [5, 8, 7]
    assert checkpoint.find_steps(tmp_path, "latest") == [8, 7, 5]
    for which in ("5", 5):
        assert checkpoint.find_steps(tmp_path, which) == [5]
    assert checkpoint.best_metric(tmp_path) == 1.0
    save(tmp_path, {9: 0.5})
    assert checkpoint.saved_steps(tmp_path) == [8, 9]


def test_a_step_that_does_not_exist_is_an_error_that_lists_those_that_do(saved_once):
    for which in ("3", "newest", "²"):
        with pytest.raises(ValueError, match=rf"{which}.*: best, latest, 4, 6"):
            restore(saved_once, which)


def alter(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "altered": alter,
}


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory):
    """Checkpoints 4 and 6, of which 6 is the better."""
    folder = tmp_path_factory.mktemp("two")
    save(folder, {4: 1.0, 6: 0.5})
    return folder


@pytest.fixture
def two(saved_once, tmp_path):
    """A copy of `saved_once`, to be damaged."""
    return shutil.copytree(saved_once, tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_a_file_is_noticed_or_harmless(saved_once, tmp_path, capsys, damage):
    noticed = []
    for name in contents(saved_once / "6"):
        shutil.rmtree(tmp_path, ignore_errors=True)
        shutil.copytree(saved_once, tmp_path)
        DAMAGES[damage](tmp_path / "6" / name)
        state, err = restore(tmp_path, resume=True), capsys.readouterr().err
        assert_equal(state, state_at(int(state.step)))
        if state.step == 6:  # nothing that is read was in the file
            assert err == ""
        else:
            assert state.step == 4
            assert re.search(r"/6 .*6\.damaged.*step 4", err)
            assert checkpoint.saved_steps(tmp_path) == [4]
            noticed.append(Path(name))
    for part in ("params", "progress"):
        found = {path.name for path in noticed if path.parts[0] == part}
        assert "manifest.ocdbt" in found
        assert len(found - {"_METADATA"}) > 1  # files of the arrays
    assert Path("_CHECKPOINT_METADATA") in noticed


def test_best_and_latest_fall_back_to_another_step_but_a_given_step_does_not(
    two, capsys
):
    shutil.rmtree(two / "6" / "params" / "d")
    for which in ("best", "latest"):
        assert_equal(restore(two, which), state_at(4))
        assert re.search(r"/6 .*step 4", capsys.readouterr().err)
    with pytest.raises(ValueError, match=r"/6 is damaged"):
        restore(two, 6)
    assert checkpoint.saved_steps(two) == [4, 6]


def test_an_array_that_is_lost_and_read_as_zeros_is_noticed(tmp_path):
    ones, zeros = tmp_path / "ones", tmp_path / "zeros"
    for folder, fill in ((ones, jnp.ones_like), (zeros, jnp.zeros_like)):
        with checkpoint.open_checkpoints(folder) as checkpoints:
            save_params(checkpoints, 6, jax.tree.map(fill, STATE.params))
    shutil.rmtree(ones / "6" / "params")
    shutil.copytree(zeros / "6" / "params", ones / "6" / "params")
    with pytest.raises(ValueError, match=r"/6 is damaged \(checksum .*params\."):
        restore(ones, 6)


def test_parameters_can_be_read_although_the_optimizer_state_is_damaged(two):
    alter(two / "6" / "progress" / "_METADATA")
    state = restore(two, "latest", PARAMS_ONLY)
    assert (state.step, state.opt_state) == (6, None)
    assert restore(two).step == 4


def test_parameters_without_optimizer_state_can_be_read_but_not_resumed(tmp_path):
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        save_params(checkpoints, 3, STATE.params)
    for state in (restore(tmp_path), restore(tmp_path, 3, PARAMS_ONLY)):
        assert (state.step, state.opt_state) == (3, None)
        assert_equal(state.params, STATE.params)
    with pytest.raises(ValueError, match=r"/3 .*--init-from"):
        restore(tmp_path, resume=True)
    assert checkpoint.saved_steps(tmp_path) == [3]


def test_a_damaged_metric_is_reported_and_does_not_change_which_is_best(two, capsys):
    path = two / "6" / "_CHECKPOINT_METADATA"
    path.write_text(path.read_text().replace('"figure": 0.5', '"figure": 7.5'))
    assert checkpoint.find_steps(two, "best") == [6, 4]  # so that it is reported
    assert_equal(restore(two, "best"), state_at(4))
    assert re.search(r"/6 .*step 4", capsys.readouterr().err)
    assert checkpoint.best_metric(two) == 1.0
    save(two, {8: None, 10: None})  # saving goes on
    assert checkpoint.saved_steps(two) == [4, 8, 10]


def test_a_checkpoint_that_one_process_cannot_read_is_used_by_none(
    saved_once, monkeypatch, capsys
):
    found = iter([True])
    monkeypatch.setattr(checkpoint, "any_failed", lambda own: next(found, own))
    assert_equal(restore(saved_once), state_at(4))
    assert re.search(r"/6 .*another process", capsys.readouterr().err)


def make_old(saved, val_loss=None):
    """Gives a checkpoint the format of versions without records."""
    path = saved / "_CHECKPOINT_METADATA"
    metadata = json.loads(path.read_text()) | {"custom_metadata": {}}
    if val_loss:
        (saved / "metrics").mkdir()
        (saved / "metrics" / "metrics").write_text(json.dumps({"val_loss": val_loss}))
        metadata["item_handlers"]["metrics"] = "JsonCheckpointHandler"
    path.write_text(json.dumps(metadata))


def test_checkpoints_of_older_versions_are_read_and_rank_by_their_losses(two, capsys):
    make_old(two / "4", 1.0)
    make_old(two / "6", 2.0)
    for which, step in (("best", 4), ("latest", 6), ("4", 4)):
        assert_equal(restore(two, which), state_at(step))
        (line,) = capsys.readouterr().err.splitlines()
        assert re.search(rf"/{step} .*older version", line)
    assert_equal(restore(two, resume=True), state_at(6))
    assert restore(two, "best", PARAMS_ONLY).step == 4
    assert checkpoint.best_metric(two) == 1.0
    other = ABSTRACT.replace(opt_state=ABSTRACT.params)  # as if it had been different
    with pytest.raises(ValueError, match=r"/6 is from an older version.*--init-from"):
        restore(two, 6, other)
    save(two, {8: 1.5, 10: None})
    assert checkpoint.saved_steps(two) == [4, 8, 10]
    (two / "4" / "metrics" / "metrics").unlink()
    assert_equal(restore(two, "best"), state_at(8))
    assert re.search(r"/4 .*step 8", capsys.readouterr().err)


def test_the_folder_may_be_a_relative_path(two, monkeypatch):
    monkeypatch.chdir(two.parent)
    relative = Path(two.name)
    save(relative, {8: 2.0})
    assert_equal(restore(relative, resume=True), state_at(8))
    make_old(relative / "8")
    assert_equal(restore(relative, resume=True), state_at(8))
    assert restore(relative, "best", PARAMS_ONLY).step == 6


def test_a_checkpoint_under_the_name_of_another_step_is_refused(two):
    (two / "6").rename(two / "8")
    for options in ({}, {"which": 8, "resume": True}):
        with pytest.raises(ValueError, match=r"/8 contains step 6"):
            restore(two, **options)


def test_a_save_that_orbax_declines_is_an_error(two):
    with pytest.raises(OSError, match="later than step 2"):
        save(two, {2: None})


def test_if_every_checkpoint_is_damaged_all_are_listed_and_kept(two):
    alter(two / "4" / "_CHECKPOINT_METADATA")
    shutil.rmtree(two / "6" / "progress")
    shutil.copytree(two / "6", two / "9")
    (two / "9" / "_CHECKPOINT_METADATA").unlink()
    (two / "12").mkdir()
    for resume in (False, True):
        with pytest.raises(ValueError, match="damaged") as error:
            restore(two, resume=resume)
        steps = re.findall(r"/(\d+) is damaged", str(error.value))
        assert steps == ["12", "9", "6", "4"]
    assert checkpoint.saved_steps(two) == [4, 6, 9, 12]


def test_a_damaged_checkpoint_is_set_aside_and_its_step_can_be_saved_again(two):
    for _ in range(2):  # the step that was saved again may be damaged again
        alter(two / "6" / "params" / "manifest.ocdbt")
        assert restore(two, resume=True).step == 4
        assert (two / "6.damaged").is_dir()
        save(two, {6: 0.5})
        assert_equal(restore(two), state_at(6))


def test_a_failed_save_is_reported_at_the_next_step_or_at_the_end(two, monkeypatch):
    fail = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr("orbax.checkpoint.StandardCheckpointHandler.finalize", fail)
    with checkpoint.open_checkpoints(two) as checkpoints:
        checkpoint.save_state(checkpoints, state_at(8), None)
        while checkpoints.is_saving_in_progress():
            time.sleep(0.01)
        with pytest.raises(OSError, match="No space left"):
            checkpoint.check_saves(checkpoints, 6)
    with pytest.raises(OSError, match="No space left"):
        save(two, {8: None})
    monkeypatch.undo()
    assert_equal(restore(two, resume=True), state_at(6))


def test_memory_is_released_once_after_each_save(tmp_path, monkeypatch):
    release = Mock()
    monkeypatch.setattr(checkpoint, "release_memory", release)
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        saved = checkpoint.check_saves(checkpoints, None)
        for step in (1, 2):
            checkpoint.save_state(checkpoints, state_at(step), None)
            checkpoints.wait_until_finished()
            for _ in range(2):
                saved = checkpoint.check_saves(checkpoints, saved)
            assert saved == release.call_count == step


def test_a_checkpoint_of_another_config_is_an_error_that_names_a_parameter(saved_once):
    other = changed(CONFIG, model={"bias": True})
    abstract = abstract_state(build_model(other.model, "cpu"), other, MESH)
    with pytest.raises(ValueError, match=r"/4 .*c_attn\.bias"):
        restore(saved_once, 4, abstract)


def test_a_lost_process_is_not_reported_as_a_failed_save(tmp_path, monkeypatch):
    lose = Mock(side_effect=RuntimeError("the other process is gone"))
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(checkpoints, "save", lose)
        with pytest.raises(OSError, match=r"the other process is gone"):
            checkpoint.save_state(checkpoints, state_at(2), None)
        monkeypatch.setattr(checkpoint, "several_processes", lambda: True)
        with pytest.raises(RuntimeError, match=r"^the other process is gone"):
            checkpoint.save_state(checkpoints, state_at(2), None)


def fail_to_read(monkeypatch, error, step=""):
    """Makes reading the arrays of the step, by default of all, raise the error."""
    restore = checkpoint.ocp.PyTreeCheckpointHandler.restore

    def fail(self, path, args):
        if f"/{step}" in str(path):
            raise error
        return restore(self, path, args=args)

    monkeypatch.setattr(checkpoint.ocp.PyTreeCheckpointHandler, "restore", fail)


@pytest.mark.parametrize(
    "error",
    [PermissionError(), MemoryError(), jax.errors.JaxRuntimeError(), KeyError()],
)
def test_whatever_makes_a_restore_fail_leads_to_the_one_before(
    two, monkeypatch, capsys, error
):
    fail_to_read(monkeypatch, error, step=6)
    assert_equal(restore(two), state_at(4))
    assert re.search(r"/6 .*skipped.*step 4", capsys.readouterr().err)
    fail_to_read(monkeypatch, error)
    with pytest.raises(ValueError if type(error) is KeyError else type(error)):
        restore(two, resume=True)
    assert checkpoint.saved_steps(two) == [4, 6]


def test_a_record_that_may_not_be_read_hides_no_other_checkpoint(two, monkeypatch):
    read = checkpoint.read_record

    def fail(saved):
        if saved.name == "6":
            raise PermissionError
        return read(saved)

    monkeypatch.setattr(checkpoint, "read_record", fail)
    assert_equal(restore(two, "best"), state_at(4))
    assert checkpoint.best_metric(two) == 1.0
    save(two, {8: None})
    assert restore(two, resume=True).step == 8


def test_a_checkpoint_that_may_not_be_read_is_kept_aside(two, monkeypatch):
    fail_to_read(monkeypatch, PermissionError(), step=6)
    assert_equal(restore(two, resume=True), state_at(4))
    monkeypatch.undo()
    (two / "6.unreadable").rename(two / "6")
    assert_equal(restore(two), state_at(6))


def test_a_first_checkpoint_for_which_memory_is_short_is_read_back_in_part(
    tmp_path, monkeypatch
):
    whole = checkpoint.ocp.PyTreeCheckpointHandler.restore

    def fail(self, path, args):
        if ... not in jax.tree.leaves(args.item):
            raise MemoryError
        return whole(self, path, args=args)

    monkeypatch.setattr(checkpoint.ocp.PyTreeCheckpointHandler, "restore", fail)
    save(tmp_path, {4: 1.0})
    assert checkpoint.saved_steps(tmp_path) == [4]


def test_parameters_that_are_not_finite_are_not_used(two, capsys):
    params = jax.tree.map(jnp.copy, STATE.params)
    params["wte"]["embedding"] = params["wte"]["embedding"].at[3, 2].set(jnp.nan)
    with checkpoint.open_checkpoints(two) as checkpoints:
        save_params(checkpoints, 8, params)
    assert restore(two, abstract=PARAMS_ONLY).step == 6
    assert re.search(r"/8 .*not finite.*wte.*step 6", capsys.readouterr().err)


def test_a_checkpoint_that_training_deletes_meanwhile_is_not_damaged(
    two, monkeypatch, capsys
):
    read = checkpoint.read_record

    def delete_and_read(saved):
        shutil.rmtree(two / "6", ignore_errors=True)
        return read(saved)

    monkeypatch.setattr(checkpoint, "read_record", delete_and_read)
    assert_equal(restore(two, resume=True), state_at(4))
    assert capsys.readouterr().err == ""


def test_a_deleted_checkpoint_disappears_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_empty_deleted", lambda folder: None)
    save(tmp_path, dict.fromkeys(range(1, 6)))
    assert checkpoint.saved_steps(tmp_path) == [4, 5]
    assert len(list((tmp_path / "deleted").iterdir())) == 3  # moved, whole
    monkeypatch.undo()
    save(tmp_path, {6: None})
    assert {path.name for path in tmp_path.iterdir()} == {"5", "6"}


@pytest.mark.parametrize("name", ["x[1]", "*?%41 #\n{ä}\udcff"])
def test_a_folder_may_have_any_name(tmp_path, name):
    (tmp_path / "x1").mkdir()  # which the first matches as a pattern
    save(tmp_path / name, {4: 1.0, 6: 0.5})
    assert_equal(restore(tmp_path / name, resume=True), state_at(6))
    make_old(tmp_path / name / "6", 0.5)
    assert_equal(restore(tmp_path / name, "best"), state_at(6))
    assert checkpoint.saved_steps(tmp_path / name) == [4, 6]


@pytest.mark.parametrize("large", [False, True])
def test_the_first_checkpoint_is_read_back_and_no_other(tmp_path, monkeypatch, large):
    if large:
        monkeypatch.setattr(checkpoint, "_READ_BACK_BYTES", 0)
    monkeypatch.setattr(checkpoint, "checksums", Mock(wraps=checkpoint.checksums))
    save(tmp_path, {4: 1.0, 6: 0.5})
    ((restored,), _), *others = checkpoint.checksums.call_args_list
    assert not others
    arrays = [leaf for leaf in jax.tree.leaves(restored) if leaf is not ...]
    assert len(arrays) == (2 if large else len(jax.tree.leaves(STATE)))
    monkeypatch.setattr(checkpoint, "checksums", lambda tree: {"params.wte": 0})
    with pytest.raises(OSError, match="read back"):
        save(tmp_path / "other", {4: 1.0})


def test_a_digest_is_of_the_parameters_alone(saved_once, tmp_path):
    saved = saved_once / "4"
    copied = shutil.copytree(saved, tmp_path / "copied")
    assert checkpoint.digest(copied) == checkpoint.digest(saved)
    save(tmp_path / "again", {5: 0.5})  # the same parameters at another step
    assert checkpoint.digest(tmp_path / "again" / "5") == checkpoint.digest(saved)
    (first, *_), _ = jax.tree.flatten(STATE.params)
    params = jax.tree.map(lambda a: a + (a is first), STATE.params)
    with checkpoint.open_checkpoints(tmp_path / "other") as checkpoints:
        save_params(checkpoints, 1, params)
    assert checkpoint.digest(tmp_path / "other" / "1") != checkpoint.digest(saved)
