import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, changed

from jaxgpt.models import build_model
from jaxgpt.parallel.mesh import make_mesh, single_device_mesh
from jaxgpt.training.record import _checksums, checksums
from jaxgpt.training.step import abstract_state, create_state


@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_checksums_do_not_depend_on_the_mesh_and_gather_nothing(mesh):
    model = build_model(TINY.model, "cpu")
    state = create_state(model, TINY, single_device_mesh())
    where = abstract_state(model, TINY, make_mesh(changed(TINY, mesh=mesh)))
    shared = jax.tree.map(lambda a, b: jax.device_put(a, b.sharding), state, where)
    kernel = shared.params["h"]["mlp"]["c_fc"]["kernel"]
    assert kernel.addressable_shards[0].data.size < kernel.size
    assert checksums(shared) == checksums(state)
    assert len(set(checksums(state.params).values())) > 5
    compiled = _checksums.lower({"kernel": kernel}).compile().as_text()
    assert "all-reduce" in compiled
    assert "all-gather" not in compiled


def checksum(array):
    return checksums({"a": array})["a"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint32", "uint8"])
def test_any_flipped_bit_is_found(dtype):
    array = np.array(jax.random.normal(jax.random.key(0), (3, 2, 4)) * 50)
    array = array.astype(jnp.dtype(dtype))
    expected = checksum(array)
    for place in range(array.nbytes * 8):
        content = bytearray(array.tobytes())
        content[place // 8] ^= 1 << place % 8
        flipped = np.frombuffer(content, array.dtype).reshape(array.shape)
        assert checksum(flipped) != expected
    assert checksum(array) == expected


def test_elements_that_are_swapped_are_found():
    array = np.array([[0, 1, 2, 4], [1, -1, 0.5, 3]], np.float32)
    for one in np.ndindex(array.shape):
        for other in np.ndindex(array.shape):
            swapped = array.copy()
            swapped[one], swapped[other] = array[other], array[one]
            same = array[one] == array[other]
            assert (checksum(swapped) == checksum(array)) == same
    assert checksum(array.T) != checksum(array)


@pytest.mark.parametrize("size", [1, 64, 1024, 65_536])
def test_a_part_of_equal_elements_that_became_zeros_is_found(size):
    array = np.ones((2, size), np.float32)
    lost = array.copy()
    lost[1] = 0
    assert len({checksum(array), checksum(lost), checksum(0 * array)}) == 3


def test_scalars_and_truth_values_have_checksums():
    found = [checksum(np.int32(n)) for n in (0, 1, 2**31 - 1)]
    found += [checksum(jnp.array([True, False])), checksum(jnp.array([False, True]))]
    assert len(set(found)) == 5
