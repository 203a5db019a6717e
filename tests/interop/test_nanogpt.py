import math
import re
import shutil
from functools import cache

import jax
import numpy as np
import optax
import pytest
import torch
import torch_nanogpt
from torch_nanogpt import SETTINGS, batches

from jaxgpt.interop.nanogpt import read_nanogpt, write_nanogpt
from jaxgpt.models import build_model
from jaxgpt.training.objectives import next_token
from jaxgpt.training.optimizer import make_optimizer
from jaxgpt.training.step import make_train_step


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def saved(request, tmp_path):
    """nanoGPT's model after 5 updates, its optimizer, and the path of its ckpt.pt."""
    path = tmp_path / "[x]\udce9.pt"  # not UTF-8
    return *torch_nanogpt.make(path, bias=request.param), path


@pytest.fixture
def path(make_once, tmp_path):
    """The ckpt.pt of a model without biases."""
    made = make_once("nanogpt", lambda to: torch_nanogpt.make(to / "a.pt", bias=False))
    return shutil.copy(made / "a.pt", tmp_path / "ckpt.pt")


def read(path):
    return read_nanogpt(path, log=pytest.fail)


def edit(path, where, change=None):
    """Replaces an entry of the checkpoint, or removes it if `change` is None.

    `where` has the keys that lead to it, as in "model_args/n_head". `change` is the new
    value, or a function that makes it from the old one.
    """
    tree = checkpoint = torch.load(path)
    *outer, key = (int(k) if k.isdecimal() else k for k in where.split("/"))
    for each in outer:
        tree = tree[each]
    if change is None:
        del tree[key]
    else:
        tree[key] = change(tree[key]) if callable(change) else change
    torch.save(checkpoint, path)


def flat(tree, name=""):
    """Leaves of nested dicts and lists by their path, tensors as their bytes."""
    if isinstance(tree, dict | list):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for key, t in items for k, v in flat(t, f"{name}/{key}").items()}
    return {name: tree.numpy().tobytes() if torch.is_tensor(tree) else tree}


@cache
def train_step(config):
    objective = next_token(build_model(config.model, "cpu"))
    optimizer = make_optimizer(config.optimizer, config.train.max_steps)
    return jax.jit(make_train_step(objective, optimizer, config))


def our_losses(config, state, steps):
    losses = []
    for pair in batches(steps):
        state, metrics = train_step(config)(state, pair)
        losses.append(float(metrics["loss"]))
    return losses, state


def their_losses(model, optimizer, settings, steps):
    return torch_nanogpt.train(model, optimizer, settings, steps, batches(steps))


def load_as_nanogpt(path):
    """nanoGPT's model and optimizer from its checkpoint, and the checkpoint."""
    checkpoint = torch.load(path)  # only tensors and plain values
    model = torch_nanogpt.GPT(**checkpoint["model_args"])
    model.load_state_dict(checkpoint["model"])
    optimizer = torch_nanogpt.configure_optimizer(model, SETTINGS)
    optimizer.load_state_dict(checkpoint["optimizer"])
    return model, optimizer, checkpoint


def test_imported_weights_give_nanogpts_logits(saved):
    model, _, path = saved
    config, state, _ = read(path)
    tokens = batches([9])[0][0]
    ours = build_model(config.model, "cpu").apply({"params": state.params}, tokens)
    theirs = model(torch.tensor(tokens)).detach().numpy()
    assert np.abs(theirs).max() > 0.05
    np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_an_imported_checkpoint_continues_training_as_nanogpt_does(saved):
    model, optimizer, path = saved
    config, state, _ = read(path)
    assert int(state.step) == 5
    ours, state = our_losses(config, state, range(5, 15))
    theirs = their_losses(model, optimizer, SETTINGS, range(5, 15))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert ours[-1] < ours[0]
    table = model.lm_head.weight.detach().numpy()
    np.testing.assert_allclose(state.params["wte"]["embedding"], table, atol=1e-5)


def test_nanogpt_continues_training_from_an_exported_checkpoint(saved, tmp_path):
    config, state, _ = read(saved[2])
    _, state = our_losses(config, state, range(5, 10))
    write_nanogpt(tmp_path / "out.pt", config, state, 1.5, "shakespeare_char")
    model, optimizer, checkpoint = load_as_nanogpt(tmp_path / "out.pt")
    assert checkpoint["iter_num"] == 10
    assert checkpoint["best_val_loss"] == 1.5
    theirs = their_losses(model, optimizer, checkpoint["config"], range(10, 20))
    ours, _ = our_losses(config, state, range(10, 20))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_import_and_export_restore_every_tensor_and_setting(saved, tmp_path):
    path = saved[2]
    write_nanogpt(tmp_path / "out.pt", *read(path), "shakespeare_char")
    before, after = (flat(torch.load(p)) for p in (path, tmp_path / "out.pt"))
    del before["/config/device"]
    assert before.keys() == after.keys() - {"/config/block_size"}
    lr = torch_nanogpt.learning_rate(5, SETTINGS)
    for name, value in before.items():
        if name == "/best_val_loss":  # nanoGPT saves a tensor
            assert after[name] == 2.5
        elif name.endswith("/lr"):  # nanoGPT sets it before each update
            assert after[name] == pytest.approx(lr, rel=1e-6)
        else:
            assert after[name] == value, name


@pytest.mark.parametrize(
    ("where", "change"),
    [
        ("model", lambda model: {f"_orig_mod.{name}": model[name] for name in model}),
        ("model", lambda model: {name: model[name].double() for name in model}),
        ("model", lambda model: {n: torch.nn.Parameter(model[n]) for n in model}),
        ("model/transformer.h.0.attn.bias", torch.ones(1, 1, 8, 8)),  # a mask
        ("model_args/dropout", None),
    ],
)
def test_other_forms_of_the_same_weights_are_read_alike(path, where, change):
    _, before, _ = read(path)
    edit(path, where, change)
    _, after, _ = read(path)
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_a_file_without_the_bias_setting_has_biases(tmp_path):
    torch_nanogpt.make(tmp_path / "ckpt.pt", bias=True)
    edit(tmp_path / "ckpt.pt", "model_args/bias")
    assert read(tmp_path / "ckpt.pt")[0].model.bias


def test_training_settings_are_imported(path):
    config, _, val_loss = read(path)
    assert val_loss == 2.5
    assert (config.data.batch_size, config.data.microbatch_size) == (8, 4)
    assert config.train.max_steps == 20
    assert (config.optimizer.warmup_steps, config.optimizer.beta1) == (3, 0.8)
    edit(path, "config/decay_lr", False)
    constant = read(path)[0].optimizer
    assert constant.min_lr == constant.learning_rate == 3e-3
    assert constant.warmup_steps == 0


@pytest.mark.parametrize(
    ("where", "change", "message"),
    [
        ("config/beta1", 1.0, "beta1=1.0"),
        ("config/lr_decay_iters", 60, "lr_decay_iters=60"),
        ("optimizer", lambda saved: None, "optimizer state"),
        ("optimizer/state/0", None, "optimizer state"),
        ("optimizer/state/0/exp_avg", None, "optimizer state.*exp_avg"),
        ("optimizer/state/0/exp_avg", torch.ones(3), "optimizer state.*wte"),
        ("optimizer/state/0/exp_avg", lambda m: m * math.nan, "optimizer.*wte.*NaN"),
    ],
)
def test_what_cannot_be_imported_is_logged_and_left_out(path, where, change, message):
    edit(path, where, change)
    lines = []
    config, state, _ = read_nanogpt(path, lines.append)
    (line,) = lines
    assert re.search(message, line)
    assert config.model.n_embd == 16
    assert config.optimizer.beta1 == (0.9 if where == "config/beta1" else 0.8)
    if where.startswith("optimizer"):
        assert state.opt_state is None
    else:
        assert optax.tree.get(state.opt_state, "ScaleByAdamState").count == 5


@pytest.mark.parametrize("where", ["optimizer", "optimizer/state"])
def test_without_optimizer_state_nanogpt_begins_with_new_moments(path, tmp_path, where):
    edit(path, where, None if where == "optimizer" else {})
    config, state, _ = read(path)
    assert state.opt_state is None
    write_nanogpt(tmp_path / "out.pt", config, state, None, "x")
    model, optimizer, checkpoint = load_as_nanogpt(tmp_path / "out.pt")
    assert checkpoint["best_val_loss"] == 1e9
    assert not optimizer.state
    their_losses(model, optimizer, SETTINGS, range(1))


def test_the_schedule_counts_iterations_and_adam_counts_updates(path, tmp_path):
    def skip_two(states):
        return {i: each | {"step": each["step"] - 2} for i, each in states.items()}

    edit(path, "optimizer/state", skip_two)
    config, state, _ = read(path)
    assert state.step == 5
    counts = optax.tree.get_all_with_path(state.opt_state, "count")
    assert [int(count) for _, count in counts] == [3, 5]
    write_nanogpt(tmp_path / "out.pt", config, state, None, "x")
    assert torch.load(tmp_path / "out.pt")["optimizer"]["state"][0]["step"] == 3


@pytest.mark.parametrize(
    ("where", "change", "message"),
    [
        ("model", None, "'model'"),
        ("model_args/n_head", 3, "n_head=3"),
        ("model_args/n_layer", 10**9, "n_layer=1000000000"),
        ("model_args/n_layer", 1, r"h\.1\.\w+\.weight: .*none"),
        ("iter_num", 2**31, "2147483648"),
        ("model/transformer.h.1.mlp.c_fc.weight", None, r"h\.1\.mlp\.c_fc\.weight: "),
        ("model/transformer.ln_f.weight", torch.ones(17), r"ln_f\.weight: .*17.*16"),
        ("model/lm_head.weight", torch.ones(65, 16), r"lm_head\.weight"),
        ("model/transformer.ln_f.weight", 3, r"ln_f\.weight: .*\(\).*\(16,\)"),
        (
            "model/transformer.wpe.weight",
            torch.ones(1).expand(10**6, 16),
            r"wpe\.weight: .*\(1000000, 16\).*\(8, 16\)",
        ),
    ],
)
def test_a_faulty_checkpoint_is_an_error_that_names_the_fault(
    path, where, change, message
):
    edit(path, where, change)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{message}"):
        read(path)
