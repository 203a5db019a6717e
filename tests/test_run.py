import jax
import numpy as np
import pytest
from conftest import TINY, changed

from jaxgpt import CharTokenizer, load_run
from jaxgpt.models import build_model
from jaxgpt.run import prepare_run, save_config
from jaxgpt.training.checkpoint import open_checkpoints, save_state
from jaxgpt.training.sharding import make_mesh
from jaxgpt.training.step import create_state

TOKENIZER = CharTokenizer("\nabcdefghij")
STATE = create_state(build_model(TINY.model), TINY, make_mesh(TINY))


@pytest.fixture
def run_dir(tmp_path):
    """A run with one checkpoint, saved from a mesh of 8 devices."""
    folder = tmp_path / "run"
    prepare_run(folder, resume=False, overwrite=False)
    save_config(folder, TINY, TOKENIZER)
    with open_checkpoints(folder / "checkpoints", create=True) as checkpoints:
        save_state(checkpoints, STATE, 1.0)
    return folder


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
    with pytest.raises(FileExistsError, match=r"already holds a run.*--resume.*--over"):
        prepare_run(run_dir, resume=False, overwrite=False)
    assert load_run(run_dir)
    prepare_run(run_dir, resume=False, overwrite=True)
    assert [path.name for path in run_dir.iterdir()] == ["notes.md"]


def test_a_folder_of_other_files_is_never_made_a_run(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="is not a run"):
            prepare_run(tmp_path, resume=False, overwrite=overwrite)


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
    with pytest.raises(FileNotFoundError, match="has no checkpoints folder"):
        load_run(run_dir)
