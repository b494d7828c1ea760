"""Times many adapters over one base: trained together, and one for each example.

    pip install -e ".[demo,peers]" && python benchmarks/many_adapters.py
    python benchmarks/many_adapters.py --adapters 16 --repeats 30
    python benchmarks/many_adapters.py --device tpu-v5e --adapters 64

Training n adapters at once, by `jax.vmap` over a stack, is compared with n steps one
after the other, and with one adapter that trains on all of their tokens. A mixed batch,
in which each example has its own adapter, is compared with the plain forward pass, with
one adapter for all, and with PEFT's `adapter_names=` on torch, on the same weights.
(many.py compares `take`, which serves the batch here, with `mix`.) The
contenders take turns in one process: compare the ratios. FLOPs and memory are XLA's own
counts. If torch or PEFT is not installed, their rows are skipped with a message. Prints
tables; writes them, the times and a figure into benchmarks/results. Takes about ten
minutes on two CPU cores.

With --device nothing is timed: XLA's compiler for the chip, which may be absent,
computes the memory of that many adapters of a published model. A compilation takes a
minute or two.
"""

import argparse
import functools
import gc
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import memory
import numpy as np
import optax
import report
import script
import speed
import training
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from models.architectures import ARCHITECTURES, Model
from option_types import DefaultsFormatter, folder, integer_from
from tqdm import tqdm

import lora_jax as lj

JOB = speed.Job(speed.SMALL, 1, 128)  # the job of one adapter
COUNTS = [1, 4, 16, 64]  # of adapters
# For each kind of contenders the one that the others are compared with.
KINDS = {"train": "one adapter", "serve": "plain"}
COLORS = {
    "at once": "#0b6e8f",
    "one after the other": "#c8553d",
    "mixed batch": "#0b6e8f",
    "one adapter": "#e0a030",
    "plain": "#777777",
    "PEFT on torch": "#8a6fb0",
}
# The aims, each a ratio that 16 adapters have to reach.
AIMS = {
    "training 16 at once / one with their tokens": ("train", "at once", "ms", 1.10),
    "a mixed batch of 16 / the plain forward": ("serve", "mixed batch", "ms", 1.15),
    "FLOPs of training 16 at once / floor": ("train", "at once", "flops", 1.02),
    "FLOPs of a mixed batch of 16 / floor": ("serve", "mixed batch", "flops", 1.02),
}


class Contender(NamedTuple):
    """One implementation of the job: `run` executes it once and waits for its end."""

    run: Callable[[], Any]
    flops: float | None = None  # counted by XLA
    bytes: int | None = None  # all bytes that XLA allocates, and the optimizer states


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark with the options of the command line."""
    parser = options()
    args = parser.parse_args(argv)
    with script.exit_on_interrupt(parser, args.output):
        if args.device is None:
            return run(args)
        with script.exit_on_error(parser, RuntimeError):
            device = memory.devices(args.device)[0]
        plan(args, device)


def options() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(
        description="Times many adapters over one base.",
        formatter_class=DefaultsFormatter,
    )
    add = parser.add_argument
    counts = "numbers of adapters; default: 1 4 16 64, with --device 64"
    add("--adapters", nargs="+", type=integer_from(1), help=counts)
    add("--repeats", type=integer_from(1), default=8, help="runs of each contender")
    output = Path(__file__).parent / "results"
    add("--output", type=folder, default=output, help="where the files are written")
    compile_only = (
        "compute the memory on this device instead of timing: tpu-v5e, cpu..."
    )
    add("--device", type=chip, help=compile_only)
    models = [name for name, arch in ARCHITECTURES.items() if not arch.patch]
    planned = "with --device: "
    add("--model", choices=models, default="llama-3.2-1b", help=f"{planned}the model")
    per_adapter = f"{planned}sequences of each adapter"
    add("--batch", type=integer_from(1), default=1, help=per_adapter)
    per_sequence = f"{planned}tokens of each sequence"
    add("--sequence", type=integer_from(1), default=128, help=per_sequence)
    add(
        "--rank", type=integer_from(1), default=8, help=f"{planned}rank of the adapters"
    )
    return parser


def chip(text: str) -> str:
    """Parses an option: a device as in memory.py, but only one chip."""
    name = memory.device(text)
    if ":" in name:
        raise argparse.ArgumentTypeError(f"{text} is not one chip: omit the mesh")
    return name


# Timed contenders.


def run(args: argparse.Namespace) -> None:
    """Times every number of adapters and writes the files, all of them or none."""
    args.output.mkdir(parents=True, exist_ok=True)
    counts = sorted(set(args.adapters or COUNTS))
    found: dict[str, Any] = {"versions": training.versions(), "adapters": {}}
    with tqdm(total=len(counts), unit="job", disable=None) as bar:
        for n in counts:
            bar.set_description(f"{n} adapters")
            job = JOB._replace(batch=n)
            log = bar.write if n == counts[0] else lambda _: None
            found["adapters"][str(n)] = compare(job, args.repeats, log)
            bar.update()
    text = report_text(found)
    with script.staged(args.output) as new:
        (new / "many_adapters.md").write_text(text + "\n", encoding="utf-8")
        script.write_json(new / "many_adapters.json", found)
        figure(new / "many_adapters.png", found["adapters"])
    print(f"{text}\n{found['versions']}\nThe files are in {args.output}")


def compare(
    job: speed.Job, repeats: int, log: Callable[[str], Any] = print
) -> dict[str, Any]:
    """Returns `{"train" or "serve": {contender: times and counts}}`, and the floor."""
    found: dict[str, Any] = {}
    for kind, contenders in (("train", training_steps), ("serve", forward_passes)):
        ready = contenders(job)
        if kind == "serve":
            try:
                ready |= peers(job)
            except ImportError as error:
                log(f"PEFT on torch is skipped: {error}.")
        seconds = speed.take_turns({name: x.run for name, x in ready.items()}, repeats)
        found[kind] = {
            name: {
                "ms": [1000 * s for s in seconds[name]],
                "flops": x.flops,
                "bytes": x.bytes,
            }
            for name, x in ready.items()
        }
        del ready
        gc.collect()
    plain = found["serve"]["plain"]["flops"]
    least = found["train"]["one adapter"]["flops"]
    found["floor"] = {"train": least, "serve": plain + speed.low_rank_flops(job)}
    return found


def training_steps(job: speed.Job) -> dict[str, Contender]:
    """Returns the training steps; each owns its state and donates it."""
    task, tx = speed.task(job), optax.adamw(speed.RATE)
    step = training.step(speed.on_split_params(lj.lora(task.apply)), tx)
    stacked = speed.adapted(job, stack=job.batch)
    adapters, frozen = lj.split(stacked)
    many = jax.vmap(step, in_axes=(0, lj.in_axes(frozen), 0, 0))
    start = adapters, jax.vmap(tx.init)(adapters)
    apart = [x[:, None] for x in task.batch]  # (n, 1, tokens)

    first, base = lj.split(lj.take(stacked, 0))
    one = first, tx.init(first)
    alone = compiled(step, one, base, *(x[0] for x in apart))
    states = [training.copied(one) for _ in range(job.batch)]
    given = [tuple(x[i] for x in apart) for i in range(job.batch)]

    def in_turn() -> None:
        for i, batch in enumerate(given):
            states[i], loss = alone(states[i], base, *batch)
        jax.block_until_ready((states, loss))

    others = (job.batch - 1) * training.nbytes(one)
    return {
        "one adapter": trained(step, one, base, task.batch),
        "at once": trained(many, start, frozen, apart),
        "one after the other": Contender(
            in_turn,
            job.batch * alone.cost_analysis()["flops"],
            training.allocated(alone) + others,
        ),
    }


def trained(step: Callable[..., Any], state: Any, frozen: Any, batch: Any) -> Contender:
    """Returns a compiled step that trains a copy of its state further in each run."""
    made, state = compiled(step, state, frozen, *batch), training.copied(state)

    def run() -> None:
        nonlocal state
        state, loss = made(state, frozen, *batch)
        jax.block_until_ready((state, loss))

    return Contender(run, made.cost_analysis()["flops"], training.allocated(made))


def forward_passes(job: speed.Job) -> dict[str, Contender]:
    """Returns the forward passes of n examples."""
    task, stacked = speed.task(job), speed.adapted(job, stack=job.batch)
    (x,) = task.inputs
    run = lj.lora(task.apply)
    given = {
        "plain": (task.apply, task.plain, x),
        "one adapter": (run, lj.take(stacked, 0), x),
        "mixed batch": (mixed(run), stacked, order(job), x),
    }
    ready = {}
    for name, (fn, *args) in given.items():
        made = jax.jit(fn).lower(*args).compile()
        go = lambda made=made, args=args: jax.block_until_ready(made(*args))
        flops = made.cost_analysis()["flops"]
        ready[name] = Contender(go, flops, training.allocated(made))
    return ready


def mixed(run: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `fn(stacked, ids, x)`, which runs each example with its own adapter.

    `ids` selects the adapters. If there are more examples than ids, each id applies to
    equally many consecutive examples.
    """

    def fn(stacked, ids, x):
        own, apart = lj.take(stacked, ids), (len(ids), -1, *x.shape[1:])
        y = jax.vmap(run, in_axes=(lj.in_axes(own), 0))(own, jnp.reshape(x, apart))
        return jnp.reshape(y, (len(x), *y.shape[2:]))

    return fn


def order(job: speed.Job) -> jax.Array:
    """Returns the adapter of each example: a permutation of all adapters."""
    return jax.random.permutation(jax.random.key(2), job.batch)


def compiled(step: Callable[..., Any], state: Any, *args: Any) -> Any:
    return jax.jit(step, donate_argnums=0).lower(state, *args).compile()


def peers(job: speed.Job) -> dict[str, Contender]:
    """Returns the forward pass in torch, and a mixed batch with PEFT on torch.

    Raises:
      ImportError: If torch or PEFT is not installed.
      RuntimeError: If PEFT's logits differ from ours.
    """
    import peft
    import torch
    from models import torch_models

    if torch.cuda.is_available() or jax.default_backend() != "cpu":
        raise ImportError("the comparison is for CPUs only")
    task, stacked = speed.task(job), speed.adapted(job, stack=job.batch)
    x = torch.tensor(np.asarray(task.inputs[0])).long()
    plain, model = torch_models.model(job.arch).eval(), torch_models.model(job.arch)
    for module in (plain, model):
        torch_models.load(module, task.plain)
    config = peft.LoraConfig(
        r=job.rank, lora_alpha=job.rank, target_modules=list(task.targets)
    )
    names = [str(i) for i in range(job.batch)]
    model = peft.get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    copy_factors(stacked, model.base_model.model, names)
    model.eval()
    own = [names[i] for i in order(job)]

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return args[0](x, **kwargs)

    peft_run = functools.partial(run, model, adapter_names=own)
    ours = jax.jit(mixed(lj.lora(task.apply)))
    want = ours(stacked, order(job), *task.inputs)
    off = np.abs(peft_run().numpy() - want).max()
    if off > 1e-3 * np.abs(want).max():
        raise RuntimeError(f"PEFT's logits of the mixed batch differ by {off:.1e}.")
    return {
        "torch": Contender(functools.partial(run, plain)),
        "PEFT on torch": Contender(peft_run),
    }


def copy_factors(stacked: Any, model: Any, names: list[str]) -> None:
    """Copies the factors of every adapter into PEFT's layers."""
    import torch
    from models import torch_models

    factors = {"lora_a": "lora_A", "lora_b": "lora_B"}
    for path, x in jax.tree.leaves_with_path(lj.detach(stacked)):
        *parents, leaf = (entry.key for entry in path)
        if leaf not in factors:
            continue
        layer = model.get_submodule(torch_models.module_name(parents))
        for name, own in zip(names, np.asarray(x), strict=True):
            weight = getattr(layer, factors[leaf])[name].weight
            with torch.no_grad():
                weight.copy_(torch.tensor(own.T))


# Results.


def median(results: dict[str, Any], kind: str, name: str) -> float | None:
    """Returns the median of a contender's times, or None if it was skipped."""
    found = results[kind].get(name)
    return None if found is None else float(np.median(found["ms"]))


def report_text(found: dict[str, Any]) -> str:
    """Returns the printed report: the tables, the aims, and a summary."""
    parts = [heading()]
    for kind in KINDS:
        parts += [table(found["adapters"], kind), ""]
    if "16" in found["adapters"]:
        parts += [aims(found["adapters"]["16"]), ""]
    return "\n".join([*parts, summary(found["adapters"])])


def heading() -> str:
    """Returns one line that describes the timed job."""
    return (
        f"{JOB.arch.layers} layers of width {JOB.arch.width}, each adapter of rank "
        f"{JOB.rank} with 1 x {JOB.length} tokens, {JOB.dtype}\n"
    )


def table(adapters: dict[str, Any], kind: str) -> str:
    """Returns a table of medians, ratios, and the quartiles of the ratios per turn."""
    base = KINDS[kind]
    what = {"train": "a training step", "serve": "a forward pass"}[kind]
    lines = [
        f"| n | {what} | / {base} | quartiles | median, ms | GFLOP | / floor | MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for n, results in adapters.items():
        first = np.array(results[kind][base]["ms"])
        for name, found in results[kind].items():
            row, memory = speed.cells(found, first, results["floor"][kind], 0), ""
            if found["flops"] is not None:
                memory = f"{found['bytes'] / 1e6:,.0f}"
            lines.append(f"| {n} | {name} | {' | '.join([*row, memory])} |")
    return "\n".join(lines)


def aims(results: dict[str, Any]) -> str:
    """Returns a table of the aims and the ratios that were measured."""
    lines = ["| aim | ratio | at most | |", "|---|---|---|---|"]
    for what, (kind, name, unit, most) in AIMS.items():
        if unit == "ms":
            found = median(results, kind, name) / median(results, kind, KINDS[kind])
        else:
            found = results[kind][name]["flops"] / results["floor"][kind]
        lines.append(speed.verdict(what, found, most))
    return "\n".join(lines)


def summary(adapters: dict[str, Any]) -> str:
    """Returns sentences on the relative cost of the largest number of adapters."""
    n, results = list(adapters.items())[-1]
    train = functools.partial(median, results, "train")
    serve = functools.partial(median, results, "serve")
    lines = [
        f"Training {n} at once takes {train('at once') / train('one adapter'):.2f} of "
        "the time of one adapter with their tokens, and "
        f"{train('at once') / train('one after the other'):.2f} of that of as many "
        "steps one after the other.",
        f"A mixed batch of {n} takes {serve('mixed batch') / serve('plain'):.2f} of "
        "the plain forward pass, and "
        f"{serve('mixed batch') / serve('one adapter'):.2f} of one adapter for all.",
    ]
    if peft := serve("PEFT on torch"):
        lines.append(
            f"PEFT's takes {peft / serve('torch'):.2f} of torch's plain one, and "
            f"{peft / serve('mixed batch'):.2f} of the mixed batch here."
        )
    return "\n".join(lines)


def figure(path: Path, adapters: dict[str, Any]) -> None:
    """Draws time and memory over the number of adapters into a PNG."""
    made = Figure(figsize=(12.6, 4.1), dpi=130, layout="constrained")
    train, serve, size = made.subplots(1, 3)
    draw(train, adapters, "train", ["at once", "one after the other"])
    draw(serve, adapters, "serve", ["mixed batch", "one adapter", "PEFT on torch"])
    draw_memory(size, adapters)
    report.title(train, "Time of a training step", "/ one adapter with all tokens")
    report.title(
        serve, "Time of a forward pass", "/ the plain one; PEFT / torch's plain one"
    )
    report.title(size, "Memory of a training step", "GB that XLA allocates for it")
    made.get_layout_engine().set(w_pad=0.12, h_pad=0.1, wspace=0.04)
    made.savefig(path)


def draw(
    axes: Axes, adapters: dict[str, Any], kind: str, contenders: list[str]
) -> None:
    """Draws each contender's time relative to the base: medians with quartiles."""
    ends: dict[str, float] = {}
    for name in contenders:
        base = "torch" if name == "PEFT on torch" else KINDS[kind]
        known = [(int(n), x[kind]) for n, x in adapters.items() if name in x[kind]]
        if not known:
            continue
        ratios = [np.array(x[name]["ms"]) / x[base]["ms"] for _, x in known]
        low, high = np.percentile(ratios, [25, 75], axis=1)
        middle = [np.median(x[name]["ms"]) / np.median(x[base]["ms"]) for _, x in known]
        counts = [n for n, _ in known]
        axes.fill_between(counts, low, high, color=COLORS[name], alpha=0.15, lw=0)
        axes.plot(counts, middle, "o-", color=COLORS[name], linewidth=2)
        ends[name] = middle[-1]
    axes.axhline(1, color="#999999", linewidth=1, linestyle="--", zorder=0)
    axes.set_ylim(0, None)
    label(axes, adapters, ends, "{:.2f}")


def draw_memory(axes: Axes, adapters: dict[str, Any]) -> None:
    """Draws all bytes of a training step over the number of adapters."""
    ends: dict[str, float] = {}
    for name in ("at once", "one after the other", "one adapter"):
        sizes = [x["train"][name]["bytes"] / 1e9 for x in adapters.values()]
        axes.plot(list(map(int, adapters)), sizes, "o-", color=COLORS[name])
        ends[name] = sizes[-1]
    axes.set_ylim(0, None)
    label(axes, adapters, ends, "{:.1f} GB")


def label(
    axes: Axes, adapters: dict[str, Any], ends: dict[str, float], template: str
) -> None:
    """Labels the x axis with the numbers of adapters, and each line at its end."""
    gap = 0.13 * np.ptp(axes.get_ylim())
    places = report.spread(list(ends.values()), gap)
    for (name, value), y in zip(ends.items(), places, strict=True):
        short = name.replace("one after the other", "one after\nthe other")
        text = f"{short.replace(' on torch', '')} {template.format(value)}"
        report.label_right(axes, text, y, COLORS[name])
    axes.set_xscale("log", base=2)
    axes.set_xticks([int(n) for n in adapters], list(adapters))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("adapters", color=report.INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=report.INK, length=3)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


# The memory on a chip, from compilation alone.


def plan(args: argparse.Namespace, device: Any) -> None:
    """Compiles for the chip, and prints and writes the memory of each program."""
    found: dict[str, Any] = {
        "device": device.device_kind,
        "settings": {k: str(v) for k, v in vars(args).items()},
        "versions": training.versions(),
        "adapters": {},
    }
    counts = sorted(set(args.adapters or COUNTS[-1:]))
    with tqdm(total=4 * len(counts), unit=" compiled", disable=None) as bar:
        for n in counts:
            found["adapters"][str(n)] = rows = {}
            for name, lower in programs(args, n, device).items():
                bar.set_description(f"{n} adapters, {name}")
                rows[name] = measure(*lower(), device.platform == "tpu")
                bar.update()
    text = plan_table(args, found)
    with script.staged(args.output) as new:
        script.write_json(new / "many_adapters_plan.json", found)
    print(f"{text}\nThe file is in {args.output}")


def programs(
    args: argparse.Namespace, n: int, device: Any
) -> dict[str, Callable[[], tuple[Any, dict[str, int]]]]:
    """Returns a function for each program that lowers it, and returns known sizes."""
    arch = ARCHITECTURES[args.model]
    sharding = jax.sharding.SingleDeviceSharding(device)
    model = Model(arch)
    run = lambda method, params, x: model.apply({"params": params}, x, method=method)
    put = lambda tree: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
    )
    tokens = lambda *shape: put(jax.ShapeDtypeStruct(shape, jnp.int32))
    shape = args.batch, args.sequence
    inputs = tokens(*shape)
    plain = put(jax.eval_shape(model.init, jax.random.key(0), inputs)["params"])
    axes = lj.find_axes(functools.partial(run, None), plain, inputs)
    adapt = functools.partial(
        lj.lorafy, plain, args.rank, targets=["blocks*/*/kernel"], axes=axes
    )
    parts = functools.partial(run, "hidden"), functools.partial(run, "logits")
    chunk = math.gcd(32, args.sequence)
    loss = training.loss_in_chunks(*parts, chunk, adapted=True)
    tx = optax.adamw(speed.RATE)
    step = training.update(speed.on_split_params(loss), tx)
    # A server needs only the logits of the last token.
    last = lambda params, x: parts[1](params, parts[0](params, x)[:, -1:])

    def train(several: bool) -> tuple[Any, dict[str, int]]:
        adapters, frozen = lj.split(put(adapt(stack=n) if several else adapt()))
        init, fn, batch = tx.init, step, (n * args.batch, args.sequence)
        if several:
            init, batch = jax.vmap(init), (n, *shape)
            fn = jax.vmap(step, in_axes=(0, lj.in_axes(frozen), 0, 0))
        state = adapters, put(jax.eval_shape(init, adapters))
        lowered = jax.jit(fn, donate_argnums=0).lower(
            state, frozen, tokens(*batch), tokens(*batch)
        )
        return lowered, training.parts(state, frozen)

    def serve(several: bool) -> tuple[Any, dict[str, int]]:
        fn, given = last, (plain, tokens(n * args.batch, args.sequence))
        if several:
            fn = mixed(lj.lora(last))
            given = put(adapt(stack=n)), tokens(n), given[1]
        sizes = {"parameters": training.nbytes(given[0]), "optimizer": 0}
        return jax.jit(fn).lower(*given), sizes

    return {
        "training at once": lambda: train(True),
        "training one with their tokens": lambda: train(False),
        "serving a mixed batch": lambda: serve(True),
        "serving the plain model": lambda: serve(False),
    }


def measure(lowered: Any, sizes: dict[str, int], on_tpu: bool) -> dict[str, Any]:
    """Returns the bytes of a lowered program, like `measure` in memory.py."""
    made, refusal = memory.compile_or_refusal(lowered)
    if made is None:
        return sizes | refusal
    # XLA's own peak excludes the temporaries on CPU.
    peak = (
        made.memory_analysis().peak_memory_in_bytes
        if on_tpu
        else training.allocated(made)
    )
    return sizes | {"peak": peak}


def plan_table(args: argparse.Namespace, found: dict[str, Any]) -> str:
    """Returns the table of a plan, in GB."""
    cell = lambda x: "unknown" if x is None else f"{x / 1e9:.2f}"
    lines = [
        f"{args.model} in bfloat16 on {found['device']}: adapters of rank {args.rank} "
        f"in float32, {args.batch} x {args.sequence} tokens each\n",
        "| adapters | | peak, GB | parameters | optimizer | the rest |",
        "|---|---|---|---|---|---|",
    ]
    for n, rows in found["adapters"].items():
        for name, x in rows.items():
            known = x["parameters"] + x["optimizer"]
            rest = None if x["peak"] is None else x["peak"] - known
            sizes = [x["peak"], x["parameters"], x["optimizer"], rest]
            cells = [cell(size) for size in sizes]
            if x.get("refused"):
                cells[0] += f", more than the limit of {cell(x['limit'])}"
            lines.append(f"| {n} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
