import os
import re

import jax
import numpy as np
import optax
import pytest
import torch
import torch_nanogpt
from conftest import changed
from torch_nanogpt import SETTINGS, batches

from jaxgpt.interop.nanogpt import read_nanogpt, write_nanogpt
from jaxgpt.models import build_model
from jaxgpt.training.objectives import next_token
from jaxgpt.training.optimizer import make_optimizer
from jaxgpt.training.step import make_train_step


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def saved(request, tmp_path):
    """nanoGPT's model after 5 updates, its optimizer, and the path of its ckpt.pt."""
    path = tmp_path / "ckpt.pt"
    return *torch_nanogpt.make(path, bias=request.param), path


@pytest.fixture
def path(tmp_path):
    """Of the ckpt.pt of one without biases."""
    torch_nanogpt.make(tmp_path / "ckpt.pt", bias=False)
    return tmp_path / "ckpt.pt"


def read(path):
    return read_nanogpt(path, log=pytest.fail)


def spoil(path, change):
    """Saves the checkpoint at `path` after `change(checkpoint)`."""
    checkpoint = torch.load(path)
    change(checkpoint)
    torch.save(checkpoint, path)


def flat(tree, name=""):
    """Leaves of nested dicts and lists by their path, tensors as their bytes."""
    if isinstance(tree, dict | list):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for key, t in items for k, v in flat(t, f"{name}/{key}").items()}
    return {name: tree.numpy().tobytes() if torch.is_tensor(tree) else tree}


def our_losses(config, state, steps):
    objective = next_token(build_model(config.model, "cpu"))
    optimizer = make_optimizer(config.optimizer, config.train.max_steps)
    step = jax.jit(make_train_step(objective, optimizer, config))
    losses = []
    for pair in batches(steps):
        state, metrics = step(state, pair)
        losses.append(float(metrics["loss"]))
    return losses, state


def test_imported_weights_give_nanogpts_logits(saved):
    model, _, path = saved
    config, state, _ = read(path)
    tokens = batches([9])[0][0]
    ours = build_model(config.model, "cpu").apply({"params": state.params}, tokens)
    theirs = model(torch.tensor(tokens)).detach().numpy()
    assert np.abs(theirs).max() > 0.05
    np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_an_imported_checkpoint_trains_on_as_nanogpt_does(saved):
    model, optimizer, path = saved
    config, state, _ = read(path)
    assert int(state.step) == 5
    ours, state = our_losses(config, state, range(5, 15))
    theirs = torch_nanogpt.train(
        model, optimizer, SETTINGS, range(5, 15), batches(range(5, 15))
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert ours[-1] < ours[0]
    np.testing.assert_allclose(
        state.params["wte"]["embedding"],
        model.lm_head.weight.detach().numpy(),
        atol=1e-5,
    )


def test_nanogpt_trains_on_from_an_exported_checkpoint_as_we_do(saved, tmp_path):
    config, state, _ = read(saved[2])
    _, state = our_losses(config, state, range(5, 10))
    write_nanogpt(tmp_path / "out.pt", config, state, 1.5, "shakespeare_char")
    checkpoint = torch.load(tmp_path / "out.pt")  # tensors and plain values only
    assert checkpoint["iter_num"] == 10
    assert checkpoint["best_val_loss"] == 1.5
    model = torch_nanogpt.GPT(**checkpoint["model_args"])
    model.load_state_dict(checkpoint["model"])
    optimizer = torch_nanogpt.configure_optimizer(model, SETTINGS)
    optimizer.load_state_dict(checkpoint["optimizer"])
    settings = checkpoint["config"]
    theirs = torch_nanogpt.train(
        model, optimizer, settings, range(10, 20), batches(range(10, 20))
    )
    ours, _ = our_losses(config, state, range(10, 20))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_there_and_back_every_tensor_and_setting_is_the_same(saved, tmp_path):
    path = saved[2]
    write_nanogpt(tmp_path / "out.pt", *read(path), "shakespeare_char")
    before, after = (flat(torch.load(p)) for p in (path, tmp_path / "out.pt"))
    del before["/config/device"]
    assert before.keys() == after.keys() - {"/config/block_size"}
    lr = torch_nanogpt.learning_rate(5, SETTINGS)
    for name, value in before.items():
        if name == "/best_val_loss":  # a tensor of nanoGPT's
            assert after[name] == 2.5
        elif name.endswith("/lr"):  # nanoGPT sets it before each update
            assert after[name] == pytest.approx(lr, rel=1e-6)
        else:
            assert after[name] == value, name


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(
            model={f"_orig_mod.{name}": t for name, t in c["model"].items()}
        ),
        lambda c: c["model"].update(
            {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8)}
        ),
        lambda c: c["model"].update(
            {name: t.double() for name, t in c["model"].items()}
        ),
        lambda c: c["model_args"].pop("dropout"),
        lambda c: c["model"].update(
            {name: torch.nn.Parameter(t) for name, t in c["model"].items()}
        ),
    ],
    ids=["compiled", "mask buffer", "float64", "no dropout", "parameters"],
)
def test_other_ways_to_save_the_same_weights_make_no_difference(path, change):
    _, before, _ = read(path)
    spoil(path, change)
    _, after, _ = read(path)
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_old_files_that_say_nothing_of_bias_have_it(tmp_path):
    torch_nanogpt.make(tmp_path / "ckpt.pt", bias=True)
    spoil(tmp_path / "ckpt.pt", lambda c: c["model_args"].pop("bias"))
    assert read(tmp_path / "ckpt.pt")[0].model.bias


def test_settings_are_taken_over(path):
    config, _, val_loss = read(path)
    assert val_loss == 2.5
    assert config.data.batch_size == 8
    assert config.data.microbatch_size == 4
    assert config.train.max_steps == 20
    assert config.optimizer.warmup_steps == 3
    assert config.optimizer.beta1 == 0.8
    spoil(path, lambda c: c["config"].update(decay_lr=False))
    constant = read(path)[0].optimizer
    assert constant.min_lr == constant.learning_rate == 3e-3
    assert constant.warmup_steps == 0


def test_settings_that_make_no_sense_here_are_left_with_a_word(path):
    spoil(path, lambda c: c["config"].update(beta1=1.0))
    lines = []
    config, state, _ = read_nanogpt(path, lines.append)
    assert "beta1=1.0 must be at least 0, under 1" in lines[0]
    assert config.optimizer.beta1 == 0.9
    assert config.model.n_embd == 16
    assert optax.tree.get(state.opt_state, "ScaleByAdamState").count == 5


@pytest.mark.parametrize("change", [lambda c: c.pop("optimizer"), None])
def test_without_optimizer_state_nanogpt_begins_with_fresh_moments(
    path, tmp_path, change
):
    spoil(path, change or (lambda c: c["optimizer"].update(state={})))
    config, state, _ = read(path)
    assert state.opt_state is None
    write_nanogpt(tmp_path / "out.pt", config, state, None, "x")
    checkpoint = torch.load(tmp_path / "out.pt")
    assert checkpoint["best_val_loss"] == 1e9
    model = torch_nanogpt.GPT(**checkpoint["model_args"])
    optimizer = torch_nanogpt.configure_optimizer(model, SETTINGS)
    optimizer.load_state_dict(checkpoint["optimizer"])
    assert not optimizer.state
    torch_nanogpt.train(model, optimizer, SETTINGS, range(1), batches(range(1)))


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["optimizer"]["state"].pop(0),
        lambda c: c["optimizer"]["state"][0].pop("exp_avg"),
        lambda c: c["optimizer"]["state"].update({0: c["optimizer"]["state"][1]}),
        lambda c: c.update(optimizer=None),
    ],
    ids=["a parameter less", "no moments", "other order", "none"],
)
def test_an_optimizer_of_another_form_is_left_with_a_word(path, change):
    spoil(path, change)
    lines = []
    _, state, _ = read_nanogpt(path, lines.append)
    assert state.opt_state is None
    assert "optimizer state is not taken over" in lines[0]


def test_another_end_of_the_schedule_is_left_with_a_word(path):
    spoil(path, lambda c: c["config"].update(lr_decay_iters=60))
    lines = []
    read_nanogpt(path, lines.append)
    assert "lr_decay_iters=60 is not taken over" in lines[0]


def test_the_schedule_counts_iterations_and_adam_its_updates(path, tmp_path):
    def skip_two(checkpoint):
        for state in checkpoint["optimizer"]["state"].values():
            state["step"] -= 2

    spoil(path, skip_two)
    config, state, _ = read(path)
    assert state.step == 5
    counts = optax.tree.get_all_with_path(state.opt_state, "count")
    assert [int(count) for _, count in counts] == [3, 5]
    write_nanogpt(tmp_path / "out.pt", config, state, None, "x")
    assert torch.load(tmp_path / "out.pt")["optimizer"]["state"][0]["step"] == 3


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("owned",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["model"].pop("transformer.h.1.mlp.c_fc.weight"),
            r"transformer\.h\.1\.mlp\.c_fc\.weight: the file has none",
        ),
        (
            lambda c: c["model"].update(
                {"transformer.h.2.ln_1.weight": torch.ones(16)}
            ),
            r"transformer\.h\.2\.ln_1\.weight: .*, the model none",
        ),
        (
            lambda c: c["model"].update({"transformer.ln_f.weight": torch.ones(17)}),
            r"transformer\.ln_f\.weight: the file has \(17,\), the model \(16,\)",
        ),
        (
            lambda c: c["model"].update({"lm_head.weight": torch.ones(65, 16)}),
            r"lm_head\.weight is not the token embedding",
        ),
        (lambda c: c.pop("model"), "it has no 'model'"),
        (lambda c: c.pop("model_args"), "it has no 'model_args'"),
        (lambda c: c["model_args"].update(n_head=3), "not divisible by n_head=3"),
        (
            lambda c: c["model"].update(extra=3),
            r"extra: the file has \(\), the model none",
        ),
        (
            lambda c: c["model"].update(
                {"transformer.wpe.weight": torch.ones(1).expand(10**6, 16)}
            ),
            r"wpe\.weight: the file has \(1000000, 16\), the model \(8, 16\)",
        ),
        (lambda c: c["model_args"].update(n_layer=10**9), "n_layer=1000000000, but"),
        (lambda c: c.update(model_args=[2]), "list"),
        (lambda c: c.update(iter_num=2**31), "2147483648"),
        (lambda c: c.update(config=Malicious()), "more than .* no code in it was run"),
    ],
)
def test_a_checkpoint_of_another_form_is_named_with_its_fault(
    path, tmp_path, monkeypatch, change, message
):
    monkeypatch.chdir(tmp_path)
    spoil(path, change)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{message}"):
        read(path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 no zip", b"[1, 2]", b"\x80\x04."]
)
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, content):
    path = tmp_path / "ckpt.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is not a checkpoint"):
        read(path)


def test_other_things_that_torch_saves_are_no_checkpoint(tmp_path):
    torch.save([1, 2], tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match=r"ckpt\.pt: list"):
        read(tmp_path / "ckpt.pt")
    with pytest.raises(FileNotFoundError, match="is not a file"):
        read(tmp_path)


def test_a_rung_of_the_ladder_has_no_place_in_nanogpt(path, tmp_path):
    config, state, _ = read(path)
    rung = {"architecture": "layer-norm"}
    with pytest.raises(ValueError, match="nanoGPT has no layer-norm model, only a gpt"):
        write_nanogpt(tmp_path / "o", changed(config, model=rung), state, None, "x")
