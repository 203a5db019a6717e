import dataclasses
import json

import pytest
from conftest import changed

from jaxgpt import BigramConfig, Config, GPTConfig, SamplingConfig, TrainConfig
from jaxgpt.config import sampling_contradictions, training_contradictions
from jaxgpt.presets import PRESETS


@pytest.mark.parametrize("preset", PRESETS)
def test_from_dict_inverts_to_dict_and_json(preset):
    config = PRESETS[preset]()
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"n_embd": 384, "n_head": 5}}, "n_embd=384 .*n_head=5.*1, 2, 3, 4"),
        ({"model": {"n_layer": 0}}, "n_layer=0"),
        ({"model": {"n_embd": 2**31 - 1}}, "n_embd=2147483647 .*n_head=4"),
        ({"model": {"dropout": float("nan")}}, "dropout=nan"),
        ({"model": {"architecture": "rnn"}}, "architecture='rnn'"),
        (
            {"data": {"batch_size": 12, "gradient_accumulation_steps": 5}},
            "batch_size=12 .*gradient_accumulation_steps=5",
        ),
        ({"optimizer": {"learning_rate": 10**400}}, "learning_rate=1000"),
        ({"optimizer": {"min_lr": 1.0}}, "min_lr=1.0 .*learning_rate=0.001"),
        ({"optimizer": {"beta2": 1.0}}, "beta2=1.0"),
        ({"train": {"seed": -1}}, "seed=-1 .*4294967295"),
        ({"mesh": {"data": 0}}, "mesh.data=0"),
        ({"mesh": {"fsdp": -2}}, "mesh.fsdp=-2"),
        ({"mesh": {"tensor": -1}}, "mesh.tensor=-1"),
        (
            {"model": {"architecture": "residual"}, "mesh": {"fsdp": 2}},
            "mesh.fsdp=2 .*architecture=residual",
        ),
        *(
            ({"model": {"architecture": "classifier", "labels": labels}}, "labels=")
            for labels in (["a"], ["a", "b", "a"], ["a", ""])
        ),
        *(
            ({"ppo": {"kl_target": 6.0}} | values, message)
            for values, message in (
                ({"dpo": {}}, "ppo or by dpo"),
                ({"ppo": {"reward_std": 0.0}}, "reward_std=0.0"),
                ({"ppo": {"reward_std": -1.0}}, "reward_std=-1.0"),
                ({"model": {"compute_dtype": "bfloat16"}}, "bfloat16.*float32"),
                (
                    {
                        "ppo": {"kl_target": 6.0, "kl_horizon": 100},
                        "data": {"batch_size": 500},
                    },
                    "kl_horizon=100 .*batch_size=500",
                ),
            )
        ),
        ({"data": {"tokenizer": "bpe"}}, r"--model\.vocab-size 1024"),
        ({"modle": {}}, "'modle'"),
    ],
)
def test_an_invalid_value_is_an_error_that_names_it(values, message):
    with pytest.raises(ValueError, match=message):
        Config.from_dict(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"n_layers": 2}}, "'n_layers'"),
        ({"model": {"n_layer": "two"}}, "n_layer='two' .*int"),
        ({"model": {"n_layer": True}}, "n_layer=True .*int"),
        ({"model": {"gelu": "fast"}}, "gelu='fast' .*exact, tanh"),
        ({"model": {"vocab_size": 1.5}}, r"vocab_size=1.5 .*int \| None"),
        ({"model": {"architecture": "bigram", "n_layer": 5}}, "'n_layer'"),
        ({"data": {"path": [1]}}, r"path=\(1,\)"),
        ({"data": []}, "'list'"),
        ([], "'list'"),
    ],
)
def test_a_value_of_the_wrong_type_and_an_unknown_field_are_errors(values, message):
    with pytest.raises(TypeError, match=message):
        Config.from_dict(values)


def test_fields_that_older_versions_saved_for_every_model_are_ignored_at_defaults():
    saved = dataclasses.asdict(GPTConfig(block_size=8)) | {"architecture": "bigram"}
    assert Config.from_dict({"model": saved}).model == BigramConfig(block_size=8)


@pytest.mark.parametrize("preset", PRESETS)
def test_no_preset_contradicts_itself(preset):
    assert training_contradictions(PRESETS[preset]()) == []


@pytest.mark.parametrize(
    ("train", "names"),
    [
        ({"max_steps": 11}, []),
        ({"max_steps": 10}, ["warmup_steps=10 max_steps=10"]),
        ({"log_interval": 100}, []),
        ({"log_interval": 101}, ["log_interval=101 max_steps=100"]),
        ({"eval_interval": 10}, []),
        ({"eval_interval": 9}, ["steps_per_call=10 eval_interval=9"]),
        ({"checkpoint_interval": 9}, ["steps_per_call=10 checkpoint_interval=9"]),
        (
            {"max_steps": 6, "log_interval": 7, "eval_interval": 2},
            ["warmup_steps=", "log_interval=", "steps_per_call="],
        ),
        ({"max_steps": 9, "eval_interval": 9}, ["warmup_steps="]),  # a short trial
    ],
)
def test_a_setting_that_others_keep_from_taking_effect_is_named(train, names):
    lines = training_contradictions(changed(PRESETS["smoke"](), train=train))
    for line, words in zip(lines, names, strict=True):
        assert all(word in line for word in words.split())


@pytest.mark.parametrize(
    ("sections", "names"),
    [
        ({}, []),
        ({"model": {"dropout": 0.1}}, ["dropout"]),
        ({"train": {"steps_per_call": 20}}, ["steps_per_call"]),
        (
            {"ppo": {"kl_horizon": 9, "kl_target": 0.0}},
            ["kl_horizon without kl_target"],
        ),
        ({"ppo": {"kl_horizon": 99, "kl_target": 1.0}}, []),
    ],
)
def test_a_setting_without_effect_in_ppo_is_named(sections, names):
    lines = training_contradictions(changed(PRESETS["ppo"](), **sections))
    for line, name in zip(lines, names, strict=True):
        assert line.startswith(f"{name} has no effect")


def test_groups_of_one_response_are_said_to_teach_nothing():
    (line,) = training_contradictions(
        changed(PRESETS["assistant-grpo"](), grpo={"group_size": 1})
    )
    assert "nothing is learned" in line


@pytest.mark.parametrize("steps", [0, -2])
def test_steps_per_call_are_a_number_or_chosen_for_the_device(steps):
    with pytest.raises(ValueError, match=f"steps_per_call={steps} .*-1 "):
        TrainConfig(steps_per_call=steps)


@pytest.mark.parametrize(
    ("sampling", "num_samples", "names"),
    [
        ({}, 5, []),
        ({"temperature": 0}, 1, []),
        ({"temperature": 0}, 2, ["2 samples temperature=0"]),
        ({"top_k": 1}, 2, ["2 samples top_k=1"]),
        ({"temperature": 0, "top_k": 1, "top_p": 0.9}, 1, ["top_k=1", "top_p=0.9"]),
    ],
)
def test_sampling_options_without_effect_are_named(sampling, num_samples, names):
    lines = sampling_contradictions(SamplingConfig(**sampling), num_samples)
    for line, words in zip(lines, names, strict=True):
        assert all(word in line for word in words.split())
