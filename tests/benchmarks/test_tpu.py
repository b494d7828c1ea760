"""A LoRA step compiles for TPUs, on one chip and sharded, without a TPU."""

import itertools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import memory
import pytest
import training
from jax.sharding import PartitionSpec as P
from models.architectures import ARCHITECTURES, Architecture

pytest.importorskip("libtpu", reason="no compiler for TPUs: pip install -e '.[tpu]'")
pytestmark = pytest.mark.usefixtures("third_party", "uncached")

# No weight has a dimension of 160 or 4 x 160, so that shapes identify activations.
RANK, LAYERS, WIDTH, MLP, VOCAB, TIME = 4, 2, 512, 1024, 2048, 160
TINY = Architecture(LAYERS, WIDTH, 4, MLP, VOCAB, kv_heads=2)
KERNELS = [  # inputs, outputs, and the dimension that is sharded: the longer, or first
    *[("attention/query", WIDTH, WIDTH, 0), ("attention/out", WIDTH, WIDTH, 0)],
    *[("attention/key", WIDTH, WIDTH // 2, 0), ("attention/value", WIDTH, 256, 0)],
    *[("mlp/gate", WIDTH, MLP, 1), ("mlp/up", WIDTH, MLP, 1)],
    ("mlp/down", MLP, WIDTH, 0),
]
TABLE = "bf16", (VOCAB, WIDTH)


@pytest.fixture
def compiled(monkeypatch):
    """Returns the compiled LoRA step for a device, and the shapes of its arguments."""
    monkeypatch.setitem(ARCHITECTURES, "tiny", TINY)

    def compile_for(device, *more):
        given = ["--model=tiny", f"--sequence={TIME}", f"--rank={RANK}"]
        args = memory.options().parse_args([*given, f"--device={device}", *more])
        job = memory.prepare(args)
        lowered, shapes = memory.lower(job, "lora", job.mesh.size)
        return lowered.compile(), shapes

    return compile_for


@pytest.mark.slow
def test_lower_for_one_chip(compiled):
    step, (state, frozen, batch) = compiled("tpu-v5e", "--no-scan", "--no-remat")
    stats = step.memory_analysis()
    held = training.nbytes((state, frozen, batch))
    assert held <= stats.argument_size_in_bytes < 1.1 * held
    # The new state reuses the memory of the old one; the only other output is the loss.
    assert stats.alias_size_in_bytes >= training.nbytes(state)
    assert stats.output_size_in_bytes - stats.alias_size_in_bytes < 2048
    # Each weight has one forward and one backward product, and none for its gradient.
    weights = LAYERS * sum(n_in * n_out for _, n_in, n_out, _ in KERNELS)
    forward = 2 * TIME * (weights + VOCAB * WIDTH)
    assert 2 * forward < step.cost_analysis()["flops"] < 2.4 * forward


@pytest.mark.slow
def test_lower_a_quantized_base_for_one_chip(compiled):
    options = "--base=nf4", "--table=int8", "--chunk=32"
    step, shapes = compiled("tpu-v5e", *options)
    held = training.nbytes(shapes)
    stats, text = step.memory_analysis(), step.as_text()
    assert held <= stats.argument_size_in_bytes < 1.1 * held  # packed
    # No array holds all layers of a weight in floats, and none holds all logits.
    for _, n_in, n_out, _ in KERNELS:
        assert f"s4[{LAYERS},{n_in},{n_out}]" in text
        for dtype in ("bf16", "f32"):
            assert f"{dtype}[{LAYERS},{n_in},{n_out}]" not in text
    found = {tuple(map(int, x.split(","))) for x in re.findall(r"\[([\d,]+)\]", text)}
    logits = {x for x in found if VOCAB in x}
    assert any(32 in x for x in logits)
    assert not any(TIME in x for x in logits)


@pytest.mark.slow
def test_lower_sharded_over_four_chips(compiled):
    step, (state, frozen, batch) = compiled("tpu-v5e:2x2")
    # A is split like W's inputs, B like W's outputs; ranks and layers are not split.
    for path, n_in, n_out, split in KERNELS:
        part, name = path.split("/")
        adapter, weight = state[0]["blocks"][part][name], frozen["blocks"][part][name]
        first, second = ("chips", None) if split == 0 else (None, "chips")
        assert weight["kernel"].sharding.spec == P(None, first, second)
        assert adapter["lora_a"].shape == (LAYERS, n_in, RANK)
        assert adapter["lora_a"].sharding.spec == P(None, first, None)
        assert adapter["lora_b"].shape == (LAYERS, RANK, n_out)
        assert adapter["lora_b"].sharding.spec == P(None, None, second)
    # The program takes these shardings, and returns the new state with the old ones.
    (given, _), (left, _) = step.input_shardings, step.output_shardings
    for found, wanted in ((given, (state, frozen, *batch)), (left, state)):
        same = jax.tree.map(
            lambda s, x: s.is_equivalent_to(x.sharding, x.ndim), found, wanted
        )
        assert all(jax.tree.leaves(same))

    gathered, summed = collectives(step.as_text())
    # Each weight is gathered in bfloat16: in the forward pass, in remat's recomputation
    # and in the backward pass. The table is gathered once, W + A B and x never.
    large = Counter({x: n for x, n in gathered.items() if RANK not in x[1]})
    weights = [("bf16", (n_in, n_out)) for _, n_in, n_out, _ in KERNELS]
    assert Counter(weights * 2) <= large <= Counter([*weights * 3, TABLE])
    # The chips sum only the gradients of the adapters, and the loss.
    assert all(not shape or RANK in shape for _, shape in summed)


def collectives(text):
    """Counts the (dtype, shape) that are gathered, and those summed over chips.

    XLA writes one collective into several fusions, all with the same channel id.
    """
    found = {"all-gather": {}, "all-reduce": {}}
    line = r"= (.*?) ([a-z]+-[a-z-]+?)(?:-start)?\(.*?channel_id=(\d+)"
    for shapes, kind, channel in re.findall(line, text):
        if kind in found:
            found[kind][channel] = [  # a layer of a stack has a leading 1
                (dtype, tuple(int(n) for n in sizes.split(",") if n not in ("", "1")))
                for dtype, sizes in re.findall(r"(b?f\d+)\[([\d,]*)\]", shapes)
            ]
    return (Counter(itertools.chain(*x.values())) for x in found.values())


def test_main_refuses_unknown_meshes(capsys):
    for device, message in {
        "tpu-v5e:3x3": "libtpu does not support tpu-v5e:3x3",
        "tpu-v99": "libtpu does not support tpu-v99",
    }.items():
        with pytest.raises(SystemExit) as error:
            memory.main([f"--device={device}"])
        assert error.value.code == 2
        assert message in capsys.readouterr().err


def test_refusal_parses_the_message_of_the_installed_compiler():
    sharding = jax.sharding.SingleDeviceSharding(memory.devices("tpu-v5e")[0])
    x = jax.ShapeDtypeStruct((8, 2**30), jnp.float32, sharding=sharding)
    lowered = jax.jit(lambda x: x + 1).lower(x)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED") as error:
        lowered.compile()
    found = memory.refusal(str(error.value))
    assert found["refused"]
    assert found["limit"] == 15.75 * 2**30
    assert found["peak"] >= 4 * 8 * 2**30
