import json

import pytest
from conftest import random_params, save_params

from jaxgpt.config import ClassifierConfig, Config, MaskedLMConfig, Seq2SeqConfig
from jaxgpt.interop import torch_models, torch_parity
from jaxgpt.models import build_model
from jaxgpt.run import save_config
from jaxgpt.training.checkpoint import CHECKPOINTS, open_checkpoints

SIZES = {"block_size": 12, "vocab_size": 40, "n_layer": 2, "n_head": 4, "n_embd": 32}
SIZES |= {"unroll": 1}
BIASED = SIZES | {"bias": True, "gelu": "tanh", "n_layer": 3}
LABELS = ("bad", "fair", "good")
SEQ2SEQ = Seq2SeqConfig(**SIZES, label_smoothing=0.1)
MORE = [
    ClassifierConfig(**SIZES, labels=LABELS),
    MaskedLMConfig(**SIZES, bias=True),
    ClassifierConfig(**BIASED, labels=LABELS),
    ClassifierConfig(**SIZES, labels=LABELS, pooling="first"),
    MaskedLMConfig(**BIASED, mask_prob=0.5),
    MaskedLMConfig(**SIZES),
    Seq2SeqConfig(**BIASED),
]


def params_of(config):
    """Parameters none of which is 0 or 1."""
    return random_params(build_model(config, "cpu"), mean=0.05, std=0.2)


@pytest.mark.parametrize(
    "config", [SEQ2SEQ, *(pytest.param(c, marks=pytest.mark.torch) for c in MORE)]
)
def test_outputs_and_gradients_are_those_of_torchs_transformers(config):
    params = params_of(config)
    reference = torch_models.torch_of_params(config, params)
    found = list(torch_parity.compare(config, params, reference, steps=0))
    by_section = {check.section: [] for check in found}
    for check in found:
        assert check.passed, check
        by_section[check.section].append(check)
    (logits,) = (c for c in by_section["logits"] if c.name == "float32")
    assert logits.absolute <= 2e-5
    assert len(by_section["activations"]) == len(reference.activations) > 0
    for check in by_section["gradients"]:
        if not check.name.endswith("keys"):  # whose true gradient is 0
            assert check.error <= 1e-5, check
    names = {check.name.removesuffix(", keys") for check in by_section["gradients"]}
    assert names == {name for name, _ in reference.module.named_parameters()}


@pytest.mark.torch
def test_a_seq2seq_run_can_be_compared_by_the_command(call, tmp_path):
    config, params = Config(model=SEQ2SEQ), params_of(SEQ2SEQ)
    with open_checkpoints(tmp_path / "run" / CHECKPOINTS) as checkpoints:
        save_params(checkpoints, 3, params)
    save_config(tmp_path / "run", config, None)
    flags = ["--run-dir", tmp_path / "run", "--steps", 10, "--json"]
    report = json.loads(call("jaxgpt", "compare", *flags).out)
    sections = {check["section"]: check for check in report["checks"]}
    assert sections["loss"]["name"] == "AdamW step 10"
    assert sections["final parameters"]["error"] < 1e-4
