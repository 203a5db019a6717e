"""Packed rows in the objective, in evaluation and on devices.

B batch   T time   P pieces, each alone in a row   V vocab
"""

from functools import partial

import jax
import numpy as np
import pytest
from conftest import TINY, changed, logits_of, mesh_of, train_on

from jaxgpt import CharTokenizer
from jaxgpt.models import build_model
from jaxgpt.ops import cross_entropy
from jaxgpt.parallel.feeding import batch_shapes, read_batches
from jaxgpt.text.batches import predictions, training_source
from jaxgpt.text.conversations import CHAT_TOKENS, make_rows, tokenize
from jaxgpt.text.packing import pack_documents, read_rows
from jaxgpt.training.evaluation import evaluate_exactly, make_losses_step
from jaxgpt.training.objectives import Context, next_token
from jaxgpt.training.step import create_state

T, END = 80, 10  # more than one block of queries
CONFIG = changed(TINY, model={"block_size": T}, data={"packing": "documents"})
RNG = np.random.default_rng(0)
LENGTHS = [30, 200, 7, 1, 44, 80, 79, 21, 66, 13, 5, 81]
TEXTS = [np.append(RNG.integers(END, size=n - 1), END) for n in LENGTHS]
TOKENS = np.concatenate(TEXTS).astype(np.uint16)
PACKED = pack_documents(TOKENS, END, T)
BATCH = read_rows(PACKED, np.arange(len(PACKED)))
# Conversations, with system turns and without; the longest ones do not fit a row.
CHAT = CharTokenizer("abcdef").with_special(CHAT_TOKENS)  # 11 tokens, as in TINY
CONTENTS = [
    ["abcdef"[(n + turn) % 6] * (1 + n * turn % 9) for turn in range(turns)]
    for n, turns in enumerate([41, 2, 3, 12, 2, 5, 30, 4])
]


def chat_rows(block_size):
    arrays = tokenize([("0", *each) for each in CONTENTS], CHAT, print)
    arrays["split"] = np.zeros(len(CONTENTS))
    config = changed(CONFIG, model={"block_size": block_size})
    return make_rows(arrays, config, CHAT, print, "train")


CHATS = chat_rows(T)


def pieces_alone(packed):
    """Yields each piece after an end-of-text token, and which predictions count."""
    if packed.parts is None:
        for text in TEXTS:
            for start in range(0, len(text), T):
                piece = np.append(END, text)[start : start + T + 1]
                yield piece, [1] * (len(piece) - 1)
        return
    start, system, user, assistant, end = map(CHAT.special_id, CHAT_TOKENS)
    left = [each[len(each) % 2 :] for each in CONTENTS]
    tokens_P = np.split(packed.tokens, packed.starts_P[1:])
    for n, tokens in zip(packed.conversations_P, tokens_P, strict=True):
        size = 2 * np.count_nonzero(tokens == user)
        contents = CONTENTS[n][: len(CONTENTS[n]) % 2] + left[n][:size]
        roles = [system] * (len(contents) % 2) + [user, assistant] * (size // 2)
        piece, counted = [start], []
        for role, text in zip(roles, contents, strict=True):
            piece += [role, *CHAT.encode(text), end]
            counted += [0, *[role == assistant] * (len(text) + 1)]
        yield np.array(piece), counted
        left[n] = left[n][size:]
    assert not any(left)


@pytest.fixture(scope="module")
def model_and_params():
    """A model with large parameters, so that each position affects the later ones."""
    model = build_model(CONFIG.model, "cpu")
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 1), int))["params"]
    return model, jax.tree.map(lambda a: 8 * a if a.ndim > 2 else a, params)


def loss_alone(packed, model, params):
    """The mean loss of the pieces, each of which has a row for itself."""
    rows, counted_PT = zip(*pieces_alone(packed), strict=True)
    rows = np.stack([np.pad(row, (0, T + 1 - len(row))) for row in rows])
    counted_PT = np.stack([np.pad(of, (0, T - len(of))) for of in counted_PT])
    losses_PT = cross_entropy(logits_of(model, params, rows[:, :-1]), rows[:, 1:])
    assert counted_PT.sum() == predictions(packed)
    return (losses_PT * counted_PT).sum() / counted_PT.sum()


def test_pieces_of_conversations_have_their_system_turn_and_count_answers_to_the_end():
    assert len(CHATS.lengths_P) > len(CONTENTS)  # some are cut
    assert len(CHATS) < len(CHATS.lengths_P)  # some share a row
    inputs_BT, targets_BT, segments_BT, parts_BT = read_rows(CHATS, range(len(CHATS)))
    found = []
    for row, segments in enumerate(segments_BT):
        for own in (segments == n for n in range(1, segments.max() + 1)):
            of_row = (each[row, own] for each in (inputs_BT, targets_BT, parts_BT))
            found.append(tuple(map(np.ndarray.tolist, of_row)))
    for (inputs, targets, parts), (piece, counted) in zip(
        found, pieces_alone(CHATS), strict=True
    ):
        assert [*inputs, targets[-1]] == piece.tolist()
        assert targets == piece[1:].tolist()
        assert [part > 0 for part in parts] == counted


@pytest.mark.parametrize("packed", [PACKED, CHATS], ids=["documents", "chats"])
def test_packed_rows_have_the_losses_and_gradients_of_their_documents_alone(
    model_and_params, packed
):
    model, params = model_and_params
    batch = read_rows(packed, np.arange(len(packed)))
    assert (batch[2] == 0).any()  # there is padding

    def packed_loss(params):
        loss, _ = next_token(model)(
            params, batch, Context(None, np.arange(len(packed)))
        )
        return loss.mean()

    (loss, grads), (expected, expected_grads) = (
        jax.jit(jax.value_and_grad(function))(params)
        for function in (packed_loss, partial(loss_alone, packed, model))
    )
    assert loss == pytest.approx(float(expected), abs=2e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5),
        grads,
        expected_grads,
    )


def test_a_changed_token_changes_later_logits_of_its_document_and_no_others(
    model_and_params,
):
    model, params = model_and_params
    row = int(np.argmax(BATCH[2].max(axis=1)))  # the one with the most documents
    inputs_BT, _, segments_BT = (a[row : row + 1] for a in BATCH)
    logits = jax.jit(partial(model.apply, {"params": params}, segments_BT=segments_BT))
    at = 1 + int(np.argmax(segments_BT == 2))
    changed_BT = inputs_BT.copy()
    changed_BT[0, at] = (inputs_BT[0, at] + 1) % END
    before, after = logits(inputs_BT), logits(changed_BT)
    expected_T = (segments_BT[0] == 2) & (np.arange(T) >= at)
    assert segments_BT.max() > 2
    assert expected_T.sum() > 2
    np.testing.assert_array_equal(np.any(before != after, axis=(0, 2)), expected_T)


@pytest.mark.parametrize("packed", [PACKED, CHATS], ids=["documents", "chats"])
def test_the_exact_loss_is_that_of_the_documents_alone(model_and_params, packed):
    model, params = model_and_params
    mesh, done = mesh_of(CONFIG), []
    evaluate = partial(evaluate_exactly, make_losses_step(model, mesh), params, packed)
    exact = evaluate(CONFIG, mesh, advance=done.append)
    assert exact.tokens == sum(done) == predictions(packed)
    expected = float(jax.jit(partial(loss_alone, packed, model))(params))
    assert exact.nats_per_token == pytest.approx(expected, abs=2e-5)
    assert 0 < exact.standard_error < expected
    with pytest.raises(ValueError, match=r"stride=3 .*packing=documents"):
        evaluate(CONFIG, mesh, 3)


@pytest.mark.devices
@pytest.mark.parametrize("mesh", [{"data": 2}, {"data": 2, "fsdp": 2, "tensor": 2}])
@pytest.mark.parametrize("packing", ["documents", "conversations"])
def test_devices_and_microbatches_train_on_packed_rows_as_one_device(packing, mesh):
    small = changed(CONFIG, model={"block_size": 32, "n_layer": 1})
    small, found = changed(small, data={"packing": packing}), []
    is_chat = packing == "conversations"
    packed = chat_rows(32) if is_chat else pack_documents(TOKENS, END, 32)
    for sizes, microbatches in (({"data": 1}, 1), (mesh, 2)):
        data = {"gradient_accumulation_steps": microbatches}
        config = changed(small, data=data, mesh=sizes)
        model, devices = build_model(config.model, "cpu"), mesh_of(config)
        state, source = (
            create_state(model, config, devices),
            training_source(packed, config),
        )
        batches = read_batches(source, range(2), config.data.batch_size, devices)
        planned = batch_shapes(config, devices, 2)
        for a, b in zip(batches, planned, strict=True):
            assert (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding)
        state, metrics = train_on(model, config, devices, state, batches)
        np.testing.assert_array_equal(metrics["tokens"], (batches[-1] > 0).sum((1, 2)))
        found.append(jax.device_get((metrics["loss"], state.params)))
    assert (metrics["tokens"] < 8 * 32).all()  # padding does not count
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), *found
    )
