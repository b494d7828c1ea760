"""The choice between tensors that are equal in every value: by their names."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lora_jax._hub.checkpoint import CheckpointTensor
from lora_jax._tree import Path, listed, path_name

HEADS = ("head", "decoder", "output", "logits", "proj_out")


class WeightPart(NamedTuple):
    """One matrix of a weight."""

    path: Path
    stack_index: tuple[int, ...]
    part: int  # of a fused weight


def choose_modules(
    candidates: Mapping[WeightPart, Sequence[CheckpointTensor]],
) -> dict[WeightPart, tuple[str, ...]]:
    """Returns one module for each part of a weight, or two for a tied embedding.

    If several tensors have the same values, names decide: the tensor next to those of
    the weight's neighbours, of the same layer, or with the most similar name. If that
    leaves several, none is guessed.

    Args:
      candidates: The equal tensors that each part may be.

    Raises:
      ValueError: If a part may be several tensors, or two weights are one tensor.
    """
    names = {part: {t.name for t in tensors} for part, tensors in candidates.items()}
    sure = {
        part: tensors[0]
        for part, tensors in candidates.items()
        if len(names[part]) == 1
    }
    owned = {tensor.name for tensor in sure.values()}
    chosen: dict[WeightPart, tuple[str, ...]] = {}
    for part, equals in candidates.items():
        if part in sure:
            chosen[part] = (sure[part].module,)
            continue
        free = [t for t in equals if t.name not in owned] or list(equals)
        contested = any(
            other != part and not names[other].isdisjoint(t.name for t in free)
            for other in candidates.keys() - sure.keys()
        )
        pair = None if contested else _tied_pair(part.path, free)
        modules, name = pair or _best_by_name(part, free, sure), path_name(part.path)
        if modules is None:
            raise ValueError(
                f"{name!r} may be any of {listed(sorted(names[part]))}: they are equal "
                "in every value, and their names do not decide. Leave the weight out, "
                f"exclude=[{name!r}], or write the map by hand."
            )
        chosen[part] = modules
    _check_one_owner(chosen)
    return chosen


def _tied_pair(
    path: Path, equals: Sequence[CheckpointTensor]
) -> tuple[str, str] | None:
    """Returns the embedding and the head that share a table."""
    is_table = any(word in path_name(path).lower() for word in ("emb", "wte"))
    if not is_table or len(equals) != 2 or len(equals[0].shape) != 2:
        return None
    modules = [t.module for t in equals]
    is_head = lambda name: any(head in name for head in HEADS)
    heads = [m for m in modules if is_head(m.split(".")[-1])]
    heads = heads or [m for m in modules if is_head(m)]
    if len(heads) != 1:
        return None
    (table,) = (m for m in modules if m not in heads)
    return table, heads[0]


def _best_by_name(
    part: WeightPart,
    equals: Sequence[CheckpointTensor],
    sure: Mapping[WeightPart, CheckpointTensor],
) -> tuple[str] | None:
    """Returns the module whose name fits the weight best, if there is only one."""
    path, index = part.path, part.stack_index
    # In a stack or a fused weight, the neighbours are the parts at the same index.
    near = {
        other: _common_start(other.path, path) + (other.stack_index == index)
        for other in sure
        if other.stack_index == index or other.path != path
    }
    closest = max(near.values(), default=0)
    neighbours = [sure[other].module for other, n in near.items() if n == closest]

    def score(tensor: CheckpointTensor) -> tuple[int, int]:
        pieces = tensor.module.split(".")
        shared = (_common_start(pieces, other.split(".")) for other in neighbours)
        return max(shared, default=0), len(
            _words(path_name(path)) & _words(tensor.module)
        )

    scores = sorted(map(score, equals), reverse=True)
    best = max(equals, key=score)
    return None if scores[0] in scores[1:] else (best.module,)


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z]+|\d+", name.lower()))


def _common_start(one: Sequence[object], other: Sequence[object]) -> int:
    """Returns how many components two paths, or names, have in common at the start."""
    n = 0
    for x, y in zip(one, other, strict=False):
        if str(x) != str(y):
            break
        n += 1
    return n


def _check_one_owner(chosen: Mapping[WeightPart, tuple[str, ...]]) -> None:
    owner: dict[str, Path] = {}
    for part, modules in chosen.items():
        for module in modules:
            first, name = owner.setdefault(module, part.path), path_name(part.path)
            if first != part.path:
                raise ValueError(
                    f"{path_name(first)!r} and {name!r} are both {module!r}: PyTorch "
                    "has one weight there, as for an embedding and its tied head. One "
                    f"adapter can serve only one of them: exclude=[{name!r}]."
                )
