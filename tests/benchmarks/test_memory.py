"""The memory calculator: its models, its search, its messages, and complete runs."""

import json
import math
import re
import sys

import finetune
import jax
import jax.numpy as jnp
import many
import many_adapters
import memory
import numpy as np
import pytest
import speed
import to_peft
import training
from models.architectures import ARCHITECTURES, GPT2, Architecture, Model
from models.attention import rotate, speeds

import lora_jax as lj

SMALL = dict(layers=2, width=16, heads=4, mlp=24, vocab=30)
KINDS = {
    "gpt2": Architecture(**SMALL, positions=8, **GPT2),
    "llama": Architecture(**SMALL, kv_heads=2, tied=False),
    "gemma": Architecture(
        **SMALL,
        kv_heads=2,
        head_dim=6,
        post_norm=True,
        activation="gelu",
        scaled_embedding=True,
        attention_cap=5.0,
        logit_cap=3.0,
    ),
    "vit": Architecture(**SMALL, patch=4, image=8, **GPT2),
}
pytestmark = pytest.mark.usefixtures("third_party")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    for name, arch in KINDS.items():
        monkeypatch.setitem(ARCHITECTURES, f"tiny-{name}", arch)


# The models.


@pytest.mark.parametrize(
    ("name", "count"),
    [
        # From Hugging Face's model cards and safetensors headers
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3-70b", 70_553_706_496),
        ("gemma-2-2b", 2_614_341_888),
        ("smollm2-135m", 134_515_008),
        # https://docs.pytorch.org/vision/main/models/generated/torchvision.models.vit_h_14.html
        ("vit-h", 632_045_800),
    ],
)
def test_architectures_have_the_published_number_of_parameters(name, count):
    arch = ARCHITECTURES[name]
    x = jnp.zeros((1, arch.image, arch.image, 3) if arch.patch else (1, 4), int)
    shapes = jax.eval_shape(Model(arch).init, jax.random.key(0), x)
    assert sum(x.size for x in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize("name", KINDS)
def test_model_is_the_same_scanned_and_unrolled(name):
    arch, wide = KINDS[name], dict(dtype=jnp.float32, param_dtype=jnp.float32)
    shape = (2, 8, 8, 3) if arch.patch else (2, 8)
    x = np.random.default_rng(0).integers(30, size=shape)
    x = jnp.asarray(x, jnp.float32 if arch.patch else jnp.int32)
    scanned = Model(arch, **wide)
    shapes = jax.eval_shape(scanned.init, jax.random.key(0), x)["params"]
    rng = np.random.default_rng(1)
    draw = lambda x: jax.device_put(
        np.asarray(0.3 * rng.standard_normal(x.shape), x.dtype)
    )
    stacked = jax.tree.map(draw, shapes)
    layers = {
        f"blocks_{i}": jax.tree.map(lambda x, i=i: x[i], stacked["blocks"])
        for i in range(arch.layers)
    }
    params = {k: x for k, x in stacked.items() if k != "blocks"} | layers
    unrolled = jax.jit(Model(arch, scanned=False, remat=False, **wide).apply)
    got = jax.jit(scanned.apply)({"params": stacked}, x)
    want = unrolled({"params": params}, x)
    assert got.shape == ((2, 30) if arch.patch else (2, 8, 30))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=1e-4)
    if not arch.patch:  # no token attends to a later one
        later = unrolled({"params": params}, x.at[:, 5:].set(0))
        np.testing.assert_allclose(later[:, :5], want[:, :5], atol=1e-5)
        assert np.abs(later[:, 5:] - want[:, 5:]).max() > 1e-3


def drawn(name, *more):
    """Returns a tiny job, random parameters, with or without adapters, and a batch."""
    given = f"--model=tiny-{name}", "--sequence=8", "--dtype=float32", "--layers=1"
    job = memory.prepare(memory.options().parse_args([*given, *more]))
    rng = np.random.default_rng(0)
    draw = lambda x: jax.device_put(
        np.asarray(0.3 * rng.standard_normal(x.shape), x.dtype)
    )
    params = jax.tree.map(draw, job.params)
    batch = jax.device_put(np.asarray(rng.integers(30, size=(2, 3, 8)), jnp.int32))
    if job.args.base:
        axes = lj.find_axes(lambda p, x: job.loss(p, x, x), params, batch[0])
        params = memory.store(params, job.args, axes)
        params = lj.lorafy(params, 2, targets=job.args.targets, axes=axes)
        adapters, base = lj.split(params)
        params = lj.combine(jax.tree.map(draw, adapters), base)
    return job, params, batch


def assert_same(got, want):
    """Asserts that losses and gradients are equal up to rounding."""
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_loss_in_chunks_equals_the_loss(name):
    found = []
    for chunk in ([], ["--chunk=2"]):
        job, params, batch = drawn(name, *chunk)
        found.append(jax.jit(jax.value_and_grad(job.loss))(params, *batch))
    assert_same(*found)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "table"), [("llama", "nf4"), ("gemma", "int8")])
def test_loss_in_chunks_equals_the_loss_on_quantized_weights(name, table):
    head = "tokens/embedding" if KINDS[name].tied else "head/kernel"
    given = "--base=nf4", f"--table={table}", "--targets", "blocks", head
    job, params, batch = drawn(name, *given)
    adapters, base = lj.split(params)

    def found(fn):
        loss = lambda adapters: fn(lj.combine(adapters, base), *batch)
        return jax.jit(jax.value_and_grad(loss))(adapters)

    in_chunks = drawn(name, *given, "--chunk=4")[0].loss
    merged = lambda params, *batch: job.loss(lj.merge(params), *batch)
    assert_same(found(lj.lora(in_chunks)), found(merged))


def test_loss_in_chunks_never_computes_all_logits():
    job, params, batch = drawn("llama", "--base=nf4", "--table=int8", "--chunk=2")
    adapters, base = lj.split(params)
    loss = lambda *x: lj.lora(job.loss)(lj.combine(*x), *batch)
    text = str(jax.make_jaxpr(jax.grad(loss))(adapters, base))
    assert "f32[3,2,30]" in text
    assert "[3,8,30]" not in text


def test_nbytes_of_int4_is_half_a_byte_per_element():
    x = jax.ShapeDtypeStruct((3, 8), jnp.int4)
    assert training.nbytes(x) == 12
    assert training.nbytes(jax.ShapeDtypeStruct((3,), jnp.uint4)) == 2
    assert training.nbytes(jax.ShapeDtypeStruct((3,), jnp.bool_)) == 3
    assert training.nbytes(jnp.zeros((3, 8), jnp.bfloat16)) == 48
    mesh = jax.sharding.Mesh(jax.devices()[:4], "chips")
    place = memory.split_over(mesh, None, "chips")
    w = jax.ShapeDtypeStruct((64, 32), jnp.bfloat16, sharding=place)
    q = lj.quantize({"kernel": w}, "nf4")
    assert training.nbytes(q) == 64 * 8 // 2 + 8 * 2


def test_rotate_makes_products_depend_on_distances_only():
    x, y = jax.random.normal(jax.random.key(0), (2, 1, 1, 8))
    rotated = lambda x: rotate(jnp.tile(x, (1, 6, 1)), speeds(8, 100.0))[0]
    products = rotated(x) @ rotated(y).T
    np.testing.assert_allclose(products[2, 0], products[5, 3], rtol=1e-5)
    np.testing.assert_allclose(products[4, 4], jnp.vdot(x, y), rtol=1e-5)


# The search.


@pytest.mark.parametrize(
    "peak",
    [
        lambda n: 100 + 7 * n,
        lambda n: 100 + 7 * n + 40 * (n % 2),  # almost linear
        lambda n: 900 if n < 40 else 100 + 30 * n,
        lambda n: 3 * n**1.5,
        lambda n: max(700 + 1e-6 * n, 30 * n),  # almost constant for small batches
        lambda n: max(700, 30 * n) if n < 40 else math.inf,
        lambda n: 100 + n if n < 37 else math.inf,
        lambda n: 5000.0,
        lambda n: 1000 * n,
    ],
)
@pytest.mark.parametrize("chips", [1, 4])
@pytest.mark.parametrize("first", [1, 7, 60])
def test_largest_returns_the_last_batch_that_fits(peak, chips, first):
    seen = []
    over_all = lambda n: seen.append(n) or peak(n // chips)
    found = memory.largest(over_all, 1000, chips, first)
    assert seen[0] == first * chips
    assert found % chips == 0
    assert not found or peak(found // chips) <= 1000
    assert peak(found // chips + 1) > 1000
    assert {found, found + chips} - {0} <= set(seen)
    assert len(seen) == len(set(seen)) < 20


def test_largest_takes_four_compilations_on_a_straight_line():
    seen = []
    assert memory.largest(lambda n: seen.append(n) or 10 + 9 * n, 1000, 1) == 110
    assert seen == [1, 2, 110, 111]


# Complete runs.


def run(folder, *given):
    memory.main([*given, f"--output={folder}"])
    return json.loads((folder / "memory.json").read_text())


@pytest.mark.slow
def test_main_end_to_end(tmp_path, capsys):
    given = "--model=tiny-llama", "--layers=1", "--sequence=8", "--rank=1"
    given += ("--dtype=float32",)
    fits = "--fits=0.05MB", "--methods", "lora", "full"
    results = run(tmp_path / "new", *given, *fits)
    found = results["methods"]
    assert list(found) == ["lora", "full"]
    for parts in found.values():
        held = parts["parameters"] + parts["optimizer"]
        assert parts["peak"] == held + parts["temporaries"]
        assert parts["bytes_accessed"] > held
    kernels = 2 * (16 + 16) + 2 * (16 + 8) + 3 * (16 + 24)
    scales = 7
    assert found["lora"]["gradients"] == 4 * kernels
    assert found["full"]["gradients"] == found["full"]["parameters"]
    assert found["full"]["parameters"] == 4 * results["parameters"]
    assert found["lora"]["parameters"] == 4 * (results["parameters"] + kernels + scales)
    # Adam's two moments, and its count of steps.
    assert found["lora"]["optimizer"] == 2 * 4 * kernels + 4

    # Separate compilations confirm that this batch fits, and the next does not.
    job = memory.prepare(memory.options().parse_args(given))
    most = found["lora"]["largest_batch"]
    assert most > 1
    assert found["full"]["largest_batch"] == 0
    assert str(most) in found["lora"]["peaks"]
    assert found["full"]["peaks"] == {"1": found["full"]["peak"]}
    for n in (most, most + 1):
        stats = memory.lower(job, "lora", n)[0].compile().memory_analysis()
        size = stats.argument_size_in_bytes + stats.temp_size_in_bytes
        size += stats.output_size_in_bytes - stats.alias_size_in_bytes
        assert (size <= 50_000) == (n == most)

    assert (tmp_path / "new" / "memory.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr()
    for text in (
        "peak, MB",
        "peak / full",
        "largest batch in 0.05 MB",
        "not even one",
    ):
        assert text in shown.out
    assert "of LoRA's peak" in shown.out
    assert shown.err == ""  # no progress bar without a terminal


@pytest.mark.slow
def test_main_on_images_with_unrolled_layers(tmp_path, capsys):
    given = "--model=tiny-vit", "--no-remat", "--no-scan", "--layers=1"
    results = run(tmp_path, *given, "--batch=2", "--dtype=float32")
    lora, merged, full = results["methods"].values()
    assert lora["optimizer"] == merged["optimizer"] < full["optimizer"]
    assert lora["peak"] < full["peak"]
    assert results["sequence"] == 5
    assert results["logits"] == 4 * 2 * 30
    shown = capsys.readouterr().out
    assert "tiny-vit of 1 layers" in shown
    assert "LoRA materialized" in shown


def test_summary_reports_when_lora_saves_little():
    full = dict(parameters=100, optimizer=200, gradients=100, temporaries=900)
    lora = dict(parameters=101, optimizer=2, gradients=1, temporaries=801)
    results = {"methods": {"full": full, "lora": lora}, "logits": 0}
    results["settings"] = {"remat": False, "base": None, "chunk": None}
    for parts in (full, lora):
        parts["peak"] = sum(parts.values()) - parts["gradients"]
    text = memory.summary(results)
    assert "Activations are 88% of LoRA's peak: it saves 25% of the memory" in text
    assert "To save more, reduce the activations: --remat, a smaller batch" in text
    lora |= {"temporaries": 1, "peak": 104}
    assert "To save more" not in memory.summary(results)


@pytest.fixture
def refused(monkeypatch):
    """Makes every compilation fail with the given message."""

    def refuse(text):
        class Refused:
            def compile(self):
                raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {text}")

        lower = memory.lower
        monkeypatch.setattr(memory, "lower", lambda *x: (Refused(), lower(*x)[1]))

    return refuse


@pytest.mark.parametrize(
    ("text", "peak"),
    [
        ("memory required for HLO temporaries (1.5M) exceeds available HBM (1.0M).", 1),
        ("Ran out of memory in memory space hbm. Used 1.5M of 1.0M hbm. Exceeded", 1),
        ("RESOURCE_EXHAUSTED", None),
    ],
)
def test_main_reports_that_a_program_does_not_fit(
    text, peak, tmp_path, refused, capsys
):
    refused(text)
    given = "--model=tiny-gpt2", "--sequence=8", "--methods=lora"
    results = run(tmp_path, *given, "--fits=16GB")
    parts = results["methods"]["lora"]
    assert parts["largest_batch"] == 0
    assert parts["peak"] == (peak and 1.5 * 2**20)
    assert parts["limit"] == (peak and 2**20)
    assert "LoRA does not fit: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("base", "table"),
    [
        (None, None),
        ("int8", "int8"),
        ("nf4", "int8"),
        ("int4", "float32"),
        ("float32", None),
    ],
)
def test_main_counts_and_reports_the_format_of_the_base(
    base, table, tmp_path, refused, capsys
):
    refused("")
    given = [f"--base={base}"] * bool(base) + [f"--table={table}"] * bool(table)
    given += ["--model=tiny-llama", "--sequence=8", "--rank=1", "--chunk=4"]
    found = run(tmp_path, *given, "--methods", "lora", "full")
    outputs, tables, layers = 2 * 16 + 2 * 8 + 2 * 24 + 16, 30 * 16, 2
    kernels = layers * (16 * (outputs - 16) + 24 * 16)
    # The default block of 64 and the 24 inputs of one kernel have the divisor 8.
    scales = layers * (outputs + 2 * 16)
    blocks = {"int8": layers * outputs, "int4": scales, "nf4": scales}
    bits = {None: 16, "float32": 32, "int8": 8, "int4": 4, "nf4": 4}
    plain = 2 * found["parameters"]
    stored = plain + (bits[base] - 16) * kernels // 8 + 2 * blocks.get(base, 0)
    stored += 2 * (bits[table] - 16) * tables // 8 + 2 * 60 * (table == "int8")
    lora, full = found["methods"].values()
    adapters = lora["gradients"] + 4 * 7 * layers
    assert lora["parameters"] == stored + adapters
    assert full["parameters"] == plain
    assert found["logits"] == 4 * 4 * 30
    assert found["settings"]["base"] == base
    shown = capsys.readouterr().out
    assert (f"bfloat16, base in {base}" in shown) == bool(base)
    assert (f", tables in {table}, remat" in shown) == bool(table)
    assert (f"LoRA on {base} " in shown) == bool(base)
    assert "rank 1, chunks of 4 tokens" in shown
    assert "full does not fit" in shown


def test_measure_raises_other_errors_of_the_compiler(monkeypatch):
    class Broken:
        def compile(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: broken")

    lower = memory.lower
    monkeypatch.setattr(memory, "lower", lambda *x: (Broken(), lower(*x)[1]))
    args = memory.options().parse_args(["--model=tiny-gpt2", "--sequence=8"])
    with pytest.raises(jax.errors.JaxRuntimeError, match="broken"):
        memory.measure(memory.prepare(args), "lora", 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--model=gpt-5", "invalid choice: 'gpt-5'"),
        ("--device=tpu", "tpu is not a device to compile for: write cpu, gpu (the one"),
        ("--device=h100", "h100 is not a device to compile for: write cpu, gpu"),
        ("--device=h100", "or a TPU, present or not, such as tpu-v5e, tpu-v6e"),
        ("--device=tpu-v5e:0x1", "is not a device to compile for"),
        ("--fits=16", "16 is not a size such as 16GB"),
        ("--fits=16gb", "16gb is not a size"),
        ("--fits=0GB", "0GB is not a size"),
        ("--fits=-1GB", "-1GB is not a size"),
        ("--batch=0", "0 is not a whole number from 1"),
        ("--sequence=1025", "gpt2-medium has 1024 positions, fewer than"),
        ("--model=vit-h --sequence=8", "--sequence is for text: vit-h takes images"),
        ("--base=int2", "invalid choice: 'int2'"),
        ("--table=int8 --methods full", "for frozen weights, and full fine-tuning has"),
        ("--chunk=0", "0 is not a whole number from 1"),
        ("--chunk=3", "--chunk 3 does not divide 1024 tokens"),
        ("--model=vit-h --chunk=1", "--chunk is for text: vit-h takes images"),
        ("--targets atn", "--targets atn: No weight matches 'atn'"),
        (f"--output={__file__}", "is not a folder"),
    ],
)
def test_main_refuses_bad_options_before_any_work(given, message, capsys, monkeypatch):
    monkeypatch.setattr(memory, "lower", lambda *_: pytest.fail("work"))
    with pytest.raises(SystemExit) as error:
        memory.main(given.split())
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["16GB", "15.75GiB", "500MB", "1MiB"])
def test_size_parses_units(text):
    units = {"GB": 1e9, "GiB": 2**30, "MB": 1e6, "MiB": 2**20}
    number = text.rstrip("GMiB")
    assert memory.size(text) == float(number) * units[text[len(number) :]]


def test_main_refuses_a_batch_that_does_not_divide(monkeypatch, capsys):
    monkeypatch.setattr(memory, "devices", lambda _: jax.devices()[:4])
    with pytest.raises(SystemExit):
        memory.main(["--batch=6"])
    assert "--batch 6 cannot be split over 4 chips: write" in capsys.readouterr().err


def test_main_without_libtpu_ends_with_instructions(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(SystemExit) as error:
        memory.main(["--device=tpu-v5e"])
    assert error.value.code == 1
    assert 'pip install -e ".[demo,tpu]"' in capsys.readouterr().err


def test_main_without_a_gpu_ends_with_instructions(capsys, monkeypatch):
    def none(name):
        raise RuntimeError("Unknown backend")

    monkeypatch.setattr(memory.jax, "devices", none)
    with pytest.raises(SystemExit) as error:
        memory.main(["--device=gpu"])
    assert error.value.code == 1
    assert "There is no gpu in this machine" in capsys.readouterr().err


@pytest.mark.parametrize(
    "script", [finetune, many, many_adapters, memory, speed, to_peft]
)
def test_options_help_has_each_default_once(script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    shown = script.options().format_help()
    lines = [line for line in shown.splitlines() if "default" in line]
    assert lines and all(line.count("default") == 1 for line in lines)
    assert "None" not in shown


def test_main_ends_at_ctrl_c_with_one_line(monkeypatch, capsys, tmp_path):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(memory, "measure", stop)
    with pytest.raises(SystemExit) as error:
        memory.main(["--model=tiny-gpt2", "--sequence=8", f"--output={tmp_path}"])
    assert error.value.code == 130
    shown = capsys.readouterr().err
    assert re.search(r": stopped; nothing was written to .*\n$", shown)
    assert not list(tmp_path.iterdir())
