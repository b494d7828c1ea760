"""Tunix's trainers and samplers accept a LoRA module in place of their own models."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lora_jax as lj

pytest.importorskip("tunix", reason="pip install google-tunix")

with warnings.catch_warnings():  # from tunix, at import
    warnings.simplefilter("ignore")
    from tunix.generate.sampler import CacheConfig, Sampler
    from tunix.models.gemma3 import model as gemma3
    from tunix.models.llama3 import model as llama3
    from tunix.models.qwen3 import model as qwen3
    from tunix.rl import common
    from tunix.sft.dpo import dpo_trainer
    from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput

pytestmark = [
    pytest.mark.usefixtures("third_party"),
    pytest.mark.filterwarnings("ignore"),  # warnings of tunix
    # A warning of lora_jax is an error: no weight is materialized here.
    pytest.mark.filterwarnings("error:'.*' meets"),
]
VOCAB, RATE = 32, 0.5
FROZEN = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))
SIZES = dict(num_layers=1, embed_dim=16, hidden_dim=24, num_heads=2, head_dim=8)
SIZES |= dict(num_kv_heads=1)
THETA = dict(vocab_size=VOCAB, rope_theta=10_000, norm_eps=1e-6)
MODELS = {
    "qwen3": lambda: qwen3.Qwen3(qwen3.ModelConfig(**SIZES, **THETA), rngs=nnx.Rngs(0)),
    "llama3": lambda: llama3.Llama3(
        llama3.ModelConfig(**SIZES, **THETA, weight_tying=True), rngs=nnx.Rngs(0)
    ),
    "gemma3": lambda: gemma3.Gemma3(
        gemma3.ModelConfig(
            **SIZES, num_embed=VOCAB, sliding_window_size=4, param_dtype=jnp.float32
        ),
        rngs=nnx.Rngs(0),
    ),
}
rng = np.random.default_rng(0)
IDS = jnp.asarray(rng.integers(3, VOCAB, (4, 2, 6)))  # batches of two
MASK = jnp.ones((2, 6), bool)
POSITIONS = jnp.tile(jnp.arange(6)[None], (2, 1))
CAUSAL = jnp.tile(jnp.tril(jnp.ones((6, 6), bool))[None], (2, 1, 1))


def logits(model, ids=IDS[0]):
    return model(ids, POSITIONS, None, CAUSAL)[0]


def randomized(module, kind, seed, size):
    """Returns the module with random values in its variables of a kind."""
    rng = np.random.default_rng(seed)
    draw = lambda x: jnp.asarray(size * rng.standard_normal(x.shape), x.dtype)
    nnx.update(module, jax.tree.map(draw, nnx.state(module, kind)))
    return module


@functools.cache
def base(family):
    """Returns a model with random weights, and the axes of its weights.

    Tunix initializes its MLPs with zeros, which block all gradients. `find_axes` also
    finds the attention weights, whose name `w` is no default target.
    """
    model = randomized(MODELS[family](), nnx.Param, 0, 0.3)
    return model, lj.find_axes(model, IDS[0], POSITIONS, None, CAUSAL)


def adapted(family, *, seed=None, model=None, **options):
    """Returns a module with adapters in attention and MLP, random if given a seed."""
    plain, axes = base(family)
    model = plain if model is None else model
    module = lj.LoRA(model, 2, targets="layers", axes=axes, **options)
    return module if seed is None else randomized(module, nnx.LoRAParam, seed, 0.3)


def leaves(module, *filters):
    return [np.asarray(x) for x in jax.tree.leaves(nnx.state(module, *filters))]


def same(got, want, atol=1e-4):
    np.testing.assert_allclose(got, want, atol=atol, rtol=1e-4)


def trainer_of(module, steps, *, folder=None, rate=RATE):
    config = TrainingConfig(
        eval_every_n_steps=100,
        max_steps=steps,
        gradient_accumulation_steps=2,
        checkpoint_root_directory=None if folder is None else str(folder),
    )
    inputs = dict(positions=POSITIONS, attention_mask=CAUSAL)
    trainer = PeftTrainer(module, optax.sgd(rate), config)
    return trainer.with_gen_model_input_fn(lambda x: vars(x) | inputs)


BATCHES = [TrainingInput(input_tokens=ids, input_mask=MASK) for ids in IDS]


def loss(model, ids):
    log_p = jax.nn.log_softmax(logits(model, ids)[:, :-1])
    return -jnp.take_along_axis(log_p, ids[:, 1:, None], -1).mean()


@pytest.mark.parametrize("family", MODELS)
def test_lora_module_in_peft_trainer_accumulates_and_resumes(family, tmp_path):
    module = adapted(family)
    frozen = leaves(module, FROZEN)
    trainer_of(module, 1, folder=tmp_path).train(BATCHES)
    for x, y in zip(leaves(module, FROZEN), frozen, strict=True):
        np.testing.assert_array_equal(x, y)
    # B is zero at the start, so its gradient is A^T dL/dW, here over two batches.
    model, _ = base(family)
    gradient = nnx.jit(nnx.grad(loss))
    dense = [gradient(model, ids)["layers"][0]["mlp"] for ids in IDS[:2]]
    for name in ("gate_proj", "down_proj"):
        g = sum(np.asarray(x[name]["kernel"][...]) for x in dense) / 2
        own = getattr(module.model.layers[0].mlp, name)
        assert np.abs(g).max() > 1e-3
        same(own.lora_b[...], -RATE * np.asarray(own.lora_a[...]).T @ g)

    again = adapted(family)
    resumed = trainer_of(again, 2, folder=tmp_path)
    assert resumed.train_steps == 1
    restored = leaves(again, nnx.LoRAParam)
    for x, y in zip(restored, leaves(module, nnx.LoRAParam), strict=True):
        np.testing.assert_array_equal(x, y)
    resumed.train(BATCHES)
    assert resumed.train_steps == 2
    pairs = zip(leaves(again, nnx.LoRAParam), restored, strict=True)
    assert all(np.abs(x - y).max() > 0 for x, y in pairs)


@pytest.mark.parametrize("family", MODELS)
def test_lora_module_in_dpo_trainer_starts_at_the_reference(family):
    model, _ = base(family)
    module = adapted(family)
    config = dpo_trainer.DPOTrainingConfig(eval_every_n_steps=100, max_steps=2)
    trainer = dpo_trainer.DPOTrainer(module, model, optax.sgd(RATE), config)
    seen = []
    trainer.with_training_hooks(Seen(seen))
    ones = jnp.ones((2, 3), jnp.int32)
    example = dpo_trainer.TrainingInput(
        prompt_ids=IDS[0, :, :3],
        prompt_mask=ones,
        chosen_ids=IDS[1, :, :3],
        chosen_mask=ones,
        rejected_ids=IDS[2, :, :3],
        rejected_mask=ones,
    )
    trainer.train([example] * 2)
    same(seen[0], np.log(2))  # B is zero, so policy and reference are equal
    assert seen[1] < seen[0]


class Seen(dpo_trainer.peft_trainer.hooks.TrainingHooks):
    """Records the losses of a training run."""

    def __init__(self, losses):
        self.losses = losses

    def on_train_step_end(self, trainer, step, loss):
        self.losses.append(float(loss))

    on_train_start = on_train_end = on_train_step_start = lambda *_: None
    on_eval_step_start = on_eval_step_end = lambda *_: None


@pytest.mark.parametrize("family", MODELS)
def test_lora_module_in_grpo_has_the_log_probabilities_of_merged_weights(family):
    """Tunix reads a model's arguments from the signature of its `__call__`."""
    module = adapted(family, seed=1)
    values = [
        common.compute_per_token_logps(
            *nnx.split(model), IDS[0, :, :3], IDS[0, :, 3:], pad_id=0, eos_id=2
        )
        for model in (module, module.merge(), base(family)[0])
    ]
    same(values[0], values[1])
    assert np.abs(values[0] - values[2]).max() > 1e-2


class Words:
    """A tokenizer for texts of integers."""

    def encode(self, text):
        return [int(x) for x in text.split()]

    def decode(self, ids):
        return " ".join(map(str, ids))

    bos_id, eos_id, pad_id = (lambda self, i=i: i for i in (1, 2, 0))


@pytest.mark.parametrize("family", MODELS)
def test_lora_module_in_sampler_generates_like_merged_weights(family):
    module = adapted(family, seed=1)
    sizes = CacheConfig(cache_size=16, num_layers=1, num_kv_heads=1, head_dim=8)
    got, want = (
        Sampler(model, Words(), sizes)(
            ["5 6 7", "8"], max_generation_steps=4, return_logprobs=True
        )
        for model in (module, module.merge())
    )
    assert got.text == want.text
    for x, y in zip(got.logprobs, want.logprobs, strict=True):
        same(x, y)


@pytest.mark.parametrize("family", MODELS)
def test_lora_module_on_an_nf4_base_trains(family):
    model, axes = base(family)
    stored = lj.quantize(model, "nf4", targets="layers", axes=axes, block=8)
    assert type(stored) is type(model)
    module = adapted(family, seed=1, model=stored)
    same(logits(module), logits(module.merge()), 1e-3)
    before = float(loss(module, IDS[0]))
    trainer_of(module, 1, rate=0.1).train(BATCHES[:1] * 2)
    assert float(loss(module, IDS[0])) < before
    assert lj.count(module).base_bytes < lj.count(adapted(family)).base_bytes
