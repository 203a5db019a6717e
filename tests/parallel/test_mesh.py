import math
import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, TINY, changed, train_on
from jax.sharding import PartitionSpec as P

from jaxgpt import GPTConfig
from jaxgpt.models import build_model
from jaxgpt.parallel import mesh as meshes
from jaxgpt.parallel.feeding import read_batches, stack_batches
from jaxgpt.parallel.mesh import make_mesh, shardings
from jaxgpt.presets import PRESETS
from jaxgpt.text.batches import training_source
from jaxgpt.training.step import abstract_state, create_state

STEPS = 20
WIDE = changed(
    TINY,
    model={"n_head": 8, "n_embd": 64, "block_size": 16, "bias": True},
    data={"batch_size": 32},
    train={"max_steps": STEPS},
)
TOKENS = np.random.default_rng(0).integers(11, size=400).astype(np.uint16)
MESHES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)]


def on(config, data=1, fsdp=1, tensor=1, microbatches=1):
    """The config on a mesh of this shape, each batch cut into so many microbatches."""
    mesh = {"data": data, "fsdp": fsdp, "tensor": tensor}
    return changed(
        config, mesh=mesh, data={"gradient_accumulation_steps": microbatches}
    )


def mesh_of(config):
    return make_mesh(config, lambda line: None)


def read(config, steps, source=None):
    """The training batches of these steps on the config's mesh."""
    source = source or training_source(TOKENS, config)
    return read_batches(source, steps, config.data.batch_size, mesh_of(config))


def train(config):
    """Trains for STEPS steps from the seed; returns the losses and the state."""
    model, mesh = build_model(config.model, "cpu"), mesh_of(config)
    state = create_state(model, config, mesh)
    batches = read(config, range(STEPS))
    state, metrics = train_on(model, config, mesh, state, batches)
    return np.asarray(metrics["loss"]), state


@pytest.fixture(scope="module")
def reference():
    """Losses of plain training on one device, dropout on."""
    losses, _ = train(on(WIDE))
    assert losses[-1] < losses[0]  # so that it is worth comparing
    return losses


@pytest.mark.parametrize("microbatches", [1, 2, 4])
@pytest.mark.parametrize("shape", MESHES)
def test_every_mesh_trains_as_one_device_with_dropout(reference, shape, microbatches):
    losses, _ = train(on(WIDE, *shape, microbatches=microbatches))
    np.testing.assert_allclose(losses, reference, rtol=0, atol=2e-5)


def test_trained_state_stays_where_the_table_puts_it():
    config = on(WIDE, 2, 2, 2)
    _, state = train(config)
    expected = abstract_state(build_model(config.model, "cpu"), config, mesh_of(config))

    def check(leaf, shape):
        assert leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim)

    jax.tree.map(check, state, expected)
    kernel = state.params["h"]["attn"]["c_attn"]["kernel"]
    moment = state.opt_state[1][0].mu["h"]["attn"]["c_attn"]["kernel"]
    assert kernel.shape == (2, 64, 3, 8, 8)
    for each in (kernel, moment):
        shards = {shard.data.shape for shard in each.addressable_shards}
        assert shards == {(2, 32, 3, 4, 8)}


def bytes_per_device(state):
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves((state.params, state.opt_state))
    )


GPTS = [
    name
    for name, make in PRESETS.items()
    if isinstance(make().model, GPTConfig) and make().model.n_embd % 8 == 0
]


@pytest.mark.parametrize("preset", GPTS)
def test_fsdp_over_8_devices_leaves_an_eighth_on_each(preset):
    data = {"batch_size": 8, "gradient_accumulation_steps": 1}
    config = changed(PRESETS[preset](), model={"vocab_size": 65}, data=data)
    model = build_model(config.model, "cpu")
    whole, eighth = (
        bytes_per_device(abstract_state(model, each, mesh_of(each)))
        for each in (on(config), on(config, fsdp=8))
    )
    assert whole / 8 <= eighth <= 1.05 * whole / 8


@pytest.mark.parametrize("shape", [(1, 8, 1), (1, 1, 8)])
def test_no_device_holds_the_whole_model_while_it_is_made(shape):
    config = on(changed(WIDE, model={"n_embd": 512, "n_layer": 8}), *shape)
    model, mesh = build_model(config.model, "cpu"), mesh_of(config)
    make = jax.jit(partial(create_state, model, config, mesh))
    memory = make.lower().compile().memory_analysis()
    shapes = jax.tree.leaves(abstract_state(model, config, mesh).params)
    params = sum(leaf.size * 4 for leaf in shapes)
    held = memory.output_size_in_bytes + memory.temp_size_in_bytes
    assert 3 * params / 8 < held < 0.7 * params  # the moments come on top


def test_initial_parameters_are_the_same_on_every_mesh():
    one, other = (
        create_state(build_model(WIDE.model, "cpu"), config, mesh_of(config)).params
        for config in (on(WIDE), on(WIDE, 2, 2, 2))
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_parameter_without_a_rule_is_an_error_that_names_it():
    tree = {"h": {"mlp": {"gate": {"kernel": jnp.zeros((2, 2))}}}}
    with pytest.raises(ValueError, match="how to shard h/mlp/gate/kernel; add one"):
        shardings(tree, mesh_of(TINY))


def test_the_first_rule_that_fits_counts(monkeypatch):
    rules = (("mlp/c_fc/kernel", P("data")), *meshes.RULES)
    monkeypatch.setattr(meshes, "RULES", rules)
    tree = {"h": {"mlp": {"c_fc": {"kernel": jnp.zeros((8, 2))}}}}
    with_shardings = shardings(tree, mesh_of(TINY))
    assert with_shardings["h"]["mlp"]["c_fc"]["kernel"].spec == P("data")


@pytest.mark.parametrize(
    ("model", "mesh", "message"),
    [
        ({"n_head": 4}, {"tensor": 8}, r"c_attn/kernel .*: 4 does not .*tensor=8"),
        ({"n_embd": 72, "n_head": 2}, {"fsdp": 16}, "8 devices"),
        ({"n_embd": 20}, {"fsdp": 8}, r": 20 does not divide over mesh.fsdp=8"),
    ],
)
def test_a_dimension_that_does_not_divide_is_named_with_both_numbers(
    model, mesh, message
):
    config = changed(TINY, model=model, mesh={"data": 1} | mesh)
    with pytest.raises(ValueError, match=message):
        abstract_state(build_model(config.model, "cpu"), config, mesh_of(config))


def test_any_vocabulary_fits_any_mesh():
    config = on(changed(WIDE, model={"vocab_size": 13}), 1, 2, 4)
    model, mesh = build_model(config.model, "cpu"), mesh_of(config)
    assert abstract_state(model, config, mesh).params["wte"]["embedding"].shape[0] == 13


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mesh": {"data": 9}}, "mesh.data=9 x .*, but there are 8 devices"),
        ({"mesh": {"data": 3}}, "8 sequences .* do not divide over mesh.data=3"),
        ({"mesh": {"data": 2, "fsdp": 3}}, "over mesh.data=2 x mesh.fsdp=3"),
        ({"mesh": {"tensor": 3}}, "block_size=8 does not divide over mesh.tensor=3"),
        ({"mesh": {"fsdp": 4, "tensor": 4}}, "mesh.tensor=4, but there are 8"),
    ],
)
def test_a_mesh_that_does_not_fit_is_an_error(fields, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(changed(TINY, **fields))


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
    lines = []
    model = {"n_embd": 20 if rows == 24 else 16}
    config = changed(TINY, model=model, data={"batch_size": rows}, mesh=mesh)
    assert tuple(make_mesh(config, lines.append).shape.values()) == shape
    used = math.prod(shape)
    idle = [f"using {used} of 8 devices, for {rows} rows at once"]
    assert lines == (idle if used < 8 else [])


def test_one_device_holds_a_large_model_unless_more_are_asked_for():
    def devices_of(**mesh):
        large = {"n_layer": 12, "n_embd": 768}
        config = changed(TINY, model=large, data={"batch_size": 8}, mesh=mesh)
        return make_mesh(config, lines.append).size

    lines = []
    assert devices_of() == 1
    assert lines == ["using 1 of 8 CPU devices: each would hold a copy"]
    assert [devices_of(data=2), devices_of(fsdp=-1), devices_of(tensor=2)] == [2, 8, 8]


def test_a_process_that_would_have_no_device_is_an_error():
    devices = [SimpleNamespace(process_index=host) for host in (0, 0, 1, 1)]
    config = changed(TINY, data={"batch_size": 2})
    with pytest.raises(ValueError, match=r"2 of 4 devices .* leaves process 1 without"):
        make_mesh(config, devices=devices)


def test_batches_are_those_of_one_device_and_only_their_own_rows_are_read():
    config, seen = on(WIDE, 2, 2, 2), []
    source = training_source(TOKENS, config)

    def spy(step, rows):
        seen.append((step, rows.start, rows.stop))
        inputs, targets = source(step, rows)
        return {"inputs": inputs, "lengths": targets[:, 0]}  # any pytree of rows

    batches = read(config, range(3, 6), spy)
    own = [(0, 8), (8, 16), (16, 24), (24, 32)]
    assert sorted(seen) == [(step, *rows) for step in (3, 4, 5) for rows in own]
    whole = stack_batches(spy, range(3, 6))
    assert batches["lengths"].shape == (3, 32)
    jax.tree.map(np.testing.assert_array_equal, batches, whole)


def test_models_know_no_mesh():
    for path in (ROOT / "jaxgpt" / "models").glob("*.py"):
        found = re.search(r"Mesh|jax\.sharding|PartitionSpec", path.read_text())
        assert not found, path
