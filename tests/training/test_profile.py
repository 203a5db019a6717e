import jax.numpy as jnp
import pytest

from jaxgpt.training.profile import profiled


@pytest.mark.parametrize(
    ("calls", "made", "traced"), [(2, 5, 2), (2, 2, 1), (1, 1, 0), (0, 3, None)]
)
def test_dispatches_are_traced_from_the_second_on(
    tmp_path, capsys, calls, made, traced
):
    with profiled(tmp_path / "\udcff", calls) as called:  # not UTF-8
        for number in range(made):
            called(jnp.square(number))
    lines, wanted = capsys.readouterr().err.splitlines(), int(traced is not None)
    assert [line.split()[1] for line in lines] == [str(traced)] * wanted
    for pattern in ("perfetto_trace.json.gz", "*.xplane.pb"):
        assert len(list(tmp_path.rglob(pattern))) == wanted
