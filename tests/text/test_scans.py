import os

import numpy as np
import pytest

from jaxgpt.text.scans import scan_once


@pytest.fixture
def old_file(tmp_path):
    (path := tmp_path / "text.txt").write_text("to be")
    os.utime(path, (1, 1))  # long ago, so that a scan is kept
    return path


@pytest.mark.parametrize("is_array", [True, False])
@pytest.mark.parametrize("damage", [b"", b"{", b"\x93NUMPY"])
def test_a_damaged_scan_is_made_again(old_file, fresh_cache, damage, is_array):
    found = np.arange(5) if is_array else [0, 1, 2, 3, 4]
    scans = []

    def scan():
        scans.append(1)
        return found

    for number in (1, 1, 2, 2):
        if number > len(scans) > 0:
            (path,) = (fresh_cache / "scans").iterdir()
            path.write_bytes(damage)
        again = scan_once([old_file], "a", scan, is_array=is_array)
        assert list(again) == list(found)
        assert len(scans) == number


def test_a_scan_needs_no_cache(old_file, tmp_path, monkeypatch):
    (blocked := tmp_path / "cache").touch()  # a file, which can't be a folder
    monkeypatch.setenv("JAXGPT_CACHE", str(blocked))
    assert scan_once([old_file], "a", lambda: [1]) == [1]
