"""Rollouts sample what `generate_tokens` would, row by row."""

import jax
import numpy as np
import pytest
from conftest import TINY, changed, init_model

from jaxgpt.config import SamplingConfig
from jaxgpt.generation import decode
from jaxgpt.generation.decode import LateEnds
from jaxgpt.parallel.feeding import shard_batch
from jaxgpt.parallel.mesh import AXES, make_mesh, replicated
from jaxgpt.posttrain.rollout import Rules, make_rollout
from jaxgpt.text.examples import PromptBatch

N, RULES = 5, Rules(5, (3, 7), temperature=0.9)
PROMPTS = [[1, 2, 3], [4], [5, 6], [3, 1, 4], [2], [7, 7], [9, 10, 8], [1]]


@pytest.fixture(scope="module")
def tiny():
    return init_model(block_size=8)


def batch_of(prompts, seed=5):
    fold_in = jax.vmap(jax.random.fold_in, (None, 0))
    key_B = fold_in(jax.random.key(seed), np.arange(len(prompts)))
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    padded = [np.pad(prompt, (0, 4 - len(prompt))) for prompt in prompts]
    keys_B2 = np.asarray(jax.random.key_data(key_B))
    return PromptBatch(np.array(padded, np.int32), lengths, lengths * 0 + 1.0, keys_B2)


def responses(tiny, batch, rules=RULES, **mesh):
    model, params = tiny
    B = len(batch.lengths_B)
    config = changed(TINY, data={"batch_size": B}, mesh={"data": 1} | mesh)
    devices = make_mesh(config, lambda line: None)
    program = make_rollout(model, rules, devices)
    params = jax.device_put(params, replicated(devices))
    rolled = jax.device_get(program(params, shard_batch(devices, batch)))
    return rolled, [
        tokens[start : start + count].tolist()
        for tokens, start, count in zip(
            rolled.tokens_BT, rolled.prompts_B, rolled.counts_B, strict=True
        )
    ]


def test_a_rollout_has_the_tokens_of_generate_tokens_up_to_its_end(tiny):
    rolled, found = responses(tiny, batch_of(PROMPTS))
    drawn = decode.generate_tokens(
        *(*tiny, PROMPTS, N, SamplingConfig(temperature=0.9), 5, RULES.end_tokens)
    )
    expected = np.concatenate([tokens for tokens, _ in drawn], axis=1).tolist()
    for tokens, ended, row in zip(found, rolled.ended_B, expected, strict=True):
        assert tokens == row[: len(tokens)]
        assert ended == (tokens[-1] in RULES.end_tokens)
        assert ended or len(tokens) == N
    assert 0 < rolled.ended_B.sum() < len(PROMPTS)


def test_a_late_end_before_its_first_place_is_an_ordinary_token(tiny):
    _, free = responses(tiny, batch_of(PROMPTS))
    assert min(map(len, free)) < 3
    _, found = responses(
        tiny,
        batch_of(PROMPTS),
        RULES._replace(end_tokens=(), late_ends=LateEnds((3, 7), 3)),
    )
    assert min(map(len, found)) == 3
    for row, other in zip(found, free, strict=True):
        assert row[: len(other)] == other


def test_a_row_does_not_depend_on_the_others(tiny):
    batch = batch_of(PROMPTS)
    whole, _ = responses(tiny, batch)
    part, _ = responses(tiny, jax.tree.map(lambda a: a[::-1][:4], batch))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(part), strict=True):
        np.testing.assert_array_equal(a[::-1][:4], b)


@pytest.mark.devices
@pytest.mark.parametrize("axis", AXES)
def test_every_mesh_samples_the_same_tokens(tiny, axis):
    _, expected = responses(tiny, batch_of(PROMPTS))
    _, found = responses(
        tiny, batch_of(PROMPTS), **{axis: 2 if axis == "tensor" else 8}
    )
    assert found == expected
