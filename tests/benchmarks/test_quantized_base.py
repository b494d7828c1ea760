"""quantized_base.py trains on each base of a tiny Llama, and prints a table."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quantized_base
import to_peft
from models import smollm2

import lora_jax as lj

pytestmark = pytest.mark.usefixtures("third_party")


@pytest.fixture
def given(tiny_smollm2, tmp_path, monkeypatch):
    """Returns the command line of a short run, with a tiny model instead of a file."""
    monkeypatch.setattr(to_peft, "missing", lambda check: [])
    lines = [f"the other film {i},{i % 2}" for i in range(60)]
    (tmp_path / "data.csv").write_text("\n".join(["text,label", *lines]))
    tiny_smollm2.write(tmp_path / "tiny.gguf")
    files = {"weights": "tiny.gguf", "data": "data.csv", "output": "output"}
    return [
        *(f"--{name}={tmp_path / file}" for name, file in files.items()),
        *("--rank=2", "--steps=4", "--length=16", "--held-out=20", "--tokens=1"),
    ]


@pytest.mark.slow
def test_main_end_to_end(given, tmp_path, capsys):
    quantized_base.main([*given, "--bases", "float32", "int8", "nf4"])
    results = json.loads((tmp_path / "output" / "quantized_base.json").read_text())
    found = results["bases"]
    sizes = [x["base_bytes"] for x in found.values()]
    assert [*found] == ["float32", "int8", "nf4"] and sizes == sorted(sizes)[::-1]
    for x in found.values():
        assert x["after"]["loss"] < x["before"]["loss"] and len(x["losses"]) == 4
    # The same adapters and rows, on almost the same base
    assert found["int8"]["losses"] == pytest.approx(found["float32"]["losses"], abs=0.1)
    assert found["int8"]["losses"] != found["float32"]["losses"]
    shown = capsys.readouterr().out
    for name in ("float32", "int8", "NF4"):
        assert re.search(
            rf"^{name} +\d+\.\d( +\d\.\d{{3}}){{2}} +\d+ +\d+$", shown, re.M
        )
        assert f"\n{name}: the film" in shown
    assert (
        (tmp_path / "output" / "quantized_base.png").read_bytes().startswith(b"\x89PNG")
    )


@pytest.mark.parametrize("scanned", [True, False])
def test_base_quantizes_kernels_and_embedding(tiny_smollm2, tmp_path, scanned):
    path = tiny_smollm2.write(tmp_path / "tiny.gguf")
    model, params, _ = smollm2.load(path, scanned=scanned)
    apply = to_peft.function(model)
    assert quantized_base.base(apply, params, "float32") is params
    made = quantized_base.base(apply, jax.eval_shape(lambda: params), "nf4")
    kernel = made["blocks" if scanned else "blocks_1"]["mlp"]["down"]["kernel"]
    assert kernel.format == "nf4" and kernel.values.dtype == jnp.int4
    assert kernel.scale.shape == ((2, 1, 32) if scanned else (1, 32))
    assert made["tokens"]["embedding"].values.dtype == jnp.int8
    assert not isinstance(made["norm"]["scale"], lj.Quantized)
    assert np.shape(made["norm"]["scale"]) == (32,)


def test_main_refuses_bad_options_before_any_work(given, capsys, monkeypatch):
    monkeypatch.setattr(quantized_base, "run", lambda *_: pytest.fail("work"))
    for more, message in (
        (["--bases", "fp4"], "invalid choice: 'fp4'"),
        (["--targets", "heads"], "--targets heads: No weight matches 'heads'"),
    ):
        with pytest.raises(SystemExit) as error:
            quantized_base.main([*given, *more])
        assert error.value.code == 2
        assert message in " ".join(capsys.readouterr().err.split())
