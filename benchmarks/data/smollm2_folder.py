"""Makes a Hugging Face folder of SmolLM2-135M-Instruct from the package index, once.

The package has the model as a GGUF with 4-bit weights. The folder has them dequantized,
in bfloat16 like the original checkpoint, with the file's tokenizer and chat template,
so that it can be read like any folder of the hub.
"""

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import safetensors.numpy
import script
from data import wheels
from models import folder, smollm2
from models.architectures import Architecture

NAME = "SmolLM2-135M-Instruct"


def ready() -> Path:
    """Returns the folder in the user's cache, which is made the first time.

    Raises:
      OSError: If the package cannot be downloaded, or the folder not be written.
    """
    target = wheels.cache_folder() / NAME
    if (target / "config.json").is_file():
        return target
    file = smollm2.packaged_file()
    print(f"making {target}, once", file=sys.stderr, flush=True)
    # A folder is renamed when it is complete, so that a stopped job leaves no half.
    with tempfile.TemporaryDirectory(dir=target.parent) as made:
        new = Path(made, NAME)
        new.mkdir()
        write(file, new)
        os.rename(new, target)
    return target


def write(gguf: Path, target: Path) -> None:
    """Writes a GGUF of a Llama with its tokenizer into an empty folder."""
    fields = smollm2.read_fields(gguf)
    arch = smollm2.measure(fields)
    loaded = smollm2.load(gguf)
    loaded.tokenizer.save(str(target / "tokenizer.json"))
    tokens = smollm2.field(fields, "tokenizer.ggml.tokens")
    token = lambda name: tokens[smollm2.field(fields, f"tokenizer.ggml.{name}_id")]
    special = {name: token(name) for name in ("bos_token", "eos_token")}
    template = smollm2.field(fields, "tokenizer.chat_template")
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    script.write_json(
        target / "tokenizer_config.json", tokenizer | {"chat_template": template}
    )
    tensors = dict(torch_tensors(loaded.params, arch))
    safetensors.numpy.save_file(tensors, target / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": arch.layers,
        "hidden_size": arch.width,
        "intermediate_size": arch.mlp,
        "num_attention_heads": arch.heads,
        "num_key_value_heads": arch.kv_heads,
        "vocab_size": arch.vocab,
        "rope_theta": arch.rope,
        "rms_norm_eps": arch.epsilon,
        "max_position_embeddings": fields.get("llama.context_length", 2048),
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": smollm2.field(fields, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": smollm2.field(fields, "tokenizer.ggml.eos_token_id"),
    }
    script.write_json(target / "config.json", config)


def torch_tensors(params: Mapping[str, Any], arch: Architecture) -> Any:
    """Yields the names and values of the PyTorch model, in bfloat16."""
    names = folder.names(arch)
    for path, leaf in jax.tree.leaves_with_path(params):
        *parts, last = (key.key for key in path)
        name = names["/".join(parts)]
        name = name if isinstance(name, str) else name[0]  # a tied table
        layers = leaf if "{layer}" in name else [leaf]
        for i, layer in enumerate(layers):
            w = np.asarray(layer).astype(ml_dtypes.bfloat16)
            w = w.T if last == "kernel" else w
            yield f"{name.format(layer=i)}.weight", np.ascontiguousarray(w)
