import os

from jaxgpt.files import temporary


def write(path, mib):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(int(mib * 2**20)))
    return path


def test_the_cache_is_measured_and_emptied(call, fresh_cache, monkeypatch):
    assert "0.0 MiB  in total" in call("jaxgpt", "cache").out
    write(fresh_cache / "tokens" / "a" / "train.bin", 1.5)
    write(fresh_cache / "tinyshakespeare.txt", 1)
    users = write(fresh_cache / "notes.txt", 9)
    with temporary(fresh_cache / "tokens" / "b") as tmp_path:
        name = tmp_path.name.replace(f"{os.getpid()}", f"{os.getppid()}")
    written = write(fresh_cache / "tokens" / name / "val.bin", 0.5)
    lines = call("jaxgpt", "cache").out.splitlines()
    assert lines[0] == str(fresh_cache)
    assert "       2.0 MiB  tokenized texts" in lines
    assert "       3.0 MiB  in total" in lines
    out = call("jaxgpt", "cache", "--clear", status=1).out
    assert "deleted 2.5 MiB" in out
    assert f"kept {written.parent}" in out
    files = {path for path in fresh_cache.rglob("*") if path.is_file()}
    assert files == {users, written}
