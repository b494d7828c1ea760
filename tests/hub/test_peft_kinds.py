"""Every kind of adapter that PEFT makes of a language model, imported and exported.

PEFT on torch is the oracle, both ways. Needs torch, peft and transformers.
"""

import copy
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lora_jax as lj

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = np.arange(14).reshape(2, 7)
QV = ["q_proj", "v_proj"]
KINDS = {
    "plain": {},
    "trained biases": dict(bias="all"),
    "trained biases of adapted modules": dict(bias="lora_only"),
    "bias of B": dict(lora_bias=True),
    "rows of the table": dict(trainable_token_indices=[3, 1]),
    "a module of another model": dict(target_modules=[*QV, "W_pack"]),
    "all linear modules": dict(target_modules="all-linear"),
    "an expression": dict(target_modules=r".*\.layers\.1\..*(q|v)_proj"),
    "some layers": dict(layers_to_transform=[1], layers_pattern="(layers|h)"),
    "ranks and alphas": dict(
        rank_pattern={"q_proj": 3}, alpha_pattern={"1.*q_proj": 5}
    ),
    "rank-stabilized": dict(use_rslora=True),
    "DoRA": dict(use_dora=True),
    "MiCA": dict(init_lora_weights="mica"),
    "a parameter": dict(target_modules=[], target_parameters=["o_proj.weight"]),
    "the head, trained": dict(modules_to_save=["lm_head"]),
    "the table and the head": dict(target_modules=[*QV, "embed_tokens", "lm_head"]),
}
TIED = {
    "the table and its head": dict(target_modules=[*QV, "embed_tokens"]),
    "the table, trained, and its head": dict(modules_to_save=["embed_tokens"]),
}


def llama(tied):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        attention_bias=True,
        tie_word_embeddings=tied,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for x in model.parameters():
            x.copy_(0.3 * torch.randn(x.shape) + (x.dim() == 1))
    return model


def tree_of(model, tied):
    """The model's parameters in Flax's layout, and the map of their names."""
    tree, names = {}, {}
    for name, x in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        x = x.detach().numpy().copy()
        if leaf == "weight":
            is_table = module.endswith("embed_tokens")
            leaf = "scale" if x.ndim == 1 else "embedding" if is_table else "kernel"
            x = x.T if leaf == "kernel" else x
        tree.setdefault(module, {})[leaf] = jnp.asarray(x)
        names[module] = module
    if tied:
        names["model.embed_tokens"] = ("model.embed_tokens", "lm_head")
    return tree, names


def logits(model):
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


def merged(model, params):
    """The model with the merged weights of a tree."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for module, leaves in lj.merge(params).items():
            for leaf, x in leaves.items():
                x = torch.tensor(np.asarray(x))
                x = x.T if leaf == "kernel" else x
                name = "bias" if leaf == "bias" else "weight"
                getattr(model.get_submodule(module), name).copy_(x)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [*KINDS, *TIED])
@pytest.mark.parametrize("tied", [False, True])
def test_adapters_of_every_kind_from_peft_and_back(tmp_path, kind, tied):
    settings = KINDS.get(kind) or TIED.get(kind) or {}
    if kind in TIED:
        if not tied:
            pytest.skip("only of a tied model")
        settings = settings | dict(ensure_weight_tying=True)
    elif tied and ("head" in kind):
        pytest.skip("PEFT would untie the head")
    model = llama(tied)
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        **dict(r=2, lora_alpha=3, target_modules=QV, task_type="CAUSAL_LM") | settings
    )
    adapted = peft.get_peft_model(copy.deepcopy(model), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, x in adapted.named_parameters():
            if x.requires_grad and "magnitude" not in name:
                x.add_(0.3 * torch.randn(x.shape))
    want = logits(adapted)
    assert abs(want - logits(model)).max() > 1e-2
    adapted.save_pretrained(tmp_path / "peft", save_embedding_layers="auto")

    base, names = tree_of(model, tied)
    params = lj.import_peft(tmp_path / "peft", base, names)
    np.testing.assert_allclose(logits(merged(model, params)), want, atol=1e-4)

    lj.export_peft(tmp_path / "back", params, names, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # of transformers 5, about itself
        again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "back")
    np.testing.assert_allclose(logits(again.eval()), want, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True])
def test_import_peft_of_tables_that_were_saved(tmp_path, tied):
    model = llama(tied)
    config = peft.LoraConfig(r=2, target_modules=QV)
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    adapted.save_pretrained(tmp_path, save_embedding_layers=True)
    base, names = tree_of(model, tied)
    params = lj.import_peft(tmp_path, base, names)
    assert not any("lora_w" in leaf for module in params.values() for leaf in module)
    assert lj.count(params).trainable == 4 * 2 * (16 + 16)


# Experts.


def moe():
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=32,
        hidden_size=16,
        moe_intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
    )
    model = transformers.Qwen3MoeForCausalLM(config).eval()
    with torch.no_grad():
        for x in model.parameters():
            x.copy_(0.3 * torch.randn(x.shape) + (x.dim() == 1))
    return model


def read_checkpoint(folder):
    """A tree with the experts of a layer stacked, and the map of its names."""
    stored = safetensors.numpy.load_file(folder / "model.safetensors")
    tree, names = {}, {}
    for i in range(2):
        experts = f"model.layers.{i}.mlp.experts"
        for part in ("gate_proj", "up_proj", "down_proj"):
            each = [stored[f"{experts}.{e}.{part}.weight"].T for e in range(4)]
            tree[f"{i}_{part}"] = {"kernel": jnp.asarray(np.stack(each))}
            names[f"{i}_{part}"] = f"{experts}.{{expert}}.{part}"
        for part in ("mlp.gate", "self_attn.q_proj"):
            name = f"model.layers.{i}.{part}"
            tree[name] = {"kernel": jnp.asarray(stored[f"{name}.weight"].T)}
            names[name] = name
    return tree, names


def with_updates(folder, out, params, names):
    """Loads the checkpoint with NumPy's sums of the weights and their updates."""
    stored = safetensors.numpy.load_file(folder / "model.safetensors")
    for path, leaves in params.items():
        if "lora_a" not in leaves:
            continue
        a, b, s = (np.asarray(leaves[f"lora_{n}"]) for n in ("a", "b", "scale"))
        update = s[..., None, None] * (a @ b) if a.ndim == 3 else s * (a @ b)
        for e, x in enumerate(update if a.ndim == 3 else [update]):
            stored[names[path].format(expert=e) + ".weight"] += x.T
    out.mkdir()
    (out / "config.json").write_text((folder / "config.json").read_text())
    safetensors.numpy.save_file(stored, out / "model.safetensors", {"format": "pt"})
    return transformers.AutoModelForCausalLM.from_pretrained(out).eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("only_gate_up", [False, True])
def test_import_peft_of_fused_experts(tmp_path, only_gate_up):
    """PEFT on transformers 5 saves parameters of all experts; trees have them apart."""
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("transformers 4 has the experts apart")
    model = moe()
    model.save_pretrained(tmp_path / "base")
    parameters = ["mlp.experts.gate_up_proj"]
    if not only_gate_up:
        parameters += ["mlp.experts.down_proj", "mlp.gate.weight"]
    config = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=["q_proj"],
        target_parameters=parameters,
        rank_pattern={"experts.gate_up_proj": 3},
        alpha_pattern={"experts.gate_up_proj": 5},
    )
    adapted = peft.get_peft_model(copy.deepcopy(model), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for x in adapted.parameters():
            if x.requires_grad:
                x.add_(0.3 * torch.randn(x.shape))
    want = logits(adapted)
    adapted.save_pretrained(tmp_path / "peft")
    base, names = read_checkpoint(tmp_path / "base")
    params = lj.import_peft(tmp_path / "peft", base, names)
    assert params["0_up_proj"]["lora_a"].shape == (4, 16, 3)
    new = with_updates(tmp_path / "base", tmp_path / "new", params, names)
    np.testing.assert_allclose(logits(new), want, atol=1e-4)
    assert abs(want - logits(model)).max() > 1e-2


@pytest.mark.filterwarnings("ignore")
def test_export_peft_of_separate_experts(tmp_path, randomized):
    """PEFT fuses them itself, if ranks and scales are the same for all."""
    model = moe()
    model.save_pretrained(tmp_path / "base")
    base, names = read_checkpoint(tmp_path / "base")
    targets = ["*_proj"]
    axes = {
        f"{path}/kernel": lj.Axes((0,), (1,), (2,))
        for path in base
        if base[path]["kernel"].ndim == 3
    }
    params = randomized(lj.lorafy(base, 2, alpha=3, targets=targets, axes=axes))
    lj.export_peft(tmp_path / "out", params, names, axes=axes)
    got = peft.PeftModel.from_pretrained(model, tmp_path / "out").eval()
    want = with_updates(tmp_path / "base", tmp_path / "new", params, names)
    np.testing.assert_allclose(logits(got), logits(want), atol=1e-4)
