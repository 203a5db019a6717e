from collections import Counter
from functools import partial
from itertools import islice

import numpy as np
import pytest
from conftest import TINY, changed
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt import CharTokenizer
from jaxgpt.text.batches import training_source
from jaxgpt.text.packing import (
    as_rows,
    best_fit_decreasing,
    fill_rows,
    get_packed_batch,
    pack_documents,
    read_rows,
)
from jaxgpt.text.shards import Tokens

END = 7
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=30)


def documents(lengths):
    """Documents of so many tokens besides the end token, each a token of its own."""
    ids = iter(range(END + 1, 10_000))
    return [[*(next(ids) for _ in range(length)), END] for length in lengths]


@given(LENGTHS, st.integers(1, 6), st.booleans(), st.integers(0, 30))
def test_an_epoch_has_each_prediction_of_each_document_once(
    lengths, T, is_whole, shard
):
    """Whether or not the last document has its end, and in one array or in two."""
    texts = documents(lengths)
    if not is_whole:
        texts[-1].pop()
    tokens = np.concatenate(texts)
    shard = sum(lengths[:shard]) + len(lengths[:shard])
    parts = Tokens([tokens[:shard], tokens[shard:]]) if shard else tokens
    expected = Counter()
    for text in texts:
        inputs = [END, *text[:-1]]
        for i in range(0, len(text), T):
            expected[tuple(inputs[i : i + T]), tuple(text[i : i + T])] += 1
    packed, found = pack_documents(parts, END, T), Counter()
    assert packed.has_ends == (is_whole or len(texts) > 1)
    inputs_BT, targets_BT, segments_BT = get_packed_batch(
        packed, 1, 0, batch_size=len(packed)
    )
    for inputs, targets, segments in zip(
        inputs_BT, targets_BT, segments_BT, strict=True
    ):
        last = segments.max()
        padding = np.zeros((segments == 0).sum())
        in_order = np.append(np.sort(segments[segments > 0]), padding)
        np.testing.assert_array_equal(segments, in_order)
        for segment in range(1, last + 1):
            own = segments == segment
            found[tuple(inputs[own].tolist()), tuple(targets[own].tolist())] += 1
    assert found == expected


@given(st.lists(st.integers(1, 12), min_size=1, max_size=200))
def test_rows_are_as_full_as_when_pieces_are_placed_one_by_one(lengths):
    free = []  # the room in each row
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in free if room >= length]
        if fitting:
            free.remove(min(fitting))
        free.append(min(fitting, default=12) - length)
    rows_P = best_fit_decreasing(np.array(lengths), 12)
    found = 12 - np.bincount(rows_P, lengths).astype(int)
    assert sorted(found.tolist()) == sorted(free)


STRETCHES = st.lists(st.tuples(st.integers(0, 4), LENGTHS), max_size=20)


@given(STRETCHES, st.integers(13, 40))
def test_rows_have_each_exchange_once_in_order_and_what_fits_stays_whole(of, capacity):
    systems, stretches = [each[0] for each in of], [each[1] for each in of]
    rows, found = fill_rows(stretches, systems, capacity), [[] for _ in stretches]
    for row in rows:
        assert row
        for n, start, stop in row:
            found[n] += range(start, stop)
            if systems[n] + sum(stretches[n]) <= capacity:
                assert (start, stop) == (0, len(stretches[n]))
        taken = [systems[n] + sum(stretches[n][a:b]) for n, a, b in row]
        assert sum(taken) <= capacity
    assert found == [[*range(len(each))] for each in stretches]


@pytest.mark.parametrize("system", [0, 12])
def test_rows_of_conversations_are_full_without_needless_cuts(system):
    """Of conversations with lengths as in chitchat."""
    rng = np.random.default_rng(0)
    sizes = np.minimum(rng.geometric(1 / 17, 1000), 350)  # exchanges of each
    tokens = iter(np.minimum(10 + rng.exponential(35, sizes.sum()), 236).astype(int))
    stretches = [[*map(int, islice(tokens, size))] for size in sizes]
    rows = fill_rows(stretches, [system] * len(stretches), 256)
    pieces, fewest, taken = sum(map(len, rows)), 0, 0
    for stretch in stretches:  # cut only where the next exchange does not fit
        room = 0
        for length in stretch:
            if length > room:
                fewest, room = fewest + 1, 256 - system
            room -= length
        taken += sum(stretch)
    assert taken + pieces * system >= 0.97 * 256 * len(rows)
    assert pieces < 1.43 * fewest


PACKED = pack_documents(np.concatenate(documents(range(1, 40))), END, 16)
batch = partial(get_packed_batch, PACKED, batch_size=10)


def test_rows_of_a_batch_depend_on_seed_and_step_alone():
    whole = batch(1, 6)  # of the second epoch; it was the first to be read
    for step in range(7):
        last = batch(1, step)
    part = batch(1, 6, np.array([7, 2])), batch(1, 6, slice(7, 9))
    for i in range(3):
        np.testing.assert_array_equal(last[i], whole[i])
        np.testing.assert_array_equal(part[0][i], whole[i][[7, 2]])
        np.testing.assert_array_equal(part[1][i], whole[i][7:9])
    for other in (batch(2, 6), batch(1, 7)):
        assert not np.array_equal(other[1], whole[1])


def test_each_epoch_has_all_rows_in_another_order():
    R = len(PACKED)
    rows = [row for step in range(R) for row in batch(1, step)[1].tolist()]
    epochs = [rows[start : start + R] for start in range(0, 10 * R, R)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len(set(map(str, epochs))) == 10


def test_rows_are_read_a_piece_at_a_time_with_their_padding():
    class Spy(Tokens):
        def __getitem__(self, positions):
            jumps.append(np.count_nonzero(np.diff(np.ravel(positions)) != 1))
            return super().__getitem__(positions)

    jumps = []
    arrays = [np.concatenate(documents([9] * 20))] * 2
    packed = pack_documents(Spy(arrays), END, 16)  # each row has 6 tokens of padding
    jumps.clear()
    read_rows(packed, np.arange(len(packed)))
    assert max(jumps) < len(packed) + 16  # in the last row, the last token is repeated


def test_folders_joined_have_no_ends_because_there_are_several():
    arrays = [np.arange(8, 12), np.arange(12, 20)]
    assert not pack_documents(Tokens(arrays), END, 4).has_ends
    arrays[1][3] = END
    assert pack_documents(Tokens(arrays), END, 4).has_ends


def test_documents_need_ends():
    config = changed(TINY, data={"packing": "documents"})
    tokens = np.arange(99)
    for tokenizer in (None, CharTokenizer("ab")):
        with pytest.raises(ValueError, match="packing=documents"):
            as_rows(tokens, config, tokenizer, print)
        assert as_rows(tokens, TINY, tokenizer, print) is tokens
    with pytest.raises(ValueError, match="packing=documents"):
        training_source(pack_documents(tokens, 200, 8), config)
    with pytest.raises(ValueError, match="architecture=bigram"):
        changed(config, model={"architecture": "bigram"})
