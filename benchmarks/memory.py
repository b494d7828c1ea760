"""Computes the memory of a training step, in full and with LoRA, on any chip.

    python benchmarks/memory.py --model llama-3-8b --device tpu-v5e:2x4
    python benchmarks/memory.py --model gpt2-medium --device tpu-v5e --fits 16GB
    python benchmarks/memory.py --model llama-3-8b --device tpu-v5e --base nf4

The numbers come from XLA's own compiler: nothing is allocated, and no TPU is needed.
Prints a table; writes the results and a figure into benchmarks/results. A compilation
takes about a minute on two CPU cores.

On several chips each kernel is split over all of them along its longer side, and each
token embedding along its features. Both are gathered where they are used, layer by
layer. The optimizer state is split like its parameters (fully sharded data
parallelism). A batch is split too, and the figures are those of one chip.

--base and --table store the frozen weights of the methods with adapters quantized, or
in another float dtype. Full fine-tuning trains all weights, and keeps them in --dtype.
"LoRA materialized" computes W + A B of every weight from the stored weights in every
step. With --chunk the loss of every method is computed from the logits of that many
tokens of each sequence at a time.
"""

import argparse
import dataclasses
import functools
import math
import os
import re
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import report
import script
import training
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from models.architectures import ARCHITECTURES, Architecture, Model
from models.fsdp import by_batch, distribute
from option_types import DefaultsFormatter, folder, integer_from, targets_error
from tqdm import tqdm

import lora_jax as lj

METHODS = {"lora": "LoRA", "merged": "LoRA materialized", "full": "full"}
LINES = report.LINES | {"merged": "#6b5b95"}
AXIS = "chips"
FLOATS, QUANTIZED = ["bfloat16", "float32"], ["int8", "int4", "nf4"]
UNITS = {"MB": 1e6, "GB": 1e9, "MiB": 2.0**20, "GiB": 2.0**30}


class Job(NamedTuple):
    """The program to compile, except its method and its batch; arrays are shapes."""

    args: argparse.Namespace
    arch: Architecture
    sequence: int  # tokens; of an image model, patches and the class
    mesh: Mesh
    loss: Callable[[Any, Any, Any], jax.Array]  # of parameters, inputs and labels
    params: dict[str, Any]
    adapted: dict[str, Any] | None  # as stored, with adapters, if any method has them


def main(argv: list[str] | None = None) -> None:
    """Runs the job with the options of the command line."""
    began = time.perf_counter()
    parser = options()
    args = parser.parse_args(argv)
    with script.exit_on_interrupt(parser, args.output):
        with script.exit_on_error(parser, RuntimeError):
            job = prepare(args)
        found = {"methods": compare(job)} | about(job)
        with script.staged(args.output) as new:
            script.write_json(new / "memory.json", found)
            figure(new / "memory.png", found)
            print(f"{heading(found)}\n\n{table(found)}\n\n{summary(found)}")
    count = sum(len(x["peaks"]) for x in found["methods"].values())
    seconds = time.perf_counter() - began
    print(f"{count} compilations, {seconds:.0f} s; the files are in {args.output}")


def compare(job: Job) -> dict[str, dict[str, Any]]:
    """Returns the memory of each method, and with --fits the largest batch that fits.

    `peaks` holds the peak of every batch that was compiled during that search.
    """
    found = {}
    with tqdm(unit=" compiled", disable=None) as bar:
        for name in job.args.methods:
            seen: dict[int, dict[str, Any]] = {}

            def peak(n: int, name: str = name, seen: dict = seen) -> float:
                if n not in seen:
                    bar.set_description(f"{name}, batch {n}")
                    seen[n] = measure(job, name, n)
                    bar.update()
                size = seen[n]["peak"] or 0
                # A program that XLA refuses does not fit, whatever the limit.
                if "refused" in seen[n] and size <= (job.args.fits or 0):
                    return math.inf
                return size

            peak(job.args.batch)
            most = {}
            if job.args.fits:
                limit, chips = job.args.fits, job.mesh.size
                first = job.args.batch // chips
                most = {"largest_batch": largest(peak, limit, chips, first)}
            peaks = {n: seen[n]["peak"] for n in sorted(seen)}
            found[name] = seen[job.args.batch] | most | {"peaks": peaks}
    return found


def about(job: Job) -> dict[str, Any]:
    """Returns the settings and versions that the results depend on."""
    each = 1 if job.arch.patch else job.args.chunk or job.sequence
    rows = job.args.batch // job.mesh.size * each
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(job.params)),
        "sequence": job.sequence,
        "logits": 4 * rows * job.arch.vocab,  # bytes on each chip at a time
        "chips": job.mesh.size,
        "settings": training.settings(job.args),
        "versions": training.versions()
        | {"device": job.mesh.devices.flat[0].device_kind},
    }


# The command line.


def options() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(
        description="Computes the memory of a training step, in full and with LoRA.",
        formatter_class=DefaultsFormatter,
    )
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    models = list(ARCHITECTURES)
    add("--model", choices=models, default="gpt2-medium", help="the architecture")
    add("--layers", type=integer_from(1), help="instead of the model's own number")
    add(
        "--device", type=device, default="cpu", help="cpu, gpu, tpu-v5e, tpu-v5e:2x4..."
    )
    add("--batch", type=integer_from(1), help="over all chips; default: one per chip")
    add(
        "--sequence",
        type=integer_from(1),
        help="tokens; default: 1024, or an image's patches",
    )
    add("--rank", type=integer_from(1), default=8, help="rank of every adapter")
    add("--targets", nargs="+", default=["blocks*/*/kernel"], help="what to adapt")
    add(
        "--dtype",
        choices=FLOATS,
        default="bfloat16",
        help="of everything except the adapters, which are float32",
    )
    add(
        "--base",
        choices=[*FLOATS, *QUANTIZED],
        help="of the blocks' frozen kernels; default: --dtype",
    )
    add(
        "--table",
        choices=[*FLOATS, *QUANTIZED],
        help="of the token embedding and the head; default: --dtype",
    )
    add(
        "--chunk",
        type=integer_from(1),
        metavar="TOKENS",
        help="tokens whose logits exist at a time",
    )
    add("--remat", action=switch, default=True, help="keep only each block's input")
    add("--scan", action=switch, default=True, help="stack the layers")
    add(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        help="the methods to compare",
    )
    add("--fits", type=size, metavar="16GB", help="find the largest batch that fits")
    output = Path(__file__).parent / "results"
    add("--output", type=folder, default=output, help="where the files are written")
    return parser


def device(text: str) -> str:
    """Parses an option: cpu, gpu, or a kind of TPU with or without a mesh."""
    if not re.fullmatch(r"cpu|gpu|tpu-\w+(:[1-9]\d*x[1-9]\d*)?", text, re.ASCII):
        raise argparse.ArgumentTypeError(
            f"{text} is not a device to compile for: write cpu, gpu (the one in this "
            "machine), or a TPU, present or not, such as tpu-v5e, tpu-v6e or "
            "tpu-v5e:2x4"
        )
    return text


def size(text: str) -> float:
    """Parses an option: a number of bytes with its unit."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([MG]i?B)", text, re.ASCII)
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(
            f"{text} is not a size such as 16GB or 15.75GiB"
        )
    return float(found[1]) * UNITS[found[2]]


def prepare(args: argparse.Namespace, **changed: Any) -> Job:
    """Returns the job to compile, once all options are checked.

    Args:
      args: From `options`.
      **changed: Fields of the model's architecture to replace.

    Raises:
      RuntimeError: If there is no such device, or no compiler for it.
      ValueError: If an option does not fit the model or the device.
    """
    arch = dataclasses.replace(ARCHITECTURES[args.model], **changed)
    if args.layers:
        arch = dataclasses.replace(arch, layers=args.layers)
    sequence = tokens(args, arch)
    mesh = Mesh(np.array(devices(args.device)), AXIS)
    args.batch = args.batch or mesh.size
    if args.batch % mesh.size:
        raise ValueError(
            f"--batch {args.batch} cannot be split over {mesh.size} chips: write a "
            f"multiple of {mesh.size}."
        )
    model = Model(
        *(arch, args.scan, args.remat, jnp.dtype(args.dtype), jnp.dtype(args.dtype)),
        keep=by_batch(mesh),
        attention=None if args.device == "gpu" else "xla",  # not that of a GPU here
    )
    run = lambda method, params, x: model.apply({"params": params}, x, method=method)
    apply = functools.partial(run, None)
    loss = training.loss(apply)
    if args.chunk:
        parts = (functools.partial(run, name) for name in ("hidden", "logits"))
        # A head that is dequantized once (`adapted=True`) takes 0.5 GB more on a TPU.
        loss = training.loss_in_chunks(*parts, args.chunk)
    job = Job(args, arch, sequence, mesh, loss, {}, None)
    inputs, _ = batch_of(job, mesh.size)
    plain = jax.eval_shape(model.init, jax.random.key(0), inputs)["params"]
    job = job._replace(params=distribute(plain, mesh))
    if {*args.methods} == {"full"}:
        return job
    axes = lj.find_axes(apply, job.params, inputs)
    stored = store(job.params, args, axes)
    try:
        adapted = lj.lorafy(stored, args.rank, targets=args.targets, axes=axes)
    except ValueError as error:
        raise targets_error(args, error, "query value") from None
    return job._replace(adapted=adapted)


def tokens(args: argparse.Namespace, arch: Architecture) -> int:
    """Returns how many tokens an input has, once the options are checked."""
    if arch.patch and args.sequence:
        raise ValueError(f"--sequence is for text: {args.model} takes images.")
    sequence = args.sequence or min(1024, arch.positions or 1024)
    if arch.patch:
        sequence = 1 + (arch.image // arch.patch) ** 2
    elif arch.positions and sequence > arch.positions:
        raise ValueError(
            f"{args.model} has {arch.positions} positions, fewer than --sequence "
            f"{sequence}."
        )
    if args.chunk and arch.patch:
        raise ValueError(f"--chunk is for text: {args.model} takes images.")
    if args.chunk and sequence % args.chunk:
        raise ValueError(f"--chunk {args.chunk} does not divide {sequence} tokens.")
    if (args.base or args.table) and {*args.methods} == {"full"}:
        raise ValueError(
            "--base and --table are for frozen weights, and full fine-tuning has none: "
            "write --methods lora full."
        )
    return sequence


def store(
    params: dict[str, Any], args: argparse.Namespace, axes: dict[str, lj.Axes]
) -> dict[str, Any]:
    """Converts frozen weights to the formats of --base and --table."""
    formats = {}

    def put(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        how = args.table if name in ("tokens/embedding", "head/kernel") else None
        if name.startswith("blocks") and path[-1].key == "kernel":
            how = args.base
        if how in QUANTIZED:
            formats[name] = how
        elif how:
            return jax.ShapeDtypeStruct(x.shape, how, sharding=x.sharding)
        return x

    params = jax.tree_util.tree_map_with_path(put, params)
    return lj.quantize(params, formats, axes=axes) if formats else params


def devices(name: str) -> list[Any]:
    """Returns the devices to compile for; TPUs are descriptions, not real devices.

    Raises:
      RuntimeError: If there are none of that name.
    """
    if not name.startswith("tpu"):
        try:
            return jax.devices(name)[:1]
        except RuntimeError:
            raise RuntimeError(
                f"There is no {name} in this machine, and its compiler supports no "
                "absent device: write --device cpu, or a TPU such as tpu-v5e, which "
                "may be absent."
            ) from None
    kind, _, shape = name.removeprefix("tpu-").partition(":")
    # libtpu is used as a compiler only. Without these variables it queries the
    # metadata server for the TPU of this machine, and locks it for other processes.
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    shape = shape or "1x1"
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise RuntimeError(
            "libtpu, which contains XLA's compiler for TPUs, is not installed: "
            'pip install -e ".[demo,tpu]"'
        ) from None
    host = {"chips_per_host_bounds": (1, 1, 1)} if shape == "1x1" else {}
    try:
        return topologies.get_topology_desc(f"{kind}:{shape}", "tpu", **host).devices
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        raise ValueError(f"libtpu does not support {name}: {error}") from None


# The step, from shapes alone.


def batch_of(job: Job, n: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Returns the shapes of n inputs and of their labels."""
    shape, dtype, labels = (n, job.sequence), jnp.int32, (n, job.sequence)
    if job.arch.patch:
        shape, labels = (n, job.arch.image, job.arch.image, 3), (n,)
        dtype = jnp.dtype(job.args.dtype)
    sharding = split_over(job.mesh, AXIS)
    inputs = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    return inputs, jax.ShapeDtypeStruct(labels, jnp.int32, sharding=sharding)


def split_over(mesh: Mesh, *names: str | None) -> NamedSharding:
    """Returns a sharding that splits each dimension over the mesh axis of its name."""
    return NamedSharding(mesh, PartitionSpec(*names))


def lower(job: Job, name: str, n: int) -> tuple[Any, tuple[Any, Any, Any]]:
    """Returns the lowered step of a method on a batch of n, and its argument shapes."""
    if name == "full":
        loss = lambda params, _, *batch: job.loss(params, *batch)
        return lower_step(job, loss, job.params, {}, n)
    merged = lambda params, *batch: job.loss(lj.merge(params), *batch)
    fn = lj.lora(job.loss) if name == "lora" else merged
    loss = lambda adapters, base, *batch: fn(lj.combine(adapters, base), *batch)
    return lower_step(job, loss, *lj.split(job.adapted), n)


def lower_step(
    job: Job, loss: Callable[..., jax.Array], trainable: Any, frozen: Any, n: int
) -> tuple[Any, tuple[Any, Any, Any]]:
    """Returns the lowered step and shapes for `loss(trainable, frozen, *batch)`."""
    tx = optax.adamw(1e-3)
    state = trainable, optimizer_shapes(tx, trainable, job.mesh)
    batch = batch_of(job, n)
    step = jax.jit(training.update(loss, tx), donate_argnums=0)
    return step.lower(state, frozen, *batch), (state, frozen, batch)


def optimizer_shapes(
    tx: optax.GradientTransformation, trainable: Any, mesh: Mesh
) -> Any:
    """Returns the shapes of an optimizer state that is sharded like its parameters."""
    put = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return optax.tree_map_params(
        tx,
        lambda x, like: put(x, like.sharding),
        jax.eval_shape(tx.init, trainable),
        trainable,
        transform_non_params=lambda x: put(x, split_over(mesh)),
    )


def measure(job: Job, name: str, n: int) -> dict[str, Any]:
    """Returns the parts of a step's memory, in bytes on each chip, for a batch of n.

    The parts are those of `training.memory`, except that the temporaries are the peak
    minus parameters and optimizer state. If XLA refuses to compile the step, because
    the chip has too little memory, the result contains the `limit` and the peak that
    XLA names.
    """
    lowered, (state, frozen, batch) = lower(job, name, n)
    compiled, refused = compile_or_refusal(lowered)
    if compiled is None:
        parts = training.parts(state, frozen) | refused
    else:
        parts = training.memory(compiled, state, frozen, batch)
        if job.args.device.startswith("tpu"):
            parts["peak"] = compiled.memory_analysis().peak_memory_in_bytes
        parts["bytes_accessed"] = compiled.cost_analysis()["bytes accessed"]
    rest = None
    if parts["peak"] is not None:
        rest = parts["peak"] - parts["parameters"] - parts["optimizer"]
    return parts | {"temporaries": rest, "batch": n}


def compile_or_refusal(lowered: Any) -> tuple[Any, dict[str, int | None]]:
    """Returns the compiled program, or `None` and what `refusal` reads of the error."""
    try:
        return lowered.compile(), {}
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None, refusal(str(error))


def refusal(text: str) -> dict[str, int | None]:
    """Parses XLA's out-of-memory message into the peak and the limit that it names."""
    number = r"([\d.]+[KMGT])"
    old, new = rf"Used {number} of {number} hbm", rf"\({number}\) exceeds.*\({number}\)"
    found = re.search(old, text) or re.search(new, text)
    read = lambda x: round(float(x[:-1]) * 2.0 ** (10 + 10 * "KMGT".index(x[-1])))
    peak, limit = map(read, found.groups()) if found else (None, None)
    return {"peak": peak, "limit": limit, "refused": True}


def largest(
    peak: Callable[[int], float], limit: float, chips: int, first: int = 1
) -> int:
    """Returns the largest batch, over all chips, whose peak is within the limit.

    The search starts at `first`, the batch of each chip. Memory is close to linear in
    the batch, so the next candidate is where the line through two batches meets the
    limit. The search always measures the result, unless it is 0, and the next larger
    batch.
    """
    seen: dict[int, float] = {}  # peaks by the batch of each chip
    fits, above, n = 0, None, first
    while True:
        seen[n] = peak(n * chips)
        if seen[n] <= limit:
            fits = n
        else:
            above = n
        if above is not None and above - fits <= 1:
            return fits * chips
        n = following(seen, fits, above, limit)


def following(
    seen: dict[int, float], fits: int, above: int | None, limit: float
) -> int:
    """Returns the batch to measure next: above `fits`, which fits, below `above`."""
    known = sorted(n for n, size in seen.items() if size < math.inf)
    if len(known) > 1 and len(seen) < 8:  # from eight batches on, bisect
        x, y = known[-2:]
        slope = (seen[y] - seen[x]) / (y - x)
        line = (limit - seen[y]) / slope if slope > 0 else math.inf
        n = max(fits + 1, y + math.floor(min(line, 1e9)))
        if above in known:
            return min(n, above - 1)
        # The limit on the step guards against a slope near zero: with small batches
        # the parameters alone can determine the peak.
        if n < (above or 64 * fits):
            return n
    return 2 * fits if above is None else (fits + above) // 2


# Results.


def heading(results: dict[str, Any]) -> str:
    """Returns one line that describes the compiled step."""
    given = results["settings"]
    layers = f" of {given['layers']} layers" if given["layers"] else ""
    parts = [f"batch {given['batch']} x {results['sequence']}", given["dtype"]]
    parts += [f"base in {given['base']}"] * bool(given["base"])
    parts += [f"tables in {given['table']}"] * bool(given["table"])
    parts += ["remat" if given["remat"] else "no remat", f"rank {given['rank']}"]
    parts += [f"chunks of {given['chunk']} tokens"] * bool(given["chunk"])
    return (
        f"{given['model']}{layers}, {results['parameters']:,} parameters, on "
        f"{given['device']}: {', '.join(parts)}"
    )


def labels(results: dict[str, Any]) -> dict[str, str]:
    """Returns the label of each method, with the format of its base."""
    base = results["settings"]["base"]
    on = {name: f" on {base}" if base and name != "full" else "" for name in METHODS}
    return {name: METHODS[name] + on[name] for name in results["methods"]}


def unit_of(results: dict[str, Any]) -> str:
    """Returns the unit, MB or GB, that suits the sizes of the results."""
    held = [x["parameters"] + x["optimizer"] for x in results["methods"].values()]
    return "GB" if max(held) > 1e8 else "MB"


def table(results: dict[str, Any]) -> str:
    """Returns a table with a column for each method."""
    found, unit = results["methods"], unit_of(results)
    cell = lambda x: "unknown" if x is None else f"{x / UNITS[unit]:.3f}"
    rows = {
        f"parameters, {unit}": [cell(x["parameters"]) for x in found.values()],
        f"optimizer state, {unit}": [cell(x["optimizer"]) for x in found.values()],
        f"temporaries, {unit}": [cell(x["temporaries"]) for x in found.values()],
        f"  including gradients, at most, {unit}": [
            cell(x["gradients"]) for x in found.values()
        ],
        f"peak, {unit}": [cell(x["peak"]) for x in found.values()],
    }
    if "full" in found:
        rows["peak / full"] = [ratio(x, found["full"]) for x in found.values()]
    if limit := results["settings"]["fits"]:
        most = [x["largest_batch"] for x in found.values()]
        rows[f"largest batch in {limit / UNITS[unit]:.5g} {unit}"] = [
            f"{n}" if n else "not even one" for n in most
        ]
    lines = [["", *labels(results).values()]]
    lines += [[label, *cells] for label, cells in rows.items()]
    where = " on each chip" if results["chips"] > 1 else ""
    lines[0][0] = f"one training step{where}"
    return "\n".join(report.aligned(lines))


def ratio(parts: dict[str, Any], full: dict[str, Any]) -> str:
    """Returns the ratio of a peak to that of full fine-tuning."""
    if not parts["peak"] or not full["peak"]:
        return "unknown"
    return f"{parts['peak'] / full['peak']:.3f}"


def summary(results: dict[str, Any]) -> str:
    """Returns sentences on the methods that do not fit, and on what LoRA saves."""
    found, unit, text = results["methods"], unit_of(results), []
    formatted = lambda size: f"{size / UNITS[unit]:.2f} {unit}"
    for name, parts in found.items():
        if parts.get("refused"):
            line = "XLA refuses it"
            if parts["peak"]:
                line = f"it needs at least {formatted(parts['peak'])} of the chip's "
                line += formatted(parts["limit"])
            text.append(f"{labels(results)[name]} does not fit: {line}.")
    lora = found.get("lora", {})
    if lora.get("peak"):
        share = activations(lora) / lora["peak"]
        line = f"Activations are {share:.0%} of LoRA's peak"
        if found.get("full", {}).get("peak"):
            saved = 1 - lora["peak"] / found["full"]["peak"]
            line += f": it saves {saved:.0%} of the memory of full fine-tuning"
            if saved < 0:
                line = line.replace(f"saves {saved:.0%} of", f"adds {-saved:.0%} to")
        if share > 0.5:
            remat = "" if results["settings"]["remat"] else "--remat, "
            line += (
                f". To save more, reduce the activations: {remat}a smaller batch or "
                "shorter inputs"
            )
        text.append(line + ".")
        at_once = " at a time" if results["settings"]["chunk"] else ""
        logits = formatted(results["logits"])
        text.append(f"The logits alone, in float32, are {logits}{at_once}.")
    return "\n".join(text)


def activations(parts: dict[str, Any]) -> int:
    """Returns the bytes of the temporaries that cannot be gradients."""
    return max(0, parts["temporaries"] - parts["gradients"])


def figure(path: Path, results: dict[str, Any]) -> None:
    """Draws a bar of stacked parts for every method into a PNG."""
    found = results["methods"]
    bars = [x | {"temporaries": x["temporaries"] or 0} for x in found.values()]
    top = max(x["parameters"] + x["optimizer"] + x["temporaries"] for x in bars)
    unit = unit_of(results)
    top /= UNITS[unit]
    width = 4.4 + 1.5 * len(bars)
    made = Figure(figsize=(width, 4.8), dpi=160, layout="constrained")
    axes = made.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=report.INK, length=3)
    report.stack(axes, bars, unit, 2)
    limit = results["settings"]["fits"]
    limit = limit or max((x.get("limit") or 0 for x in bars), default=0)
    limit /= UNITS[unit]
    if 0 < limit < 2 * top:
        axes.set_ylim(0, 1.08 * max(top, limit))
        axes.axhline(limit, color=report.INK, linestyle="--", zorder=0)
        report.label_right(axes, f"{limit:.4g} {unit}", limit, report.INK)
    names = list(labels(results).values())
    for i, (name, parts) in enumerate(found.items()):
        if "full" in found and name != "full":
            names[i] += f"\n{ratio(parts, found['full'])} of full"
        if "largest_batch" in parts:
            names[i] += f"\nlargest batch {parts['largest_batch']}"
        if parts.get("refused"):
            names[i] += "\ndoes not fit"
    report.below(axes, names, [LINES[name] for name in found])
    where = ", of each chip" if results["chips"] > 1 else ""
    first, _, second = heading(results).partition(": ")
    note = f"memory of one training step{where}: {second}"
    report.title(axes, first, textwrap.fill(note, int(14 * width)))
    made.savefig(path)


if __name__ == "__main__":
    main()
