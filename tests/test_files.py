import os
import sys

import pytest

from jaxgpt.files import log_line, replace_file


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


def test_a_line_that_cannot_be_written_is_no_error(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as nobody_reads:
        monkeypatch.setattr(sys, "stderr", nobody_reads)
        log_line("step 1")
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)  # so that it can be closed
