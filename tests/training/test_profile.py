import jax.numpy as jnp
import pytest

from jaxgpt.training.profile import profiled


@pytest.mark.parametrize(("calls", "made", "traced"), [(2, 5, 2), (2, 2, 1), (1, 1, 0)])
def test_dispatches_from_the_second_on_are_traced(
    tmp_path, capsys, calls, made, traced
):
    with profiled(tmp_path, calls) as called:
        for number in range(made):
            called(jnp.square(number))
    told = f"traced {traced} dispatches into {tmp_path}"
    assert capsys.readouterr().err.splitlines() == [told]
    assert len(list(tmp_path.rglob("perfetto_trace.json.gz"))) == 1
    assert len(list(tmp_path.rglob("*.xplane.pb"))) == 1


def test_nothing_is_traced_unless_asked_for(tmp_path):
    with profiled(tmp_path, 0) as called:
        for _ in range(3):
            called(None)
    assert not list(tmp_path.iterdir())
