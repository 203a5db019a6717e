from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, changed, mesh_of

from jaxgpt.models import build_model
from jaxgpt.parallel.mesh import single_device_mesh
from jaxgpt.training.record import _checksums, checksums
from jaxgpt.training.step import abstract_state, create_state

ONE_LAYER = changed(TINY, model={"n_layer": 1})


@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_checksums_do_not_depend_on_the_mesh_and_gather_no_array(mesh):
    model = build_model(ONE_LAYER.model, "cpu")
    state = create_state(model, ONE_LAYER, single_device_mesh())
    where = abstract_state(model, ONE_LAYER, mesh_of(changed(ONE_LAYER, mesh=mesh)))
    sharded = jax.tree.map(lambda a, b: jax.device_put(a, b.sharding), state, where)
    kernel = sharded.params["h"]["mlp"]["c_fc"]["kernel"]
    assert kernel.addressable_shards[0].data.size < kernel.size
    assert checksums(sharded) == checksums(state)
    assert len(set(checksums(state.params).values())) > 5
    compiled = _checksums.lower({"kernel": kernel}).compile().as_text()
    assert "all-reduce" in compiled
    assert "all-gather" not in compiled


def checksum(array):
    return checksums({"a": array})["a"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint32", "uint8"])
def test_flipping_any_bit_changes_the_checksum(dtype):
    array = np.array(jax.random.normal(jax.random.key(0), (3, 2, 4)) * 50)
    array = array.astype(jnp.dtype(dtype))
    expected = checksum(array)
    for place in range(array.nbytes * 8):
        content = bytearray(array.tobytes())
        content[place // 8] ^= 1 << place % 8
        flipped = np.frombuffer(content, array.dtype).reshape(array.shape)
        assert checksum(flipped) != expected
    assert checksum(array) == expected


def test_swapping_different_elements_changes_the_checksum():
    array = np.array([[0, 1, 2, 4], [1, -1, 0.5, 3]], np.float32)
    for one, other in product(np.ndindex(array.shape), repeat=2):
        swapped = array.copy()
        swapped[one], swapped[other] = array[other], array[one]
        same = array[one] == array[other]
        assert (checksum(swapped) == checksum(array)) == same
    assert checksum(array.T) != checksum(array)


@pytest.mark.parametrize("size", [1, 64, 1024, 65_536])
def test_equal_elements_that_became_zeros_change_the_checksum(size):
    ones = np.ones((2, size), np.float32)
    some_lost, lost = ones * np.float32([[1], [0]]), 0 * ones
    assert len({*map(checksum, (ones, some_lost, lost))}) == 3


def test_scalars_and_booleans_have_different_checksums():
    found = [checksum(np.int32(n)) for n in (0, 1, 2**31 - 1)]
    found += [checksum(jnp.array([True, False])), checksum(jnp.array([False, True]))]
    assert len(set(found)) == 5
