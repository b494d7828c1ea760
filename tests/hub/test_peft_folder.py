"""A folder is written completely or not at all, and never over other files."""

import os
import pathlib

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from lora_jax._hub import peft_folder
from lora_jax._hub.peft_folder import FILES, as_dtype, read_tensors, write_folder
from lora_jax._write import free_folder

TENSORS = {"a": np.ones((2, 3), np.float32), "b": np.ones(2, ml_dtypes.bfloat16)}


def contents(folder):
    return {p.name: p.read_bytes() for p in pathlib.Path(folder).iterdir()}


def test_write_folder_twice(tmp_path):
    path = free_folder(tmp_path / "out", FILES)
    write_folder(path, {"r": 1}, TENSORS)
    assert (tmp_path / "out/adapter_config.json").read_text() == '{\n  "r": 1\n}\n'
    read = read_tensors(path)
    assert {n: (x.shape, x.dtype) for n, x in read.items()} == {
        n: (x.shape, x.dtype) for n, x in TENSORS.items()
    }
    with safetensors.safe_open(path + "/adapter_model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    write_folder(free_folder(path, FILES), {"r": 2}, {"a": TENSORS["a"]})
    assert list(read_tensors(path)) == ["a"]
    assert os.listdir(tmp_path) == ["out"]


def test_write_folder_through_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_folder(free_folder(tmp_path / "link", FILES), {}, TENSORS)
    assert (tmp_path / "link").is_symlink()
    assert sorted(contents(tmp_path / "real")) == sorted(peft_folder.FILES)


def test_free_folder_refuses_other_files(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"holds other files: 'notes.txt'.*new folder"):
        free_folder(tmp_path, FILES)
    assert contents(tmp_path) == before
    with pytest.raises(ValueError, match="is a file"):
        free_folder(tmp_path / "notes.txt", FILES)
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        free_folder(tmp_path / "not" / "there", FILES)


@pytest.mark.parametrize("call", ["write", "rename"])
@pytest.mark.parametrize("old", [False, True])
def test_write_folder_that_fails_leaves_the_old_one(tmp_path, monkeypatch, call, old):
    path = free_folder(tmp_path / "out", FILES)
    if old:
        write_folder(path, {"r": 1}, TENSORS)
    before = contents(path) if old else {}
    calls = []

    def fail(real):
        def once(*args):
            calls.append(args)
            if len(calls) == 2 or (not old and call == "rename"):
                raise OSError("no space left")
            return real(*args)

        return once

    if call == "write":
        monkeypatch.setattr(peft_folder, "write", fail(peft_folder.write))
    else:
        monkeypatch.setattr(peft_folder.os, "rename", fail(os.rename))
    with pytest.raises(OSError, match="no space left"):
        write_folder(path, {"r": 2}, TENSORS)
    assert os.listdir(tmp_path) == (["out"] if old else [])
    if old:
        assert contents(path) == before


def test_read_tensors_refuses(tmp_path):
    with pytest.raises(FileNotFoundError, match="save_pretrained"):
        read_tensors(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="pickle"):
        read_tensors(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    whole = safetensors.numpy.save(TENSORS)
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="may be truncated"):
        read_tensors(tmp_path)
    path.write_bytes(safetensors.numpy.save({"a": np.ones(2, np.int32)}))
    with pytest.raises(ValueError, match="'a' is I32"):
        read_tensors(tmp_path)
    path.write_bytes(safetensors.numpy.save({"a": np.full(2, np.nan, np.float32)}))
    with pytest.raises(ValueError, match="'a' is not finite"):
        read_tensors(tmp_path)


def test_as_dtype():
    x = np.arange(6, dtype=np.float32).reshape(2, 3).T
    assert as_dtype("x", x, None).flags.c_contiguous
    assert as_dtype("x", x, "bfloat16").dtype.name == "bfloat16"
    with pytest.raises(ValueError, match=r"is float64.*dtype=jnp.float32"):
        as_dtype("x", x.astype(np.float64), None)
    with pytest.raises(ValueError, match="'x' in float16 is not finite"):
        as_dtype("x", 1e5 * x, "float16")
