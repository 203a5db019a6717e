from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxgpt.training.hlo import Program

MESH = jax.make_mesh((8,), ("all",), axis_types=(AxisType.Auto,))
KIB = 1024


def compiled(function, *shapes, loops=0):
    """The program of a function over 8 devices, in `loops` turns of a loop if any."""

    def looped(*arrays):
        def turn(carry, _):
            moved = function(*(array + carry for array in arrays))
            return carry + moved.sum(), None

        return jax.lax.scan(turn, jnp.zeros(()), length=loops)[0]

    body = looped if loops else function
    sharded = jax.shard_map(
        body, mesh=MESH, in_specs=P("all"), out_specs=P(), check_vma=False
    )
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(sharded).lower(*arrays).compile()


ring = [(i, (i + 1) % 8) for i in range(8)]


@pytest.mark.parametrize(
    ("kind", "function", "whole", "received"),
    [
        ("all-reduce", lambda x: jax.lax.psum(x, "all"), KIB, 2 * KIB * 7 / 8),
        ("all-gather", lambda x: jax.lax.all_gather(x, "all"), 8 * KIB, 7 * KIB),
        (
            "reduce-scatter",
            lambda x: jax.lax.psum_scatter(x, "all", tiled=True),
            KIB,
            KIB * 7 / 8,
        ),
        (
            "all-to-all",
            lambda x: jax.lax.all_to_all(x, "all", 0, 0, tiled=True),
            KIB,
            KIB * 7 / 8,
        ),
        ("collective-permute", lambda x: jax.lax.ppermute(x, "all", ring), KIB, KIB),
    ],
)
@pytest.mark.parametrize("loops", [0, 5])
def test_a_collective_is_counted_with_its_bytes_as_often_as_it_runs(
    kind, function, whole, received, loops
):
    program = Program(compiled(function, (8 * 256,), loops=loops).as_text())
    (found,) = [each for each in program.collectives() if each.kind == kind]
    assert found.times == (loops or 1)
    assert found.tensor_bytes == whole
    assert found.received_bytes == found.times * received
    assert found.group == (2 if kind == "collective-permute" else 8)


def test_collectives_of_several_tensors_and_loops_within_loops():
    @partial(jax.shard_map, mesh=MESH, in_specs=P("all"), out_specs=P())
    def twice(x):
        def inner(carry, _):
            return jax.lax.psum(jnp.sin(x) * carry, "all").mean(), None

        def outer(carry, _):
            return jax.lax.scan(inner, carry, length=4)[0], None

        return jax.lax.scan(outer, jnp.ones(()), length=3)[0]

    shape = jax.ShapeDtypeStruct((8 * 256,), jnp.float32)
    program = Program(jax.jit(twice).lower(shape).compile().as_text())
    assert sum(each.times for each in program.collectives()) == 12


def test_memory_traffic_of_a_loop_counts_each_slice_once():
    layers, width = 6, 256

    @jax.jit
    def forward(stacked, x):
        def layer(x, matrix):
            return jnp.tanh(x @ matrix), None

        return jax.lax.scan(layer, x, stacked)[0]

    stacked = jax.ShapeDtypeStruct((layers, width, width), jnp.float32)
    x = jax.ShapeDtypeStruct((width, width), jnp.float32)
    moved = Program(forward.lower(stacked, x).compile().as_text()).hbm_bytes()
    matrix = 4 * width**2
    # Each layer reads its matrix and the activations, and writes them, a few times.
    assert 3 * layers * matrix <= moved <= 10 * layers * matrix


def test_memory_traffic_without_a_loop_is_what_xla_counts():
    @jax.jit
    def chain(a, b):
        return jnp.tanh(a @ b) @ b.T

    shape = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    program = chain.lower(shape, shape).compile()
    counted = program.cost_analysis()["bytes accessed"]
    assert Program(program.as_text()).hbm_bytes() == pytest.approx(counted, rel=0.1)
