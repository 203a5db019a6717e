from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxgpt.planning.hlo import collectives

MESH = jax.make_mesh((8,), ("all",), axis_types=(AxisType.Auto,))
SHAPE = jax.ShapeDtypeStruct((8 * 256,), jnp.float32)  # 1 KiB per device
RING = [(i, (i + 1) % 8) for i in range(8)]


def compiled(function, loops):
    """HLO of a function over 8 devices, in a loop of `loops` iterations if not 0."""

    def looped(x):
        def step(carry, _):
            return carry + function(x + carry).sum(), None

        return lax.scan(step, jnp.zeros(()), length=loops)[0]

    body, specs = (
        looped if loops else function,
        {"in_specs": P("all"), "out_specs": P()},
    )
    sharded = jax.shard_map(body, mesh=MESH, **specs, check_vma=False)
    return jax.jit(sharded).lower(SHAPE).compile().as_text()


@pytest.mark.parametrize(
    ("kind", "function", "kib", "kib_received"),
    [
        ("all-reduce", lambda x: lax.psum(x, "all"), 1, 2 * 7 / 8),
        ("all-gather", lambda x: lax.all_gather(x, "all"), 8, 7),
        ("reduce-scatter", lambda x: lax.psum_scatter(x, "all", tiled=True), 1, 7 / 8),
        ("all-to-all", lambda x: lax.all_to_all(x, "all", 0, 0, tiled=True), 1, 7 / 8),
        ("collective-permute", lambda x: lax.ppermute(x, "all", RING), 1, 1),
    ],
)
@pytest.mark.parametrize("loops", [0, 5])
def test_a_collective_is_counted_with_its_bytes_as_often_as_it_runs(
    kind, function, kib, kib_received, loops
):
    text = compiled(function, loops)
    (found,) = [each for each in collectives(text) if each.kind == kind]
    assert found.times == (loops or 1)
    assert found.tensor_bytes == 1024 * kib
    assert found.received_bytes == found.times * 1024 * kib_received
    assert found.group == (2 if kind == "collective-permute" else 8)


def test_collectives_in_nested_loops_are_counted_as_often_as_they_run():
    @partial(jax.shard_map, mesh=MESH, in_specs=P("all"), out_specs=P())
    def nested(x):
        def inner(carry, _):
            return lax.psum(jnp.sin(x) * carry, "all").mean(), None

        def outer(carry, _):
            return lax.scan(inner, carry, length=4)[0], None

        return lax.scan(outer, jnp.ones(()), length=3)[0]

    text = jax.jit(nested).lower(SHAPE).compile().as_text()
    assert sum(each.times for each in collectives(text)) == 12


def collectives_of(*attributes, opcode="all-reduce"):
    """Collectives of a TPU program with an operation for each of the attributes."""
    operations = [
        f"  %op{i} = bf16[8,64]{{1,0:S({i})}} {opcode}(%p), {each}\n"
        for i, each in enumerate(attributes)
    ]
    return collectives(
        "ENTRY %main.1 (p: bf16[8,64]) -> bf16[8,64] {\n"
        "  %p = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)\n"
        f"{''.join(operations)}  ROOT %end = bf16[8,64]{{1,0}} bitcast(%p)\n}}\n"
    )


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("[2,8]<=[16]", 8),
        ("mesh['a'=2,'b'=6] {'b'}", 6),
        ("mesh['a'=64,'b'=2], device_ids=([2,64]T(1,0)) {'a'}, dimensions={1}", 64),
    ],
)
def test_all_notations_of_groups_are_read(groups, size):
    (found,) = collectives_of(f"channel_id=2, replica_groups={groups}")
    assert found.group == size
    assert found.tensor_bytes == 8 * 64 * 2


def test_an_unknown_notation_of_groups_is_an_error_that_names_the_collective():
    with pytest.raises(ValueError, match=r"all-reduce.*everyone"):
        collectives_of("channel_id=3, replica_groups=everyone")


def test_permutes_of_one_channel_are_told_apart_by_their_pairs():
    there, back = (
        f"channel_id=1, source_target_pairs={pairs}"
        for pairs in ("{{0,1},{1,0}}", "{{0,2},{2,0}}")
    )
    # The same one may appear several times, in each matmul that overlaps with it.
    assert len(collectives_of(there, back, back, opcode="collective-permute")) == 2
