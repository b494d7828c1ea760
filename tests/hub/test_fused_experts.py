"""Adapters of fused experts, in the layout that PEFT writes, become those of each."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lora_jax as lj

EXPERTS, WIDTH, INNER, R = 3, 4, 5, 2
MODULE = "base_model.model.m.0.mlp.experts"


def write(folder, *, names=("gate_up_proj", "down_proj"), change=None, **config):
    """Returns PEFT's updates, (experts, outputs, inputs), of the two parameters."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    tensors, updates = {}, {}
    sizes = {"gate_up_proj": (WIDTH, 2 * INNER), "down_proj": (INNER, WIDTH)}
    for depth, name in enumerate(reversed(names)):  # the last one is outermost
        n_in, n_out = sizes[name]
        a, b = draw(EXPERTS * R, n_in), draw(n_out, R * EXPERTS)
        key = MODULE + depth * ".base_layer"
        tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
        by_expert = a.reshape(EXPERTS, R, n_in), b.reshape(n_out, R, EXPERTS)
        updates[name] = 1.5 * np.einsum("eri,ore->eoi", *by_expert)
    if change:
        change(tensors)
    folder.mkdir(exist_ok=True)
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "target_modules": [],
        "target_parameters": [f"mlp.experts.{name}" for name in names],
    } | config
    config = {"peft_type": "LORA", "r": R, "lora_alpha": 3, **config}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return updates


def tree(gate, up, down, module="mlp.experts"):
    sizes = {gate: (WIDTH, INNER), up: (WIDTH, INNER), down: (INNER, WIDTH)}
    base = {n: {"kernel": jnp.zeros((EXPERTS, *size))} for n, size in sizes.items()}
    names = {n: f"m.0.{module}.{{expert}}.{n}" for n in sizes}
    axes = {f"{n}/kernel": lj.Axes((0,), (1,), (2,)) for n in sizes}
    return base, names, axes


@pytest.mark.parametrize(
    "parts",
    [
        ("gate_proj", "up_proj", "down_proj"),
        ("w1", "w3", "w2", "block_sparse_moe.experts"),
    ],
)
@pytest.mark.parametrize("targets", [[], "no_such_module"])
def test_import_peft_splits_fused_experts(tmp_path, close, parts, targets):
    updates = write(tmp_path, target_modules=targets)
    base, names, axes = tree(*parts)
    got = lj.merge(lj.import_peft(tmp_path, base, names, axes=axes))
    gate, up, down = parts[:3]
    both = updates["gate_up_proj"]
    for name, want in (
        (gate, both[:, :INNER]),
        (up, both[:, INNER:]),
        (down, updates["down_proj"]),
    ):
        close(got[name]["kernel"], want.swapaxes(1, 2))


def test_import_peft_splits_fused_experts_next_to_all_linear(tmp_path, close):
    q = np.ones((R, WIDTH), np.float32)
    linear = {
        f"base_model.model.m.0.q.lora_{n}.weight": x
        for n, x in zip("AB", (q, q.T.copy()), strict=True)
    }
    updates = write(
        tmp_path, change=lambda x: x.update(linear), target_modules="all-linear"
    )
    base, names, axes = tree("gate_proj", "up_proj", "down_proj")
    base["q"], names["q"] = {"kernel": jnp.zeros((WIDTH, WIDTH))}, "m.0.q"
    got = lj.merge(lj.import_peft(tmp_path, base, names, axes=axes))
    close(got["down_proj"]["kernel"], updates["down_proj"].swapaxes(1, 2))
    close(got["q"]["kernel"], 1.5 * q.T @ q)


def test_import_peft_splits_one_fused_parameter_of_its_own_rank(tmp_path, close):
    config = {"rank_pattern": {"experts.down_proj": R}, "r": 7, "lora_alpha": 2}
    config["alpha_pattern"] = {"down_proj": 3}
    updates = write(tmp_path, names=["down_proj"], **config)
    base, names, axes = tree("gate_proj", "up_proj", "down_proj")
    params = lj.import_peft(tmp_path, base, names, axes=axes)
    assert [name for name in params if "lora_a" in params[name]] == ["down_proj"]
    want = updates["down_proj"].swapaxes(1, 2)
    close(lj.merge(params)["down_proj"]["kernel"], want)


def test_import_peft_leaves_experts_that_the_map_has_fused(tmp_path, close):
    updates = write(tmp_path, names=["down_proj"])
    base = {"down": {"kernel": jnp.zeros((EXPERTS, INNER, WIDTH))}}
    params = lj.import_peft(
        tmp_path,
        base,
        {"down": "m.0.mlp.experts.down_proj"},
        axes={"down/kernel": lj.Axes((0,), (1,), (2,))},
        kinds={"down": "experts"},
    )
    want = updates["down_proj"].swapaxes(1, 2)
    close(lj.merge(params)["down"]["kernel"], want)


def test_import_peft_refuses_fused_experts_that_do_not_fit(tmp_path):
    base, names, axes = tree("gate_proj", "up_proj", "down_proj")

    def cut(tensors):
        tensors[f"{MODULE}.lora_A.weight"] = np.ones((5, INNER), np.float32)

    for change in (cut, lambda tensors: tensors.pop(f"{MODULE}.lora_B.weight")):
        write(tmp_path, change=change)
        with pytest.raises(ValueError, match=r"'m.0.mlp.experts.down_proj' must be A"):
            lj.import_peft(tmp_path, base, names, axes=axes)
    write(tmp_path)
    del base["up_proj"], names["up_proj"], axes["up_proj/kernel"]
    with pytest.raises(ValueError, match="names gives to no weight"):
        lj.import_peft(tmp_path, base, names, axes=axes)
