import numpy as np

from jaxgpt.text.batches import get_batch

SHAPE = {"batch_size": 64, "block_size": 4}
TOKENS = np.arange(40, dtype=np.uint16)


def test_a_batch_is_a_pure_function_of_seed_and_step():
    one, again = get_batch(TOKENS, 1, 2, **SHAPE), get_batch(TOKENS, 1, 2, **SHAPE)
    np.testing.assert_array_equal(one, again)
    for other in (get_batch(TOKENS, 2, 2, **SHAPE), get_batch(TOKENS, 1, 3, **SHAPE)):
        assert not np.array_equal(one[0], other[0])


def test_targets_are_the_next_tokens():
    inputs, targets = get_batch(TOKENS, 0, 0, **SHAPE)
    assert inputs.shape == targets.shape == (64, 4)
    assert inputs.dtype == targets.dtype == np.int32
    np.testing.assert_array_equal(targets, inputs + 1)  # TOKENS counts up


def test_windows_are_drawn_uniformly_up_to_the_last_token():
    starts = np.concatenate(
        [get_batch(TOKENS, 0, s, **SHAPE)[0][:, 0] for s in range(400)]
    )
    counts = np.bincount(starts)
    expected = 64 * 400 / 36
    assert len(counts) == 36  # start 35 has the last token, 39, as its last target
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 66.6  # 99.9th percentile for 35 degrees of freedom
