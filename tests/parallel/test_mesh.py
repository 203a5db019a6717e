import dataclasses
import math
import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, TINY, changed, mesh_of, train_on
from jax.sharding import PartitionSpec as P

from jaxgpt import GPTConfig
from jaxgpt.config import ClassifierConfig, MaskedLMConfig, Seq2SeqConfig
from jaxgpt.models import build_model
from jaxgpt.parallel import mesh as meshes
from jaxgpt.parallel.feeding import read_batches, stack_batches
from jaxgpt.parallel.mesh import make_mesh, shardings
from jaxgpt.presets import PRESETS
from jaxgpt.text.batches import training_source
from jaxgpt.text.examples import LabelledTexts, MaskedTexts, Sequences, TextPairs
from jaxgpt.training.objectives import make_objective
from jaxgpt.training.step import abstract_state, create_state, trace_train_steps

STEPS = 20
WIDE = changed(
    TINY,
    model={"n_head": 8, "n_embd": 64, "block_size": 16, "bias": True},
    data={"batch_size": 32},
    train={"max_steps": STEPS},
)
TOKENS = np.random.default_rng(0).integers(11, size=400).astype(np.uint16)
DEFAULT = [(2, 2, 2, 2)]
MORE = pytest.mark.devices


def on(config, data=1, fsdp=1, tensor=1, microbatches=1):
    """The config on a mesh of this shape, each batch split into microbatches."""
    mesh = {"data": data, "fsdp": fsdp, "tensor": tensor}
    rows = {"gradient_accumulation_steps": microbatches}
    return changed(config, mesh=mesh, data=rows)


def abstract(config):
    return abstract_state(build_model(config.model, "cpu"), config, mesh_of(config))


def initialise(config):
    return create_state(build_model(config.model, "cpu"), config, mesh_of(config))


@pytest.fixture(scope="module")
def initial():
    """The state before training, on one device."""
    return initialise(on(WIDE))


def train(config, initial):
    """Trains for STEPS steps; returns the losses and the state."""
    model, mesh = build_model(config.model, "cpu"), mesh_of(config)
    where = jax.tree.map(lambda leaf: leaf.sharding, abstract(config))
    # Training donates the state.
    state = jax.tree.map(jnp.copy, jax.device_put(initial, where))
    source, rows = training_source(TOKENS, config), config.data.batch_size
    batches = read_batches(source, range(STEPS), rows, mesh)
    state, metrics = train_on(model, config, mesh, state, batches)
    return np.asarray(metrics["loss"]), state


@pytest.fixture(scope="module")
def reference(initial):
    """Losses of training on one device, with dropout."""
    losses, _ = train(on(WIDE), initial)
    assert losses[-1] < losses[0]  # else equal losses would say little
    return losses


@pytest.mark.parametrize(
    ("data", "fsdp", "tensor", "microbatches"),
    [
        pytest.param(*shape, n, marks=() if (*shape, n) in DEFAULT else MORE)
        for shape in ((1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8))
        for n in (1, 2, 4)
    ],
)
def test_every_mesh_trains_as_one_device_and_keeps_the_state_sharded(
    reference, initial, data, fsdp, tensor, microbatches
):
    config = on(WIDE, data, fsdp, tensor, microbatches)
    losses, state = train(config, initial)
    np.testing.assert_allclose(losses, reference, rtol=0, atol=2e-5)

    def check(leaf, expected):
        assert leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim)

    jax.tree.map(check, state, abstract(config))
    for tree in (state.params, state.opt_state[1][0].mu):
        kernel = tree["h"]["attn"]["c_attn"]["kernel"]
        assert kernel.shape == (2, 64, 3, 8, 8)
        shards = {shard.data.shape for shard in kernel.addressable_shards}
        assert shards == {(2, 64 // fsdp, 3, 8 // tensor, 8)}


def bytes_per_device(state):
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves((state.params, state.opt_state))
    )


@pytest.mark.devices
def test_fsdp_over_8_devices_stores_an_eighth_of_any_preset_on_each():
    # 8 rows at once for PPO too, which splits them into 4 minibatches.
    data = {"batch_size": 32, "gradient_accumulation_steps": 1}
    for name, make in PRESETS.items():
        if isinstance(make().model, GPTConfig) and make().model.n_embd % 8 == 0:
            config = changed(make(), model={"vocab_size": 65}, data=data)
            whole = bytes_per_device(abstract(on(config)))
            eighth = bytes_per_device(abstract(on(config, fsdp=8)))
            assert whole / 8 <= eighth <= 1.05 * whole / 8, name


@pytest.mark.parametrize("axis", ["fsdp", pytest.param("tensor", marks=MORE)])
def test_no_device_holds_the_whole_model_during_initialisation(axis):
    config = on(changed(WIDE, model={"n_embd": 256, "n_layer": 4}), **{axis: 8})
    program = jax.jit(partial(initialise, config)).lower().compile()
    memory = program.memory_analysis()
    params = sum(leaf.size * 4 for leaf in jax.tree.leaves(abstract(config).params))
    held = memory.output_size_in_bytes + memory.temp_size_in_bytes
    assert 3 * params / 8 < held < 0.7 * params  # the moments come on top


def test_initial_parameters_are_the_same_on_every_mesh(initial):
    sharded = initialise(on(WIDE, 2, 2, 2)).params
    jax.tree.map(np.testing.assert_array_equal, sharded, initial.params)


def test_the_first_matching_rule_applies_and_one_is_needed(monkeypatch):
    rules = (("mlp/c_fc/kernel", P("data")), *meshes.RULES)
    monkeypatch.setattr(meshes, "RULES", rules)
    tree = {"h": {"mlp": {"c_fc": {"kernel": jnp.zeros((8, 2))}}}}
    found = shardings(tree, mesh_of(TINY))
    assert found["h"]["mlp"]["c_fc"]["kernel"].spec == P("data")
    tree["h"]["mlp"]["gate"] = tree["h"]["mlp"].pop("c_fc")
    with pytest.raises(ValueError, match=r"h/mlp/gate/kernel.*RULES"):
        shardings(tree, mesh_of(TINY))


@pytest.mark.parametrize(
    ("model", "mesh", "message"),
    [
        ({}, {"data": 9}, "mesh.data=9 x .* 8 devices"),
        ({}, {"data": 3}, "8 sequences .* mesh.data=3"),
        ({}, {"data": 2, "fsdp": 3}, "mesh.data=2 x mesh.fsdp=3"),
        ({}, {"tensor": 3}, "block_size=8 .* mesh.tensor=3"),
        ({}, {"fsdp": 4, "tensor": 4}, "mesh.tensor=4.* 8"),
        ({"n_embd": 72}, {"data": 1, "fsdp": 16}, "8 devices"),
        ({"n_embd": 20}, {"data": 1, "fsdp": 8}, r": 20 .*mesh.fsdp=8"),
        ({"n_head": 4}, {"data": 1, "tensor": 8}, r"c_attn/kernel .*: 4 .*tensor=8"),
    ],
)
def test_a_mesh_that_does_not_fit_is_an_error_with_both_numbers(model, mesh, message):
    with pytest.raises(ValueError, match=message):
        abstract(changed(TINY, model=model, mesh=mesh))


def test_any_vocabulary_size_can_be_sharded():
    config = on(changed(WIDE, model={"vocab_size": 13}), 1, 2, 4)
    table = abstract(config).params["wte"]["embedding"]
    assert table.sharding.shard_shape(table.shape) == (13, 64 // 8)


@pytest.mark.parametrize(
    ("rows", "mesh", "shape"),
    [
        (6, {}, (6, 1, 1)),
        (8, {}, (8, 1, 1)),
        (8, {"fsdp": 2}, (4, 2, 1)),
        (8, {"tensor": 4}, (2, 1, 4)),
        (8, {"fsdp": -1}, (1, 8, 1)),
        (8, {"fsdp": -1, "data": 2}, (2, 4, 1)),
        (6, {"fsdp": -1, "tensor": 2}, (1, 2, 2)),
        (24, {"fsdp": -1}, (2, 4, 1)),  # n_embd is 20
        (2, {"fsdp": 1, "data": 1}, (1, 1, 1)),
    ],
)
def test_axes_of_minus_one_take_the_devices_that_divide_the_rows(rows, mesh, shape):
    lines, used, model = [], math.prod(shape), {"n_embd": 20 if rows == 24 else 16}
    config = changed(TINY, model=model, data={"batch_size": rows}, mesh=mesh)
    assert tuple(make_mesh(config, lines.append).shape.values()) == shape
    assert bool(lines) == (used < 8)
    assert all(f"{used} of 8" in line for line in lines)


def test_a_large_model_gets_one_cpu_device_unless_a_mesh_is_given():
    def devices_of(**mesh):
        return make_mesh(changed(large, mesh=mesh), lines.append).size

    lines, large = [], changed(TINY, model={"n_layer": 12, "n_embd": 768})
    assert devices_of() == 1
    assert "1 of 8" in lines.pop()
    assert [devices_of(data=2), devices_of(fsdp=-1), devices_of(tensor=2)] == [2, 8, 8]


def test_a_process_without_a_device_is_an_error():
    devices = [SimpleNamespace(process_index=host) for host in (0, 0, 1, 1)]
    config = changed(TINY, data={"batch_size": 2})
    with pytest.raises(ValueError, match=r"2 of 4 .* process 1 .*batch_size"):
        make_mesh(config, devices=devices)


def test_a_sharded_batch_is_the_whole_batch_and_each_row_is_read_once():
    config, seen = on(WIDE, 2, 2, 2), []
    source = training_source(TOKENS, config)

    def spy(step, rows):
        seen.append((step, rows.start, rows.stop))
        inputs, targets = source(step, rows)
        return {"inputs": inputs, "lengths": targets[:, 0]}  # any pytree of rows

    batches = read_batches(spy, range(3, 6), 32, mesh_of(config))
    own = [(0, 8), (8, 16), (16, 24), (24, 32)]
    assert sorted(seen) == [(step, *rows) for step in (3, 4, 5) for rows in own]
    assert batches["lengths"].shape == (3, 32)
    whole = stack_batches(spy, range(3, 6))
    jax.tree.map(np.testing.assert_array_equal, batches, whole)


def test_models_do_not_mention_meshes():
    for path in (ROOT / "jaxgpt" / "models").glob("*.py"):
        found = re.search(r"Mesh|jax\.sharding|PartitionSpec", path.read_text())
        assert not found, path


SHAPE = {"n_layer": 2, "n_head": 8, "n_embd": 64, "block_size": 24, "vocab_size": 11}
SHAPE |= {"bias": True, "dropout": 0.3, "unroll": 1}
# Batches of 12 tokens, which do not divide over 8 devices.
TEXTS = Sequences(TOKENS, np.append(np.arange(0, 400, 9), 400))
EXAMPLES = {
    "classifier": (
        ClassifierConfig(**SHAPE, labels=("a", "b", "c")),
        LabelledTexts(TEXTS, np.arange(45, dtype=np.int32) % 3, np.full(45, "")),
    ),
    "masked-lm": (MaskedLMConfig(**SHAPE), MaskedTexts(TEXTS, 10, 11, 0.3)),
    "seq2seq": (
        Seq2SeqConfig(**SHAPE, label_smoothing=0.1),
        TextPairs(TEXTS, TEXTS, end_of_text=0),
    ),
}
ENCODERS = [
    (name, shape, fields)
    for name in EXAMPLES
    for shape, fields in (
        ((1, 8, 1), {}),
        ((1, 1, 8), {"unroll": 2}),
        ((2, 2, 2), {"remat": True}),
        ((4, 2, 1), {"compute_dtype": "bfloat16"}),
    )
]


@pytest.mark.parametrize(
    ("name", "shape", "fields"),
    [pytest.param(*each, marks=MORE) for each in ENCODERS],
)
def test_every_mesh_trains_encoders_as_one_device(name, shape, fields):
    model, examples = EXAMPLES[name]

    def first_steps(shape, microbatches, **fields):
        changed_model = dataclasses.replace(model, **fields)
        data = dataclasses.replace(WIDE.data, batch_size=16)
        config = dataclasses.replace(WIDE, model=changed_model, data=data)
        config = on(config, *shape, microbatches)
        mesh, built = mesh_of(config), build_model(config.model, "cpu")
        source = training_source(examples, config)
        batches = read_batches(source, range(2), 16, mesh)
        state = initialise(config)
        objective = make_objective(built)
        traced = trace_train_steps(objective, config, mesh, state, batches)
        state, metrics = traced.lower().compile()(state, batches)
        return jax.device_get((metrics["loss"], metrics["grad_norm"]))

    found = first_steps(shape, 2, **fields)
    expected = first_steps((1, 1, 1), 1, **fields)
    tolerance = 0.02 if "compute_dtype" in fields else 2e-5
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)
