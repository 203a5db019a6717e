import pytest

from jaxgpt.files import replace_file


def test_a_failed_write_leaves_the_file_unchanged(tmp_path):
    path = tmp_path / "new" / "file"
    replace_file(path, lambda tmp_path: tmp_path.write_text("whole"))

    def fail(tmp_path):
        tmp_path.write_text("ha")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        replace_file(path, fail)
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]
