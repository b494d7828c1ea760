"""FLOPs of programs, counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax._engine.flops import flops

X = np.linspace(-1, 1, 4, dtype=np.float32)


def jaxpr_of(fn, *args):
    return jax.make_jaxpr(fn)(*args)


def test_flops_by_hand():
    w = np.ones((4, 6), np.float32)
    count = lambda fn, *args: flops(jaxpr_of(fn, *args))
    product = 2 * 3 * 4 * 6
    x = np.ones((3, 4), np.float32)
    assert count(lambda x, w: jnp.sin(x @ w), x, w) == product
    step = jax.checkpoint(lambda c, _: (c, (c @ w).sum()))
    assert count(lambda x: lax.scan(step, x, length=5), x) == 5 * product
    branch = lambda x: lax.cond(True, lambda: (x @ w).sum(), lambda: 0.0)
    assert count(branch, x) == product
    loop = lambda x: lax.while_loop(lambda x: x.sum() < 0, lambda x: x @ w[:, :4], x)
    assert count(loop, x) == 2 * 3 * 4 * 4
    image, kernel = np.ones((1, 8, 8, 4), np.float32), np.ones((3, 3, 2, 6), np.float32)
    dims = ("NHWC", "HWIO", "NHWC")
    conv = lambda x, w: lax.conv_general_dilated(
        *(x, w, (1, 1), "SAME"), dimension_numbers=dims, feature_group_count=2
    )
    assert count(conv, image, kernel) == 2 * (8 * 8 * 6) * (3 * 3 * 2)
    experts = np.ones((2, 4, 6), np.float32)
    assert count(lax.ragged_dot, x, experts, np.array([1, 2])) == product
