"""`export_peft`: adapters to a folder in the format of Hugging Face PEFT."""

import os
from collections.abc import Container, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax._adapters import (
    Adapters,
    Axes,
    LowRank,
    copy_of,
    find_adapters,
    of_copies,
    of_rank,
)
from lora_jax._hub.consumer_checks import check_consumers
from lora_jax._hub.consumers import requirements
from lora_jax._hub.export_checks import check_loads, known_modules
from lora_jax._hub.fit_factors import (
    alphas_of,
    with_equal_ranks,
    with_one_alpha,
    with_zeros,
)
from lora_jax._hub.module_adapters import split_adapter
from lora_jax._hub.module_groups import module_groups
from lora_jax._hub.module_kinds import HEAD, LINEAR, Embedding, ModuleAdapter
from lora_jax._hub.module_plan import (
    ModulePlan,
    axes_by_path,
    check_inputs,
    plan_modules,
    trained_axes,
    trained_names,
    with_biases_apart,
)
from lora_jax._hub.modules import MappedLeaf, leaf_to_torch
from lora_jax._hub.names import Names
from lora_jax._hub.peft_config import TIED_BY_PEFT, new_config
from lora_jax._hub.peft_folder import (
    TORCH_DTYPES,
    adapter_folder,
    as_dtype,
    write_folder,
)
from lora_jax._hub.tensor_keys import (
    BASE_BIAS_SUFFIX,
    MAGNITUDE_SUFFIX,
    PREFIX,
    ROWS_SUFFIX,
    parameter_stems,
    tensor_name,
)
from lora_jax._processes import agreed, gathered, is_first, outline
from lora_jax._tree import (
    Path,
    PyTree,
    flatten,
    is_abstract,
    is_array,
    is_quantized,
    path_name,
    unbox,
)
from lora_jax._write import check_finite, check_savable, in_memory


def export_peft(
    folder: str | os.PathLike[str],
    params: PyTree,
    names: Names,
    *,
    axes: Mapping[str, Axes] | None = None,
    kinds: Mapping[str, str] | None = None,
    modules: Iterable[str] | None = None,
    base_model: str | os.PathLike[str] | None = None,
    task_type: str | None = None,
    fan_in_fan_out: bool = False,
    for_: str | Iterable[str] = "peft",
    dtype: Any = None,
    overwrite: bool = False,
) -> None:
    """Writes the adapters as a folder in the format of Hugging Face PEFT.

    The PyTorch model with the folder computes what `lora(fn)` does with `params`, up to
    rounding. Ranks and scales that differ become PEFT's `rank_pattern` and
    `alpha_pattern`, exactly. Other programs read this format in part: `for_` names
    those that the folder is for. The folder is written completely or not at all: if the
    process is killed, `import_peft` and the next export find the old adapter or the new
    one. If JAX runs as several processes, all of them call this, with a folder that all
    of them see; the first one writes.

    Args:
      folder: The folder to write. An old export is replaced, and files of other names,
        such as a tokenizer, stay. A folder with a model is refused.
      params: A tree from `lorafy`, trained or not, of concrete arrays. Its trained
        copies, `also=` in `lorafy`, become PEFT's `modules_to_save`; biases without
        their modules become its `bias`, and a table of which at most half of the rows
        changed its `trainable_token_indices`.
      names: The modules of the PyTorch model that the weights are: `{pattern: name}` or
        a function of a path. A pattern is as in `lorafy`, with `*` as the only special
        character and without a leading `params/`; the first that matches wins, and each
        must match a leaf. A name has a place `{}` for the text of each star, and
        `{layer}` or `{expert}` for the number along a stacked dimension. Several names
        are the parts of a fused weight, equal along its outputs, and `{name: outputs}`
        are unequal ones. Two names of an embedding are its own and that of its tied
        head. See `transformers_names` and `find_names`.
      axes: `{path: Axes}` from `find_axes`, for weights that are not stored as (inputs,
        outputs), unless `lorafy` was given them too.
      kinds: `{pattern: kind}` for leaves whose names in Flax do not show it: "linear",
        "conv" for a kernel (window..., in, out), "embedding" for a table (rows,
        features), "experts" if PyTorch has a stack in one parameter of three
        dimensions. Default: "embedding" for a leaf of that name, "conv" for the kernel
        of a module named conv, else "linear".
      modules: The PyTorch model's modules, `dict(model.named_modules())`, or the names
        of its tensors. Each name must be among them.
      base_model: The name or path of the base model, for the config. The config.json of
        a folder shows whether `for_` takes adapters of its tables.
      task_type: PEFT's, such as "CAUSAL_LM", for the config.
      fan_in_fan_out: Whether the PyTorch layers store (inputs, outputs), as GPT-2's do.
      for_: The programs that the folder is for, one or several of "peft", "vllm",
        "sglang" and "llama.cpp". An adapter that one of them would skip or misread is
        refused; the guide "What loads where" has the rules, with their versions.
        For SGLang all ranks are padded with zeros to one, and all scales but one
        multiplied into B. It loads q, k and v only together, and gate and up: those
        without an adapter get one of zeros, so that `names` must name their weights.
        For llama.cpp, which converts the folder to a GGUF, there is one alpha, and what
        differs is in B. vLLM keeps ranks and alphas; start it with a
        `--max-lora-rank` of the largest rank or more. For all three each expert has
        its own modules, and a layer has adapters of all its experts.
      dtype: Of the tensors: float32, bfloat16 or float16. Default: that of the leaves.
      overwrite: Whether to replace an adapter in the folder that another program wrote.

    Raises:
      ValueError: If a weight has no name or two have the same one, a name or pattern
        matches nothing, a program of `for_` does not load a module, a leaf is abstract,
        not finite or of another dtype, the folder holds a model or an adapter of
        another program, or another process has other adapters, names or programs. The
        folder stays as it was.
      OSError: If the folder cannot be written.
      RuntimeError: If the export failed in another process, whose error it quotes.

    Example:
      >>> import jax.numpy as jnp, lora_jax as lj, os, tempfile
      >>> params = {"layer_0": {"query": {"kernel": jnp.ones((4, 3))}}}
      >>> folder = os.path.join(tempfile.mkdtemp(), "adapter")
      >>> names = {"layer_*/query": "model.layers.{}.self_attn.q_proj"}
      >>> lj.export_peft(folder, lj.lorafy(params, rank=2), names)
      >>> sorted(os.listdir(folder))
      ['adapter_config.json', 'adapter_model.safetensors']
    """
    with agreed("export_peft") as same:
        target = adapter_folder(folder, overwrite) if is_first() else ""
        if dtype is not None and jnp.dtype(dtype).name not in TORCH_DTYPES:
            raise ValueError(
                f"dtype is one of {', '.join(TORCH_DTYPES)}, found {dtype}."
            )
        required = requirements(for_)
        leaves = flatten(params)
        adapters = find_adapters(leaves)
        plan = _export_plan(leaves, adapters, names, axes, kinds)
        known = known_modules(modules)
        check_loads(plan, leaves, names, known, task_type)
        given = axes_by_path(axes, leaves)
        certain = {p for p, adapter in of_rank(adapters).items() if adapter.aligned}
        check_inputs(plan, leaves, certain | given.keys(), fan_in_fan_out)
        check_consumers(required.consumers, plan, leaves, kinds, base_model)
        groups = module_groups(required.groups, plan, leaves, names, given, known)
        parts = [part for adapter in adapters.values() for part in adapter]
        for part in parts:
            check_savable(part, leaves[part])
        same["adapters"] = {path_name(p): outline(unbox(leaves[p])) for p in parts}
        same["names"] = {path_name(p): named for p, named in plan.named.items()}
        same["for_"] = [row.name for row in required.consumers]
    leaves |= in_memory(leaves, parts)
    with agreed("export_peft"):
        for part in parts:
            check_finite(repr(path_name(part)), leaves[part])
        arrays = {p: x.map(leaves.__getitem__) for p, x in of_rank(adapters).items()}
        found: dict[str, ModuleAdapter] = {}
        for path, weight in plan.adapted.items():
            found |= split_adapter(weight, arrays[path])
        found = with_zeros(found, groups)
        found = with_equal_ranks(found, groups, one_rank=required.one_rank)
        alphas = alphas_of(found)
        if required.one_alpha:
            found, alphas = with_one_alpha(found)
        tensors = _factor_tensors(plan, arrays, found, dtype)
        rows = _changed_rows(plan, leaves)
        tensors |= _row_tensors(plan, leaves, rows, dtype)
        copied = {path: leaf for path, leaf in plan.copied.items() if path not in rows}
        tensors |= _copy_tensors(copied | plan.biases, leaves, found, dtype)
        ranks = {name: module.a.shape[-1] for name, module in found.items()}
        config = new_config(
            ranks,
            alphas,
            plan.parameter_orders.keys() & found.keys(),
            base_model_name_or_path=base_model and str(base_model),
            bias=_bias(plan, found),
            fan_in_fan_out=fan_in_fan_out,
            modules_to_save=sorted(_own_modules(copied)) or None,
            task_type=task_type,
            use_dora=any(module.magnitude is not None for module in found.values()),
        )
        # Fields that older versions of PEFT do not have.
        if rows:
            tables = {_table(plan.copied[path]): i for path, i in rows.items()}
            config["trainable_token_indices"] = tables
        adapted = [
            leaf for leaf in plan.adapted.values() if leaf.modules.keys() & found
        ]
        if any(map(_peft_ties, (*adapted, *copied.values()))):
            config["ensure_weight_tying"] = True
        if is_first():
            write_folder(target, config, tensors)


def _export_plan(
    leaves: dict[Path, Any],
    adapters: Adapters,
    names: Names,
    axes: Mapping[str, Axes] | None,
    kinds: Mapping[str, str] | None,
) -> ModulePlan:
    """Returns the plan of all adapted and copied leaves, which must have names."""
    named = trained_names(leaves, adapters, names)
    weights = of_rank(adapters)
    known = trained_axes(leaves, adapters, axes)
    plan = plan_modules(leaves, named, weights, of_copies(adapters), known, kinds)
    return with_biases_apart(plan)


def _factor_tensors(
    plan: ModulePlan,
    adapters: Mapping[Path, LowRank[np.ndarray]],
    modules: Mapping[str, ModuleAdapter],
    dtype: Any,
) -> dict[str, np.ndarray]:
    """Returns the tensors of the adapters, in `dtype` or in that of their leaves."""
    orders = plan.parameter_orders
    stems = parameter_stems({name: orders[name] for name in orders if name in modules})
    tensors = {}
    for path, weight in plan.adapted.items():
        inputs = weight.sizes(weight.axes.inputs)
        stored = adapters[path].a.dtype if dtype is None else dtype
        for name, (kind, *_) in weight.modules.items():
            if name not in modules:
                continue
            a, b, _, m = modules[name]
            key = PREFIX + stems.get(name, name)
            both = kind.factors_to_torch(a, b, inputs)
            for suffix, x in zip(kind.suffixes, both, strict=True):
                tensors[key + suffix] = as_dtype(key + suffix, x, stored)
            if m is not None:
                m = m.reshape(kind.magnitude_shape(len(m), inputs))
                key += MAGNITUDE_SUFFIX
                tensors[key] = as_dtype(key, m, dtype)
    for name in sorted(modules.keys() - plan.adapted_modules):  # those of zeros
        a, b, *_ = modules[name]
        both = LINEAR.factors_to_torch(a, b, a.shape[:1])
        for suffix, x in zip(LINEAR.suffixes, both, strict=True):
            key = PREFIX + name + suffix
            tensors[key] = as_dtype(key, x, dtype)
    return tensors


def _copy_tensors(
    copied: Mapping[Path, MappedLeaf],
    leaves: dict[Path, Any],
    adapted: Container[str],
    dtype: Any,
) -> dict[str, np.ndarray]:
    """Returns the tensors of the leaves that are trained in full."""
    tensors = {}
    for path, leaf in copied.items():
        for name, x in leaf_to_torch(leaf, leaves[copy_of(path).w]).items():
            key = PREFIX + tensor_name(name, path)
            if name in adapted:  # the module is wrapped, and its bias stays inside
                key = PREFIX + name + BASE_BIAS_SUFFIX
            tensors[key] = as_dtype(key, x, dtype)
    return tensors


def _changed_rows(plan: ModulePlan, leaves: dict[Path, Any]) -> dict[Path, list[int]]:
    """Returns the rows of each table that differ from the base, if half do at most."""
    changed = {}
    for path, leaf in plan.copied.items():
        w = unbox(leaves[path])
        is_table = all(isinstance(p.kind, Embedding) for p in leaf.modules.values())
        if leaf.axes.batch or len(leaf.shape) != 2 or not is_table or not is_array(w):
            continue
        if is_abstract(w) or is_quantized(w):
            continue
        x = leaves[copy_of(path).w]
        old = np.asarray(gathered(w)).astype(x.dtype)
        rows = np.flatnonzero((old != x).any(1)).tolist()
        if 0 < len(rows) <= len(x) // 2:
            changed[path] = rows
    return changed


def _row_tensors(
    plan: ModulePlan,
    leaves: dict[Path, Any],
    rows: Mapping[Path, list[int]],
    dtype: Any,
) -> dict[str, np.ndarray]:
    """Returns the rows of tables that are trained; PEFT ties a head to its table."""
    tensors = {}
    for path, changed in rows.items():
        key = PREFIX + _table(plan.copied[path]) + ROWS_SUFFIX
        tensors[key] = as_dtype(key, leaves[copy_of(path).w][changed], dtype)
    return tensors


def _table(leaf: MappedLeaf) -> str:
    return next(iter(_own_modules({leaf.path: leaf})))


def _own_modules(copied: Mapping[Path, MappedLeaf]) -> set[str]:
    """Returns the modules of leaves, without heads that are tied to their tables."""
    return {
        name
        for leaf in copied.values()
        for name, part in leaf.modules.items()
        if part.kind is not HEAD
    }


def _peft_ties(leaf: MappedLeaf) -> bool:
    """Whether PEFT can keep a table and its head equal: it knows them by two names.

    For tables of other names, as BERT's `word_embeddings`, it warns that there is
    nothing to tie. The factors of both are in the file.
    """
    lasts = {name.rpartition(".")[2] for name in leaf.modules}
    return leaf.is_tied and not lasts.isdisjoint(TIED_BY_PEFT)


def _bias(plan: ModulePlan, adapted: Container[str]) -> str:
    """Returns PEFT's word for the biases that are trained without their modules."""
    names = [name for leaf in plan.biases.values() for name in leaf.modules]
    if not names:
        return "none"
    return "lora_only" if all(name in adapted for name in names) else "all"
