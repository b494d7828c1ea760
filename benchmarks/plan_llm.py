"""Plans the step of finetune_llm.py for any chip, or runs it with random weights.

    python benchmarks/plan_llm.py llama-3-8b --device tpu-v5e --base nf4 --table int8
    python benchmarks/plan_llm.py Llama-3.2-1B --device tpu-v5e --fits 16GB
    python benchmarks/plan_llm.py llama-3-8b --base nf4 --table int8 --run 1

The model is a name of models/architectures.py, or a folder with config.json. The
options are those of finetune_llm.py. The plan is XLA's own, as in memory.py: nothing is
allocated, and no TPU is needed. --run takes real steps on this machine, on random
tokens: it reports the seconds of each, and the largest memory in use.
"""

import argparse
import dataclasses
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import finetune_llm
import jax
import jax.numpy as jnp
import llm_memory
import memory
import numpy as np
import script
import training
from jax.sharding import Mesh
from models import folder as folders
from models import fsdp
from models.architectures import ARCHITECTURES, Architecture, Model
from option_types import DefaultsFormatter, folder, integer_from

import lora_jax as lj


class Step(NamedTuple):
    """The step to compile, and the shapes of its arguments."""

    model: Model
    mesh: Mesh
    params: dict  # with adapters
    args: argparse.Namespace


def main(argv: list[str] | None = None) -> None:
    """Runs the job with the options of the command line."""
    parser = options()
    args = parser.parse_args(argv)
    with script.exit_on_interrupt(parser, args.output):
        with script.exit_on_error(parser, RuntimeError):
            step = prepare(args)
        found = {"settings": training.settings(args), "versions": training.versions()}
        if args.run:
            found["run"] = take_steps(step)
        else:
            found["plan"] = plan(step)
        with script.staged(args.output) as new:
            script.write_json(new / "plan_llm.json", found)


def options() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(
        description="Plans the step of finetune_llm.py, or runs it.",
        formatter_class=DefaultsFormatter,
    )
    add = parser.add_argument
    add("model", help="a name such as llama-3-8b, or a folder with config.json")
    device = "cpu, gpu, tpu-v5e, tpu-v5e:2x4..."
    add("--device", type=memory.device, default="cpu", help=device)
    finetune_llm.add_training(parser)
    add("--layers", type=integer_from(1), help="instead of the model's own number")
    fits = "find the largest batch that fits"
    add("--fits", type=memory.size, metavar="16GB", help=fits)
    run = "take that many steps on this machine"
    add("--run", type=integer_from(0), default=0, metavar="STEPS", help=run)
    output = Path(__file__).parent / "results"
    add("--output", type=folder, default=output, help="where the file is written")
    return parser


def architecture(name: str, layers: int | None) -> Architecture:
    """Returns the architecture of a name or of a folder.

    Raises:
      ValueError: If there is no such name or folder.
    """
    if name not in ARCHITECTURES and not Path(name).is_dir():
        raise ValueError(
            f"{name} is neither a folder nor one of {', '.join(ARCHITECTURES)}."
        )
    arch = ARCHITECTURES.get(name) or folders.read_config(name)
    if arch.patch:
        raise ValueError(f"{name} takes images: a language model is needed.")
    return dataclasses.replace(arch, layers=layers) if layers else arch


def prepare(args: argparse.Namespace) -> Step:
    """Returns the step with the shapes of its parameters.

    Raises:
      RuntimeError: If there is no such device, or no compiler for it.
      ValueError: If an option does not fit the model or the device.
    """
    arch = architecture(args.model, args.layers)
    mesh = Mesh(np.array(memory.devices(args.device)), finetune_llm.AXIS)
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    finetune_llm.complete(args, mesh.size)
    dtypes = jnp.dtype(args.dtype), finetune_llm.param_dtype(args)
    keep = {"keep": fsdp.by_batch(mesh)} if mesh.size > 1 else {}
    model = Model(arch, True, args.remat, *dtypes, **keep)
    shapes = fsdp.distribute(folders.shapes(model), mesh)
    axes = finetune_llm.find_axes(model.clone(keep=lambda x: x), shapes)
    base = args.base if args.base in memory.QUANTIZED else None
    if formats := folders.formats_of(arch, base, args.table):
        shapes = lj.quantize(shapes, formats, axes=axes)
    return Step(model, mesh, finetune_llm.adapt(shapes, args, axes), args)


# The plan.


def plan(step: Step) -> dict[str, Any]:
    """Returns the memory of the step on each chip, and prints it.

    With --fits, also the largest batch that fits.
    """
    seen: dict[int, dict[str, Any]] = {}

    def peak(n: int) -> float:
        seen.setdefault(n, measure(step, n))
        size = seen[n]["peak"] or 0
        limit = step.args.fits or 0
        return math.inf if "refused" in seen[n] and size <= limit else size

    first = step.args.batch
    peak(first)
    about = f"{first} x {step.args.length} tokens on {step.args.device}"
    print(f"{about}: {describe(seen[first])}")
    found: dict[str, Any] = {"peaks": seen, "step": seen[first]}
    if step.args.fits:
        chips = step.mesh.size
        most = memory.largest(peak, step.args.fits, chips, first // chips)
        found["largest_batch"] = most
        print(f"the largest batch within {step.args.fits / 1e9:.2f} GB is {most}")
        if most:
            print(f"{most} x {step.args.length} tokens: {describe(seen[most])}")
    return found


def describe(parts: dict[str, Any]) -> str:
    """Returns the memory of a step as text."""
    if "refused" not in parts:
        return llm_memory.sizes(parts)
    if parts["peak"] is None:
        return "XLA refuses it"
    needed, limit = (parts[name] / 1e9 for name in ("peak", "limit"))
    return f"XLA refuses it: it needs {needed:.2f} GB of {limit:.2f} GB"


def measure(step: Step, n: int) -> dict[str, Any]:
    """Returns the parts of the step's memory on each chip, for `n` rows at a time."""
    state, frozen, batch = arguments(step, n)
    compiled, refusal = memory.compile_or_refusal(lower(step, state, frozen, batch))
    if compiled is None:
        return training.parts(state, frozen) | refusal
    parts = training.memory(compiled, state, frozen, batch)
    if step.args.device.startswith("tpu"):
        parts["peak"] = compiled.memory_analysis().peak_memory_in_bytes
        known = parts["parameters"] + parts["optimizer"]
        parts["temporaries"] = parts["peak"] - known
    return parts


def arguments(step: Step, n: int) -> tuple[Any, Any, Any]:
    """Returns the shapes of the step's state, frozen weights and batch."""
    tx = finetune_llm.optimizer(step.args)
    trainable, frozen = lj.split(step.params)
    state = memory.optimizer_shapes(tx, trainable, step.mesh)
    rows = step.args.accumulate, n, step.args.length
    place = memory.split_over(step.mesh, None, finetune_llm.AXIS)
    batch = jax.ShapeDtypeStruct(rows, jnp.int32, sharding=place)
    return (trainable, state), frozen, (batch,) * 4


def lower(step: Step, state: Any, frozen: Any, batch: Any) -> Any:
    """Returns the lowered step, the same as that of finetune_llm.py."""
    loss = finetune_llm.decoder_loss(step.model, step.args.chunk)
    update = training.accumulated_update(loss, finetune_llm.optimizer(step.args))
    return jax.jit(update, donate_argnums=0).lower(state, frozen, batch)


# Real steps.


def take_steps(step: Step) -> dict[str, Any]:
    """Takes --run steps with random weights and tokens, and prints what they cost."""
    shapes = arguments(step, step.args.batch)
    (trainable, _), frozen, batch = shapes
    compiled = lower(step, *shapes).compile()
    parts = training.memory(compiled, *shapes)
    print(f"XLA plans {llm_memory.sizes(parts)}", flush=True)
    trainable, frozen = (
        jax.tree_util.tree_map_with_path(random_leaf, x) for x in (trainable, frozen)
    )
    tx = finetune_llm.optimizer(step.args)
    state = trainable, finetune_llm.placed(tx, tx.init(trainable), trainable, step.mesh)
    rng = np.random.default_rng(step.args.seed)
    ids = rng.integers(step.model.arch.vocab, size=batch[0].shape, dtype=np.int32)
    positions = np.broadcast_to(np.arange(ids.shape[-1], dtype=np.int32), ids.shape)
    rows = ids, np.ones_like(ids), positions, np.roll(ids, -1, -1)
    rows = jax.device_put(rows, batch[0].sharding)
    found: dict[str, Any] = {"plan": parts, "seconds": [], "losses": []}
    resident = llm_memory.peak_resident()
    for _ in range(step.args.run):
        began, busy = time.perf_counter(), time.process_time()
        state, value = compiled(state, frozen, rows)
        found["losses"].append(float(value["loss"]))
        found["seconds"].append(time.perf_counter() - began)
        busy = time.process_time() - busy
        print(
            f"loss {found['losses'][-1]:.3f}, {found['seconds'][-1]:.1f} s, {busy:.1f} "
            f"s of CPU time; {llm_memory.used()} at most, "
            f"{resident / 1e9:.2f} GB before the first step",
            flush=True,
        )
    stats = jax.devices()[0].memory_stats() or {}
    return found | {
        "peak_resident": llm_memory.peak_resident(),
        "peak_bytes_in_use": stats.get("peak_bytes_in_use"),
    }


def random_leaf(path: Any, x: jax.ShapeDtypeStruct) -> jax.Array:
    """Returns an array of pseudo-random values, made in place."""
    name = folders.leaf_path(path)
    integer = jnp.issubdtype(x.dtype, jnp.integer)
    bits = jnp.iinfo(x.dtype).bits if integer else 8

    def values() -> jax.Array:
        if name.endswith("lora_scale") or name.startswith("norm") or "_norm/" in name:
            return jnp.ones(x.shape, x.dtype)
        if name.endswith("lora_b"):
            return jnp.zeros(x.shape, x.dtype)
        if not integer and (".scale" in name or name.endswith("/scale")):
            return jnp.full(x.shape, 0.04 if x.ndim else 1, x.dtype)
        # A hash of the indices: XLA fuses it, so that nothing but the result is stored.
        code = jnp.zeros(x.shape, jnp.uint32)
        for dim in range(x.ndim):
            code = (code ^ jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim)) * (
                jnp.uint32(2654435761)
            )
            code ^= code >> 15
        code = (code >> (32 - bits)).astype(jnp.int32) - 2 ** (bits - 1)
        if integer:
            return code.astype(x.dtype)
        return (code.astype(jnp.float32) * (0.02 / 74)).astype(x.dtype)

    return jax.jit(values, out_shardings=x.sharding)()


if __name__ == "__main__":
    main()
