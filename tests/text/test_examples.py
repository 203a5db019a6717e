import numpy as np
import pytest

from jaxgpt.text.examples import (
    LabelledTexts,
    MaskedTexts,
    Sequences,
    TextPairs,
    bucket_lengths,
    bucketed_source,
    row_keys,
)

MASK, VOCAB = 50, 60


def texts_of(lengths, seed=0):
    """Texts of random tokens from 1 to 49 that begin with token 0."""
    rng = np.random.default_rng(seed)
    return Sequences.join(
        np.concatenate([[0], rng.integers(1, MASK, length - 1)]) for length in lengths
    )


def numbered(count, longest=64):
    """Labelled texts whose label is their number."""
    lengths = np.random.default_rng(1).integers(2, longest + 1, count)
    labels = np.arange(count, dtype=np.int32)
    return LabelledTexts(texts_of(lengths), labels, np.array([""] * count))


def test_an_epoch_has_every_example_once_in_batches_of_few_lengths():
    examples, B = numbered(640), 8
    read = bucketed_source(examples, seed=3, batch_size=B, block_size=64)
    for epoch in range(2):
        batches = [read(step) for step in range(epoch * 80, epoch * 80 + 80)]
        seen = np.concatenate([batch.labels_B for batch in batches])
        assert sorted(seen) == list(range(640))
        shapes = {batch.tokens_BT.shape[1] for batch in batches}
        assert {16, 32, 64} <= shapes <= set(bucket_lengths(64))
    assert not np.array_equal(read(0).labels_B, read(80).labels_B)


def test_an_epoch_that_ends_inside_a_batch_repeats_few_examples():
    read = bucketed_source(numbered(100), seed=3, batch_size=8, block_size=64)
    seen = np.concatenate([read(step).labels_B for step in range(20)])
    assert set(seen) == set(range(100))


def test_a_batch_is_the_same_however_its_rows_are_split():
    texts = texts_of(np.random.default_rng(2).integers(2, 33, 200))
    pairs = TextPairs(texts, texts_of([9] * 200), end_of_text=0)
    for examples in (numbered(200), MaskedTexts(texts, MASK, VOCAB, 0.15), pairs):
        read = bucketed_source(examples, seed=3, batch_size=8, block_size=64)
        for step in (0, 17):
            parts = [read(step, slice(0, 3)), read(step, np.arange(3, 8))]
            for whole, *of_parts in zip(read(step), *parts, strict=True):
                np.testing.assert_array_equal(whole, np.concatenate(of_parts))


@pytest.fixture(scope="module")
def masked():
    """A masked batch of 400 rows of 41 tokens, and the original tokens."""
    texts = texts_of([41] * 400)
    rows = np.arange(400)
    examples = MaskedTexts(texts, MASK, VOCAB, 0.15)
    weights, keys = np.ones(400, np.float32), row_keys(7, rows)
    return examples.read(rows, 48, weights, keys), texts.padded(rows, 48)


def test_six_of_forty_tokens_are_predicted_but_never_the_first_or_padding(masked):
    batch, original_BT = masked
    assert (batch.weights_BK.sum(axis=1) == 6).all()  # 15% of 40
    real = batch.weights_BK > 0
    assert batch.positions_BK[real].min() == 1
    assert batch.positions_BK[real].max() == 40
    assert all(len(set(row[:6])) == 6 for row in batch.positions_BK)
    expected = np.take_along_axis(original_BT, batch.positions_BK, axis=1)
    np.testing.assert_array_equal(batch.targets_BK[real], expected[real])


def test_of_predicted_tokens_80_percent_are_masked_and_10_percent_are_random(masked):
    batch, original_BT = masked
    chosen = np.zeros(original_BT.shape, bool)
    np.put_along_axis(chosen, batch.positions_BK[:, :6], True, axis=1)
    np.testing.assert_array_equal(batch.tokens_BT[~chosen], original_BT[~chosen])
    new, old = batch.tokens_BT[chosen], original_BT[chosen]
    n = len(new)  # 2,400: three standard deviations are 2.5% and 1.8%
    assert abs((new == MASK).sum() / n - 0.8 - 0.1 / VOCAB) < 0.025
    assert abs((new == old).sum() / n - 0.1 - 0.1 / VOCAB) < 0.02
    others = new[(new != MASK) & (new != old)]
    assert abs(len(others) / n - 0.1) < 0.02
    assert len(set(others)) > 45


def test_masks_are_drawn_anew_in_each_epoch():
    examples = MaskedTexts(texts_of([33] * 80), MASK, VOCAB, 0.15)
    read = bucketed_source(examples, seed=3, batch_size=8, block_size=64)
    masks = {}
    for step in range(20):
        batch = read(step)
        for tokens_T, targets_K in zip(batch.tokens_BT, batch.targets_BK, strict=True):
            masks.setdefault(targets_K.tobytes(), []).append(tokens_T)
    assert len(masks) > 140  # of 160 draws


def test_no_two_generators_of_a_training_have_the_same_key(monkeypatch):
    keys, philox = [], np.random.Philox

    def spy(key):
        keys.append(tuple(map(int, key)))
        return philox(key=key)

    monkeypatch.setattr(np.random, "Philox", spy)
    examples = MaskedTexts(texts_of([33] * 16), MASK, VOCAB, 0.15)
    read = bucketed_source(examples, seed=3, batch_size=8, block_size=64)
    for step in range(6):
        read(step)
    assert len(set(keys)) == len(keys) == 3 + 6 * 8  # epochs and rows


def test_a_target_is_predicted_from_the_end_token_and_its_earlier_tokens():
    sources = Sequences.join([[5, 6, 0]])
    targets = Sequences.join([[7, 8, 9, 0]])
    batch = TextPairs(sources, targets, end_of_text=0).read(
        np.array([0]), 6, np.ones(1, np.float32), row_keys(0, np.array([0]))
    )
    assert batch.source_BS.tolist() == [[5, 6, 0, 0, 0, 0]]
    assert batch.lengths_B.tolist() == [3]
    assert batch.inputs_BT.tolist() == [[0, 7, 8, 9, 0, 0]]
    assert batch.targets_BT.tolist() == [[7, 8, 9, 0, 0, 0]]
    assert batch.weights_BT.tolist() == [[1, 1, 1, 1, 0, 0]]
