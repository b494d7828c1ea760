"""One file at a time, whoever else writes, and whatever the system lacks."""

import concurrent.futures
import os

import pytest

from lora_jax import _write


def test_many_writers_of_one_name(tmp_path):
    path = tmp_path / "file"
    contents = [bytes([i]) * 1000 for i in range(100)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda data: _write.write(path, data), contents))
    assert path.read_bytes() in contents
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(_write.fcntl is None, reason="there are no such locks")
def test_a_system_without_locks(tmp_path, monkeypatch):
    def missing(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(_write.fcntl, "flock", missing)
    for data in (b"old", b"new"):
        _write.write(tmp_path / "file", data)
    assert (tmp_path / "file").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]
