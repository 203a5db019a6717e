import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt import SamplingConfig
from jaxgpt.generation.sampling import filter_logits, sample, scores

ODDS = np.array([0.4, 0.3, 0.2, 0.1])


def drawn_odds(config, draws=20_000):
    """Shares of each token among many draws from ODDS."""
    logits = jnp.tile(jnp.log(ODDS), (draws, 1))
    keys = jax.random.split(jax.random.key(0), draws)
    return np.bincount(sample(logits, keys, config), minlength=4) / draws


def test_temperature_1_draws_the_models_odds():
    shares = drawn_odds(SamplingConfig(temperature=1.0))
    np.testing.assert_allclose(shares, ODDS, atol=0.02)


def test_temperature_sharpens_the_odds():
    shares = drawn_odds(SamplingConfig(temperature=0.5))
    np.testing.assert_allclose(shares, ODDS**2 / (ODDS**2).sum(), atol=0.02)


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-45])
def test_a_tiny_temperature_overflows_nothing(temperature):
    config = SamplingConfig(temperature=temperature)
    keys = jax.random.split(jax.random.key(0), 3)
    logits = jnp.array([[8.0, 2.0, 9.0], [-9.0, -2.0, -5.0], [9.0, 2.0, 5.0]])
    assert sample(logits, keys, config).tolist() == [2, 1, 0]
    assert not np.isnan(scores(logits, keys, config)).any()


def test_temperature_0_takes_the_likeliest():
    assert drawn_odds(SamplingConfig(temperature=0.0)).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("k", [1, 2, 4])
def test_top_k_draws_from_the_k_likeliest(k):
    shares = drawn_odds(SamplingConfig(temperature=1.0, top_k=k))
    expected = np.where(np.arange(4) < k, ODDS, 0)
    np.testing.assert_allclose(shares, expected / expected.sum(), atol=0.02)


@pytest.mark.parametrize(("p", "kept"), [(0.01, 1), (0.39, 1), (0.41, 2), (0.95, 4)])
def test_top_p_draws_from_the_fewest_that_reach_p(p, kept):
    shares = drawn_odds(SamplingConfig(temperature=1.0, top_p=p))
    expected = np.where(np.arange(4) < kept, ODDS, 0)
    np.testing.assert_allclose(shares, expected / expected.sum(), atol=0.02)


@given(
    st.lists(st.integers(-20, 20), min_size=2, max_size=12, unique=True),
    st.floats(0.01, 1.0),
    st.integers(1, 12),
)
@settings(max_examples=50, deadline=None)
def test_filters_keep_what_plain_python_keeps(logits, p, k):
    k = min(k, len(logits))
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[:k]
    odds = np.exp([float(logits[i]) for i in order])
    odds /= odds.sum()
    before = np.cumsum(odds) - odds
    kept = {order[i] for i in np.flatnonzero(before < p - 1e-5)}
    maybe = {order[i] for i in np.flatnonzero(before < p + 1e-5)}
    filtered = filter_logits(
        jnp.array([logits], jnp.float32), SamplingConfig(top_p=p, top_k=k)
    )
    found = set(np.flatnonzero(np.isfinite(filtered[0])).tolist())
    assert kept <= found <= maybe


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1 must be at least 0"),
        ({"temperature": float("nan")}, "temperature=nan must be at least 0"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0, up to 1"),
        ({"top_p": 1.1}, "top_p=1.1 must be above 0, up to 1"),
    ],
)
def test_a_setting_out_of_range_is_an_error(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SamplingConfig(**fields)
