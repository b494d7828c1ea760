"""The kinds of PyTorch modules: how each stores its weight, and PEFT its adapter.

Here the weight of a module is a matrix (inputs, outputs), and its adapter has the
factors a (inputs, r) and b (r, outputs); experts add a first dimension to all three.

PEFT's formats: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from typing import Any, NamedTuple

import numpy as np

from lora_jax._adapters import Shape

Array = Any  # of NumPy, or of JAX under `jit`
FactorPair = tuple[np.ndarray, np.ndarray]

# The last part of the names of Hugging Face's `Conv1D` modules, as GPT-2 has them. They
# store (inputs, outputs), and Flax stores either order, so that the shape of a square
# kernel does not show which one it is.
CONV1D_NAMES = ("c_attn", "c_proj", "c_fc", "q_attn")


class ModuleAdapter(NamedTuple):
    """The adapter of one PyTorch module, whose update is scale * a @ b."""

    a: np.ndarray  # (inputs, r), or (experts, inputs, r)
    b: np.ndarray  # (r, outputs), or (experts, r, outputs)
    scale: float
    magnitude: np.ndarray | None = None  # DoRA's, (outputs,)


class Linear:
    """A matrix stored as (outputs, inputs). The base class of the other kinds."""

    name = "linear"  # as in `kinds=` of the public functions
    suffixes = (".lora_A.weight", ".lora_B.weight")  # of the keys of A and B
    has_dora = True  # whether PEFT has the norm of its update that DoRA has here
    inputs_last = True  # whether the last dimension of the tensor is the inputs'

    def weight_to_torch(self, w: Array, inputs: Shape) -> Array:
        """Returns the module's weight; `inputs` are the sizes of its input dims."""
        return w.T

    def weight_from_torch(self, w: Array) -> Array:
        return w.T

    def factors_to_torch(self, a: Array, b: Array, inputs: Shape) -> FactorPair:
        """Returns the tensors A and B: here A (r, inputs) and B (outputs, r)."""
        return a.T, b.T

    def factors_from_torch(self, a: Array, b: Array, a_shape: Shape) -> FactorPair:
        """Returns a, of shape `a_shape`, and b from the tensors A and B."""
        return a.T, b.T

    def magnitude_shape(self, outputs: int, inputs: Shape) -> Shape:
        return (outputs,)


class Conv(Linear):
    """A convolution stored as (outputs, features, window...).

    Its inputs here are (window..., features). PEFT stores A (r, features, window...)
    and B (outputs, r, 1...).
    """

    name = "conv"

    def weight_to_torch(self, w: Array, inputs: Shape) -> Array:
        w = w.reshape(*inputs, w.shape[-1])
        return w.transpose(w.ndim - 1, w.ndim - 2, *range(w.ndim - 2))

    def weight_from_torch(self, w: Array) -> Array:
        return w.transpose(*range(2, w.ndim), 1, 0).reshape(-1, w.shape[0])

    def factors_to_torch(self, a: Array, b: Array, inputs: Shape) -> FactorPair:
        window = (1,) * (len(inputs) - 1)
        return self.weight_to_torch(a, inputs), b.T.reshape(*b.T.shape, *window)

    def factors_from_torch(self, a: Array, b: Array, a_shape: Shape) -> FactorPair:
        return self.weight_from_torch(a), b.reshape(b.shape[:2]).T

    def magnitude_shape(self, outputs: int, inputs: Shape) -> Shape:
        return (1, outputs, *(1,) * (len(inputs) - 1))


class Conv1D(Linear):
    """A matrix stored as (inputs, outputs), by GPT-2's modules of that name."""

    name = "conv1d"
    inputs_last = False

    def weight_to_torch(self, w: Array, inputs: Shape) -> Array:
        return w

    def weight_from_torch(self, w: Array) -> Array:
        return w


class Embedding(Conv1D):
    """A table whose rows are looked up, stored as (rows, features) there and here."""

    name = "embedding"
    suffixes = (".lora_embedding_A", ".lora_embedding_B")


class TiedHead(Embedding):
    """The linear head that shares an embedding's table, so that A and B swap roles.

    DoRA would need a norm over the features for the lookup, and one over the rows for
    the head.
    """

    name = "head"
    suffixes = Linear.suffixes
    has_dora = False

    def factors_to_torch(self, a: Array, b: Array, inputs: Shape) -> FactorPair:
        return b, a

    def factors_from_torch(self, a: Array, b: Array, a_shape: Shape) -> FactorPair:
        return b, a


class Experts(Linear):
    """A parameter (experts, ...) of a module, which PEFT calls a target parameter.

    PEFT stores A (experts * r, inputs), experts outermost, and B (outputs, r *
    experts), experts innermost.
    """

    name = "experts"
    has_dora = False
    inputs_last = False

    def weight_to_torch(self, w: Array, inputs: Shape) -> Array:
        return w

    def weight_from_torch(self, w: Array) -> Array:
        return w

    def factors_to_torch(self, a: Array, b: Array, inputs: Shape) -> FactorPair:
        rows = a.swapaxes(1, 2).reshape(-1, a.shape[1])
        return rows, b.transpose(2, 1, 0).reshape(b.shape[-1], -1)

    def factors_from_torch(self, a: Array, b: Array, a_shape: Shape) -> FactorPair:
        experts, n_in, r = a_shape
        a = a.reshape(experts, r, n_in).swapaxes(1, 2)
        return a, b.reshape(len(b), r, experts).transpose(2, 1, 0)


class Vector(Embedding):
    """A bias, a norm's scale or any other leaf that PyTorch keeps as one dimension."""

    name = "vector"

    def weight_to_torch(self, w: Array, inputs: Shape) -> Array:
        return w.reshape(-1)


LINEAR, HEAD, EXPERTS, VECTOR = Linear(), TiedHead(), Experts(), Vector()
CONV1D, EMBEDDING = Conv1D(), Embedding()
KINDS = {kind.name: kind for kind in (LINEAR, CONV1D, Conv(), EMBEDDING, EXPERTS)}
