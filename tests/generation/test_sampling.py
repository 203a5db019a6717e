import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt import SamplingConfig
from jaxgpt.generation.sampling import filter_logits, sample, scores

PROBS = np.array([0.4, 0.3, 0.2, 0.1])


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"temperature": 1.0}, PROBS),
        ({"temperature": 0.5}, PROBS**2),
        *(({"top_k": k}, PROBS * (np.arange(4) < k)) for k in (1, 2, 4)),
        *(
            ({"top_p": p}, PROBS * (np.arange(4) < kept))
            for p, kept in [(0.01, 1), (0.39, 1), (0.41, 2), (0.95, 4)]
        ),
    ],
)
def test_shares_of_sampled_tokens_are_their_probabilities(fields, expected):
    config = SamplingConfig(**{"temperature": 1.0} | fields)
    logits_BV = jnp.tile(jnp.log(PROBS), (20_000, 1))
    keys_B = jax.random.split(jax.random.key(0), 20_000)
    shares = np.bincount(sample(logits_BV, keys_B, config), minlength=4) / 20_000
    np.testing.assert_allclose(shares, expected / expected.sum(), atol=0.02)


@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1e-38, 1e-45])
def test_a_tiny_temperature_takes_the_likeliest_and_does_not_overflow(temperature):
    config = SamplingConfig(temperature=temperature)
    keys_B = jax.random.split(jax.random.key(0), 3)
    logits_BV = jnp.array([[8.0, 2.0, 9.0], [-9.0, -2.0, -5.0], [9.0, 2.0, 5.0]])
    assert sample(logits_BV, keys_B, config).tolist() == [2, 1, 0]
    assert not np.isnan(scores(logits_BV, keys_B, config)).any()


@given(
    st.permutations(range(-20, 20)),
    st.sampled_from([2, 12]),  # each size and each k is a program
    st.floats(0.01, 1.0),
    st.integers(1, 12),
)
@settings(max_examples=50, deadline=None)
def test_filters_keep_what_plain_python_keeps(values, size, p, k):
    logits, k = values[:size], min(k, size)
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[:k]
    probs = np.exp([float(logits[i]) for i in order])
    probs /= probs.sum()
    before = np.cumsum(probs) - probs
    kept = {order[i] for i in np.flatnonzero(before < p - 1e-5)}
    maybe = {order[i] for i in np.flatnonzero(before < p + 1e-5)}
    config = SamplingConfig(top_p=p, top_k=k)
    filtered = filter_logits(jnp.array([logits], jnp.float32), config)
    found = set(np.flatnonzero(np.isfinite(filtered[0])).tolist())
    assert kept <= found <= maybe
