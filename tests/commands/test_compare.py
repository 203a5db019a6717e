import json
import re

import jax
import numpy as np
import optax
import pytest
import torch_gpt2
import torch_nanogpt
from safetensors.numpy import load_file, save_file

from jaxgpt import GPTConfig
from jaxgpt.commands import compare
from jaxgpt.interop import huggingface, torch_parity
from jaxgpt.interop.huggingface import read_huggingface
from jaxgpt.models import layers
from jaxgpt.training import optimizer

SIZES = {"block_size": 16, "vocab_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 64}
SMALL = GPTConfig(**SIZES, bias=True, gelu="tanh")


@pytest.fixture
def gpt2(tmp_path):
    """A directory of Hugging Face's GPT-2."""
    torch_gpt2.make(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def checks(call, *arguments, status=0):
    out, _ = call("jaxgpt", "compare", *arguments, "--json", status=status)
    report = json.loads(out)
    assert report["passed"] == (status == 0)
    return report["checks"]


@pytest.mark.torch
@pytest.mark.parametrize("config", [SMALL, compare.RANDOM])
def test_a_random_gpt2_agrees_with_pytorch_within_the_tolerances(
    call, monkeypatch, config
):
    losses, training = [], torch_parity._torch_training

    def spy(*args):
        losses.extend(training(*args))
        return losses

    monkeypatch.setattr(torch_parity, "_torch_training", spy)
    monkeypatch.setattr(compare, "RANDOM", config)
    by_name = {(c["section"], c["name"]): c for c in checks(call)}
    assert by_name["logits", "float32"]["absolute"] <= 2e-5
    assert by_name["loss", "first batch"]["absolute"] <= 1e-6
    gradients = {n: c for (section, n), c in by_name.items() if section == "gradients"}
    # Embeddings, blocks, the last norm, and apart the biases of keys.
    assert len(gradients) == 2 + 12 * config.n_layer + 2 + config.n_layer
    for name, check in gradients.items():
        if name.endswith("keys"):
            assert check["tolerance"] is None
        else:
            assert check["error"] <= 1e-5, name
    for step in range(1, 51):
        assert by_name["loss", f"AdamW step {step}"]["absolute"] <= 1e-4
    assert losses[-1] < losses[0] - 0.5  # else equal losses would say little
    greedy = by_name["greedy text", f"{3 * config.block_size} tokens"]
    assert greedy["absolute"] == 0
    assert by_name["logits", "bfloat16"]["error"] <= 2**-7 * 2
    activations = {name for section, name in by_name if section == "activations"}
    for layer in range(config.n_layer):
        assert activations > {f"h.{layer}{part}" for part in ("", ".attn", ".mlp")}


@pytest.mark.torch
@pytest.mark.parametrize("source", ["hf", "nanogpt", "nanogpt without bias", "run"])
def test_weights_of_any_source_can_be_compared(call, tmp_path, tiny_run, gpt2, source):
    torch_nanogpt.make(tmp_path / "ckpt.pt", bias=source == "nanogpt")
    flags = {"hf": ["--hf", gpt2], "run": ["--run-dir", tiny_run]}
    flags = flags.get(source, ["--nanogpt", tmp_path / "ckpt.pt"])
    out, _ = call("jaxgpt", "compare", *flags, "--steps", "3")
    passed, count = re.search(r"(\d+) of (\d+)", out).groups()
    assert passed == count
    assert "≤" in out
    assert ">" not in out
    for part in ("activations", "h.1.mlp.c_proj.weight", "AdamW step 3", "greedy text"):
        assert part in out
    assert ("ln_f.bias" in out) == (source in ("hf", "nanogpt"))


def scaled_bias(factor):
    """`read_huggingface`, except that it scales one bias."""

    def read(folder):
        config, params = read_huggingface(folder)
        params["h"]["mlp"]["c_fc"]["bias"] *= factor
        return config, params

    return read


def other_epsilon(config):
    return layers.nn.LayerNorm(epsilon=2e-5, use_bias=config.bias)


CONSTANT = optax.constant_schedule(1e-3)
OTHER_GELU = huggingface.ACTIVATIONS | {"gelu_new": "exact"}
OTHER_TOKENS = [(np.zeros((1, 48), int), np.zeros((1, 48)))]


@pytest.mark.torch
@pytest.mark.parametrize(
    ("module", "name", "value", "section"),
    [
        (huggingface, "ACTIVATIONS", OTHER_GELU, "logits"),
        (huggingface, "read_huggingface", scaled_bias(np.nan), "gradients"),
        (layers, "layer_norm", other_epsilon, "activations"),
        (optimizer, "_NOT_DECAYED", ("bias",), "final parameters"),
        (optax, "clip_by_global_norm", lambda _: optax.identity(), "final parameters"),
        (optimizer, "learning_rate_schedule", lambda *_: CONSTANT, "loss"),
        (
            torch_parity,
            "generate_tokens",
            lambda *_: OTHER_TOKENS,
            "greedy text",
        ),
        (None, None, None, None),
    ],
)
def test_a_difference_is_found_and_named(
    call, gpt2, monkeypatch, module, name, value, section
):
    if module:
        monkeypatch.setattr(module, name, value)
    jax.clear_caches()
    status = int(module is not None)
    found = checks(call, "--hf", gpt2, "--steps", "30", status=status)
    jax.clear_caches()
    failed = [check for check in found if not check["passed"]]
    assert {section} <= {None, *(check["section"] for check in failed)}
    if section == "greedy text":
        assert re.search(r"no\. \d+, .* \d", failed[0]["name"])


@pytest.mark.torch
def test_a_difference_in_one_weight_is_found(call, gpt2, monkeypatch):
    monkeypatch.setattr(huggingface, "read_huggingface", scaled_bias(1 + 1e-4))
    flags = ("--hf", gpt2, "--steps", 0, "--greedy-tokens", 0)
    failed = [check for check in checks(call, *flags, status=1) if not check["passed"]]
    assert {"activations", "gradients"} <= {check["section"] for check in failed}


@pytest.mark.torch
def test_nan_in_pytorchs_weights_is_refused(call, gpt2):
    path = gpt2 / "model.safetensors"
    tensors = load_file(path)
    tensors["transformer.ln_f.bias"] *= np.nan
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"ln_f\.bias is not finite"):
        call("jaxgpt", "compare", "--hf", gpt2)


def test_nan_is_never_within_a_tolerance():
    for ours, theirs in ((np.nan, 1.0), (1.0, np.nan), (np.nan, np.nan)):
        check = torch_parity._check("logits", "float32", [ours], [theirs], 1e-5)
        assert not check.passed
