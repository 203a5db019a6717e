import json

import jax
import numpy as np
import pytest
from conftest import TINY, changed

from jaxgpt import CharTokenizer, load_run
from jaxgpt.models import build_model
from jaxgpt.parallel.mesh import make_mesh, single_device_mesh
from jaxgpt.run import (
    claim_run,
    clear_run,
    find_checkpoint,
    load_initial_params,
    load_state,
    save_config,
)
from jaxgpt.training.checkpoint import open_checkpoints, save_state
from jaxgpt.training.step import create_state

TOKENIZER = CharTokenizer("\nabcdefghij")
STATE = create_state(build_model(TINY.model, "cpu"), TINY, make_mesh(TINY))


@pytest.fixture
def run_dir(tmp_path):
    """A run with one checkpoint, saved from a mesh of 8 devices."""
    folder = tmp_path / "run"
    with claim(folder):
        save_config(folder, TINY, TOKENIZER)
    with open_checkpoints(folder / "checkpoints") as checkpoints:
        save_state(checkpoints, STATE, 1.0)
    return folder


def claim(folder, *, resume=False, overwrite=False):
    return claim_run(folder, resume=resume, overwrite=overwrite)


def contents(folder):
    return {
        path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def test_a_run_comes_back_as_it_was_and_reading_it_changes_nothing(run_dir):
    before = contents(run_dir)
    run = load_run(run_dir)
    assert run.config == TINY
    assert run.tokenizer.characters == TOKENIZER.characters
    jax.tree.map(np.testing.assert_array_equal, run.params, STATE.params)
    tokens_BT = np.array([[1, 2, 3]])
    logits = run.model.apply({"params": run.params}, tokens_BT, deterministic=True)
    assert logits.shape == (1, 3, 11)
    assert logits.dtype == np.float32
    assert contents(run_dir) == before


def test_a_run_is_replaced_only_when_asked_and_only_its_own_files(run_dir):
    (run_dir / "notes.md").write_text("mine")
    before = contents(run_dir)
    message = r"already holds a run.*--resume.*--overwrite"
    with pytest.raises(FileExistsError, match=message), claim(run_dir):
        pass
    assert contents(run_dir) == before
    (run_dir / "attention.png").write_bytes(b"of the old model")
    with claim(run_dir, overwrite=True):
        clear_run(run_dir)
    assert sorted(path.name for path in run_dir.iterdir()) == ["lock", "notes.md"]


def test_a_linked_checkpoints_folder_is_let_go_and_not_resumed(run_dir, tmp_path):
    (run_dir / "checkpoints").rename(tmp_path / "disk")
    (run_dir / "checkpoints").symlink_to(tmp_path / "disk")
    clear_run(run_dir)
    assert not (run_dir / "checkpoints").exists()
    assert (tmp_path / "disk").exists()


def test_a_folder_of_other_files_is_never_made_a_run(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    for overwrite in (False, True):
        with (
            pytest.raises(FileExistsError, match=r"not a run, it has thesis\.tex"),
            claim(tmp_path, overwrite=overwrite),
        ):
            pass


@pytest.mark.parametrize("name", ["tokenizer.json", "config.tmp", "lock"])
def test_what_a_killed_start_leaves_does_not_bar_the_next(tmp_path, name):
    (tmp_path / "lock").write_text("")
    (tmp_path / name).write_text("")
    with claim(tmp_path):
        pass


def test_another_programs_config_does_not_make_a_folder_a_run(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "tokenizer.json").write_text("{}")
    before = contents(tmp_path)
    for overwrite in (False, True):
        with (
            pytest.raises(FileExistsError, match=r"not a run, it has config\.json"),
            claim(tmp_path, overwrite=overwrite),
        ):
            pass
    assert contents(tmp_path) == before


def test_two_trainings_never_share_a_directory(run_dir):
    with (
        claim(run_dir, resume=True),
        pytest.raises(FileExistsError, match="another training is going on"),
        claim(run_dir, resume=True),
    ):
        pass
    with claim(run_dir, resume=True):
        pass


def test_a_start_is_from_the_very_checkpoint_that_was_found(run_dir):
    later = jax.tree.map(lambda leaf: leaf + 1, STATE)
    with open_checkpoints(run_dir / "checkpoints") as checkpoints:
        save_state(checkpoints, later, 2.0)
    for which, state in (("best", STATE), ("latest", later), ("0", STATE)):
        checkpoint = find_checkpoint(run_dir, which)
        config = changed(TINY, train={"init_from": str(checkpoint)})
        start = load_initial_params(config, single_device_mesh())
        jax.tree.map(np.testing.assert_array_equal, start, state.params)
    assert load_initial_params(TINY, single_device_mesh()) is None
    other = changed(config, model={"n_embd": 32})
    with pytest.raises(ValueError, match=rf"{checkpoint} is of another config"):
        load_initial_params(other, single_device_mesh())


def test_a_state_comes_with_the_runs_best_loss_whichever_step_it_is_of(run_dir):
    later = STATE.replace(step=STATE.step + 1)
    with open_checkpoints(run_dir / "checkpoints") as checkpoints:
        save_state(checkpoints, later, 2.0)
    for which, step in (("best", 0), ("latest", 1)):
        config, state, val_loss = load_state(run_dir, which)
        assert (config, int(state.step), val_loss) == (TINY, step, 1.0)


def test_a_run_of_a_newer_version_is_refused_and_one_of_the_first_is_read(run_dir):
    path = run_dir / "config.json"
    config = json.loads(path.read_text())
    assert next(iter(config)) == "format"
    path.write_text(json.dumps(config | {"format": config["format"] + 1}))
    with pytest.raises(ValueError, match=r"made by a newer jaxgpt; update"):
        load_run(run_dir)
    for odd in ("two", None):
        path.write_text(json.dumps(config | {"format": odd}))
        with pytest.raises(ValueError, match=r"config\.json is not a config of jaxgpt"):
            load_run(run_dir)
    del config["format"]
    path.write_text(json.dumps(config))
    assert load_run(run_dir).config == TINY


def test_what_a_run_lacks_is_named(run_dir, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"not a run: it has no config\.json"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="checkpoint '7' is not one of"):
        load_run(run_dir, "7")
    save_config(run_dir, changed(TINY, model={"n_embd": 32}), TOKENIZER)
    with pytest.raises(ValueError, match="of another config"):
        load_run(run_dir)
    save_config(run_dir, changed(TINY, model={"vocab_size": 12}), TOKENIZER)
    with pytest.raises(ValueError, match="has 11 tokens, the model 12"):
        load_run(run_dir)
    (run_dir / "checkpoints").rename(tmp_path / "elsewhere")
    save_config(run_dir, TINY, TOKENIZER)
    with pytest.raises(FileNotFoundError, match="has no checkpoint yet"):
        load_run(run_dir)
