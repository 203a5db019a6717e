from functools import partial

import numpy as np

from jaxgpt.text.batches import get_batch

TOKENS = np.arange(40, dtype=np.uint16)
batch = partial(get_batch, TOKENS, batch_size=64, block_size=4)


def test_a_batch_is_a_pure_function_of_seed_and_step():
    np.testing.assert_array_equal(batch(1, 2), batch(1, 2))
    for other in (batch(2, 2), batch(1, 3)):
        assert not np.array_equal(batch(1, 2)[0], other[0])


def test_targets_are_the_next_tokens():
    inputs, targets = batch(0, 0)
    assert inputs.shape == targets.shape == (64, 4)
    assert inputs.dtype == targets.dtype == np.int32
    np.testing.assert_array_equal(targets, inputs + 1)  # TOKENS counts up


def test_windows_are_drawn_uniformly_up_to_the_last_token():
    counts = np.bincount([s for step in range(400) for s in batch(0, step)[0][:, 0]])
    expected = 64 * 400 / 36
    assert len(counts) == 36  # start 35 has the last token, 39, as its last target
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 66.6  # 99.9th percentile for 35 degrees of freedom
