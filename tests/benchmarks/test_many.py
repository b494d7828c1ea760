"""The benchmark of `take` and `mix` compares equal results and computes the ratios."""

import dataclasses
import json

import many
import pytest
import speed
from models.architectures import ARCHITECTURES

pytestmark = pytest.mark.usefixtures("third_party", "uncached")
SMALL = "--adapters=6 --distinct=2 --width=64 --rank=4 --repeats=2".split()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    shapes = {"decoding": (24,), "prefill": (4, 8)}
    monkeypatch.setattr(many, "BATCHES", shapes)
    monkeypatch.setattr(speed.time, "sleep", lambda seconds: None)


def test_main_compares_equal_results(tmp_path, capsys):
    many.main([*SMALL, f"--output={tmp_path}"])
    shown = capsys.readouterr().out
    assert (tmp_path / "many.md").read_text() in shown
    batches = json.loads((tmp_path / "many.json").read_text())["batches"]
    assert list(batches) == ["decoding", "prefill"]
    for found in batches.values():
        assert list(found) == ["plain", "take", "mix", "mix, most=2"]
        for x in found.values():
            assert len(x["ms"]) == 2 and min(x["ms"]) > 0
        # The low-rank products are those of one adapter, of two and of all six.
        plain, *flops = (x["flops"] for x in found.values())
        one, six, two = (x - plain for x in flops)
        assert 1.5 * one < two < six < 7 * one
        assert found["plain"]["off"] > 1e-2
    # `take` has a copy of the factors for each example.
    temporaries = {name: x["temporaries"] for name, x in batches["decoding"].items()}
    assert temporaries["take"] > 24 * 4 * 2 * 64 * 4
    assert temporaries["mix, most=2"] < temporaries["take"] / 3
    assert "| decoding, 24 | mix, most=2 | " in shown


def test_compare_finds_a_wrong_result(monkeypatch):
    args = many.options().parse_args(SMALL)
    given = many.contenders

    def wrong(fn, most):
        made = given(fn, most)
        first = lambda stacked, ids, x: made["take"](stacked, 0 * ids, x)
        return made | {"mix": first}

    monkeypatch.setattr(many, "contenders", wrong)
    with pytest.raises(RuntimeError, match="mix differs from take by"):
        many.compare(args, (24,))


def results(ms=2.0, temporaries=50, off=0.0):
    row = {"temporaries": 1000, "bytes accessed": 1000, "flops": 10**9, "off": 0.0}
    less = {"temporaries": temporaries, "bytes accessed": 300, "off": off}
    take, mix = row | {"ms": [4.0]}, row | less | {"ms": [ms]}
    return {"plain": take, "take": take, "mix": mix, "mix, most=8": mix}


def test_report_text_reports_which_aims_are_met():
    args = many.options().parse_args([])
    found = {"decoding": results(off=2e-7), "prefill": results(ms=5.0)}
    text = many.report_text(args, found)
    assert "| prefill, 4 x 8 | mix, most=8 | 1.25 | 5.0 | 0.00 | 0.0 | 1.000 |" in text
    rows = text[text.index("| aim ") :].splitlines()[2:]
    assert [row.strip("| ").split(" | ")[1:] for row in rows] == [
        ["0.050", "0.10", "met"],
        ["0.300", "0.40", "met"],
        ["0.500", "1.00", "met"],
        ["1.250", "1.00", "not met"],
        ["2.0e-07", "1e-06", "met"],
        ["0.0e+00", "1e-06", "met"],
    ]


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "tpu-v5e"])
def test_main_plans_the_memory_of_a_chip(device, tmp_path, monkeypatch, capsys):
    if device != "cpu":
        pytest.importorskip("libtpu", reason="no compiler for TPUs")
    tiny = dataclasses.replace(
        ARCHITECTURES["llama-3-8b"],
        **{"layers": 2, "width": 128, "heads": 2, "kv_heads": 2, "mlp": 256},
        vocab=512,
    )
    monkeypatch.setitem(ARCHITECTURES, "llama-3-8b", tiny)
    options = "--adapters=6 --distinct=2 --rank=4 --examples=32".split()
    many.main([*options, f"--device={device}", f"--output={tmp_path}"])
    shown = capsys.readouterr().out
    rows = json.loads((tmp_path / "many_plan.json").read_text())["rows"]
    assert list(rows) == ["take", "mix", "mix, most=2"]
    assert all(f"| {name} | " in shown for name in rows)
    take, mix, few = (x["peak"] - x["parameters"] for x in rows.values())
    assert 0 < few < mix < take


def test_plan_table_reports_that_a_program_does_not_fit():
    args = many.options().parse_args(["--device=tpu-v5e"])
    refused = {"peak": 2 * 10**10, "parameters": 10**9, "limit": 16 * 10**9}
    text = many.plan_table(args, "TPU v5 lite", {"take": refused | {"refused": True}})
    assert "| take | 20.00, more than the limit of 16.00 | 1.00 | 19.00 |" in text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--distinct=65", "--distinct 65 is more than --adapters 64"),
        ("--adapters=0", "0 is not a whole number from 1"),
        ("--device=tpu-v5e:2x2", "tpu-v5e:2x2 is not one chip: omit the mesh"),
        ("--model=vit-h", "invalid choice: 'vit-h'"),
        (f"--output={__file__}", "is not a folder"),
    ],
)
def test_main_refuses_bad_options_before_any_work(given, message, capsys, monkeypatch):
    monkeypatch.setattr(many, "run", lambda *_: pytest.fail("work"))
    with pytest.raises(SystemExit) as error:
        many.main([given])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
