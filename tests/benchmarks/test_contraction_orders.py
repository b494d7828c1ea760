"""Every order computes the same, in float64 too, and a wrong one is refused."""

import dataclasses
import json

import contraction_orders
import numpy as np
import pytest
import speed

TINY = contraction_orders.Shape(12, 16, 24, 3)


@pytest.fixture(autouse=True)
def quick(third_party, monkeypatch):
    monkeypatch.setattr(contraction_orders, "HERE", [TINY])
    monkeypatch.setattr(speed.time, "sleep", lambda seconds: None)


def test_each_order_is_checked_and_timed(tmp_path, capsys):
    contraction_orders.main(["--repeats", "2", "--output", str(tmp_path)])
    said = capsys.readouterr().out
    (found,) = json.loads((tmp_path / "contraction_orders.json").read_text())["results"]
    assert list(found["orders"]) == list(contraction_orders.ORDERS)
    for name, kinds in found["orders"].items():
        assert name in said
        assert [len(x["ms"]) for x in kinds.values()] == [2, 2]
    flops = {name: x["step"]["flops"] for name, x in found["orders"].items()}
    assert flops["no adapter"] < flops["formed, thin"] < flops["formed"]
    assert flops["x W + (x A) B"] < flops["formed"]


@pytest.mark.parametrize(
    "name", [x for x in contraction_orders.ORDERS if x != "no adapter"]
)
def test_gradients_are_numpys(name):
    x, layers, dys = contraction_orders.arrays(TINY)
    _, (dx, factors) = contraction_orders.backward(contraction_orders.ORDERS[name])(
        x, layers, dys
    )
    double = lambda z: np.asarray(z, np.float64)
    weights = [double(w) + double(a) @ double(b) for w, a, b in layers]
    want = sum(double(dy) @ w.T for dy, w in zip(dys, weights, strict=True))
    np.testing.assert_allclose(dx, want, atol=1e-4)
    for (da, db), dy, (_, a, b) in zip(factors, dys, layers, strict=True):
        np.testing.assert_allclose(
            da, double(x).T @ double(dy) @ double(b).T, atol=1e-4
        )
        np.testing.assert_allclose(
            db, double(a).T @ double(x).T @ double(dy), atol=1e-4
        )


def test_what_computes_something_else_is_refused(monkeypatch):
    off = lambda x, layers: [1.01 * y for y in contraction_orders.plain(x, layers)]
    monkeypatch.setitem(contraction_orders.ORDERS, "formed", off)
    with pytest.raises(RuntimeError, match="formed computes something else"):
        contraction_orders.timed(TINY, 1)


def test_a_sum_in_bfloat16_hides_a_small_update():
    assert contraction_orders.hides(TINY) < 1e-3
    assert contraction_orders.hides(TINY._replace(dtype="bfloat16")) > 0.5


def test_both_orders_learn_the_same(monkeypatch, optax_promotion):
    small = dataclasses.replace(
        speed.SMALL, layers=1, width=64, heads=2, mlp=128, vocab=64, positions=32
    )
    monkeypatch.setitem(speed.JOBS, "bfloat16", speed.Job(small, 2, 16, 4))
    curves = contraction_orders.losses(3)
    exact, formed = curves.values()
    assert exact[0] > exact[-1]
    np.testing.assert_allclose(exact, formed, rtol=1e-5)
    assert "In 3 steps in bfloat16" in contraction_orders.words({}, curves)


def test_what_cannot_be_compiled_for_is_refused(capsys):
    with pytest.raises(SystemExit):
        contraction_orders.main(["--device", "abacus"])
    assert "abacus is not what can be planned for" in capsys.readouterr().err


def test_bounds_are_of_one_chip_alone(capsys):
    for device in ("cpu", "tpu-v6e", "tpu-v5e:2x2"):
        with pytest.raises(SystemExit):
            contraction_orders.main(["--device", device])
        assert f"invalid choice: '{device}'" in capsys.readouterr().err


@pytest.mark.usefixtures("uncached")
def test_all_is_planned_for_a_chip_that_is_absent(tmp_path, monkeypatch, capsys):
    pytest.importorskip("libtpu")
    shape = contraction_orders.Shape(256, 256, 256, 8, "bfloat16")
    monkeypatch.setattr(contraction_orders, "THERE", [shape])
    two = {
        "no adapter": contraction_orders.plain,
        "x W + (x A) B": contraction_orders.engine,
    }
    monkeypatch.setattr(contraction_orders, "ORDERS", two)
    contraction_orders.main(["--device", "tpu-v5e", "--output", str(tmp_path)])
    assert "bound / now" in capsys.readouterr().out
    (found,) = json.loads((tmp_path / "contraction_orders.json").read_text())["results"]
    least, now = (x["forward"] for x in found["orders"].values())
    assert 0 < least["bound"] < now["bound"]
    assert least["hbm"] == 4 * 2 * 256 * 256 + 3 * 2 * 256 * 256  # x, 3 W, 3 y
