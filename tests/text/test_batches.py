from functools import partial

import numpy as np
import pytest
from conftest import TINY, changed

from jaxgpt.text.batches import (
    evaluation_source,
    get_batch,
    mixture,
    training_source,
)
from jaxgpt.text.packing import pack_documents

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


def constant(value):
    """A source whose rows are this value and their numbers."""
    return lambda step, rows: {
        "value": np.full(len(rows), value),
        "row": np.asarray(rows),
    }


def test_rows_of_a_mixture_are_rows_of_its_sources_by_weight():
    source = mixture([constant(0), constant(1), constant(2)], [6, 1, 3], 5, 64)
    counts = np.zeros(3)
    for step in range(400):
        batch = source(step, slice(None))
        assert batch["row"].tolist() == list(range(64))
        counts += np.bincount(batch["value"], minlength=3)
    expected = 64 * 400 * np.array([0.6, 0.1, 0.3])
    assert ((counts - expected) ** 2 / expected).sum() < 13.8  # 99.9th percentile


def test_rows_of_a_mixture_do_not_depend_on_the_others_that_are_read():
    windows = [partial(get_batch, TOKENS + n * 40, 1) for n in range(2)]
    windows = [partial(each, batch_size=64, block_size=4) for each in windows]
    source = mixture(windows, [0.5, 0.5], 1, 64)
    whole = source(3, slice(None))[0]
    for rows in (slice(0, 5), slice(9, 64, 3), np.array([63, 2, 7]), slice(0, 0)):
        np.testing.assert_array_equal(source(3, rows)[0], whole[rows])
    assert not np.array_equal(source(4, slice(None))[0], whole)
    for n in range(2):  # each row is that of the source alone
        alone, chosen = windows[n](3)[0], whole[:, 0] // 40 == n
        np.testing.assert_array_equal(whole[chosen], alone[chosen])


@pytest.mark.parametrize("make_source", [training_source, evaluation_source])
def test_rows_of_packed_parts_are_drawn_by_weight(make_source):
    parts = [packed_documents(first) for first in (100, 500)]
    data = {"path": ("a", "b"), "weights": (3.0, 1.0), "batch_size": 64}
    config = changed(TINY, data=data | {"gradient_accumulation_steps": 1})
    source, alone = make_source(parts, config), [make_source(p, config) for p in parts]
    shares = []
    for step in range(50):
        whole, some = source(step, slice(None)), source(step, np.array([63, 2, 7]))
        is_last_B = whole[1][:, 0] >= 500
        shares.append(is_last_B.mean())
        for n, own_B in enumerate([~is_last_B, is_last_B]):
            for i, leaf in enumerate(alone[n](step, own_B.nonzero()[0])):
                np.testing.assert_array_equal(whole[i][own_B], leaf)
        for i in range(3):
            np.testing.assert_array_equal(some[i], whole[i][[63, 2, 7]])
    assert abs(np.mean(shares) - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 64 / 50)


def packed_documents(first):
    """Packed documents of 1 to 12 tokens from `first` on, and the end, 99."""
    texts = [[first + n] * n + [99] for n in range(1, 13)]
    return pack_documents(np.concatenate(texts), 99, TINY.model.block_size)


class Positions:
    """A terabyte of tokens, which tell where they are."""

    def __len__(self):
        return 2**40

    def __getitem__(self, positions):
        return positions >> 20


def test_the_source_of_a_row_tells_nothing_of_its_window():
    B = 10_000
    starts = get_batch(Positions(), 1, 0, batch_size=B, block_size=1)[0][:, 0] / 2**20
    rows = mixture([constant(0), constant(1)], [1, 1], 1, B)(0, slice(None))
    means = [starts[rows["value"] == n].mean() for n in range(2)]
    assert abs(means[0] - means[1]) < 4 * np.sqrt(4 / B / 12)  # standard errors
