"""The loading benchmark writes a checkpoint that both ways read alike."""

import dataclasses
import json

import jax
import load
import numpy as np
import pytest
from models.architectures import ARCHITECTURES, Architecture, Model
from models.folder import names as module_names

import lora_jax as lj

pytestmark = pytest.mark.usefixtures("third_party")

SMALL = Architecture(2, 64, 2, 128, 96, kv_heads=1)


@pytest.mark.parametrize("tied", [True, False])
def test_both_methods_read_the_same_tree(tmp_path, monkeypatch, tied):
    monkeypatch.setattr(load, "SHARD", 50_000)
    arch = dataclasses.replace(SMALL, tied=tied)
    about = load.write_checkpoint(tmp_path, arch)
    assert about["largest"] == 2 * 128 * 64
    assert len([*tmp_path.glob("*.safetensors")]) > 2
    like = jax.eval_shape(Model(arch).init, jax.random.key(0), np.ones((1, 2), int))
    names = module_names(arch)
    got = lj.import_weights(tmp_path, like, names, how=load.HOW)
    want = load.eager(tmp_path, like, names)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_tensors_of_has_the_published_number_of_parameters():
    total = lambda name: sum(
        int(np.prod(shape)) for shape in load.tensors_of(ARCHITECTURES[name]).values()
    )
    # The numbers on the models' pages.
    assert total("llama-3.2-1b") == 1_235_814_400
    assert total("llama-3-8b") == 8_030_261_248


def test_main_measures_both_methods(tmp_path, capsys):
    load.main(["--model", "smollm2-135m", "--layers", "1", "--output", str(tmp_path)])
    found = json.loads((tmp_path / "load.json").read_text())
    assert found["methods"].keys() == {*load.METHODS}
    for x in found["methods"].values():
        assert x["result"] < x["peak"] > x["before"] > 0 < x["seconds"]
    assert {path.name for path in tmp_path.iterdir()} == {"load.json", "load.md"}
    assert "| import_weights |" in capsys.readouterr().out


def test_main_refuses_more_layers(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        load.main(["--layers", "99", "--output", str(tmp_path)])
    assert "--layers must be between 1 and 16" in capsys.readouterr().err
