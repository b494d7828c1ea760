"""The tensors of a model, under the names that its modules have in PyTorch."""

import os
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from lora_jax._hub.checkpoint import Checkpoint, CheckpointTensor, open_checkpoint
from lora_jax._hub.gguf_file import open_gguf
from lora_jax._hub.model_class import ModelClass, model_class
from lora_jax._hub.names import similar_names
from lora_jax._hub.quantized_tensors import logical_tensors


class ModelTensors(NamedTuple):
    """The tensors of a checkpoint.

    Attributes:
      each: The tensors.
      by_name: The tensors by their names in the file, and by those of the modules.
      about: What the checkpoint's config says about its model.
    """

    each: list[CheckpointTensor]
    by_name: dict[str, CheckpointTensor]
    about: ModelClass

    @property
    def names(self) -> list[str]:
        return [*self.by_name]

    def unused(self, used: Iterable[str], ignore: Iterable[str]) -> list[str]:
        """Returns the names of the tensors that are neither used nor ignored.

        Raises:
          ValueError: If a pattern to ignore matches no tensor.
        """
        left = {tensor.name for tensor in self.each} - {*used}
        for pattern in ignore:
            text = ".*".join(map(re.escape, pattern.split("*")))
            matched = {name for name in self.names if re.fullmatch(text, name)}
            if not matched:
                raise ValueError(
                    f"No tensor of the checkpoint matches {pattern!r} of ignore. "
                    f"Close: {similar_names(pattern, self.names)}."
                )
            left -= {self.by_name[name].name for name in matched}
        return sorted(left)

    def is_tied_head(self, names: Iterable[str]) -> bool:
        """Whether one of these tensors is a head that the checkpoint does not store."""
        head = self.about.tied_head(self.names)
        return head is not None and f"{head}.weight" in names


def open_model(checkpoint: Checkpoint, *, gguf: bool = True) -> ModelTensors:
    """Opens a checkpoint: a file, a folder, a mapping or, with `gguf`, a GGUF.

    Raises:
      FileNotFoundError: If there is none, or one of its files is missing.
      ValueError: If a file is truncated, or a tensor is quantized in a format that is
        not supported.
    """
    path = "" if isinstance(checkpoint, Mapping) else os.fspath(checkpoint)
    if gguf and path.endswith(".gguf"):
        each, names = open_gguf(path)
        held = {tensor.name: tensor for tensor in each}
        by_name = {alias: held[name] for alias, name in names.items()} | held
        return ModelTensors(each, by_name, ModelClass(tied="output.weight" not in held))
    about = model_class(checkpoint)
    each = logical_tensors(open_checkpoint(checkpoint))
    # Names in the file are good enough where the class is not known.
    modules = about.module_names((t.name for t in each), None if about.name else "")
    by_name = {modules[tensor.name]: tensor for tensor in each}
    by_name |= {tensor.name: tensor for tensor in each}
    return ModelTensors(each, by_name, about)
