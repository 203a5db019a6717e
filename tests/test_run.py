import json
import shutil

import jax
import numpy as np
import pytest
from conftest import (
    ONE_ROW,
    TINY,
    changed,
    contents,
    logits_of,
    mesh_of,
    random_params,
    save_params,
)

from jaxgpt import CharTokenizer, load_run, run
from jaxgpt.models import build_model
from jaxgpt.parallel.mesh import single_device_mesh
from jaxgpt.training.checkpoint import open_checkpoints, save_state
from jaxgpt.training.step import create_state

CONFIG = changed(TINY, model={"n_layer": 1})
TOKENIZER = CharTokenizer("\nabcdefghij")
STATE = create_state(build_model(CONFIG.model, "cpu"), CONFIG, mesh_of(CONFIG))


def claim(folder, *, resume=False, overwrite=False):
    return run.claim_run(folder, resume=resume, overwrite=overwrite)


def save(folder, state, metric):
    with open_checkpoints(folder / "checkpoints") as checkpoints:
        save_state(checkpoints, state, metric)


@pytest.fixture
def run_dir(tmp_path):
    """A run with one checkpoint, saved from a mesh of 8 devices."""
    folder = tmp_path / "run"
    with claim(folder):
        run.save_config(folder, CONFIG, TOKENIZER)
    save(folder, STATE, 1.0)
    return folder


def test_a_loaded_run_equals_the_saved_one_and_loading_changes_no_file(run_dir):
    before = contents(run_dir)
    loaded = load_run(run_dir)
    assert loaded.config == CONFIG
    assert loaded.tokenizer.characters == TOKENIZER.characters
    jax.tree.map(np.testing.assert_array_equal, loaded.params, STATE.params)
    logits = logits_of(loaded.model, loaded.params, ONE_ROW)
    saved = logits_of(build_model(CONFIG.model, "cpu"), STATE.params, ONE_ROW)
    np.testing.assert_allclose(logits, saved, atol=1e-6)
    assert logits.dtype == np.float32
    assert contents(run_dir) == before


def test_only_overwrite_replaces_a_run_and_only_its_own_files(run_dir):
    (run_dir / "notes.md").write_text("mine")
    (run_dir / "attention.png").write_bytes(b"of the old model")
    for name in ("tensorboard", "wandb"):
        (run_dir / name).mkdir()
        (run_dir / name / "events").touch()
    before = contents(run_dir)
    with pytest.raises(FileExistsError, match=r"--resume.*--overwrite"), claim(run_dir):
        pass
    assert contents(run_dir) == before
    shutil.copytree(run_dir / "checkpoints", run_dir / "checkpoints.other-7.tmp")
    (run_dir / "config.json.7.tmp").touch()  # both left by killed processes
    with claim(run_dir, overwrite=True):
        run.clear_run(run_dir)
    assert contents(run_dir).keys() == {"lock", "notes.md"}


def test_clearing_a_run_with_linked_checkpoints_removes_only_the_link(
    run_dir, tmp_path
):
    (run_dir / "checkpoints").rename(tmp_path / "disk")
    (run_dir / "checkpoints").symlink_to(tmp_path / "disk")
    before = contents(tmp_path / "disk")
    run.clear_run(run_dir)
    assert not (run_dir / "checkpoints").exists()
    assert contents(tmp_path / "disk") == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_another_program_never_becomes_a_run(tmp_path, overwrite):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text('{"model_type": "gpt2"}')
    before, claimed = contents(tmp_path), claim(tmp_path, overwrite=overwrite)
    with pytest.raises(FileExistsError, match=r"config\.json"), claimed:
        pass
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["tokenizer.json", "config.tmp", "lock"])
def test_files_that_a_killed_start_leaves_do_not_prevent_the_next(tmp_path, name):
    (tmp_path / "lock").write_text("")
    (tmp_path / name).write_text("")
    with claim(tmp_path):
        pass


def test_two_processes_never_train_in_one_directory(run_dir):
    with (
        claim(run_dir, resume=True),
        pytest.raises(FileExistsError, match=f"another process .*{run_dir}"),
        claim(run_dir, resume=True),
    ):
        pass
    with claim(run_dir, resume=True):
        pass


def test_initial_parameters_are_those_of_the_given_checkpoint(run_dir):
    later = jax.tree.map(lambda leaf: leaf + 1, STATE)
    save(run_dir, later, 2.0)
    for which, state in (("best", STATE), ("latest", later), ("0", STATE)):
        checkpoint = run.find_checkpoint(run_dir, which)
        config = changed(CONFIG, train={"init_from": str(checkpoint)})
        params = run.load_initial_params(config, single_device_mesh())
        jax.tree.map(np.testing.assert_array_equal, params, state.params)
    assert run.load_initial_params(CONFIG, single_device_mesh()) is None
    other = changed(config, model={"n_embd": 32})
    with pytest.raises(ValueError, match=rf"{checkpoint} .*kernel"):
        run.load_initial_params(other, single_device_mesh())


def untrained(folder, **model):
    """A run of random parameters that has not trained."""
    config = changed(TINY, model={"n_layer": 1, **model})
    params = random_params(build_model(config.model, "cpu"))
    run.save_config(folder, config, None)
    with open_checkpoints(folder / "checkpoints") as checkpoints:
        save_params(checkpoints, 0, params)
    return changed(config, train={"init_from": str(folder / "checkpoints/0")}), params


@pytest.mark.parametrize(
    ("model", "labels", "head"),
    [
        ({"architecture": "masked-lm"}, ("a", "b"), False),
        ({"architecture": "classifier", "labels": ("a", "c")}, ("a", "b"), False),
        ({"architecture": "classifier", "labels": ("a", "b")}, ("a", "b"), True),
    ],
)
def test_a_classifier_starts_from_an_encoder_and_has_a_new_head_for_other_labels(
    tmp_path, capsys, model, labels, head
):
    config, params = untrained(tmp_path, **model)
    model = {"architecture": "classifier", "labels": labels, "block_size": 5}
    config = changed(config, model=model)
    found = run.load_initial_params(config, single_device_mesh())
    assert found.keys() - {"classifier"} == {"wte", "encoder"}
    assert ("classifier" in found) == head
    assert ("classifier is new" in capsys.readouterr().err) != head
    expected = run.crop_block_size(params, 5)
    for name, part in found.items():
        jax.tree.map(np.testing.assert_array_equal, part, expected[name])
    assert found["encoder"]["wpe"]["embedding"].shape == (5, 16)
    model, mesh = build_model(config.model, "cpu"), single_device_mesh()
    state = create_state(model, config, mesh, found)
    assert state.params["classifier"]["kernel"].shape == (16, 2)
    kept = state.params["encoder"]["h"]
    jax.tree.map(np.testing.assert_array_equal, kept, expected["encoder"]["h"])
    other = changed(config, model={"n_embd": 32})
    with pytest.raises(ValueError, match=str(tmp_path)):
        run.load_initial_params(other, mesh)


def test_a_state_is_loaded_with_the_best_loss_of_the_run(run_dir):
    save(run_dir, STATE.replace(step=STATE.step + 1), 2.0)
    for which, step in (("best", 0), ("latest", 1)):
        config, state, val_loss = run.load_state(run_dir, which)
        assert (config, int(state.step), val_loss) == (CONFIG, step, 1.0)


def test_only_known_formats_of_config_json_are_read(run_dir):
    path = run_dir / "config.json"
    config = json.loads(path.read_text())
    assert next(iter(config)) == "format"
    path.write_text(json.dumps(config | {"format": config["format"] + 1}))
    with pytest.raises(ValueError, match=f"{run_dir} .*newer"):
        load_run(run_dir)
    for unknown in ("two", None):
        path.write_text(json.dumps(config | {"format": unknown}))
        with pytest.raises(ValueError, match=str(path)):
            load_run(run_dir)
    del config["format"]  # as in the first version
    path.write_text(json.dumps(config), encoding="utf-8-sig")  # as some editors save
    assert load_run(run_dir).config == CONFIG


def test_a_tokenizer_of_another_size_than_the_models_is_an_error(run_dir):
    run.save_config(run_dir, changed(CONFIG, model={"vocab_size": 12}), TOKENIZER)
    with pytest.raises(ValueError, match=r"tokenizer\.json has 11 .* 12"):
        load_run(run_dir)
