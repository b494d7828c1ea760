"""Fits the factors of adapters to what a program reads: zeros, one rank, one alpha.

The update of each module stays what it was. All arrays are NumPy's.
"""

from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

from lora_jax._hub.module_groups import ModuleGroup
from lora_jax._hub.module_kinds import ModuleAdapter
from lora_jax._hub.names import last_part

Modules = dict[str, ModuleAdapter]


def with_zeros(
    modules: Mapping[str, ModuleAdapter], groups: Iterable[ModuleGroup]
) -> Modules:
    """Adds an adapter of zeros for each module that its group lacks.

    It has the rank, scale and dtype of another one, so that the config stays short.
    """
    found = dict(modules)
    for group in groups:
        like = next((found[name] for name in group.sizes if name in found), None)
        for name, (n_in, n_out) in group.sizes.items():
            if like is not None and name not in found:
                r, dtype = like.a.shape[-1], like.a.dtype
                a, b = np.zeros((n_in, r), dtype), np.zeros((r, n_out), dtype)
                found[name] = ModuleAdapter(a, b, like.scale)
    return found


def with_equal_ranks(
    modules: Mapping[str, ModuleAdapter],
    groups: Iterable[ModuleGroup],
    *,
    one_rank: bool,
) -> Modules:
    """Pads factors with zeros to the largest rank: of all modules, or of experts.

    The experts of a layer are stacked, so that each projection has one rank.
    """
    sets = [list(modules)] if one_rank else []
    for group in groups if not one_rank else ():
        by_last: dict[str, list[str]] = {}
        for name in group.sizes if group.of_experts else ():
            if name in modules:
                by_last.setdefault(last_part(name), []).append(name)
        sets += by_last.values()
    found = dict(modules)
    for names in sets:
        r = max(modules[name].a.shape[-1] for name in names)
        for name in names:
            a, b, *_ = modules[name]
            more = (0, r - a.shape[-1])
            a, b = np.pad(a, ((0, 0), more)), np.pad(b, (more, (0, 0)))
            found[name] = modules[name]._replace(a=a, b=b)
    return found


def alphas_of(modules: Mapping[str, ModuleAdapter]) -> dict[str, float]:
    """Returns the alpha of each module: its scale times its rank."""
    return {name: _alpha(x.scale, x.a.shape[-1]) for name, x in modules.items()}


def with_one_alpha(
    modules: Mapping[str, ModuleAdapter],
) -> tuple[Modules, dict[str, float]]:
    """Multiplies into B what differs from the most common alpha.

    That is never zero: llama.cpp takes an alpha of zero for a scale of one.
    """
    alphas = alphas_of(modules)
    nonzero = Counter(alpha for alpha in alphas.values() if alpha)
    common = nonzero.most_common(1)[0][0] if nonzero else 1.0
    found = dict(modules)
    for name, alpha in alphas.items():
        if alpha != common:
            _, b, scale, *_ = module = modules[name]
            r = b.shape[-2]
            # Narrow factors are rounded once, after the product.
            wide = b.astype(np.result_type(b.dtype, np.float32))
            b = wide * np.asarray(scale * r / common, wide.dtype)
            found[name] = module._replace(b=b, scale=common / r)
    return found, dict.fromkeys(modules, common)


def _alpha(scale: float, r: int) -> float:
    """Returns the shortest number whose quotient by r is the scale, a float32."""
    alphas = (float(f"{scale * r:.{digits}g}") for digits in range(1, 18))
    return next(x for x in alphas if np.float32(x / r) == np.float32(scale))
