"""A tiny random Llama as a Hugging Face folder, written without torch."""

import json
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
# Qwen 3's: an answer that is not the last one loses what is before </think>.
THINKING = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '
' }}{% set parts = message['content'].split('</think>') %}\
{% if message['role'] == 'assistant' and loop.last %}{{ '<think>' + parts[0] + \
'</think>' }}{% endif %}{{ parts[-1] + '<|im_end|>' + '
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
MARKED = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '
' }}{% if message['role'] == 'assistant' %}{% generation %}\
{{ message['content'] | trim + '<|im_end|>' }}{% endgeneration %}{% else %}\
{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '
' }}{% endfor %}"""
SIZES = dict(layers=2, width=16, heads=4, groups=2, mlp=24)


@pytest.fixture(scope="session")
def tiny_llm():
    """Returns this module, which tests cannot import by its name."""
    return sys.modules[__name__]


def tokenizer():
    """Returns a tokenizer of bytes, with a few merges, like SmolLM2's."""
    tokens = [*CONTROL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "the"]
    vocab = {token: i for i, token in enumerate(tokens)}
    made = Tokenizer(BPE(vocab, [("h", "e"), ("t", "he")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, normalized=False) for token in CONTROL])
    return made


def write(folder, template=TEMPLATE, scale=0.3):
    """Writes config.json, the weights, the tokenizer and the chat template."""
    folder.mkdir(exist_ok=True)
    made = tokenizer()
    made.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}}
    dump(folder / "tokenizer_config.json", config)
    if template:
        (folder / "chat_template.jinja").write_text(template)
    layers, width, heads, groups, mlp = SIZES.values()
    vocab, kv = made.get_vocab_size(), width // heads * groups
    shapes = {"model.embed_tokens": (vocab, width), "model.norm": (width,)}
    for i in range(layers):
        parts = {f"self_attn.{x}_proj": (width, width) for x in "qo"}
        parts |= {f"self_attn.{x}_proj": (kv, width) for x in "kv"}
        parts |= {f"mlp.{x}_proj": (mlp, width) for x in ("gate", "up")}
        parts |= {"mlp.down_proj": (width, mlp)}
        parts |= {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in parts.items()}
    rng = np.random.default_rng(0)
    tensors = {
        f"{name}.weight": np.float32(scale * rng.normal(size=shape) + (len(shape) == 1))
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    fields = dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=mlp,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=vocab,
        rope_theta=100.0,
        rms_norm_eps=1e-5,
        hidden_act="silu",
        tie_word_embeddings=True,
    )
    dump(folder / "config.json", fields)
    return folder


def dump(path, found):
    """Writes a JSON file."""
    path.write_text(json.dumps(found))


def write_lines(path, records):
    """Writes JSON lines."""
    path.write_text("".join(json.dumps(x) + "\n" for x in records))
    return path


def chats(count=24):
    """Returns chats whose answers a model can learn."""
    rng = np.random.default_rng(1)
    made = []
    for _ in range(count):
        word = "".join(rng.choice(list("abcd"), rng.integers(2, 7)))
        turns = [("user", word), ("assistant", word[0])] * rng.integers(1, 3)
        made.append({"messages": [dict(role=r, content=c) for r, c in turns]})
    return made
