"""Packed rows in the objective, in evaluation and on devices.

B batch   T time   P pieces, each alone in a row   V vocab
"""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from conftest import TINY, changed, logits_of, mesh_of, train_on

from jaxgpt.models import build_model
from jaxgpt.ops import cross_entropy
from jaxgpt.parallel.feeding import batch_shapes, read_batches
from jaxgpt.text.batches import predictions, training_source
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
# The same rows, of which only some predictions count, as in those of conversations.
CHATS = dataclasses.replace(PACKED, parts=RNG.integers(3, size=len(TOKENS)))
BATCH = read_rows(PACKED, np.arange(len(PACKED)))


@pytest.fixture(scope="module")
def model_and_params():
    """A model with large parameters, so that each position affects the later ones."""
    model = build_model(CONFIG.model, "cpu")
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 1), int))["params"]
    return model, jax.tree.map(lambda a: 8 * a if a.ndim > 2 else a, params)


def loss_alone(packed, model, params):
    """The mean loss of the documents, each piece of which has a row for itself."""
    counted = np.ones(len(TOKENS)) if packed.parts is None else packed.parts > 0
    counted_PT, rows = [], []
    for text, of in zip(TEXTS, np.split(counted, np.cumsum(LENGTHS)[:-1]), strict=True):
        for start in range(0, len(text), T):
            piece = np.append(END, text)[start : start + T + 1]
            rows.append(np.pad(piece, (0, T + 1 - len(piece))))
            counted_PT.append(np.pad(of[start : start + T], (0, T + 1 - len(piece))))
    rows, counted_PT = np.stack(rows), np.stack(counted_PT)
    losses_PT = cross_entropy(logits_of(model, params, rows[:, :-1]), rows[:, 1:])
    assert counted_PT.sum() == predictions(packed)
    return (losses_PT * counted_PT).sum() / counted_PT.sum()


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
def test_devices_and_microbatches_train_on_packed_rows_as_one_device(mesh):
    small = changed(CONFIG, model={"block_size": 16, "n_layer": 1})
    packed, found = pack_documents(TOKENS, END, 16), []
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
        np.testing.assert_array_equal(metrics["tokens"], (batches[2] > 0).sum((1, 2)))
        found.append(jax.device_get((metrics["loss"], state.params)))
    assert (metrics["tokens"] < 8 * 16).all()  # padding does not count
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), *found
    )
