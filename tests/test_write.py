"""Tests of the atomic write: concurrent writers, and systems without locks."""

import concurrent.futures
import os

import pytest

from lora_jax import _write


def test_write_by_many_threads_to_one_name(tmp_path):
    path = tmp_path / "file"
    contents = [bytes([i]) * 1000 for i in range(100)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda data: _write.write(path, data), contents))
    assert path.read_bytes() in contents
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(_write.fcntl is None, reason="this system has no fcntl")
def test_write_on_a_system_without_locks(tmp_path, monkeypatch):
    def missing(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(_write.fcntl, "flock", missing)
    for data in (b"old", b"new"):
        _write.write(tmp_path / "file", data)
    assert (tmp_path / "file").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]
