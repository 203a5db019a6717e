import json
import shutil
from functools import partial

import jax
import numpy as np
import pytest
import tokenizers
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

from jaxgpt import BPETokenizer, CharTokenizer, load_run, run
from jaxgpt.models import build_model
from jaxgpt.parallel.mesh import single_device_mesh
from jaxgpt.text.conversations import CHAT_TOKENS, is_chat_tokenizer
from jaxgpt.text.tokenizer import END_OF_TEXT
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
    ("spare", "special", "rows"),
    [(0, (), 5), (0, (END_OF_TEXT,), 4), (2, (END_OF_TEXT,), 2), (50, (), 0)],
)
def test_tokens_of_conversations_begin_as_the_mean_row(spare, special, rows):
    tokenizer = CharTokenizer("abcdefghijk").with_special(special)
    if spare:  # as nanoGPT has them, which only BPE can
        tokenizer = BPETokenizer.train(["to be or not to be"], 259)
    known = tokenizer.vocab_size
    config = changed(TINY, model={"n_layer": 1, "vocab_size": known + spare})
    model = build_model(config.model, "cpu")
    params = jax.device_put(random_params(model))
    grown = run.with_chat_tokens(run.Run(config, tokenizer, model, params, 0))
    before, after = (each["wte"]["embedding"] for each in (params, grown.params))
    assert len(after) == len(before) + rows == grown.config.model.vocab_size
    new = len({*CHAT_TOKENS} - {*tokenizer.special})
    np.testing.assert_array_equal(after[:known], before[:known])
    mean = np.broadcast_to(before[:known].mean(axis=0), (new, 16))
    np.testing.assert_allclose(after[known : known + new], mean, atol=1e-6)
    np.testing.assert_array_equal(after[known + new :], before[known + new :])
    assert all(grown.params[name] is params[name] for name in params if name != "wte")
    assert grown.tokenizer.special[-4:] == CHAT_TOKENS[-4:]
    assert logits_of(grown.model, grown.params, ONE_ROW).shape[-1] == len(after)
    assert run.with_chat_tokens(grown) is grown


def test_tokens_of_conversations_that_were_not_special_become_so():
    library = tokenizers.Tokenizer.from_str(BPETokenizer.train(["a"], 257).to_json())
    library.add_tokens(list(CHAT_TOKENS))
    tokenizer, config = BPETokenizer(library), changed(TINY, model={"vocab_size": 261})
    before = run.Run(config, tokenizer, None, {}, 0)
    after = run.with_chat_tokens(before)
    assert not is_chat_tokenizer(before.tokenizer)
    assert is_chat_tokenizer(after.tokenizer)
    assert after.params is before.params


def test_a_run_without_a_tokenizer_cant_learn_conversations(tmp_path):
    config, _ = untrained(tmp_path)
    config = changed(config, data={"packing": "conversations"})
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        run.load_initial_params(config, single_device_mesh())


@pytest.mark.devices
def test_the_vocabulary_grows_on_a_mesh_as_on_one_device(tmp_path):
    config, params = untrained(tmp_path)
    run.save_config(tmp_path, config, TOKENIZER)
    model = {"vocab_size": 11 + 5, "block_size": 5}
    config = changed(config, model=model, data={"packing": "conversations"})
    mesh = mesh_of(changed(config, mesh={"data": 1, "fsdp": 4}))
    many = run.load_initial_params(config, mesh)
    one = run.load_initial_params(config, single_device_mesh())
    assert len(many["wte"]["embedding"].sharding.device_set) == 4
    shard = many["wte"]["embedding"].addressable_shards[0].data
    assert shard.shape == (16, 4)
    close = partial(np.testing.assert_allclose, rtol=0, atol=1e-6)
    jax.tree.map(close, jax.device_get(many), jax.device_get(one))
    cropped = run.crop_block_size(params, 5)
    kept = {**many, "wte": 0}, {**cropped, "wte": 0}
    jax.tree.map(np.testing.assert_array_equal, *kept)


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
