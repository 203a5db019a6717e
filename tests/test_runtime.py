import pytest

from jaxgpt.runtime import replace_file


def test_a_file_whose_writing_fails_stays_as_it_was(tmp_path):
    path = tmp_path / "new" / "file"
    replace_file(path, lambda aside: aside.write_text("whole"))

    def fail(aside):
        aside.write_text("ha")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        replace_file(path, fail)
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]
