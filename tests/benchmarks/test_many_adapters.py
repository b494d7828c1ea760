"""The benchmark of many adapters times each contender and computes correct ratios."""

import dataclasses
import json
import sys

import jax
import many_adapters
import numpy as np
import pytest
import speed
from models.architectures import ARCHITECTURES

import lora_jax as lj

SMALL = dataclasses.replace(
    speed.SMALL, layers=1, width=128, heads=2, mlp=256, vocab=512, positions=64
)
TINY = speed.Job(SMALL, 1, 32, 4)


@pytest.fixture(autouse=True)
def tiny(third_party, optax_promotion, monkeypatch):
    """Uses a tiny transformer, and allows the peers and optax to mix dtypes."""
    monkeypatch.setattr(many_adapters, "JOB", TINY)
    monkeypatch.setattr(speed.time, "sleep", lambda seconds: None)


@pytest.mark.slow
def test_main_times_and_counts_each_contender(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    given = ["--adapters", "16", "1", "--repeats", "2", "--output", str(tmp_path)]
    many_adapters.main(given)
    shown = capsys.readouterr().out
    assert shown.count("PEFT on torch is skipped") == 1
    assert (tmp_path / "many_adapters.md").read_text() in shown
    found = json.loads((tmp_path / "many_adapters.json").read_text())["adapters"]
    assert list(found) == ["1", "16"]
    for n, results in found.items():
        train, serve = results["train"], results["serve"]
        assert list(train) == ["one adapter", "at once", "one after the other"]
        assert list(serve) == ["plain", "one adapter", "mixed batch"]
        for x in (*train.values(), *serve.values()):
            assert len(x["ms"]) == 2 and min(x["ms"]) > 0 and x["bytes"] > 0
        # No weight's gradient is computed, and no weight is copied for each adapter.
        # (At this width the optimizer has 3 % of the FLOPs with 16 adapters.)
        over = lambda x, kind: x["flops"] / results["floor"][kind]  # noqa: B023
        assert 0.99 < over(train["at once"], "train") < 1.04
        assert 0.98 < over(serve["mixed batch"], "serve") < 1.02
        assert over(serve["plain"], "serve") < over(serve["one adapter"], "serve")
        base = sum(x.nbytes for x in jax.tree.leaves(speed.task(TINY).plain))
        assert train["at once"]["bytes"] < base * (1.5 + int(n))
    assert "Training 16 at once takes " in shown and "PEFT's" not in shown
    assert "| a mixed batch of 16 / the plain forward | " in shown
    assert (tmp_path / "many_adapters.png").read_bytes().startswith(b"\x89PNG")


def test_training_steps_run():
    job = TINY._replace(batch=3)
    stacked = speed.adapted(job, stack=3)
    assert lj.count(stacked).trainable == 3 * lj.count(speed.adapted(job)).trainable
    b = stacked["blocks_0"]["attention"]["query"]["lora_b"]
    assert not np.allclose(b[0], b[1])
    for contender in many_adapters.training_steps(job).values():
        contender.run()


def test_mixed_gives_each_example_its_own_adapter():
    job = TINY._replace(batch=4)
    task, stacked = speed.task(job), speed.adapted(job, stack=4)
    ids = many_adapters.order(job)
    assert sorted(ids.tolist()) == [0, 1, 2, 3]
    run = jax.jit(many_adapters.mixed(lj.lora(task.apply)))
    got = run(stacked, ids, *task.inputs)
    for i, id in enumerate(ids.tolist()):
        alone = lj.merge(lj.take(stacked, id))
        (want,), (plain,) = (
            task.apply(params, task.inputs[0][i][None])
            for params in (alone, task.plain)
        )
        np.testing.assert_allclose(got[i], want, atol=1e-4)
        assert np.abs(want - plain).max() > 0
    pairs = run(stacked, ids[:2], *task.inputs)
    each = run(stacked, np.repeat(ids[:2], 2), *task.inputs)
    np.testing.assert_allclose(pairs, each, atol=1e-4)


def test_peers_compute_the_same(monkeypatch):
    pytest.importorskip("peft")
    job = TINY._replace(batch=3)
    ready = many_adapters.peers(job)
    assert list(ready) == ["torch", "PEFT on torch"]
    assert ready["PEFT on torch"].run().shape == (3, 32, 512)
    # With other adapters for the examples, the check fails.
    mixed = many_adapters.mixed
    first = lambda run: lambda stacked, ids, x: mixed(run)(stacked, 0 * ids, x)
    monkeypatch.setattr(many_adapters, "mixed", first)
    with pytest.raises(RuntimeError, match="PEFT's logits of the mixed batch differ"):
        many_adapters.peers(job)


def results(at_once=105.0, mixed=60.0, peft=None):
    times = lambda ms, flops: {"ms": [ms], "flops": flops, "bytes": 10**9}
    serve = {"plain": times(50, 98), "one adapter": times(55, 100)}
    serve["mixed batch"] = times(mixed, 101)
    if peft:
        serve |= {"torch": times(90, None), "PEFT on torch": times(peft, None)}
    train = {"one adapter": times(100, 300), "at once": times(at_once, 303)}
    train["one after the other"] = times(400, 300)
    return {"train": train, "serve": serve, "floor": {"train": 300, "serve": 100}}


def test_aims_reports_which_are_met():
    rows = many_adapters.aims(results()).splitlines()[2:]
    assert [row.strip("| ").split(" | ")[1:] for row in rows] == [
        ["1.050", "1.10", "met"],
        ["1.200", "1.15", "not met"],
        ["1.010", "1.02", "met"],
        ["1.010", "1.02", "met"],
    ]


def test_report_text_has_the_ratios_of_the_results():
    found = {"adapters": {"4": results(), "64": results(80, 75, 180)}}
    text = many_adapters.report_text(found)
    assert "Training 64 at once takes 0.80 of the time of one" in text
    assert "and 0.20 of that of as many steps one after the other" in text
    assert "A mixed batch of 64 takes 1.50 of the plain forward pass" in text
    assert "PEFT's takes 2.00 of torch's plain one, and 2.40 of the mixed batch" in text
    assert "| 64 | PEFT on torch | 3.60 | 3.60 to 3.60 | 180 |  |  |  |" in text
    assert "| aim |" not in text  # 16 were not run


@pytest.mark.slow
def test_main_plans_the_memory_of_a_chip(tmp_path, monkeypatch, capsys):
    llama = dataclasses.replace(SMALL, positions=0, norm="rms", gated=True, bias=False)
    tiny = dataclasses.replace(llama, activation="silu", tied=True, layers=2)
    monkeypatch.setitem(ARCHITECTURES, "llama-3.2-1b", tiny)
    given = ["--device", "cpu", "--adapters", "3", "--sequence", "32", "--rank", "4"]
    many_adapters.main([*given, "--output", str(tmp_path)])
    shown = capsys.readouterr().out
    rows = json.loads((tmp_path / "many_adapters_plan.json").read_text())["adapters"][
        "3"
    ]
    assert all(f"| 3 | {name} | " in shown for name in rows)
    at_once, one, mixed, plain = rows.values()
    # Adam has two float32 moments for each parameter, and a step for each adapter.
    assert at_once["optimizer"] == 3 * one["optimizer"]
    adapters = (one["optimizer"] - 4) // 2
    assert at_once["parameters"] - one["parameters"] == 2 * (adapters + 7 * 2 * 4)
    assert mixed["parameters"] == at_once["parameters"]
    assert plain["parameters"] < one["parameters"]
    for x in rows.values():
        assert x["peak"] > x["parameters"] + x["optimizer"]


def test_measure_reports_that_a_program_does_not_fit():
    class Refused:
        def compile(self):
            message = "RESOURCE_EXHAUSTED: Used 20.0G of 15.0G hbm."
            raise jax.errors.JaxRuntimeError(message)

    sizes = {"parameters": 10**9, "optimizer": 0}
    found = many_adapters.measure(Refused(), sizes, True)
    assert found["refused"] and found["limit"] == 15 * 2**30
    args = many_adapters.options().parse_args(["--device=tpu-v5e"])
    table = {"device": "TPU v5 lite", "adapters": {"64": {"training": found}}}
    text = many_adapters.plan_table(args, table)
    assert "| 64 | training | 21.47, more than the limit of 16.11 | 1.00 |" in text

    class Broken:
        def compile(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: broken")

    with pytest.raises(jax.errors.JaxRuntimeError, match="broken"):
        many_adapters.measure(Broken(), sizes, True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--adapters 0", "0 is not a whole number from 1"),
        ("--device=h100", "h100 is not a device to compile for"),
        ("--device=tpu-v5e:2x2", "tpu-v5e:2x2 is not one chip: omit the mesh"),
        ("--model=vit-h", "invalid choice: 'vit-h'"),
        (f"--output={__file__}", "is not a folder"),
    ],
)
def test_main_refuses_bad_options_before_any_work(given, message, capsys, monkeypatch):
    monkeypatch.setattr(many_adapters, "run", lambda *_: pytest.fail("work"))
    with pytest.raises(SystemExit) as error:
        many_adapters.main(given.split())
    assert error.value.code == 2
    assert message in capsys.readouterr().err
