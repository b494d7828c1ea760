"""The class of a checkpoint's model: how its tensors are named as modules in PyTorch.

The hub has checkpoints whose tensors lack the name of the inner model, as GPT-2's
"h.0.attn" for "transformer.h.0.attn", and others whose names transformers changes when
it loads them. PEFT, and everything that goes by modules, needs the names of modules.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

MODEL_CONFIG = "config.json"

# The attribute that holds the model without its head, `base_model_prefix` in
# transformers, by the `model_type` of the config.
_TRANSFORMER = "gpt2 bloom gptj falcon mpt gpt_bigcode codegen gpt_neo"
_MODEL = (
    "llama mistral mixtral qwen2 qwen2_moe qwen3 qwen3_moe gemma gemma2 gemma3_text "
    "phi phi3 olmo olmo2 granite smollm3 starcoder2 cohere opt"
)
INNER_MODELS = {
    **dict.fromkeys(_TRANSFORMER.split(), "transformer"),
    **dict.fromkeys(_MODEL.split(), "model"),
    **{name: name for name in "bert roberta distilbert electra gpt_neox vit".split()},
}
# The modules next to it.
HEADS = ("lm_head", "score", "classifier", "cls", "qa_outputs", "pre_classifier")
# The output head that shares the table of the token embedding, if that is tied.
TIED_HEADS = {
    "bert": "cls.predictions.decoder",
    "roberta": "lm_head.decoder",
    "distilbert": "vocab_projector",
    "gpt_neox": "embed_out",
}
# Classes with such a head, by the end of their names.
LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "MaskedLM")
# Token embeddings, by the last part of their names.
TABLES = "embed_tokens wte word_embeddings tok_embeddings embed_in shared".split()

# What transformers renames on loading, in the order in which it tries them: the start
# of a tensor's name, and that of its module. From `conversion_mapping.py` of
# transformers 5, and `_checkpoint_conversion_mapping` of 4.
_LLAVA = (
    (r"^language_model\.model", "model.language_model"),
    (r"^language_model\.lm_head", "lm_head"),
    (r"^(vision_tower|multi_modal_projector|image_newline)", r"model.\1"),
)
_QWEN_VL = (
    (r"^visual", "model.visual"),
    (r"^model(?!\.(language_model|visual))", "model.language_model"),
)
_LLAVA_TYPES = (
    "llava llava_next llava_next_video llava_onevision vipllava video_llava paligemma "
    "gemma3 mistral3 aya_vision got_ocr2 internvl"
)
RENAMES: dict[str, tuple[tuple[str, str], ...]] = {
    **dict.fromkeys(_LLAVA_TYPES.split(), _LLAVA),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), _QWEN_VL),
}


# Names that a class with a head and one without it have in different modules.
UNSURE = re.compile(r"h\.\d+\.")


class ModelClass(NamedTuple):
    """What the config of a checkpoint says about its model.

    Attributes:
      name: The class that wrote the checkpoint, "GPT2LMHeadModel", or "".
      kind: The config's `model_type`, or "".
      tied: Whether the output head shares the table of the token embedding, or `None`
        if the config does not say.
    """

    name: str = ""
    kind: str = ""
    tied: bool | None = None

    def module_names(
        self, names: Iterable[str], prefix: str | None = None
    ) -> dict[str, str]:
        """Returns the names of tensors as the modules of the class have them.

        Args:
          names: All names in the checkpoint.
          prefix: The module that holds the inner model, instead of that of the class.

        Raises:
          ValueError: If these depend on the class, and neither it nor `prefix` is
            known.
        """
        names = list(names)
        if prefix is None and not self.name and any(map(UNSURE.match, names)):
            raise ValueError(
                "The checkpoint has modules such as "
                f"{next(filter(UNSURE.match, names))!r}, and no config.json that names "
                "the model's class: GPT2LMHeadModel has them in 'transformer', and "
                "GPT2Model has not. Pass the folder with its config.json, or write "
                "prefix='transformer', or prefix='' for a model without a head."
            )
        renames = RENAMES.get(self.kind, ())
        found = {name: _renamed(name, renames) for name in names}
        if prefix is None:
            has_head = bool(self.name) and not self.name.endswith("Model")
            # "GPT2LMHeadModel" and "GPT2DoubleHeadsModel" have one, "GPT2Model" not.
            has_head |= "Head" in self.name
            prefix = INNER_MODELS.get(self.kind, "") if has_head else ""
        if not prefix or any(name.startswith(f"{prefix}.") for name in found.values()):
            return found
        return {
            name: new if new.split(".")[0] in HEADS else f"{prefix}.{new}"
            for name, new in found.items()
        }

    def tied_head(self, names: Iterable[str]) -> str | None:
        """Returns the head that the checkpoint does not store, or `None`.

        Args:
          names: All names of tensors, as the modules of the class have them.
        """
        head = TIED_HEADS.get(self.kind, "lm_head")
        if f"{head}.weight" in {*names} or self.tied is False:
            return None
        is_language_model = self.name.endswith(LANGUAGE_MODELS)
        known = is_language_model or (self.tied is True and not self.name)
        return head if known else None


def model_class(checkpoint: str | os.PathLike[str] | Mapping[str, Any]) -> ModelClass:
    """Returns what the config.json next to a checkpoint says; nothing without one."""
    if isinstance(checkpoint, Mapping):
        return ModelClass()
    path = os.fspath(checkpoint)
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    path = os.path.join(folder, MODEL_CONFIG)
    if not os.path.isfile(path):
        return ModelClass()
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no config: {config!r}.")
    text = config.get("text_config")
    text = text if isinstance(text, dict) else {}
    names = config.get("architectures") or [""]
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    return ModelClass(str(names[0]), str(config.get("model_type", "")), tied)


def _renamed(name: str, renames: Iterable[tuple[str, str]]) -> str:
    for pattern, new in renames:
        changed, count = re.subn(pattern, new, name)
        if count:
            return changed
    return name
