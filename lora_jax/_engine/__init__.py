"""A function, evaluated on weights in parts.

What comes in is a function of arrays and, for some of its arguments, `Factors`: a
weight W and its adapter, which stand for the one array W + scale * A B. What goes out
is what the function computes, without forming that array, and notes of what became of
each weight. The wing knows arrays, jaxprs and factors: no tree, no file, no optimizer.

Read in this order:

  shapes.py    sizes and reshapes, of shapes alone
  per_layer.py one layer of a stack after another
  quantized.py quantized arrays: their views, and the plain array
  factors.py   a weight and its adapter as one array, and the views of it
  thin.py      products with thin arrays, and how they are added to plain ones
  ops.py       the factored products, as namesakes of those of `jax.lax`
  dora.py      the magnitudes of DoRA, and the norms that divide them
  jaxpr.py     JAX's jaxprs: the only file that knows how a release writes them
  casts.py     which casts must be applied to the whole sum
  run.py       one evaluation: what it is told, and what it has to tell
  products.py  a rule for each product that meets a weight
  views.py     a rule for each view of a weight
  rules.py     the evaluation itself, `run_jaxpr`, and a rule for each call
  uses.py      a walk of another kind: what a function does with a weight's dimensions
"""
