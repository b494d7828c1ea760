"""Loads language models from Hugging Face folders: Llama, Mistral, Qwen and Gemma.

    model, params = folder.load("Llama-3.2-1B", how="nf4", table="int8")

Whatever `config.json` has that the model would compute differently is refused, by the
name of the field.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, Sharding
from models import fsdp
from models.architectures import Architecture, Model
from models.attention import RopeScaling

import lora_jax as lj

# The default values of transformers' configurations, for fields that a file omits.
# Fields without a default must be there.
COMMON = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
    "head_dim": None,
}
QWEN = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
GEMMA = {
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attention_bias": False,
    "use_bidirectional_attention": None,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": COMMON
    | {"num_key_value_heads": None, "attention_bias": False, "mlp_bias": False},
    "mistral": COMMON | {"sliding_window": 4096},
    "qwen2": COMMON | QWEN,
    "qwen3": COMMON | QWEN | {"head_dim": 128, "attention_bias": False},
    "gemma2": COMMON
    | GEMMA
    | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": COMMON
    | GEMMA
    | {
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
    },
}
SIZES = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "mlp": "intermediate_size",
    "vocab": "vocab_size",
}
# transformers' names of activations, and those of jax.nn.
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu"}
LAYERS = {"sliding_attention": True, "full_attention": False}
# Fields without influence on the logits.
HARMLESS = {
    *("_name_or_path", "architectures", "model_type", "transformers_version"),
    *("torch_dtype", "dtype", "tokenizer_class", "task_specific_params"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"),
    *("use_cache", "cache_implementation", "initializer_range", "pretraining_tp"),
    *("max_position_embeddings", "is_llama_config", "transformers.js_config"),
    *("_attn_implementation", "_attn_implementation_autoset", "attn_implementation"),
    *("unsloth_fixed", "unsloth_version", "output_attentions", "output_hidden_states"),
    *("return_dict", "id2label", "label2id", "_sliding_window_pattern"),
}
# Fields that must have one of these values.
FIXED = {
    "attention_dropout": (0, None),
    "rope_interleaved": (False, None),
    "use_bidirectional_attention": (False, None),
}


# The configuration.


class Config:
    """The fields of a config.json, which remembers those that were read."""

    def __init__(self, path: Path, fields: Mapping[str, Any], defaults: Mapping):
        self.path, self.fields, self.defaults = path, fields, defaults
        self.read: set[str] = set()

    def has(self, name: str) -> bool:
        return self.fields.get(name) is not None

    def get(self, name: str) -> Any:
        """Returns a field, or its default.

        Raises:
          ValueError: If it is missing and has no default.
        """
        self.read.add(name)
        if name in self.fields:
            return self.fields[name]
        if name not in self.defaults:
            raise ValueError(f"{self.path} has no field {name!r}.")
        return self.defaults[name]

    def number(self, name: str, kind: type = int) -> Any:
        """Returns a positive number."""
        return self.check_number(name, self.get(name), kind)

    def flag(self, name: str) -> bool:
        value = self.get(name)
        return value if isinstance(value, bool) else self.refuse(name, value, "a bool")

    def check_number(self, name: str, x: Any, kind: type = int) -> Any:
        kinds = (int,) if kind is int else (int, float)
        if isinstance(x, bool) or not isinstance(x, kinds) or not x > 0:
            self.refuse(name, x, "a positive number")
        return kind(x)

    def refuse(self, name: str, value: Any, supported: str) -> Any:
        raise ValueError(
            f"{self.path}: {name!r} is {value!r}, which is not supported: {supported} "
            "is needed."
        )


def read_config(path: str | os.PathLike[str]) -> Architecture:
    """Returns the architecture of a Hugging Face folder, from its `config.json`.

    Raises:
      FileNotFoundError: If the folder has no `config.json`.
      ValueError: If a field is missing or unknown, or requires something that `Model`
        does not compute. The message names the field.
    """
    config = open_config(Path(path))
    kind = config.fields["model_type"]
    heads, width = (config.number(SIZES[name]) for name in ("heads", "width"))
    arch = Architecture(
        **{here: config.number(there) for here, there in SIZES.items()},
        kv_heads=number_or(config, "num_key_value_heads", heads),
        head_dim=number_or(config, "head_dim", None),
        epsilon=config.number("rms_norm_eps", float),
        tied=config.flag("tie_word_embeddings"),
        activation=activation(config),
        bias=biases(config, kind),
        head_norm=kind in ("qwen3", "gemma3_text"),
        **rope(config, kind),
        **windows(config, kind),
        **(gemma(config) if kind.startswith("gemma") else {}),
    )
    check_heads(config, arch, width)
    check_quantization(config)
    check_rest(config)
    return arch


def open_config(path: Path) -> Config:
    file = path / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{path} has no config.json: a model's folder is needed."
        )
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}.") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{file} holds no fields.")
    kind = fields.get("model_type")
    if kind not in FAMILIES:
        supported = f"one of {', '.join(FAMILIES)}"
        Config(file, fields, {}).refuse("model_type", kind, supported)
    return Config(file, fields, FAMILIES[kind])


def number_or(config: Config, name: str, default: int | None) -> int | None:
    """Returns a positive number, or the default if the field is null."""
    return default if config.get(name) is None else config.number(name)


def activation(config: Config) -> str:
    """Returns the name in jax.nn of the MLP's activation."""
    name = "hidden_act"
    if "hidden_activation" in config.defaults:  # Gemma ignores hidden_act
        config.read.add(name)
        name = "hidden_activation"
    found = config.get(name)
    if found not in ACTIVATIONS:
        config.refuse(name, found, " or ".join(ACTIVATIONS))
    return ACTIVATIONS[found]


def biases(config: Config, kind: str) -> bool | tuple[str, ...]:
    """Returns the dense layers that have a bias, or False."""
    if kind == "qwen2":
        return ("query", "key", "value")
    attention = "attention_bias" in config.defaults and config.flag("attention_bias")
    mlp = "mlp_bias" in config.defaults and config.flag("mlp_bias")
    found = ("query", "key", "value", "out") if attention else ()
    return (*found, "gate", "up", "down") if mlp else found or False


def gemma(config: Config) -> dict[str, Any]:
    """Returns what distinguishes all versions of Gemma."""
    most = lambda name: config.number(name, float) if config.get(name) else 0.0
    return dict(
        norm="offset",
        post_norm=True,
        scaled_embedding=True,
        query_scale=config.number("query_pre_attn_scalar", float) ** -0.5,
        attention_cap=most("attn_logit_softcapping"),
        logit_cap=most("final_logit_softcapping"),
    )


def rope(config: Config, kind: str) -> dict[str, Any]:
    """Returns the rotary frequencies, from the fields of transformers 4 or 5."""
    if not config.has("rope_parameters"):
        found = {"rope": config.number("rope_theta", float)}
        config.read.add("rope_scaling")
        if config.has("rope_scaling"):
            given = config.fields["rope_scaling"]
            found["scaling"] = rope_scaling(config, "rope_scaling", given)
        if kind == "gemma3_text":
            found["local_rope"] = config.number("rope_local_base_freq", float)
        return found
    config.read.add("rope_parameters")
    given = mapping(config, "rope_parameters", config.fields["rope_parameters"])
    for name in ("rope_theta", "rope_scaling", "rope_local_base_freq"):
        if config.has(name):
            config.refuse(name, config.fields[name], "no field next to rope_parameters")
    if kind != "gemma3_text":
        wavelength, scaling = rope_entry(config, "rope_parameters", given, "rope_theta")
        return dict(rope=wavelength, scaling=scaling)
    if unknown := sorted({*given} - {*LAYERS}):
        name = f"rope_parameters.{unknown[0]}"
        config.refuse(name, given[unknown[0]], " or ".join(LAYERS))
    entry = lambda kind, theta: rope_entry(
        config, f"rope_parameters.{kind}", given.get(kind) or {}, theta
    )
    wavelength, scaling = entry("full_attention", "rope_theta")
    local, slower = entry("sliding_attention", "rope_local_base_freq")
    if slower is not None:
        name = "rope_parameters.sliding_attention"
        config.refuse(name, given["sliding_attention"], "rope_type default")
    return dict(rope=wavelength, scaling=scaling, local_rope=local)


def rope_entry(
    config: Config, name: str, given: Any, default: str
) -> tuple[float, RopeScaling | None]:
    """Returns the wavelength and the scaling of an entry of transformers 5."""
    given = mapping(config, name, given)
    wavelength = given.pop("rope_theta", config.defaults[default])
    wavelength = config.check_number(f"{name}.rope_theta", wavelength, float)
    return wavelength, rope_scaling(config, name, given)


def rope_scaling(config: Config, name: str, given: Any) -> RopeScaling | None:
    """Returns the scaling of rotary frequencies, or None."""
    given = mapping(config, name, given)
    key = "rope_type" if "rope_type" in given else "type"
    kind = given.get(key, "default")
    needed = {
        "default": (),
        "linear": ("factor",),
        "llama3": (
            *("factor", "low_freq_factor", "high_freq_factor"),
            "original_max_position_embeddings",
        ),
    }
    if kind not in needed:
        config.refuse(f"{name}.{key}", kind, " or ".join(needed))
    known = {"rope_type", "type", *needed[kind]}
    if unknown := sorted(x for x in {*given} - known if given[x] is not None):
        config.refuse(f"{name}.{unknown[0]}", given[unknown[0]], "no such field")
    values = [
        config.check_number(f"{name}.{x}", given.get(x), float) for x in needed[kind]
    ]
    if kind == "llama3":
        factor, low, high, positions = values
        if low >= high:
            config.refuse(f"{name}.low_freq_factor", low, f"less than {high}")
        return RopeScaling(factor, low, high, int(positions))
    return RopeScaling(*values) if values else None


def mapping(config: Config, name: str, value: Any) -> dict[str, Any]:
    return (
        dict(value) if isinstance(value, dict) else config.refuse(name, value, "a map")
    )


def windows(config: Config, kind: str) -> dict[str, Any]:
    """Returns the window of local attention, and the layers that have it."""
    if kind == "llama":
        return {}
    window = number_or(config, "sliding_window", 0) or 0
    if kind == "mistral":
        return dict(window=window)
    count = config.number("num_hidden_layers")
    if kind.startswith("qwen"):
        if not config.flag("use_sliding_window"):
            window = 0
        first = config.get("max_window_layers")
        local = [window > 0 and layer >= first for layer in range(count)]
    else:
        period = 2 if kind == "gemma2" else gemma3_period(config)
        local = [bool((layer + 1) % period) for layer in range(count)]
    config.read.add("layer_types")
    if config.has("layer_types"):
        local = layer_types(config, count)
    if any(local) and not window:
        name = "sliding_window" if kind.startswith("gemma") else "layer_types"
        config.refuse(name, config.fields.get(name), "a window, or full attention,")
    return dict(window=window, local=tuple(local)) if any(local) else {}


def gemma3_period(config: Config) -> int:
    """Returns the number of layers of which the last one is not local."""
    for name in ("sliding_window_pattern", "_sliding_window_pattern"):
        if config.has(name):
            return config.number(name)
    return 6


def layer_types(config: Config, count: int) -> list[bool]:
    given = config.fields["layer_types"]
    if not isinstance(given, list) or len(given) != count:
        config.refuse("layer_types", given, f"a list of {count}")
    for found in given:
        if found not in LAYERS:
            config.refuse("layer_types", found, " or ".join(LAYERS))
    return [LAYERS[found] for found in given]


def check_heads(config: Config, arch: Architecture, width: int) -> None:
    heads = arch.heads
    if arch.head_dim is None and width % heads:
        config.refuse("num_attention_heads", heads, f"a divisor of {width}")
    if heads % (arch.kv_heads or heads):
        config.refuse("num_key_value_heads", arch.kv_heads, f"a divisor of {heads}")
    if arch.size % 2:
        config.refuse("head_dim", arch.size, "an even number")


def check_quantization(config: Config) -> None:
    """Checks that a quantized checkpoint is one that `import_weights` reads."""
    name = "quantization_config"
    config.read.add(name)
    if not config.has(name):
        return
    given = mapping(config, name, config.fields[name])
    # https://huggingface.co/docs/transformers/main_classes/quantization
    expected = {
        "quant_method": ("bitsandbytes",),
        "load_in_8bit": (False, None),
        "_load_in_8bit": (False, None),
        "bnb_4bit_quant_type": ("nf4",),
    }
    for key, values in expected.items():
        if given.get(key) not in values:
            config.refuse(f"{name}.{key}", given.get(key), f"{values[0]!r}")


def check_rest(config: Config) -> None:
    """Checks the fields that no other function reads."""
    for name, values in FIXED.items():
        if name in config.fields and config.fields[name] not in values:
            config.refuse(name, config.fields[name], f"{values[0]!r}")
    known = HARMLESS | {*FIXED} | config.read
    if unknown := sorted(x for x in {*config.fields} - known if config.has(x)):
        raise ValueError(
            f"{config.path} has the field {unknown[0]!r}, which is not supported for "
            f"{config.fields['model_type']}."
        )


# The parameters.


def names(arch: Architecture, scanned: bool = True) -> dict[str, Any]:
    """Returns the PyTorch module of each leaf, for all of lora_jax's files.

    It is the map of `import_weights`, `export_weights`, `export_peft` and
    `import_peft`.
    """
    ours, theirs = ("blocks", "{layer}") if scanned else ("blocks_*", "{}")
    attention = dict(query="q_proj", key="k_proj", value="v_proj", out="o_proj")
    if arch.head_norm:
        attention |= dict(query_norm="q_norm", key_norm="k_norm")
    parts = {f"attention/{a}": f"self_attn.{b}" for a, b in attention.items()}
    parts |= {f"mlp/{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    parts |= {"attention_norm": "input_layernorm"}
    if arch.post_norm:
        parts |= {"attention_post_norm": "post_attention_layernorm"}
        parts |= {"mlp_norm": "pre_feedforward_layernorm"}
        parts |= {"mlp_post_norm": "post_feedforward_layernorm"}
    else:
        parts |= {"mlp_norm": "post_attention_layernorm"}
    names: dict[str, Any] = {
        f"{ours}/{a}": f"model.layers.{theirs}.{b}" for a, b in parts.items()
    }
    if arch.tied:
        names |= {"tokens": ("model.embed_tokens", "lm_head")}
    else:
        names |= {"tokens": "model.embed_tokens", "head": "lm_head"}
    return names | {"norm": "model.norm"}


def load(
    path: str | os.PathLike[str],
    how: str | Mapping[str, str] | None = None,
    table: str | None = None,
    scanned: bool = True,
    remat: bool = True,
    dtype: Any = jnp.bfloat16,
    sharding: Mesh | Callable[[str, Any], Sharding] | None = None,
    param_dtype: Any = None,
) -> tuple[Model, dict[str, Any]]:
    """Returns a folder's model and parameters, read one tensor at a time.

    Args:
      path: A folder with `config.json` and safetensors.
      how: The format of the layers' kernels, such as "nf4", or `{pattern: format}` as
        in `lj.quantize`. What the folder has in 4 bits is kept as it is.
      table: The format of the token embedding and the head, such as "int8".
      scanned: Whether the layers' weights are stacked, and the layers one `scan`.
      remat: Whether a step keeps only each layer's input, and computes the rest again.
      dtype: Of the activations.
      sharding: A mesh of one axis, over which each kernel and each batch is split
        (fully sharded data parallelism); or a function of a leaf's path and shape that
        returns its sharding.
      param_dtype: Of the weights that are not quantized. Default: `dtype`.

    Raises:
      FileNotFoundError: If the folder, or one of its files, is missing.
      ValueError: As `read_config` and `lj.import_weights`.
    """
    arch = read_config(path)
    param_dtype = param_dtype or dtype
    keep = {"keep": fsdp.by_batch(sharding)} if isinstance(sharding, Mesh) else {}
    model = Model(arch, scanned, remat, dtype, param_dtype, **keep)
    like = shapes(model)
    if isinstance(sharding, Mesh):
        like = fsdp.distribute(like, sharding)
    elif sharding is not None:
        like = jax.tree_util.tree_map_with_path(
            lambda path, x: x.update(sharding=sharding(leaf_path(path), x)), like
        )
    formats = how if isinstance(how, Mapping) else formats_of(arch, how, table)
    if isinstance(how, Mapping) and table:
        formats = {**how, **formats_of(arch, None, table)}
    map_ = names(arch, scanned)
    return model, lj.import_weights(path, like, map_, how=formats or None)


def shapes(model: Model) -> dict[str, Any]:
    """Returns the model's parameters as shapes."""
    plain = model.clone(keep=lambda x: x)
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(plain.init, jax.random.key(0), ids)["params"]


def formats_of(
    arch: Architecture, how: str | None, table: str | None
) -> dict[str, str]:
    """Returns the format of each quantized weight, by pattern."""
    formats = {"blocks*/kernel": how} if how else {}
    if table:
        formats |= {"tokens/embedding": table}
        formats |= {} if arch.tied else {"head/kernel": table}
    return formats


def leaf_path(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
