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
    sure = {
        part: tensors[0]
        for part, tensors in candidates.items()
        if len({tensor.name for tensor in tensors}) == 1
    }
    chosen: dict[WeightPart, tuple[str, ...]] = {
        part: (tensor.module,) for part, tensor in sure.items()
    }
    owned = {tensor.name for tensor in sure.values()}
    open_parts = {part: t for part, t in candidates.items() if part not in sure}
    for part, equals in open_parts.items():
        free = [t for t in equals if t.name not in owned] or list(equals)
        names = {t.name for t in free}
        contested = any(
            not names.isdisjoint(t.name for t in others)
            for other, others in open_parts.items()
            if other != part
        )
        if not contested and (pair := _tied_pair(part.path, free)):
            chosen[part] = pair
            continue
        best = _best_by_name(part, free, sure)
        if best is None:
            name = path_name(part.path)
            raise ValueError(
                f"{name!r} may be any of {listed(sorted(t.name for t in equals))}: "
                "they are equal in every value, and their names do not decide. Leave "
                f"the weight out, exclude=[{name!r}], or write the map by hand."
            )
        chosen[part] = (best.module,)
    _check_one_owner(chosen)
    return chosen


def _tied_pair(
    path: Path, equals: Sequence[CheckpointTensor]
) -> tuple[str, str] | None:
    """Returns the embedding and the head that share a table."""
    name = path_name(path).lower()
    is_table = "emb" in name or "wte" in name
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
) -> CheckpointTensor | None:
    """Returns the tensor whose name fits the weight best, if there is only one."""
    path = path_name(part.path).lower()
    # In a stack or a fused weight, the neighbours are the parts at the same index.
    near = {
        other: _common_start(other.path, part.path)
        + (other.stack_index == part.stack_index)
        for other in sure
        if other.stack_index == part.stack_index or other.path != part.path
    }
    closest = max(near.values(), default=0)
    neighbours = [sure[other].module for other, n in near.items() if n == closest]

    def score(tensor: CheckpointTensor) -> tuple[int, int]:
        own = tensor.module.split(".")
        shared = (_common_start(own, other.split(".")) for other in neighbours)
        return max(shared, default=0), len(_words(path) & _words(tensor.module.lower()))

    scores = sorted(map(score, equals), reverse=True)
    return None if scores[0] in scores[1:] else max(equals, key=score)


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z]+|\d+", name))


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
