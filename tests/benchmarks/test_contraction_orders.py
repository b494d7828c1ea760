"""All contraction orders compute the same; a wrong order is an error."""

import dataclasses
import json

import contraction_orders
import numpy as np
import pytest
import speed

TINY = contraction_orders.Shape(12, 16, 24, 3)


@pytest.fixture(autouse=True)
def quick(third_party, monkeypatch):
    monkeypatch.setattr(contraction_orders, "CPU_SHAPES", [TINY])
    monkeypatch.setattr(speed.time, "sleep", lambda seconds: None)


def test_main_checks_and_times_each_order(tmp_path, capsys):
    contraction_orders.main(["--repeats", "2", "--output", str(tmp_path)])
    shown = capsys.readouterr().out
    (found,) = json.loads((tmp_path / "contraction_orders.json").read_text())["results"]
    assert list(found["orders"]) == list(contraction_orders.ORDERS)
    for name, kinds in found["orders"].items():
        assert name in shown
        assert [len(x["ms"]) for x in kinds.values()] == [2, 2]
    flops = {name: x["step"]["flops"] for name, x in found["orders"].items()}
    low_rank = flops["x (W + A B), low-rank derivatives"]
    assert flops["no adapter"] < low_rank < flops["x (W + A B)"]
    assert flops["x W + (x A) B"] < flops["x (W + A B)"]


@pytest.mark.parametrize(
    "name", [x for x in contraction_orders.ORDERS if x != "no adapter"]
)
def test_backward_gives_numpys_gradients(name):
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


def test_timed_refuses_an_order_with_other_results(monkeypatch):
    off = lambda x, layers: [1.01 * y for y in contraction_orders.plain(x, layers)]
    monkeypatch.setitem(contraction_orders.ORDERS, "wrong", off)
    with pytest.raises(RuntimeError, match="wrong: the outputs differ from NumPy's"):
        contraction_orders.timed(TINY, 1)


def test_rounding_loss_is_large_in_bfloat16():
    assert contraction_orders.rounding_loss(TINY) < 1e-3
    assert contraction_orders.rounding_loss(TINY._replace(dtype="bfloat16")) > 0.5


def test_losses_of_both_orders_are_equal(monkeypatch, optax_promotion):
    small = dataclasses.replace(
        speed.SMALL, layers=1, width=64, heads=2, mlp=128, vocab=64, positions=32
    )
    monkeypatch.setitem(speed.JOBS, "bfloat16", speed.Job(small, 2, 16, 4))
    curves = contraction_orders.losses(3)
    exact, materialized = curves.values()
    assert exact[0] > exact[-1]
    np.testing.assert_allclose(exact, materialized, rtol=1e-5)
    assert "In 3 steps in bfloat16" in contraction_orders.summary({}, curves)


def test_main_refuses_an_unknown_device(capsys):
    with pytest.raises(SystemExit):
        contraction_orders.main(["--device", "abacus"])
    assert "abacus is not a device to compile for" in capsys.readouterr().err


def test_main_refuses_devices_without_bounds(capsys):
    for device in ("cpu", "tpu-v6e", "tpu-v5e:2x2"):
        with pytest.raises(SystemExit):
            contraction_orders.main(["--device", device])
        assert f"invalid choice: '{device}'" in capsys.readouterr().err


@pytest.mark.usefixtures("uncached")
def test_main_compiles_for_an_absent_chip(tmp_path, monkeypatch, capsys):
    pytest.importorskip("libtpu")
    shape = contraction_orders.Shape(256, 256, 256, 8, "bfloat16")
    monkeypatch.setattr(contraction_orders, "ACCELERATOR_SHAPES", [shape])
    two = {
        "no adapter": contraction_orders.plain,
        "x W + (x A) B": contraction_orders.engine,
    }
    monkeypatch.setattr(contraction_orders, "ORDERS", two)
    contraction_orders.main(["--device", "tpu-v5e", "--output", str(tmp_path)])
    assert "bound / engine" in capsys.readouterr().out
    (found,) = json.loads((tmp_path / "contraction_orders.json").read_text())["results"]
    least, now = (x["forward"] for x in found["orders"].values())
    assert 0 < least["bound"] < now["bound"]
    assert least["hbm"] == 4 * 2 * 256 * 256 + 3 * 2 * 256 * 256  # x, 3 W, 3 y
