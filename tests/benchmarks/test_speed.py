"""The speed benchmark times each contender, and its floor is what LoRA needs."""

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
FEW = ["int8 base", "NF4 base"]
KINDS = ["A frozen", "DoRA"]
ALWAYS = ["full", "split", "adapters_only", "materialised", *KINDS, *FEW, "biases"]


@pytest.fixture(autouse=True)
def lenient(third_party, optax_promotion):
    """The peers and optax mix dtypes, as most users' settings allow."""


@pytest.fixture
def no_peers(monkeypatch):
    for name in ("qwix", "peft"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.slow
def test_each_contender_is_timed_and_counted(tmp_path, monkeypatch, capsys, no_peers):
    monkeypatch.setitem(speed.JOBS, "transformer", TINY)
    monkeypatch.setattr(speed.time, "sleep", lambda seconds: None)
    speed.main(["--jobs", "transformer", "--repeats", "2", "--output", str(tmp_path)])
    said = capsys.readouterr().out
    assert "qwix is left out" in said and "torch is left out" in said
    text = (tmp_path / "speed.md").read_text()
    assert text in said and "| LoRA step / qwix step | not run | 0.65 | |" in text
    results = json.loads((tmp_path / "speed.json").read_text())["jobs"]["transformer"]
    assert list(results["step"]) == ALWAYS
    assert list(results["forward"]) == ["plain", "LoRA", "materialised", *FEW]
    for kind in ("step", "forward"):
        for found in results[kind].values():
            assert len(found["ms"]) == 2 and min(found["ms"]) > 0
            assert found["flops"] > 0 and found["temporaries"] > 0
    # The floor trains biases, and its optimizer is not quite that of the adapters.
    over = lambda name: results["step"][name]["flops"] / results["floor"]["step"]
    assert 0.98 < over("split") < 1.02 and over("adapters_only") == over("split")
    assert over("full") > 1.3 and over("materialised") > 1.3
    assert over("biases") < over("A frozen") < over("split") < over("DoRA") < 1.3
    forward = {
        k: v["flops"] / results["floor"]["forward"]
        for k, v in results["forward"].items()
    }
    assert forward["plain"] < 1 and 0.99 < forward["LoRA"] < 1.02
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_the_floor_grows_with_the_rank():
    """6 m r (k + n) FLOPs for a step's thin products, 2 of them forward."""
    m, r = TINY.batch * TINY.length, TINY.rank
    found = {"step": {"biases": {"flops": 5}}, "forward": {"plain": {"flops": 3}}}
    low, high = (speed.floor(TINY._replace(rank=n), found) for n in (r, 2 * r))
    sides = (
        4 * 2 * SMALL.width + 2 * (SMALL.width + SMALL.mlp) + SMALL.width + SMALL.vocab
    )
    assert low == {"step": 5 + 6 * m * r * sides, "forward": 3 + 2 * m * r * sides}
    assert high == {"step": 5 + 12 * m * r * sides, "forward": 3 + 4 * m * r * sides}


def test_aims_are_met_or_not():
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


def test_a_peer_that_trains_other_numbers_is_refused():
    with pytest.raises(RuntimeError, match=r"qwix has 5 numbers where [\d,]+ are ours"):
        speed.check_count("qwix", 5, TINY)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_qwix_trains_the_same_numbers():
    pytest.importorskip("qwix")
    ready = speed.qwix_contenders(TINY, "step")
    assert list(ready) == ["qwix", "qwix NF4"]
    for contender in ready.values():
        contender.run()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_qwix_stores_the_same_weights_in_four_bits():
    pytest.importorskip("qwix")
    # The codes of qwix count from 0, ours from -8.
    sizes = lambda params: sorted(
        x.size for x in jax.tree.leaves(params) if x.dtype in (jnp.int4, jnp.uint4)
    )
    *_, frozen = speed.qwix_parts(TINY, **speed.QLORA)
    assert sizes(frozen) == sizes(speed.stored(TINY, "nf4"))


def test_the_adapted_weights_are_in_few_bits():
    params = {how: speed.stored(TINY, how) for how in ("int8", "nf4")}
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
def test_the_twin_in_torch_is_the_same_model(name):
    torch, twin = (
        pytest.importorskip("torch"),
        pytest.importorskip("models.torch_models"),
    )
    job = TINY if name == "decoder" else speed.Job(None, 2, 8, 4)
    task = speed.task(job)
    model = torch_models.model(job.arch)
    loaded = torch_models.load(model, task.plain)
    assert loaded == {key for key, _ in model.named_parameters()}
    inputs = [torch.tensor(np.asarray(x)).long() for x in task.inputs]
    got = model(*inputs).detach().numpy()
    np.testing.assert_allclose(got, task.apply(task.plain, *task.inputs), atol=2e-5)


def test_peft_trains_the_same_numbers():
    pytest.importorskip("peft")
    ready = speed.torch_contenders(TINY, "step")
    assert list(ready) == ["torch", "PEFT on torch"]
    for contender in ready.values():
        contender.run()


@pytest.mark.slow
def test_adapters_that_are_timed_change_the_output():
    task, params = speed.task(TINY), speed.adapted(TINY)
    got = lj.lora(task.apply)(params, *task.inputs)
    assert np.abs(got - task.apply(task.plain, *task.inputs)).max() > 1e-3
