import contextlib
import dataclasses
import json
import re
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt import (
    BigramConfig,
    Config,
    DataConfig,
    GPTConfig,
    LectureConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)
from jaxgpt.presets import PRESETS

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["model", "data", "n_layer", "path"]) | st.text(max_size=5),
            inner,
            max_size=3,
        )
    ),
)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_config_comes_back_from_json_as_it_was(preset):
    config = PRESETS[preset]()
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        (
            GPTConfig,
            {"n_embd": 384, "n_head": 5},
            "n_embd=384 is not divisible by n_head=5; n_head could be 1, 2, 3, 4, 6, 8",
        ),
        (GPTConfig, {"n_layer": 0}, "n_layer=0 must be at least 1"),
        (GPTConfig, {"block_size": 0}, "block_size=0 must be at least 1"),
        (GPTConfig, {"vocab_size": 0}, "vocab_size=0 must be at least 1"),
        (GPTConfig, {"n_layer": 10**12}, "at least 1, under 2147483648"),
        (GPTConfig, {"n_embd": 2**31 - 1}, "by n_head=4; n_head could be 1"),
        (GPTConfig, {"dropout": 1.0}, "dropout=1.0 must be at least 0, under 1"),
        (GPTConfig, {"dropout": float("nan")}, "dropout=nan must be"),
        (DataConfig, {"batch_size": 0}, "batch_size=0 must be at least 1"),
        (
            DataConfig,
            {"batch_size": 12, "gradient_accumulation_steps": 5},
            "batch_size=12 is not divisible by gradient_accumulation_steps=5",
        ),
        (OptimizerConfig, {"learning_rate": 0.0}, "learning_rate=0.0 must be above 0"),
        (OptimizerConfig, {"learning_rate": 10**400}, "must be above 0, under 3.4e+38"),
        (OptimizerConfig, {"min_lr": 1.0}, "min_lr=1.0 is above learning_rate=0.001"),
        (OptimizerConfig, {"beta2": 1.0}, "beta2=1.0 must be at least 0, under 1"),
        (OptimizerConfig, {"grad_clip": -1.0}, "grad_clip=-1.0 must be at least 0"),
        (TrainConfig, {"max_steps": 0}, "max_steps=0 must be at least 1"),
        (TrainConfig, {"seed": -1}, "seed=-1 must be from 0 to 4294967295"),
        (MeshConfig, {"data": 0}, "mesh.data=0 must be -1"),
        (MeshConfig, {"fsdp": -2}, "mesh.fsdp=-2 must be -1"),
        (MeshConfig, {"tensor": -1}, "mesh.tensor=-1 must be at least 1"),
        (
            partial(Config, LectureConfig(architecture="residual")),
            {"mesh": MeshConfig(fsdp=2)},
            "mesh.fsdp=2 and mesh.tensor=1 change nothing with architecture=residual",
        ),
    ],
)
def test_a_value_out_of_range_is_named_with_a_way_out(section, fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        section(**fields)


def test_bpe_says_how_many_tokens_it_shall_have():
    with pytest.raises(ValueError, match=r"as in --model\.vocab-size 1024"):
        Config(data=DataConfig(tokenizer="bpe"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"n_layers": 2}}, "unexpected keyword argument 'n_layers'"),
        ({"modle": {}}, "unknown section 'modle'"),
        ({"model": {"n_layer": "two"}}, "n_layer='two' must be int"),
        ({"model": {"n_layer": True}}, "n_layer=True must be int"),
        ({"model": {"gelu": "fast"}}, "gelu='fast' must be one of exact, tanh"),
        ({"model": {"vocab_size": 1.5}}, "vocab_size=1.5 must be int | None"),
        ({"data": {"path": [1]}}, "path=(1,) must be"),
        ({"data": []}, "'list' object is not a mapping"),
        ([], "'list' object is not a mapping"),
    ],
)
def test_a_saved_config_with_a_mistake_is_refused_by_name(values, message):
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        Config.from_dict(values)


def test_a_model_has_its_own_fields_and_one_of_before_reads_as_it_was():
    of_before = dataclasses.asdict(GPTConfig(block_size=8)) | {"architecture": "bigram"}
    read = Config.from_dict({"model": of_before}).model
    assert read == BigramConfig(block_size=8)
    with pytest.raises(TypeError, match="unexpected keyword argument 'n_layer'"):
        Config.from_dict({"model": of_before | {"n_layer": 5}})
    with pytest.raises(ValueError, match="architecture='rnn' is not known"):
        Config.from_dict({"model": {"architecture": "rnn"}})


@given(JSON)
def test_any_json_gives_a_config_or_a_clear_error(values):
    with contextlib.suppress(ValueError, TypeError):
        assert Config.from_dict(json.loads(json.dumps(values))) is not None
