import os
import sys

import pytest

from jaxgpt.files import log_line, replace_file


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


def test_a_log_line_that_cannot_be_written_is_dropped(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as closed_pipe:
        monkeypatch.setattr(sys, "stderr", closed_pipe)
        log_line("step 1")
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)  # so that it can be closed
