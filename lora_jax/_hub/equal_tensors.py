"""Tensors that are equal, number by number: which of them a weight is."""

import re
from collections.abc import Mapping, Sequence

from lora_jax._hub.checkpoint import Tensor
from lora_jax._tree import Path, listed, path_name

HEADS = ("head", "decoder", "output", "logits", "proj_out")


def resolve(
    claims: Mapping[tuple[Path, tuple[int, ...], int], Sequence[Tensor]],
) -> dict[tuple[Path, tuple[int, ...], int], tuple[str, ...]]:
    """One module for each part of a weight: two for a table that is the head too.

    Where values cannot tell, names do: the tensor beside those of the weight's
    neighbours, of the same layer, or with its very name. Where these do not either,
    nothing is guessed.

    Raises:
      ValueError: If a part may be several tensors, or two weights are one tensor.
    """
    sure = {key: t[0] for key, t in claims.items() if len({x.name for x in t}) == 1}
    chosen = {key: (tensor.module,) for key, tensor in sure.items()}
    owned = {tensor.name for tensor in sure.values()}
    for key, equals in claims.items():
        if key in sure:
            continue
        free = [t for t in equals if t.name not in owned] or list(equals)
        rivals = [k for k, t in claims.items() if k != key and k not in sure]
        others = [
            k for k in rivals if {t.name for t in claims[k]} & {t.name for t in free}
        ]
        if not others and (pair := _tied(key[0], free)):
            chosen[key] = pair
            continue
        best = _best(key, free, sure)
        if best is None:
            names = sorted(t.name for t in equals)
            raise ValueError(
                f"{path_name(key[0])!r} may be any of {listed(names)}: they are equal, "
                "number by number, and their names do not tell. Leave the weight out, "
                f"exclude=[{path_name(key[0])!r}], or write the map by hand."
            )
        chosen[key] = (best.module,)
    _check_once(chosen)
    return chosen


def _tied(path: Path, equals: Sequence[Tensor]) -> tuple[str, str] | None:
    """The lookup and the head of a table that both use."""
    if len(equals) != 2 or len(equals[0].shape) != 2:
        return None
    heads = [t for t in equals if any(h in t.module.split(".")[-1] for h in HEADS)]
    heads = heads or [t for t in equals if any(h in t.module for h in HEADS)]
    tables = [t for t in equals if t not in heads]
    named = "emb" in path_name(path).lower() or "wte" in path_name(path).lower()
    if len(heads) != 1 or not named:
        return None
    return tables[0].module, heads[0].module


def _best(
    key: tuple[Path, tuple[int, ...], int],
    equals: Sequence[Tensor],
    sure: Mapping[tuple[Path, tuple[int, ...], int], Tensor],
) -> Tensor | None:
    """The one that stands where the weight does, if there is one such."""
    path, index, _ = key
    # Of a stack, or of a fused weight, the same place of its nearest neighbours.
    near = [(k, t) for k, t in sure.items() if k[1] == index or k[0] != path]
    ranks = {k: _common(k[0], path) + (k[1] == index) for k, _ in near}
    most = max(ranks.values(), default=0)
    beside = [t.module.split(".") for k, t in near if ranks[k] == most]

    def score(tensor: Tensor) -> tuple[int, int]:
        own = tensor.module.split(".")
        shared = max((_common(own, other) for other in beside), default=0)
        words = set(re.findall(r"[a-z]+|\d+", path_name(path).lower()))
        named = set(re.findall(r"[a-z]+|\d+", tensor.module.lower()))
        return shared, len(words & named)

    scores = sorted(map(score, equals), reverse=True)
    return None if scores[0] in scores[1:] else max(equals, key=score)


def _common(one: Sequence[object], other: Sequence[object]) -> int:
    n = 0
    for x, y in zip(one, other, strict=False):
        if str(x) != str(y):
            break
        n += 1
    return n


def _check_once(
    chosen: Mapping[tuple[Path, tuple[int, ...], int], tuple[str, ...]],
) -> None:
    owner: dict[str, Path] = {}
    for (path, _, _), modules in chosen.items():
        for module in modules:
            if owner.setdefault(module, path) != path:
                raise ValueError(
                    f"{path_name(owner[module])!r} and {path_name(path)!r} are both "
                    f"{module!r}: there they are one weight, as a table and its tied "
                    "head are. One adapter can serve only one of them: "
                    f"exclude=[{path_name(path)!r}]."
                )
