"""The speed benchmark times each contender, and its floor is computed correctly."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import speed

import lora_jax as lj

SMALL = dataclasses.replace(
    speed.SMALL, layers=1, width=128, heads=2, mlp=256, vocab=512, positions=64
)
TINY = speed.Job(SMALL, 2, 64, 4)
QUANTIZED = ["int8 base", "NF4 base"]
ALWAYS = ["full", "split", "adapters_only", "materialized", "A frozen", "DoRA"]
ALWAYS += [*QUANTIZED, "biases"]


@pytest.fixture(autouse=True)
def lenient(third_party, optax_promotion):
    """Allows the peers and optax to mix dtypes, like JAX's default settings."""


@pytest.fixture
def no_peers(monkeypatch):
    for name in ("qwix", "peft"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.slow
def test_main_times_and_counts_each_contender(tmp_path, monkeypatch, capsys, no_peers):
    monkeypatch.setitem(speed.JOBS, "transformer", TINY)
    monkeypatch.setattr(speed.time, "sleep", lambda seconds: None)
    speed.main(["--jobs", "transformer", "--repeats", "2", "--output", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "qwix is skipped" in shown and "torch is skipped" in shown
    text = (tmp_path / "speed.md").read_text()
    assert text in shown and "| LoRA step / qwix step | not run | 0.65 | |" in text
    results = json.loads((tmp_path / "speed.json").read_text())["jobs"]["transformer"]
    assert list(results["step"]) == ALWAYS
    assert list(results["forward"]) == ["plain", "LoRA", "materialized", *QUANTIZED]
    for kind in ("step", "forward"):
        for found in results[kind].values():
            assert len(found["ms"]) == 2 and min(found["ms"]) > 0
            assert found["flops"] > 0 and found["temporaries"] > 0
    # The floor's optimizer updates biases instead of adapters, a small difference.
    over = lambda name: results["step"][name]["flops"] / results["floor"]["step"]
    assert 0.98 < over("split") < 1.02 and over("adapters_only") == over("split")
    assert over("full") > 1.3 and over("materialized") > 1.3
    assert over("biases") < over("A frozen") < over("split") < over("DoRA") < 1.3
    forward = {
        k: v["flops"] / results["floor"]["forward"]
        for k, v in results["forward"].items()
    }
    assert forward["plain"] < 1 and 0.99 < forward["LoRA"] < 1.02
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_floor_grows_with_the_rank():
    """A step's low-rank products take 6 m r (k + n) FLOPs, 2 m r (k + n) forward."""
    m, r = TINY.batch * TINY.length, TINY.rank
    found = {"step": {"biases": {"flops": 5}}, "forward": {"plain": {"flops": 3}}}
    low, high = (speed.floor(TINY._replace(rank=n), found) for n in (r, 2 * r))
    sides = (
        4 * 2 * SMALL.width + 2 * (SMALL.width + SMALL.mlp) + SMALL.width + SMALL.vocab
    )
    assert low == {"step": 5 + 6 * m * r * sides, "forward": 3 + 2 * m * r * sides}
    assert high == {"step": 5 + 12 * m * r * sides, "forward": 3 + 4 * m * r * sides}


def test_targets_reports_which_aims_are_met():
    times = lambda ms, flops: {"ms": [ms], "flops": flops, "temporaries": 1}
    results = {
        "step": {
            "full": times(100, 100),
            "split": times(60, 68),
            "adapters_only": times(63, 68),
            "DoRA": times(76, 70),
            "NF4 base": times(64, 70),
            "qwix NF4": times(100, 70),
            "PEFT on torch": times(70, None),
        },
        "forward": {"plain": times(50, 30), "LoRA": times(53, 31)},
        "floor": {"step": 67, "forward": 31},
    }
    lines = speed.targets(results).splitlines()[2:]
    rows = dict(line.strip("| ").split(" | ", 1) for line in lines)
    assert rows["LoRA step / full step"] == "0.600 | 0.60 | met"
    assert rows["LoRA step / PEFT-on-torch step"] == "0.857 | 0.75 | not met"
    assert rows["adapters_only step / split step"] == "1.050 | 1.03 | not met"
    assert rows["LoRA step / qwix step"].startswith("not run")
    assert rows["DoRA step / LoRA step"] == "1.267 | 1.25 | not met"
    assert rows["NF4 step / LoRA step"] == "1.067 | 1.10 | met"
    assert rows["NF4 step / qwix NF4 step"] == "0.640 | 0.80 | met"
    assert rows["LoRA forward / plain forward"] == "1.060 | 1.06 | met"
    assert rows["FLOPs of the step / floor"] == "1.015 | 1.02 | met"


def test_check_count_refuses_another_number_of_parameters():
    with pytest.raises(RuntimeError, match=r"qwix has 5 parameters, lora_jax [\d,]+"):
        speed.check_count("qwix", 5, TINY)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_qwix_contenders_train_as_many_parameters():
    pytest.importorskip("qwix")
    ready = speed.qwix_contenders(TINY, "step")
    assert list(ready) == ["qwix", "qwix NF4"]
    for contender in ready.values():
        contender.run()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_qwix_parts_quantize_the_same_weights():
    pytest.importorskip("qwix")
    # qwix stores codes from 0 as uint4, lora_jax from -8 as int4.
    sizes = lambda params: sorted(
        x.size for x in jax.tree.leaves(params) if x.dtype in (jnp.int4, jnp.uint4)
    )
    *_, frozen = speed.qwix_parts(TINY, **speed.QLORA)
    assert sizes(frozen) == sizes(speed.quantized(TINY, "nf4"))


def test_quantized_stores_the_adapted_weights_in_blocks():
    params = {how: speed.quantized(TINY, how) for how in ("int8", "nf4")}
    shapes = {
        how: {
            path[-2].key: leaf.scale.shape
            for path, leaf in jax.tree.leaves_with_path(
                tree, is_leaf=lambda x: isinstance(x, lj.Quantized)
            )
            if isinstance(leaf, lj.Quantized)
        }
        for how, tree in params.items()
    }
    assert set(shapes["int8"]) == set(shapes["nf4"]) == set(speed.MATRICES)
    assert shapes["int8"]["down"] == (1, SMALL.width)
    assert shapes["nf4"]["down"] == (SMALL.mlp // speed.BLOCK, SMALL.width)


@pytest.mark.parametrize("name", ["decoder", "minilm"])
def test_torch_models_equal_those_in_jax(name):
    torch = pytest.importorskip("torch")
    torch_models = pytest.importorskip("models.torch_models")
    job = TINY if name == "decoder" else speed.Job(None, 2, 8, 4)
    task = speed.task(job)
    model = torch_models.model(job.arch)
    loaded = torch_models.load(model, task.plain)
    assert loaded == {key for key, _ in model.named_parameters()}
    inputs = [torch.tensor(np.asarray(x)).long() for x in task.inputs]
    got = model(*inputs).detach().numpy()
    np.testing.assert_allclose(got, task.apply(task.plain, *task.inputs), atol=2e-5)


def test_torch_contenders_train_as_many_parameters():
    pytest.importorskip("peft")
    ready = speed.torch_contenders(TINY, "step")
    assert list(ready) == ["torch", "PEFT on torch"]
    for contender in ready.values():
        contender.run()


@pytest.mark.slow
def test_adapted_changes_the_output():
    task, params = speed.task(TINY), speed.adapted(TINY)
    got = lj.lora(task.apply)(params, *task.inputs)
    assert np.abs(got - task.apply(task.plain, *task.inputs)).max() > 1e-3
