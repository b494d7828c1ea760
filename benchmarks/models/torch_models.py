"""The models of speed.py in torch, with the same layers, sizes and names."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from models import minilm
from models.architectures import Architecture
from torch import nn


def model(arch: Architecture | None) -> nn.Module:
    """Returns the decoder of `arch`, or MiniLM's classifier for None."""
    return Classifier() if arch is None else Decoder(arch)


def module_name(path: Sequence[str]) -> str:
    """Returns the name of the torch module for the path of a mapping in JAX's tree."""
    inner = {"attention", "mlp", "encoder"}
    name = ".".join(part for part in path if part not in inner)
    name = name.replace("blocks_", "blocks.").replace("layer_", "layers.")
    return name.replace("type", "segment")


@torch.no_grad()
def load(module: nn.Module, params: Mapping[str, Any]) -> set[str]:
    """Copies the weights of JAX's tree into a module, and returns their torch names."""
    loaded = set()

    def read(path: tuple[str, ...], tree: Mapping[str, Any]) -> None:
        for key, x in tree.items():
            if isinstance(x, Mapping):
                read((*path, key), x)
                continue
            name = f"{module_name(path)}.{'bias' if key == 'bias' else 'weight'}"
            x = torch.tensor(np.asarray(x, np.float32))
            module.get_parameter(name).copy_(x.T if key == "kernel" else x)
            loaded.add(name)

    read((), params)
    return loaded


class Block(nn.Module):
    """Attention and an MLP, normalized before or, as in BERT, after each sum."""

    def __init__(
        self, width: int, heads: int, mlp: int, epsilon: float, causal: bool
    ) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        for name in ("query", "key", "value", "out"):
            setattr(self, name, nn.Linear(width, width))
        self.up, self.down = nn.Linear(width, mlp), nn.Linear(mlp, width)
        self.attention_norm = nn.LayerNorm(width, epsilon)
        self.mlp_norm = nn.LayerNorm(width, epsilon)

    def attend(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        y = F.scaled_dot_product_attention(
            *(split(layer(x)) for layer in (self.query, self.key, self.value)),
            attn_mask=mask,
            is_causal=self.causal,
        )
        return self.out(y.transpose(1, 2).flatten(2))

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self.causal:
            x = x + self.attend(self.attention_norm(x), mask)
            h = F.gelu(self.up(self.mlp_norm(x)), approximate="tanh")
            return x + self.down(h)
        x = self.attention_norm(x + self.attend(x, mask))
        return self.mlp_norm(x + self.down(F.gelu(self.up(x))))


class Decoder(nn.Module):
    """A decoder that maps tokens (batch, time) to logits."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.tokens = nn.Embedding(arch.vocab, arch.width)
        self.positions = nn.Embedding(arch.positions, arch.width)
        block = lambda: Block(
            arch.width, arch.heads, arch.mlp, arch.epsilon, causal=True
        )
        self.blocks = nn.ModuleList(block() for _ in range(arch.layers))
        self.norm = nn.LayerNorm(arch.width, arch.epsilon)
        self.head = nn.Linear(arch.width, arch.vocab, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.tokens(ids) + self.positions(positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)).float()


class Classifier(nn.Module):
    """MiniLM with a head: maps ids and their mask to the logits of two classes."""

    def __init__(self) -> None:
        super().__init__()
        sizes = minilm.SIZES
        width = sizes["features"]
        self.word = nn.Embedding(sizes["vocab"], width)
        self.position = nn.Embedding(sizes["positions"], width)
        self.segment = nn.Embedding(sizes["types"], width)
        self.norm, self.head = nn.LayerNorm(width, 1e-12), nn.Linear(width, 2)
        heads = width // minilm.HEAD_DIM
        block = lambda: Block(width, heads, sizes["mlp"], 1e-12, causal=False)
        self.layers = nn.ModuleList(block() for _ in range(sizes["layers"]))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        segments = torch.zeros_like(ids)
        x = self.word(ids) + self.position(positions) + self.segment(segments)
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x, mask[:, None, None].bool())
        weights = mask.to(x.dtype)[..., None]
        return self.head((x * weights).sum(1) / weights.sum(1))


def step(
    model: nn.Module, inputs: Sequence[torch.Tensor], labels: torch.Tensor, rate: float
) -> Callable[[], None]:
    """Returns one training step of the parameters that require a gradient."""
    trained = [x for x in model.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(trained, rate, weight_decay=1e-4)

    def run() -> None:
        logits = model(*inputs)
        loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        wait()

    return run


def forward(
    model: nn.Module, inputs: Sequence[torch.Tensor], labels: torch.Tensor, rate: float
) -> Callable[[], None]:
    """Returns one forward pass that records no gradients."""
    model.eval()

    def run() -> None:
        with torch.no_grad():
            model(*inputs)
        wait()

    return run


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
