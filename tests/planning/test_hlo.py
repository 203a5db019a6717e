from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxgpt.planning.hlo import collectives

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
    text = compiled(function, (8 * 256,), loops=loops).as_text()
    (found,) = [each for each in collectives(text) if each.kind == kind]
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
    text = jax.jit(twice).lower(shape).compile().as_text()
    assert sum(each.times for each in collectives(text)) == 12


TPU = """HloModule step

%main.1 (p: bf16[8,64]) -> bf16[8,64] {
  %p = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  %one = bf16[8,64]{1,0} collective-permute(%p), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %two = bf16[8,64]{1,0} collective-permute(%p), channel_id=1, source_target_pairs={{0,2},{2,0}}
  %again = bf16[8,64]{1,0:S(1)} collective-permute(%p), channel_id=1, source_target_pairs={{0,2},{2,0}}
  %listed = bf16[8,64]{1,0} all-reduce(%p), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}
  %tiled = bf16[8,64]{1,0} all-reduce(%p), channel_id=3, replica_groups=[2,8]<=[16]
  %named = bf16[8,64]{1,0} all-reduce(%p), channel_id=4, replica_groups=mesh['a'=2,'b'=6] {'b'}
  %moved = bf16[8,64]{1,0} all-reduce(%p), channel_id=5, replica_groups=mesh['a'=64,'b'=2], device_ids=([2,64]T(1,0)) {'a'}, dimensions={1}
  ROOT %end = bf16[8,64]{1,0} bitcast(%p)
}
"""  # noqa: E501


def collectives_of(*names):
    """Those of the program above with only some of its operations."""
    kept = [
        line
        for line in TPU.splitlines()
        if not (found := line.strip().split(" ")[0]).startswith("%")
        or found[1:] in ("main.1", "p", *names)
    ]
    return collectives("\n".join(kept).replace("%main", "ENTRY %main"))


def test_groups_are_read_in_every_way_that_hlo_writes_them():
    found = collectives_of("listed", "tiled", "named", "moved")
    assert [each.group for each in found] == [4, 8, 6, 64]


def test_a_collective_of_unknown_groups_is_an_error():
    text = TPU.replace("%main", "ENTRY %main").replace("[2,8]<=[16]", "everyone")
    with pytest.raises(ValueError, match="can't read the groups of all-reduce"):
        collectives(text)


def test_permutes_of_one_channel_count_by_their_pairs_and_each_once():
    assert len(collectives_of("one", "two", "again")) == 2
