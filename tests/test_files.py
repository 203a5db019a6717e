import os

import pytest
from conftest import TINY, changed

from jaxgpt.files import is_abandoned, replace_file, temporary
from jaxgpt.text.corpus import load_corpus

NO_PROCESS = 2**31 - 1  # above any system's largest PID


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


def leave(path, pid):
    """Makes a temporary folder for `path` as a killed process would leave it."""
    with temporary(path) as own:
        name = own.name
    left = path.with_name(name.replace(f"-{os.getpid()}.", f"-{pid}."))
    left.mkdir(parents=True)
    (left / "half").touch()
    return left


@pytest.mark.skipif(os.name != "posix", reason="there nothing is known of processes")
def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path, monkeypatch):
    path = tmp_path / "file"
    of_dead, of_live, of_same_pid = (
        leave(path, pid) for pid in (NO_PROCESS, os.getppid(), os.getpid())
    )
    with monkeypatch.context() as patch:
        patch.setattr("platform.node", lambda: "another host")
        of_other_host = leave(path, NO_PROCESS)
    assert of_dead.name != of_other_host.name
    assert is_abandoned(of_dead)
    assert not is_abandoned(of_live)
    replace_file(path, lambda tmp_path: tmp_path.write_text("whole"))
    assert set(tmp_path.iterdir()) == {path, of_live, of_other_host}
    assert not of_same_pid.exists()


@pytest.mark.skipif(os.name != "posix", reason="there nothing is known of processes")
def test_what_a_killed_tokenization_left_goes_at_the_next_start(fresh_cache, text_file):
    config = changed(TINY, model={"vocab_size": None}, data={"path": (str(text_file),)})
    load_corpus(config)
    left = leave(fresh_cache / "tokens" / "sha256", NO_PROCESS)
    load_corpus(config)  # from the cache
    assert not left.exists()
