"""Says what memory a training step takes, in full and with LoRA, on any chip.

    python benchmarks/memory.py --model llama-3-8b --device tpu-v5e:2x4
    python benchmarks/memory.py --model gpt2-medium --device tpu-v5e --fits 16GB
    python benchmarks/memory.py --model llama-3-8b --device tpu-v5e --base nf4

From XLA's own compiler: nothing is allocated, and a TPU need not be there. Prints a
table; writes the numbers and a figure into benchmarks/results. A compilation takes
about a minute on two CPU cores.

On several chips each kernel is split over all of them along its longer side, each table
of tokens along its features, and gathered where it is used, layer by layer; optimizer
state is split like its parameters (fully sharded data parallelism). A batch is split
too, and the figures are those of one chip.

--base and --table put the frozen weights of the methods with adapters into few bits, or
into other floats. Full fine-tuning trains all weights, and holds them in --dtype; "LoRA
materialised" makes all plain weights, W + A B, from the stored ones in every step. With
--chunk the loss of every method is made of the logits of so many tokens of each
sequence at a time.
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

import files
import jax
import jax.numpy as jnp
import numpy as np
import optax
import report
import training
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from models.architectures import ARCHITECTURES, Architecture, Model
from readers import Defaults, folder, targets, whole
from tqdm import tqdm

import lora_jax as lj

METHODS = {"lora": "LoRA", "merged": "LoRA materialised", "full": "full"}
LINES = report.LINES | {"merged": "#6b5b95"}
AXIS = "chips"
FLOATS, FEW = ["bfloat16", "float32"], ["int8", "int4", "nf4"]
UNITS = {"MB": 1e6, "GB": 1e9, "MiB": 2.0**20, "GiB": 2.0**30}


class Job(NamedTuple):
    """What is compiled, but for the method and the batch; shapes stand for arrays."""

    args: argparse.Namespace
    arch: Architecture
    sequence: int  # tokens; of an image model, patches and the class
    mesh: Mesh
    loss: Callable[[Any, Any, Any], jax.Array]  # of parameters, inputs and labels
    params: dict[str, Any]
    adapted: dict[str, Any] | None  # as stored, with adapters, if any method has them


def main(argv: list[str] | None = None) -> None:
    """Runs the job that the command line asks for."""
    began = time.perf_counter()
    parser = options()
    args = parser.parse_args(argv)
    with files.stoppable(parser, args.output):
        with files.refusing(parser, RuntimeError):
            job = prepare(args)
        found = {"methods": compare(job)} | about(job)
        with files.written(args.output) as new:
            files.write_json(new / "memory.json", found)
            figure(new / "memory.png", found)
            print(f"{heading(found)}\n\n{table(found)}\n\n{words(found)}")
    count = sum(len(x["peaks"]) for x in found["methods"].values())
    seconds = time.perf_counter() - began
    print(f"{count} compilations, {seconds:.0f} s; the files are in {args.output}")


def compare(job: Job) -> dict[str, dict[str, Any]]:
    """Returns what each method takes, and the largest batch that fits if asked for.

    Of every batch that was compiled for that, `peaks` has the peak.
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
                # What XLA refuses does not fit, whatever the limit.
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
    """Returns what the numbers depend on."""
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
        description="Says what memory a training step takes, in full and with LoRA.",
        formatter_class=Defaults,
    )
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--model", choices=list(ARCHITECTURES), default="gpt2-medium", help="its sizes")
    add("--layers", type=whole(1), help="instead of the model's own number")
    add(
        "--device", type=device, default="cpu", help="cpu, gpu, tpu-v5e, tpu-v5e:2x4..."
    )
    add("--batch", type=whole(1), help="of all chips; default: one for each chip")
    add("--sequence", type=whole(1), help="tokens; default: 1024, an image's patches")
    add("--rank", type=whole(1), default=8, help="of every adapter")
    add("--targets", nargs="+", default=["blocks*/*/kernel"], help="what to adapt")
    add(
        "--dtype",
        choices=FLOATS,
        default="bfloat16",
        help="of all but the adapters, which are float32",
    )
    add(
        "--base",
        choices=[*FLOATS, *FEW],
        help="of the blocks' frozen kernels; default: --dtype",
    )
    add(
        "--table",
        choices=[*FLOATS, *FEW],
        help="of the table of tokens and the head, likewise",
    )
    add("--chunk", type=whole(1), metavar="TOKENS", help="whose logits exist at a time")
    add("--remat", action=switch, default=True, help="keep only each block's input")
    add("--scan", action=switch, default=True, help="stack the layers")
    add(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        help="to compare",
    )
    add("--fits", type=size, metavar="16GB", help="find the largest batch that fits")
    place = Path(__file__).parent / "results"
    add("--output", type=folder, default=place, help="where the files are written")
    return parser


def device(text: str) -> str:
    """Reads an option: cpu, gpu, or a kind of TPU with or without a mesh."""
    if not re.fullmatch(r"cpu|gpu|tpu-\w+(:[1-9]\d*x[1-9]\d*)?", text, re.ASCII):
        raise argparse.ArgumentTypeError(
            f"{text} is not what can be planned for: cpu, gpu (the one in this "
            "machine), or a TPU, there or not, such as tpu-v5e, tpu-v6e or tpu-v5e:2x4"
        )
    return text


def size(text: str) -> float:
    """Reads an option: bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([MG]i?B)", text, re.ASCII)
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(
            f"{text} is not a size such as 16GB or 15.75GiB"
        )
    return float(found[1]) * UNITS[found[2]]


def prepare(args: argparse.Namespace, **changed: Any) -> Job:
    """Returns what to compile; what the options get wrong is found before that.

    `changed` are fields of the model's architecture.

    Raises:
      RuntimeError: If there is no such device, or nothing to compile for it with.
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
        keep=lambda x: jax.lax.with_sharding_constraint(x, split_over(mesh, AXIS)),
    )
    run = lambda method, params, x: model.apply({"params": params}, x, method=method)
    apply = functools.partial(run, None)
    loss = training.loss(apply)
    if args.chunk:
        parts = (functools.partial(run, name) for name in ("hidden", "logits"))
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
        raise targets(args, error, "query value") from None
    return job._replace(adapted=adapted)


def tokens(args: argparse.Namespace, arch: Architecture) -> int:
    """Returns how many tokens an input has, once the options are known to fit."""
    if arch.patch and args.sequence:
        raise ValueError(f"--sequence is of text: {args.model} takes images.")
    sequence = args.sequence or min(1024, arch.positions or 1024)
    if arch.patch:
        sequence = 1 + (arch.image // arch.patch) ** 2
    elif arch.positions and sequence > arch.positions:
        raise ValueError(
            f"{args.model} has {arch.positions} positions, fewer than --sequence "
            f"{sequence}."
        )
    if args.chunk and arch.patch:
        raise ValueError(f"--chunk is of tokens: {args.model} takes images.")
    if args.chunk and sequence % args.chunk:
        raise ValueError(f"--chunk {args.chunk} does not divide {sequence} tokens.")
    if (args.base or args.table) and {*args.methods} == {"full"}:
        raise ValueError(
            "--base and --table are of frozen weights, and full fine-tuning has none: "
            "write --methods lora full."
        )
    return sequence


def store(
    params: dict[str, Any], args: argparse.Namespace, axes: dict[str, lj.Axes]
) -> dict[str, Any]:
    """Puts frozen weights into the formats of --base and --table."""
    few = {}

    def put(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        how = args.table if name in ("tokens/embedding", "head/kernel") else None
        if name.startswith("blocks") and path[-1].key == "kernel":
            how = args.base
        if how in FEW:
            few[name] = how
        elif how:
            return jax.ShapeDtypeStruct(x.shape, how, sharding=x.sharding)
        return x

    params = jax.tree_util.tree_map_with_path(put, params)
    return lj.quantize(params, few, axes=axes) if few else params


def devices(name: str) -> list[Any]:
    """Returns the devices to compile for; those of a TPU are only described.

    Raises:
      RuntimeError: If there are none of that name.
    """
    if not name.startswith("tpu"):
        try:
            return jax.devices(name)[:1]
        except RuntimeError:
            raise RuntimeError(
                f"There is no {name} in this machine, and its compiler plans for no "
                "other: write --device cpu, or a TPU such as tpu-v5e, which need not "
                "be there."
            ) from None
    kind, _, shape = name.removeprefix("tpu-").partition(":")
    # The compiler alone is wanted: no machine is asked which TPU it has, and no TPU is
    # kept from other processes.
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
            "To compile for a TPU there must be libtpu, which holds XLA's compiler "
            'for it: pip install -e ".[demo,tpu]"'
        ) from None
    host = {"chips_per_host_bounds": (1, 1, 1)} if shape == "1x1" else {}
    try:
        return topologies.get_topology_desc(f"{kind}:{shape}", "tpu", **host).devices
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        raise ValueError(f"libtpu knows no {name}: {error}") from None


# The step, from shapes alone.


def batch_of(job: Job, n: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Returns the shapes of n inputs and of their labels."""
    shape, dtype, labels = (n, job.sequence), jnp.int32, (n, job.sequence)
    if job.arch.patch:
        shape, labels = (n, job.arch.image, job.arch.image, 3), (n,)
        dtype = jnp.dtype(job.args.dtype)
    place = split_over(job.mesh, AXIS)
    inputs = jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    return inputs, jax.ShapeDtypeStruct(labels, jnp.int32, sharding=place)


def split_over(mesh: Mesh, *names: str | None) -> NamedSharding:
    """Returns the sharding whose dimensions are split over the axes of those names."""
    return NamedSharding(mesh, PartitionSpec(*names))


def distribute(params: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Splits each kernel and table over all chips; the rest is on every chip."""

    def place(path, x):
        names = [None] * x.ndim
        # Not along stacked layers, so that each is gathered when its turn comes; nor
        # along tokens, since a lookup would then be summed over the chips.
        first = x.ndim - 1 if path[-1].key == "embedding" else path[0].key == "blocks"
        even = [d for d in range(first, x.ndim) if x.shape[d] % mesh.size == 0]
        if path[-1].key in ("kernel", "embedding") and even:
            names[max(even, key=lambda d: x.shape[d])] = AXIS
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split_over(mesh, *names))

    return jax.tree_util.tree_map_with_path(place, params)


def lower(job: Job, name: str, n: int) -> tuple[Any, tuple[Any, Any, Any]]:
    """Returns a method's step on a batch of n, lowered, and its arguments' shapes."""
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
    """Returns the same for `loss(trainable, frozen, *batch)`."""
    tx = optax.adamw(1e-3)
    put = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    optimizer = optax.tree_map_params(
        tx,
        lambda x, like: put(x, like.sharding),
        jax.eval_shape(tx.init, trainable),
        trainable,
        transform_non_params=lambda x: put(x, split_over(job.mesh)),
    )
    state, batch = (trainable, optimizer), batch_of(job, n)
    step = jax.jit(training.update(loss, tx), donate_argnums=0)
    return step.lower(state, frozen, *batch), (state, frozen, batch)


def measure(job: Job, name: str, n: int) -> dict[str, Any]:
    """Returns the bytes on each chip of a method's step on a batch of n, in parts.

    The parts are those of `training.memory`, but the temporaries are all of the peak
    that is neither parameters nor optimizer state. What XLA refuses to compile, since
    the chip has too little memory, has a `limit`, and the peak that XLA names.
    """
    lowered, (state, frozen, batch) = lower(job, name, n)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        parts = training.parts(state, frozen) | refusal(str(error))
    else:
        parts = training.memory(compiled, state, frozen, batch)
        if job.args.device.startswith("tpu"):
            parts["peak"] = compiled.memory_analysis().peak_memory_in_bytes
        parts["bytes_accessed"] = compiled.cost_analysis()["bytes accessed"]
    rest = None
    if parts["peak"] is not None:
        rest = parts["peak"] - parts["parameters"] - parts["optimizer"]
    return parts | {"temporaries": rest, "batch": n}


def refusal(text: str) -> dict[str, int | None]:
    """Returns the peak and the limit that XLA names, if it does, out of memory."""
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

    The search starts at `first`, a batch for each chip.

    Memory is close to a straight line over the batch: looked at next is where the line
    through two batches meets the limit. The answer, unless it is 0, and the next larger
    batch are always among those looked at.
    """
    seen: dict[int, float] = {}  # a batch for each chip: its peak
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
    """Returns the batch to look at next: above `fits`, which fits, below `above`."""
    known = sorted(n for n, size in seen.items() if size < math.inf)
    if len(known) > 1 and len(seen) < 8:  # else the line has been of no help
        x, y = known[-2:]
        slope = (seen[y] - seen[x]) / (y - x)
        line = (limit - seen[y]) / slope if slope > 0 else math.inf
        n = max(fits + 1, y + math.floor(min(line, 1e9)))
        if above in known:
            return min(n, above - 1)
        # Not too far at once: parameters can hide the slope of small batches.
        if n < (above or 64 * fits):
            return n
    return 2 * fits if above is None else (fits + above) // 2


# What came of it.


def heading(results: dict[str, Any]) -> str:
    """Returns what was compiled, in a line."""
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
    """Returns the methods by their names, with what the base of each is in."""
    base = results["settings"]["base"]
    on = {name: f" on {base}" if base and name != "full" else "" for name in METHODS}
    return {name: METHODS[name] + on[name] for name in results["methods"]}


def unit_of(results: dict[str, Any]) -> str:
    """Returns the unit in which the numbers are easy to read."""
    held = [x["parameters"] + x["optimizer"] for x in results["methods"].values()]
    return "GB" if max(held) > 1e8 else "MB"


def table(results: dict[str, Any]) -> str:
    """Returns the methods side by side."""
    found, unit = results["methods"], unit_of(results)
    cell = lambda x: "unknown" if x is None else f"{x / UNITS[unit]:.3f}"
    rows = {
        f"parameters, {unit}": [cell(x["parameters"]) for x in found.values()],
        f"optimizer state, {unit}": [cell(x["optimizer"]) for x in found.values()],
        f"temporaries, {unit}": [cell(x["temporaries"]) for x in found.values()],
        f"  of which gradients, at most, {unit}": [
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
    """Returns how a peak compares with that of full fine-tuning."""
    if not parts["peak"] or not full["peak"]:
        return "unknown"
    return f"{parts['peak'] / full['peak']:.3f}"


def words(results: dict[str, Any]) -> str:
    """Says what the numbers mean: what does not fit, and where LoRA saves little."""
    found, unit, text = results["methods"], unit_of(results), []
    told = lambda size: f"{size / UNITS[unit]:.2f} {unit}"
    for name, parts in found.items():
        if parts.get("refused"):
            line = "XLA refuses it"
            if parts["peak"]:
                line = f"it needs at least {told(parts['peak'])} of the chip's "
                line += told(parts["limit"])
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
                f", and what is left to save is there, by {remat}a smaller batch or "
                "shorter inputs, not by LoRA"
            )
        text.append(line + ".")
        at_once = " at a time" if results["settings"]["chunk"] else ""
        logits = told(results["logits"])
        text.append(f"The logits alone, in float32, are {logits}{at_once}.")
    return "\n".join(text)


def activations(parts: dict[str, Any]) -> int:
    """Returns what of the temporaries cannot be gradients."""
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
        report.beside(axes, f"{limit:.4g} {unit}", limit, report.INK)
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
