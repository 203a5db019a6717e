import json
import re

import jax
import numpy as np
import optax
import pytest
import torch_gpt2
import torch_nanogpt
from safetensors.numpy import load_file, save_file

from jaxgpt.commands import compare
from jaxgpt.interop import huggingface, torch_parity
from jaxgpt.interop.huggingface import read_huggingface
from jaxgpt.models import layers
from jaxgpt.training import optimizer


@pytest.fixture
def gpt2(tmp_path):
    """A directory of Hugging Face's GPT-2."""
    torch_gpt2.make(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def checks(call, *arguments, status=0):
    report = json.loads(
        call("jaxgpt", "compare", *arguments, "--json", status=status).out
    )
    assert report["passed"] == (status == 0)
    return report["checks"]


def test_a_random_gpt2_gives_pytorchs_numbers_within_what_float32_allows(call):
    """The figures that the project promises."""
    by_name = {(c["section"], c["name"]): c for c in checks(call)}
    assert by_name["logits", "float32"]["absolute"] <= 2e-5
    assert by_name["loss", "first batch"]["absolute"] <= 1e-6
    gradients = {n: c for (section, n), c in by_name.items() if section == "gradients"}
    assert (
        len(gradients) == 2 + 4 * 12 + 2 + 4
    )  # embeddings, blocks, norm, keys' biases
    for name, check in gradients.items():
        if name.endswith("keys"):
            assert check["tolerance"] is None
        else:
            assert check["error"] <= 1e-5, name
    for step in range(1, 51):
        assert by_name["loss", f"AdamW step {step}"]["absolute"] <= 1e-4
    assert by_name["greedy text", "192 tokens"]["absolute"] == 0
    assert by_name["logits", "bfloat16"]["error"] <= 2**-7 * 2
    assert {f"h.{i}{part}" for i in range(4) for part in ("", ".attn", ".mlp")} < {
        name for section, name in by_name if section == "activations"
    }


def test_the_loss_falls_while_both_train(call):
    """Else equal losses would say little of the optimizer."""
    params, reference = torch_parity.random_gpt2(compare.RANDOM, 0)
    losses = []
    original = torch_parity._torch_training

    def spy(*args):
        losses.extend(original(*args))
        return losses

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_parity, "_torch_training", spy)
        list(torch_parity.compare(compare.RANDOM, params, reference, new_tokens=0))
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("source", ["hf", "nanogpt", "nanogpt without bias", "run"])
def test_every_source_of_weights_is_compared(call, tmp_path, tiny_run, gpt2, source):
    torch_nanogpt.make(tmp_path / "ckpt.pt", bias=source == "nanogpt")
    flags = {"hf": ["--hf", gpt2], "run": ["--run-dir", tiny_run]}
    flags = flags.get(source, ["--nanogpt", tmp_path / "ckpt.pt"])
    out, _ = call("jaxgpt", "compare", *flags, "--steps", "3")
    held, of = re.search(r"(\d+) of (\d+) within tolerance", out).groups()
    assert held == of
    assert "≤" in out
    assert ">" not in out
    for part in ("activations", "h.1.mlp.c_proj.weight", "AdamW step 3", "greedy text"):
        assert part in out
    assert ("ln_f.bias" in out) == (source in ("hf", "nanogpt"))


def nan_weight(patch):
    def read(folder):
        config, params = read_huggingface(folder)
        params["h"]["mlp"]["c_fc"]["bias"] *= np.nan
        return config, params

    patch.setattr(huggingface, "read_huggingface", read)


def other_gelu(patch):
    patch.setitem(huggingface.ACTIVATIONS, "gelu_new", "exact")


def other_epsilon(patch):
    patch.setattr(
        layers,
        "layer_norm",
        lambda config: layers.nn.LayerNorm(epsilon=2e-5, use_bias=config.bias),
    )


def other_weight(patch):
    def read(folder):
        config, params = read_huggingface(folder)
        params["h"]["mlp"]["c_fc"]["bias"] *= 1 + 1e-4
        return config, params

    patch.setattr(huggingface, "read_huggingface", read)


def decayed_norms(patch):
    patch.setattr(optimizer, "_NOT_DECAYED", ("bias",))


def no_clipping(patch):
    patch.setattr(optax, "clip_by_global_norm", lambda norm: optax.identity())


def no_warmup(patch):
    constant = optax.constant_schedule(1e-3)
    patch.setattr(optimizer, "learning_rate_schedule", lambda *args: constant)


def other_tokens(patch):
    def late(*args):
        yield np.zeros((1, 48), int), np.zeros((1, 48))

    patch.setattr(torch_parity, "generate_tokens", late)


@pytest.mark.parametrize(
    ("breakage", "section"),
    [
        (other_gelu, "logits"),
        (other_epsilon, "activations"),
        (other_weight, "gradients"),
        (nan_weight, "gradients"),
        (decayed_norms, "final parameters"),
        (no_clipping, "final parameters"),
        (no_warmup, "loss"),
        (other_tokens, "greedy text"),
    ],
)
def test_a_difference_is_found_and_named(call, gpt2, monkeypatch, breakage, section):
    breakage(monkeypatch)
    jax.clear_caches()
    found = checks(call, "--hf", gpt2, "--steps", "30", status=1)
    jax.clear_caches()
    failed = [check for check in found if not check["passed"]]
    assert section in {check["section"] for check in failed}
    if section == "greedy text":
        assert re.search(r"the first other is no. \d+, by \d", failed[0]["name"])


def test_without_a_difference_the_same_is_all_within_tolerance(call, gpt2):
    checks(call, "--hf", gpt2, "--steps", "30")


def test_weights_of_pytorchs_that_are_no_numbers_are_found_too(call, gpt2):
    path = gpt2 / "model.safetensors"
    tensors = load_file(path)
    tensors["transformer.ln_f.bias"] *= np.nan
    save_file(tensors, path)
    checks(call, "--hf", gpt2, status=1)


def test_a_number_that_is_none_is_no_agreement():
    check = torch_parity._check("logits", "float32", [np.nan], [1.0], 1e-5)
    assert not check.passed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hf", "x", "--run-dir", "y"], "exclude each other; choose one"),
        (["--checkpoint", "7"], "--checkpoint 7 is one of --run-dir's; give that"),
        (["--length", "65"], "length=65 must be from 1 to block_size=64"),
        (["--length", "0"], "length=0 must be from 1"),
        (["--batch-size", "0"], "batch_size=0 must be at least 1"),
        (["--run-dir", "/nowhere"], r"is not a run: it has no config\.json"),
        (["--nanogpt", "/nowhere"], "is not a file; give a ckpt.pt"),
    ],
)
def test_bad_input_is_an_error_that_names_it(call, arguments, message):
    with pytest.raises((ValueError, OSError), match=message):
        call("jaxgpt", "compare", *arguments)
