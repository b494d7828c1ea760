"""A function, evaluated on weights in parts.

The input is a function of arrays and, for some of its arguments, `Factors`: a weight W
and its adapter, which stand for the one array W + scale * A B. The output is what the
function computes, without that array, and notes on what became of each weight. This
package knows arrays, jaxprs and factors: no tree, file or optimizer.

Read in this order:

  shapes.py           sizes, and what a reshape does to dimensions
  dtypes.py           which dtype a result is computed in
  per_layer.py        a function of each layer of a stack, one after another
  companions.py       one rule per view, for everything that accompanies an array
  quantized.py        quantized arrays: the format, quantize and dequantize
  quantized_views.py  views of quantized arrays
  factors.py          a weight and its adapter as one array
  joins.py            several weights as one: side by side, or added up
  low_rank.py         products with low-rank factors
  ops.py              factored products, under the names of those in `jax.lax`
  dora.py             the magnitudes of DoRA, and the norms that divide them
  jaxpr.py            JAX's jaxprs: the only file that knows releases of JAX
  source.py           the line of the user's source behind an equation
  flops.py            the FLOPs of a program
  flow.py             what is known of values, carried forward through a program
  liveness.py         what results depend on, carried backward
  casts.py            which casts must be applied to W + scale * A B
  run.py              options and notes of one evaluation
  products.py         the rules of products with a weight
  views.py            the rules of views of a weight
  evaluate.py         the evaluation, `run_jaxpr`, and the rules of calls
  derivatives.py      the rules of functions with derivative rules of their own
  loops.py            the rules of loops and branches
  uses.py             another walk: what a function does with a weight's dimensions

`x @ w.T` under `lora`: evaluate.py finds the rule of `transpose`; views.py transposes
the weight, and by companions.py its factors; products.py, for `dot_general`, compares
the costs and calls ops.py, which adds (x B^T) A^T to x W^T.
"""

# These register their rules in `evaluate.RULES`.
from lora_jax._engine import derivatives, loops

__all__ = ["derivatives", "loops"]
