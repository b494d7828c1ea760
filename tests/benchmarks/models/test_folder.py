"""`read_config` reads known fields, and refuses all others by name."""

import dataclasses
import json

import jax.numpy as jnp
import pytest
from models import folder
from models.architectures import ARCHITECTURES, Architecture
from models.attention import RopeScaling

# The published files, without their special tokens and versions.
LLAMA = dict(
    architectures=["LlamaForCausalLM"],
    attention_bias=False,
    attention_dropout=0.0,
    head_dim=64,
    hidden_act="silu",
    hidden_size=2048,
    initializer_range=0.02,
    intermediate_size=8192,
    max_position_embeddings=131072,
    mlp_bias=False,
    model_type="llama",
    num_attention_heads=32,
    num_hidden_layers=16,
    num_key_value_heads=8,
    pretraining_tp=1,
    rms_norm_eps=1e-05,
    rope_scaling=dict(
        factor=32.0,
        high_freq_factor=4.0,
        low_freq_factor=1.0,
        original_max_position_embeddings=8192,
        rope_type="llama3",
    ),
    rope_theta=500000.0,
    tie_word_embeddings=True,
    use_cache=True,
    vocab_size=128256,
)
GEMMA2 = dict(
    attention_bias=False,
    attention_dropout=0.0,
    attn_logit_softcapping=50.0,
    cache_implementation="hybrid",
    final_logit_softcapping=30.0,
    head_dim=256,
    hidden_act="gelu_pytorch_tanh",
    hidden_activation="gelu_pytorch_tanh",
    hidden_size=2304,
    intermediate_size=9216,
    model_type="gemma2",
    num_attention_heads=8,
    num_hidden_layers=26,
    num_key_value_heads=4,
    query_pre_attn_scalar=256,
    rms_norm_eps=1e-06,
    rope_theta=10000.0,
    sliding_window=4096,
    vocab_size=256000,
)
GEMMA3 = dict(
    attn_logit_softcapping=None,
    final_logit_softcapping=None,
    head_dim=256,
    hidden_activation="gelu_pytorch_tanh",
    hidden_size=1152,
    intermediate_size=6912,
    model_type="gemma3_text",
    num_attention_heads=4,
    num_hidden_layers=26,
    num_key_value_heads=1,
    query_pre_attn_scalar=256,
    rms_norm_eps=1e-06,
    rope_local_base_freq=10000,
    rope_scaling=None,
    rope_theta=1000000,
    sliding_window=512,
    sliding_window_pattern=6,
    vocab_size=262144,
)
QWEN2 = dict(
    hidden_act="silu",
    hidden_size=896,
    intermediate_size=4864,
    max_window_layers=21,
    model_type="qwen2",
    num_attention_heads=14,
    num_hidden_layers=24,
    num_key_value_heads=2,
    rms_norm_eps=1e-06,
    rope_theta=1000000.0,
    sliding_window=32768,
    tie_word_embeddings=True,
    use_sliding_window=False,
    vocab_size=151936,
)
NF4 = dict(
    quant_method="bitsandbytes",
    load_in_4bit=True,
    load_in_8bit=False,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_compute_dtype="bfloat16",
    bnb_4bit_use_double_quant=True,
)


def write(path, fields):
    (path / "config.json").write_text(json.dumps(fields))
    return path


def read(path, fields):
    return folder.read_config(write(path, fields))


def test_read_config_of_published_models(tmp_path):
    want = dataclasses.replace(ARCHITECTURES["llama-3.2-1b"], head_dim=64)
    assert read(tmp_path, LLAMA) == want
    assert read(tmp_path, LLAMA | dict(quantization_config=NF4)) == want
    found = read(tmp_path, GEMMA2)
    want = ARCHITECTURES["gemma-2-2b"]
    assert found == dataclasses.replace(want, query_scale=1 / 16, local=found.local)
    assert [found.is_local(i) for i in range(26)] == [True, False] * 13
    found = read(tmp_path, GEMMA3)
    assert [i for i in range(26) if not found.is_local(i)] == [5, 11, 17, 23]
    assert (found.rope, found.local_rope, found.window) == (1e6, 1e4, 512)
    assert found.head_norm and found.norm == "offset" and found.tied
    found = read(tmp_path, QWEN2)
    assert found == Architecture(
        *(24, 896, 14, 4864, 151936),
        kv_heads=2,
        epsilon=1e-6,
        rope=1e6,
        bias=("query", "key", "value"),
    )


def test_read_config_reads_the_fields_of_transformers_5(tmp_path):
    new = {k: x for k, x in LLAMA.items() if not k.startswith("rope")}
    new |= dict(rope_parameters=LLAMA["rope_scaling"] | dict(rope_theta=500000.0))
    assert read(tmp_path, new) == read(tmp_path, LLAMA)
    new = {k: x for k, x in GEMMA3.items() if not k.startswith("rope")}
    slow = dict(rope_type="linear", factor=8.0, rope_theta=1e6)
    rope = dict(full_attention=slow, sliding_attention=dict(rope_theta=1e4))
    old = GEMMA3 | dict(rope_scaling=dict(type="linear", factor=8.0))
    arch = read(tmp_path, new | dict(rope_parameters=rope))
    assert arch == read(tmp_path, old)
    assert arch.scaling == RopeScaling(8.0)


def test_read_config_takes_defaults_of_missing_fields(tmp_path):
    for name in ("rope_theta", "num_key_value_heads", "tie_word_embeddings"):
        arch = read(tmp_path, {k: x for k, x in LLAMA.items() if k != name})
    assert not arch.tied
    few = {k: x for k, x in LLAMA.items() if k not in ("rope_theta", "rope_scaling")}
    assert (read(tmp_path, few).rope, read(tmp_path, few).scaling) == (1e4, None)
    assert read(tmp_path, few | dict(num_key_value_heads=None)).kv_heads == 32


SCALING = LLAMA["rope_scaling"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (LLAMA | dict(model_type="mixtral"), "'model_type' is 'mixtral'.*one of llama"),
        (LLAMA | dict(model_type=None), "'model_type' is None"),
        (LLAMA | dict(num_local_experts=8), "the field 'num_local_experts'"),
        (LLAMA | dict(sliding_window=8), "the field 'sliding_window'.*for llama"),
        (LLAMA | dict(hidden_act="gelu"), "'hidden_act' is 'gelu'.*silu or"),
        (LLAMA | dict(hidden_size=True), "'hidden_size' is True"),
        (LLAMA | dict(hidden_size="2048"), "'hidden_size' is '2048'"),
        (LLAMA | dict(vocab_size=0), "'vocab_size' is 0.*positive"),
        (LLAMA | dict(attention_bias=1), "'attention_bias' is 1.*a bool"),
        (LLAMA | dict(attention_dropout=0.1), "'attention_dropout' is 0.1"),
        (LLAMA | dict(num_key_value_heads=3), "'num_key_value_heads' is 3.*of 32"),
        (LLAMA | dict(num_attention_heads=7, head_dim=None), "'num_attention_heads'"),
        (LLAMA | dict(head_dim=65), "'head_dim' is 65.*even"),
        (LLAMA | dict(rope_interleaved=True), "'rope_interleaved' is True"),
        (LLAMA | dict(partial_rotary_factor=0.5), "field 'partial_rotary_factor'"),
        (
            LLAMA | dict(rope_scaling=SCALING | dict(rope_type="yarn")),
            r"'rope_scaling\.rope_type' is 'yarn'.*default or linear or llama3",
        ),
        (
            LLAMA | dict(rope_scaling=dict(type="dynamic", factor=2.0)),
            r"'rope_scaling\.type' is 'dynamic'",
        ),
        (
            LLAMA | dict(rope_scaling=SCALING | dict(mscale=1.0)),
            r"'rope_scaling\.mscale' is 1\.0",
        ),
        (
            LLAMA | dict(rope_scaling=dict(rope_type="linear")),
            r"'rope_scaling\.factor' is None.*positive",
        ),
        (
            LLAMA | dict(rope_scaling=SCALING | dict(low_freq_factor=4.0)),
            r"'rope_scaling\.low_freq_factor' is 4\.0.*less than",
        ),
        (LLAMA | dict(rope_scaling=8), "'rope_scaling' is 8.*a map"),
        (LLAMA | dict(rope_parameters={}), "'rope_theta'.*no field next to"),
        (
            LLAMA | dict(quantization_config=NF4 | dict(quant_method="gptq")),
            r"'quantization_config\.quant_method' is 'gptq'.*bitsandbytes",
        ),
        (
            LLAMA | dict(quantization_config=NF4 | dict(bnb_4bit_quant_type="fp4")),
            r"'quantization_config\.bnb_4bit_quant_type' is 'fp4'",
        ),
        (GEMMA2 | dict(hidden_activation="silu_x"), "'hidden_activation' is 'silu_x'"),
        (GEMMA2 | dict(sliding_window=None), "'sliding_window' is None"),
        (GEMMA3 | dict(use_bidirectional_attention=True), "bidirectional.* is True"),
        (GEMMA3 | dict(model_type="gemma3"), "'model_type' is 'gemma3'"),
        (
            GEMMA3 | dict(layer_types=["full_attention"] * 3),
            "'layer_types'.*a list of 26",
        ),
        (
            GEMMA3 | dict(layer_types=["chunked_attention"] * 26),
            "'layer_types' is 'chunked_attention'",
        ),
        (QWEN2 | dict(num_experts=60), "the field 'num_experts'"),
        (QWEN2 | dict(layer_types=["sliding_attention"] * 24), "'layer_types' is"),
    ],
)
def test_read_config_refuses_other_fields(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, fields)


@pytest.mark.parametrize("name", folder.SIZES.values())
def test_read_config_needs_the_sizes(tmp_path, name):
    fields = {k: x for k, x in QWEN2.items() if k != name}
    with pytest.raises(ValueError, match=f"no field '{name}'"):
        read(tmp_path, fields)


def test_read_config_refuses_other_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        folder.read_config(tmp_path)
    for text, message in (("{", "no JSON"), ("[]", "holds no fields")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            folder.read_config(tmp_path)


def test_load_needs_weights(tmp_path):
    with pytest.raises(FileNotFoundError):
        folder.load(write(tmp_path, LLAMA), dtype=jnp.float32)
