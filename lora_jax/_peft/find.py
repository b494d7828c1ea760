"""A model's weights by their names in PyTorch, read off its checkpoint's values."""

import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lora_jax._adapters import (
    Adapters,
    Axes,
    find_adapters,
    is_adapter,
    of_rank,
)
from lora_jax._flax_names import is_adaptable
from lora_jax._patterns import Selector
from lora_jax._peft.checkpoint import tensors_of
from lora_jax._peft.layouts import CONV1D
from lora_jax._peft.names import Name, escaped
from lora_jax._peft.nearest import nearest
from lora_jax._peft.patterns import readable, template_of
from lora_jax._peft.proofs import Index, Proof, narrower, prove, values_of
from lora_jax._peft.twins import resolve
from lora_jax._processes import agreed, outline
from lora_jax._targets import choose
from lora_jax._tree import (
    Path,
    flatten,
    is_abstract,
    is_traced,
    leaf_name,
    listed,
    path_name,
    unbox,
)

TABLES = ("emb", "wte", "wpe")  # in the names of modules that are looked up
SHOWN = 3  # weights without a tensor that a message speaks of


def find_names(
    params: Any,
    checkpoint: str | os.PathLike[str] | Mapping[str, Any],
    *,
    targets: Selector | None = None,
    exclude: Selector = (),
) -> dict[str, Name]:
    """Finds which PyTorch module each weight is, in the checkpoint they came from.

    The values say it: some order of the dimensions of a tensor, or of several, is the
    weight, in every value, to the rounding of its dtype. Transposed and reshaped
    kernels are found, with heads apart or together, stacks of layers and of experts,
    weights fused along their outputs, tables, tied heads and convolutions; also where
    the weights are in another dtype than the checkpoint, in few bits, or on several
    devices. Nothing is returned unproven.

    Args:
      params: The parameters, plain or from `lorafy`: of concrete arrays, not trained
        since. With adapters, their inputs and outputs must be PyTorch's.
      checkpoint: A `.safetensors` file, a folder of them, with their index if it has
        one, or `{name: array}`. It is read a tensor at a time.
      targets: Which weights, as in `lorafy`. Default: those with adapters or trained
        copies; where there are none, all of two or more dimensions.
      exclude: Which of them not.

    Returns:
      The map that `export_peft` and `import_peft` take, a plain dict: with patterns
      where layers repeat, `{layer}` for a stack, several names for a fused weight. A
      table under another name than `embedding` also needs `kinds=` there.

    Raises:
      FileNotFoundError: If there is no checkpoint, or one of its files is missing.
      ValueError: If a weight is abstract, or no tensor: the message says what came
        nearest, such as the same rows in another order, or the tensor plus one; if
        tensors are equal and their names do not tell which one it is; if what is the
        input there is the output of the adapter here; a file is truncated; or another
        process has other weights or tensors.
      RuntimeError: If it failed in another process, of which it tells.

    Example:
      >>> import jax.numpy as jnp, lora_jax as lj, numpy as np
      >>> draw = np.random.default_rng(0).standard_normal
      >>> torch = {f"layers.{i}.q_proj.weight": draw((3, 4)) for i in range(2)}
      >>> kernel = lambda i: jnp.asarray(torch[f"layers.{i}.q_proj.weight"].T)
      >>> params = {f"block_{i}": {"query": {"kernel": kernel(i)}} for i in range(2)}
      >>> lj.find_names(params, torch)
      {'block_*/query/kernel': 'layers.{}.q_proj'}
    """
    with agreed("find_names") as same:
        leaves = flatten(params)
        adapters = find_adapters(leaves) if any(map(is_adapter, leaves)) else {}
        chosen = _chosen(leaves, adapters, targets, exclude)
        _check_values(chosen, leaves)
        own = {path: found.axes for path, found in of_rank(adapters).items()}
        tensors = tensors_of(checkpoint)
        same["weights"] = {path_name(p): outline(unbox(leaves[p])) for p in chosen}
        same["tensors"] = [[tensor.name, tensor.shape] for tensor in tensors]
    proofs: dict[Path, list[Proof]] = {}
    lost: dict[Path, str] = {}
    with _progress(len(chosen)) as tick:
        index = Index(tensors)
        for path in chosen:
            weight = values_of(unbox(leaves[path]))
            forms = itertools.chain([weight], narrower(weight))
            if found := next(filter(None, (prove(w, index) for w in forms)), None):
                proofs[path] = found
            else:
                lost[path] = nearest(weight, tensors) if len(lost) < SHOWN else ""
            tick()
    if lost:
        raise ValueError(_lost(lost, len(chosen)))
    picked = {p: _picked(p, found, own.get(p)) for p, found in proofs.items()}
    return readable(_names(picked))


def _chosen(
    leaves: dict[Path, Any],
    adapters: Adapters,
    targets: Selector | None,
    exclude: Selector,
) -> list[Path]:
    if targets is None and adapters:
        weights = [path for path in leaves if path in adapters]
    else:
        weights = [path for path, leaf in leaves.items() if is_adaptable(path, leaf)]
    return [*choose(leaves, weights, 1, targets or "*", exclude, "rank")]


def _check_values(chosen: Sequence[Path], leaves: dict[Path, Any]) -> None:
    for path in chosen:
        w = unbox(leaves[path])
        if is_abstract(w) or is_traced(w):
            raise ValueError(
                f"{path_name(path)!r} has no values to compare: it is a "
                f"{type(w).__name__}. Pass the parameters themselves, outside jit; or "
                "see transformers_names, which goes by names alone."
            )
        if not math.prod(w.shape):
            raise ValueError(
                f"{path_name(path)!r} is empty, of shape {w.shape}: nothing tells "
                f"which tensor it is. Write exclude=[{path_name(path)!r}]."
            )


def _picked(path: Path, proofs: Sequence[Proof], own: Axes | None) -> Proof:
    """The cut that the adapter agrees with; without one, the most that is a stack."""
    if own is None:
        order = sorted(proofs, key=lambda proof: -len(proof.cut.batch))
        return next((proof for proof in order if _counts(proof)), order[-1])
    for proof in proofs:
        thin = {d for d, n in enumerate(proof.shape) if n == 1}
        same = lambda one, other, thin=thin: {*one} - thin == {*other} - thin
        batch, rows, columns = proof.cut
        if not same(batch, own.batch):
            continue
        if same(rows, own.outputs) and same(columns, own.inputs):
            return proof
        if same(rows, own.inputs) and same(columns, own.outputs):
            if _is_table(path, proof):
                return proof
    first = proofs[0]
    raise ValueError(
        f"{path_name(path)!r}, of shape {first.shape}, has an adapter with the inputs "
        f"{own.inputs}, the outputs {own.outputs} and the stacked dimensions "
        f"{own.batch}; as {_modules(first)[0]!r} its inputs are {first.cut.columns}, "
        f"its outputs {first.cut.rows} and its stacked dimensions {first.cut.batch}. "
        "Write lorafy(..., axes=find_axes(fn, params, *args))."
    )


def _counts(proof: Proof) -> bool:
    """Whether the names of a stack's modules count it, as far as they are known."""
    if not proof.cut.batch or any(
        len(x) > 1 for own in proof.parts.values() for x in own
    ):
        return True
    if len({len(own) for own in proof.parts.values()}) > 1:
        return False
    counts = [proof.shape[d] for d in proof.cut.batch]
    return all(
        template_of({at: own[j][0].module for at, own in proof.parts.items()}, counts)
        for j in range(len(next(iter(proof.parts.values()))))
    )


def _is_table(path: Path, proof: Proof) -> bool:
    """Whether PyTorch's rows are inputs: those of a table, or of GPT-2's layers."""
    last = [name.split(".")[-1].lower() for name in _modules(proof)]
    looked = any(word in name for name in last for word in TABLES)
    table = leaf_name(path) == "embedding" or looked
    return table or any(name in CONV1D for name in last)


def _modules(proof: Proof) -> list[str]:
    return [t.module for own in proof.parts.values() for equals in own for t in equals]


def _names(proofs: Mapping[Path, Proof]) -> dict[Path, Name]:
    """What the map says of each weight, once equal tensors are told apart."""
    claims = {
        (path, at, j): equals
        for path, proof in proofs.items()
        for at, own in proof.parts.items()
        for j, equals in enumerate(own)
    }
    chosen = resolve(claims)
    return {path: _name(path, proof, chosen) for path, proof in proofs.items()}


def _name(
    path: Path,
    proof: Proof,
    chosen: Mapping[tuple[Path, tuple[int, ...], int], tuple[str, ...]],
) -> Name:
    counts = [proof.shape[d] for d in proof.cut.batch]
    at, first = next(iter(proof.parts.items()))
    sizes = [[equals[0].shape[0] for equals in own] for own in proof.parts.values()]
    columns = [
        {at: chosen[path, at, j][k] for at in proof.parts}
        for j in range(len(first))
        for k in range(len(chosen[path, at, j]))
    ]
    templates = [
        template_of(names, counts) if counts else escaped(names[()])
        for names in columns
    ]
    if None in templates or any(own != sizes[0] for own in sizes):
        names = [*columns[0].values()]
        raise ValueError(
            f"{path_name(path)!r} is a stack, and the names of its modules do not "
            f"count it from 0: {listed(names)}. Write the map by hand, a function of "
            "the path, or keep these layers apart."
        )
    if len(templates) == 1:
        return templates[0]
    if len(first) > 1 and len({*sizes[0]}) > 1:
        return dict(zip(templates, sizes[0], strict=True))
    return tuple(templates)


def _lost(lost: Mapping[Path, str], count: int) -> str:
    told = "; ".join(f"{path_name(p)!r}: {why}" for p, why in lost.items() if why)
    more = f"; and {listed([*lost][SHOWN:])}" if len(lost) > SHOWN else ""
    share = (
        "none of the weights is a tensor of the checkpoint"
        if len(lost) == count
        else f"{len(lost)} of {count} weights are no tensors of the checkpoint, and "
        f"{count - len(lost)} are"
    )
    hint = (
        "Is it another model's?"
        if len(lost) == count
        else "Pass the parameters as they came from it, or leave these out: "
        f"exclude=[{path_name(next(iter(lost)))!r}]."
    )
    return f"No map is found: {share}. {told}{more}. {hint}"


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """Gives what counts a weight as done: a bar on a terminal, else nothing."""
    done, shown = 0, sys.stderr.isatty()

    def tick() -> None:
        nonlocal done
        done += 1
        if shown:
            bar = "#" * (30 * done // total)
            sys.stderr.write(f"\rfind_names |{bar:30}| {done}/{total} weights")
            sys.stderr.flush()

    try:
        yield tick
    finally:
        if shown and done:
            sys.stderr.write("\n")
