"""An adapter never replaces a model or an adapter of another program."""

import json
import os
import pathlib
import shutil

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from lora_jax._hub import peft_folder
from lora_jax._hub.folder_files import NEW
from lora_jax._hub.peft_folder import (
    CONFIG_FILE,
    FILES,
    TENSORS_FILE,
    adapter_folder,
    as_dtype,
    read_folder,
    read_tensors,
    write_folder,
)

TENSORS = {"a": np.ones((2, 3), np.float32), "b": np.ones(2, ml_dtypes.bfloat16)}
CONFIG = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q"]}


def contents(folder):
    return {p.name: p.read_bytes() for p in pathlib.Path(folder).iterdir()}


def write(folder, r, tensors, overwrite=False):
    path = adapter_folder(folder, overwrite)
    write_folder(path, CONFIG | {"r": r}, tensors)


def put_foreign(folder, tensors=TENSORS):
    """Writes the files as PEFT does."""
    folder.mkdir(exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(CONFIG | {"peft_version": "0.21"}))
    name = folder / TENSORS_FILE
    safetensors.numpy.save_file(tensors, name, metadata={"format": "pt"})


def test_write_folder_twice(tmp_path):
    out = tmp_path / "out"
    write_folder(adapter_folder(out, False), {"r": 1}, TENSORS)
    assert (out / CONFIG_FILE).read_text() == '{\n  "r": 1\n}\n'
    read = read_tensors(str(out / TENSORS_FILE))
    assert {n: (x.shape, x.dtype) for n, x in read.items()} == {
        n: (x.shape, x.dtype) for n, x in TENSORS.items()
    }
    with safetensors.safe_open(out / TENSORS_FILE, "numpy") as file:
        assert file.metadata() == {"format": "pt", "writer": "lora_jax"}
    write(out, 2, {"a": TENSORS["a"]})
    assert list(read_tensors(str(out / TENSORS_FILE))) == ["a"]
    assert os.listdir(tmp_path) == ["out"]


def test_write_folder_next_to_other_files(tmp_path):
    others = {
        "README.md": b"mine",
        "tokenizer.json": b"{}",
        "tokenizer_config.json": b"{}",
        "adapter_model.bin": b"",
    }
    write(tmp_path, 1, TENSORS)
    for name, data in others.items():
        (tmp_path / name).write_bytes(data)
    write(tmp_path, 2, TENSORS)
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["r"] == 2
    there = contents(tmp_path)
    assert {n: there[n] for n in others} == others and {*there} == {*others, *FILES}


def test_adapter_folder_refuses_the_adapter_of_another_program(tmp_path):
    put_foreign(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"did not write.*overwrite=True"):
        adapter_folder(tmp_path, False)
    (tmp_path / TENSORS_FILE).unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"did not write: 'adapter_config.json'"):
        adapter_folder(tmp_path, False)
    put_foreign(tmp_path)
    (tmp_path / CONFIG_FILE).unlink()
    with pytest.raises(ValueError, match=r"did not write: 'adapter_model.safetensors'"):
        adapter_folder(tmp_path, False)
    (tmp_path / TENSORS_FILE).write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"did not write"):
        adapter_folder(tmp_path, False)
    put_foreign(tmp_path)
    assert contents(tmp_path) == before | {"adapter_model.bin": b""}
    write(tmp_path, 3, TENSORS, overwrite=True)
    write(tmp_path, 4, TENSORS)
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["r"] == 4


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"]
)
def test_adapter_folder_refuses_a_model(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=f"holds a model, {name}"):
            adapter_folder(tmp_path, overwrite)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", FILES)
def test_adapter_folder_refuses_what_is_no_file(tmp_path, name):
    (tmp_path / name).mkdir()
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=rf"{name} is a folder"):
            adapter_folder(tmp_path, overwrite)
    assert os.listdir(tmp_path) == [name]
    (tmp_path / name).rmdir()
    (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match="is a file"):
        adapter_folder(tmp_path / name, True)


def test_read_folder_during_an_export(tmp_path, monkeypatch):
    """An export between the reads of both files: the reader starts again."""
    write(tmp_path, 1, {"a": np.full(2, 1, np.float32)})
    exports = [2, 3]
    read_config = peft_folder.read_config

    def read_and_export(path):
        config = read_config(path)
        if exports:
            r = exports.pop(0)
            write(tmp_path, r, {"a": np.full(2, r, np.float32)})
        return config

    monkeypatch.setattr(peft_folder, "read_config", read_and_export)
    found = read_folder(tmp_path)
    assert found.config["r"] == 3 and found.tensors["a"][0] == 3
    exports = [*range(4, 40)]
    with pytest.raises(ValueError, match="changes while it is read"):
        read_folder(tmp_path)


def test_read_folder_of_a_killed_export(tmp_path):
    """Between the moves of the config, the new one waits in a hidden folder."""
    write(tmp_path / "new", 2, {"a": np.full(2, 2, np.float32)})
    for tensors_moved in (False, True):
        out = tmp_path / f"out{tensors_moved}"
        write(out, 1, TENSORS)
        (out / CONFIG_FILE).unlink()
        shutil.copytree(tmp_path / "new", out / NEW)
        if tensors_moved:
            (out / NEW / TENSORS_FILE).replace(out / TENSORS_FILE)
        found = read_folder(out)
        assert found.config["r"] == 2 and found.tensors["a"].shape == (2,)
        assert adapter_folder(out, False) == str(out)
        assert contents(out) == contents(tmp_path / "new")


def test_read_tensors_refuses(tmp_path):
    path = tmp_path / "adapter_model.safetensors"
    read = lambda: read_tensors(str(path))
    with pytest.raises(FileNotFoundError, match="save_pretrained"):
        read()
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="pickle"):
        read()
    path.mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        read()
    path.rmdir()
    whole = safetensors.numpy.save(TENSORS)
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="may be truncated"):
        read()
    path.write_bytes(safetensors.numpy.save({"a": np.ones(2, np.int32)}))
    with pytest.raises(ValueError, match="'a' is int32"):
        read()
    path.write_bytes(safetensors.numpy.save({"a": np.full(2, np.nan, np.float32)}))
    with pytest.raises(ValueError, match="'a' is not finite"):
        read()


def test_as_dtype():
    x = np.arange(6, dtype=np.float32).reshape(2, 3).T
    assert as_dtype("x", x, None).flags.c_contiguous
    assert as_dtype("x", x, "bfloat16").dtype.name == "bfloat16"
    with pytest.raises(ValueError, match=r"is float64.*dtype=jnp.float32"):
        as_dtype("x", x.astype(np.float64), None)
    with pytest.raises(ValueError, match="'x' in float16 is not finite"):
        as_dtype("x", 1e5 * x, "float16")
