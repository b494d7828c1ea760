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
  dora.py             `Factors` from the leaves of an adapter, with DoRA's magnitudes
  jaxpr.py            JAX's jaxprs: the only file that knows releases of JAX
  source.py           the user's line, of an equation or a warning
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

`x @ w.T` under `lora`: `_lora.py` makes `Factors` of W and its adapter (dora.py),
traces the function on W, and evaluates the jaxpr. evaluate.py finds the rule of
`transpose`; views.py transposes the weight, and by companions.py its factors. For
`dot_general`, products.py compares the costs and calls ops.py, which adds (x B^T) A^T
to x W^T if A has the first dimension of W. Where no rule applies W + scale * A B is
materialized. A rule returns None for that; one for quantized arrays returns None to
have the array dequantized.
"""

# These register their rules in `evaluate.RULES`.
from lora_jax._engine import derivatives, loops

__all__ = ["derivatives", "loops"]
