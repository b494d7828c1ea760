"""LoRA for JAX and Flax as pure functions on the parameters you already have.

Imports follow the order of the data flow: each file imports only from those above it.
The files that define no public name, in reading order:

  _engine/        evaluates a function on weights and their adapters, in parts
  _tree.py        flattens trees, modules and boxes to `{path: leaf}`
  _layouts.py     the names of adapters in other JAX libraries
  _adapters.py    which leaves are adapters, and of which weight
  _arguments.py   the arguments of a call that hold the parameters
  _patterns.py    patterns of paths, as `targets=` and mappings take them
  _flax_names.py  the axes of a weight, by the names that Flax gives its layers
  _targets.py     which leaves to adapt, and what a default leaves out
  _processes.py   several processes: an error in one is an error in all
  _leaves.py      creates the leaves of adapters, boxed and placed like their weight
  _state.py       quantized weights in the state dicts of `flax.serialization`
  _live.py        methods of live modules as functions of a tree
  _checks.py      checks of trees that are combined
  _matrices.py    a weight and its factors as matrices, for decompositions
  _factor_axes.py the axes of a weight, by factors in another library's order
  _foreign.py     how to read adapters of other libraries
  _sample.py      a few values by which `load` recognizes an adapter's base
  _write.py       writes a file completely or not at all
  _hub/           adapters to and from Hugging Face
"""
# ruff: noqa: I001

from lora_jax._engine.quantized import Quantized as Quantized
from lora_jax._adapters import Axes as Axes
from lora_jax._lorafy import lorafy as lorafy
from lora_jax._quantize import dequantize as dequantize
from lora_jax._quantize import quantize as quantize
from lora_jax._axes import find_axes as find_axes
from lora_jax._lora import lora as lora
from lora_jax._explain import Report as Report
from lora_jax._explain import explain as explain
from lora_jax._layers import Conv as Conv
from lora_jax._layers import Dense as Dense
from lora_jax._layers import DenseGeneral as DenseGeneral
from lora_jax._layers import Einsum as Einsum
from lora_jax._layers import Embed as Embed
from lora_jax._split import Count as Count
from lora_jax._split import combine as combine
from lora_jax._split import count as count
from lora_jax._split import labels as labels
from lora_jax._split import mask as mask
from lora_jax._split import split as split
from lora_jax._optimizer import adapters_only as adapters_only
from lora_jax._merge import merge as merge
from lora_jax._merge import strip as strip
from lora_jax._module import LoRA as LoRA
from lora_jax._arithmetic import add as add
from lora_jax._arithmetic import rescale as rescale
from lora_jax._stack import in_axes as in_axes
from lora_jax._stack import stack as stack
from lora_jax._stack import take as take
from lora_jax._mix import mix as mix
from lora_jax._svd import Kept as Kept
from lora_jax._svd import extract as extract
from lora_jax._svd import kept as kept
from lora_jax._svd import principal as principal
from lora_jax._svd import resize as resize
from lora_jax._detach import attach as attach
from lora_jax._detach import detach as detach
from lora_jax._adopt import adopt as adopt
from lora_jax._adopt import as_qwix as as_qwix
from lora_jax._save import load as load
from lora_jax._save import save as save
from lora_jax._hub.names import transformers_names as transformers_names
from lora_jax._hub.export_peft import export_peft as export_peft
from lora_jax._hub.import_peft import import_peft as import_peft
from lora_jax._hub.find_names import find_names as find_names
from lora_jax._hub.import_weights import import_weights as import_weights
from lora_jax._hub.export_weights import export_weights as export_weights

__version__ = "0.3.0"
