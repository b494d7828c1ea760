"""Times LoRA's step and forward pass against full fine-tuning and other libraries.

    pip install -e ".[demo,peers]" && python benchmarks/speed.py
    python benchmarks/speed.py --jobs transformer --repeats 30

All contenders take turns in one process, so that noise affects all of them: compare
the ratios. The tables contain XLA's count of each step's FLOPs too, and its ratio to
the floor: a step that computes no frozen weight's gradient. One such step is timed:
"biases" trains the biases of the adapted layers, without adapters. LoRA is timed on
quantized frozen weights as well, next to qwix's QLoRA. Peers that are not installed
(qwix; PEFT on torch) are skipped with a message. Prints tables; writes them, the times
and a figure into benchmarks/results. Takes about ten minutes on two CPU cores.
"""

import argparse
import dataclasses
import functools
import gc
import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import script
import training
from matplotlib.figure import Figure
from models import minilm
from models.architectures import GPT2, Architecture, Model
from option_types import DefaultsFormatter, folder, integer_from
from tqdm import tqdm

import lora_jax as lj

RATE = 1e-3
TOP = 2.5  # the largest ratio that the figure draws; larger ones are written
BLOCK = 64  # elements per scale in NF4
QLORA = {"weight_qtype": "nf4", "tile_size": BLOCK}  # options of qwix's LoraProvider
SMALL = Architecture(6, 512, 8, 2048, 8192, positions=1024, tied=False, **GPT2)
MATRICES = ("query", "key", "value", "out", "up", "down", "head")


class Job(NamedTuple):
    """The model and the batch that every contender runs."""

    arch: Architecture | None  # None means MiniLM
    batch: int
    length: int
    rank: int = 8
    dtype: str = "float32"


SHALLOW = dataclasses.replace(SMALL, layers=2)
JOBS = {
    "transformer": Job(SMALL, 8, 128),
    "few tokens": Job(SHALLOW, 1, 32),
    "many tokens": Job(SHALLOW, 8, 512),
    "narrow": Job(dataclasses.replace(SHALLOW, width=256, heads=4, mlp=1024), 8, 128),
    "rank 64": Job(SHALLOW, 8, 128, 64),
    "bfloat16": Job(SHALLOW, 4, 128, 8, "bfloat16"),
    "minilm": Job(None, 32, 48),
    # For an accelerator: a billion parameters
    "1b": Job(
        Architecture(16, 2048, 16, 8192, 32000, positions=1024, tied=False, **GPT2),
        *(8, 512, 8, "bfloat16"),
    ),
}
# The aims, each a ratio of medians on the job named "transformer".
TARGETS = {
    "LoRA step / full step": ("step", "split", "full", 0.60),
    "LoRA step / qwix step": ("step", "split", "qwix", 0.65),
    "LoRA step / PEFT-on-torch step": ("step", "split", "PEFT on torch", 0.75),
    "adapters_only step / split step": ("step", "adapters_only", "split", 1.03),
    "LoRA forward / plain forward": ("forward", "LoRA", "plain", 1.06),
    "DoRA step / LoRA step": ("step", "DoRA", "split", 1.25),
    "NF4 step / LoRA step": ("step", "NF4 base", "split", 1.10),
    "NF4 step / qwix NF4 step": ("step", "NF4 base", "qwix NF4", 0.80),
    "FLOPs of the step / full": ("flops", "split", "full", 0.69),
    "FLOPs of the step / floor": ("flops", "split", "floor", 1.02),
}
COLORS = {
    "full": "#c8553d",
    "split": "#0b6e8f",
    "adapters_only": "#5aa9c4",
    "materialized": "#6b5b95",
    "A frozen": "#8c9a3c",
    "DoRA": "#a0527a",
    "int8 base": "#4d8f80",
    "NF4 base": "#9cc5ba",
    "biases": "#26413c",
    "qwix": "#e0a030",
    "qwix NF4": "#f0cf90",
    "torch": "#999999",
    "PEFT on torch": "#555555",
}


class Contender(NamedTuple):
    """One implementation of the job: `run` executes it once and waits for its end."""

    run: Callable[[], Any]
    flops: float | None = None  # counted by XLA
    temporaries: int | None = None  # bytes that XLA allocates


def main(argv: list[str] | None = None) -> None:
    """Runs the jobs with the options of the command line."""
    parser = options()
    args = parser.parse_args(argv)
    with script.exit_on_interrupt(parser, args.output):
        run(args)


def run(args: argparse.Namespace) -> None:
    """Times the jobs and writes the files, all of them or none."""
    args.output.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"versions": training.versions(), "jobs": {}}
    texts = []
    with tqdm(total=len(args.jobs), unit="job", disable=None) as bar:
        for name in args.jobs:
            bar.set_description(name)
            found["jobs"][name] = compare(JOBS[name], args.repeats, bar.write)
            texts.append(f"{title(name, JOBS[name])}\n\n{table(found['jobs'][name])}")
            bar.update()
    if "transformer" in args.jobs:
        texts.append(targets(found["jobs"]["transformer"]))
    text = "\n".join(texts)
    with script.staged(args.output) as new:
        (new / "speed.md").write_text(text + "\n", encoding="utf-8")
        script.write_json(new / "speed.json", found)
        figure(new / "speed.png", found["jobs"])
    print(f"{text}\n{found['versions']}\nThe files are in {args.output}")


def options() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(
        description="Times LoRA against full fine-tuning and other libraries.",
        formatter_class=DefaultsFormatter,
    )
    add = parser.add_argument
    default = [name for name in JOBS if name != "1b"]
    add("--jobs", nargs="+", choices=JOBS, default=default, help="the jobs to time")
    add("--repeats", type=integer_from(1), default=12, help="runs of each step")
    output = Path(__file__).parent / "results"
    add("--output", type=folder, default=output, help="where the files are written")
    return parser


def compare(
    job: Job, repeats: int, log: Callable[[str], Any] = print
) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns `{"step" or "forward": {contender: times and counts}}`."""
    found: dict[str, Any] = {}
    for kind, contenders in (("step", steps), ("forward", forwards)):
        ready = contenders(job)
        for name, peer in {"qwix": qwix_contenders, "torch": torch_contenders}.items():
            try:
                ready |= peer(job, kind)
            except ImportError as error:
                if kind == "step":
                    log(f"{name} is skipped: {error}.")
        seconds = take_turns({name: x.run for name, x in ready.items()}, repeats)
        found[kind] = {
            name: {
                "ms": [1000 * s for s in seconds[name]],
                "flops": x.flops,
                "temporaries": x.temporaries,
            }
            for name, x in ready.items()
        }
        del ready
        gc.collect()
    found["floor"] = floor(job, found)
    return found


def take_turns(
    runs: dict[str, Callable[[], Any]], repeats: int
) -> dict[str, list[float]]:
    """Returns the seconds of every run, without the first turn, which is a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    rng = np.random.default_rng(0)
    for _ in range(repeats + 1):
        # In a new order each turn, so that none always follows the same other one.
        for name in rng.permutation(list(runs)):
            time.sleep(0.2)  # lets the threads of the previous contender go to sleep
            began = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - began)
    return {name: times[1:] for name, times in seconds.items()}


# The contenders in JAX.


class Task(NamedTuple):
    """The model, the parameters and the batch that every contender starts from."""

    model: Any
    apply: Callable[..., jax.Array]
    plain: dict[str, Any]
    inputs: tuple[jax.Array, ...]
    labels: jax.Array
    targets: tuple[str, ...]  # the layers with adapters: every linear layer

    @property
    def batch(self) -> tuple[jax.Array, ...]:
        return *self.inputs, self.labels


@functools.lru_cache(maxsize=1)
def task(job: Job) -> Task:
    """Returns the job's model with random parameters, and one batch."""
    rng = np.random.default_rng(0)
    shape = job.batch, job.length
    if job.arch is None:
        model, classes = minilm.Classifier(minilm.SIZES), 2
        vocab, targets = minilm.SIZES["vocab"], MATRICES[:-1]
        extra, labels_shape = (np.ones(shape, np.int32),), shape[:1]
    else:
        dtype = jnp.dtype(job.dtype)
        model = Model(job.arch, False, False, dtype, dtype)
        vocab = classes = job.arch.vocab
        extra, labels_shape, targets = (), shape, MATRICES
    ids = rng.integers(vocab, size=shape, dtype=np.int32)
    labels = rng.integers(classes, size=labels_shape, dtype=np.int32)
    inputs = tuple(jnp.asarray(x) for x in (ids, *extra))
    plain = jax.jit(model.init)(jax.random.key(0), *inputs)["params"]
    apply = lambda params, *inputs: model.apply({"params": params}, *inputs)
    return Task(model, apply, plain, inputs, jnp.asarray(labels), targets)


@functools.lru_cache(maxsize=2)
def adapted(job: Job, **options: Any) -> dict[str, Any]:
    """Returns the parameters with adapters whose update is not zero."""
    key = jax.random.key(1)
    options = {"targets": task(job).targets, "key": key} | options
    params = lj.lorafy(task(job).plain, job.rank, **options)
    noisy = lambda b: 0.01 * jax.random.normal(key, b.shape, b.dtype)
    is_b = lambda path: path[-1].key == "lora_b"
    return jax.tree_util.tree_map_with_path(
        lambda path, x: noisy(x) if is_b(path) else x, params
    )


def quantized(job: Job, how: str) -> dict[str, Any]:
    """Returns the parameters with adapters on quantized weights."""
    return lj.quantize(
        adapted(job),
        how,
        targets=task(job).targets,
        block=BLOCK if how == "nf4" else None,
    )


def on_split_params(fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Returns `fn` as a function of the trainable and the frozen part of its tree."""
    return lambda some, rest, *inputs: fn(lj.combine(some, rest), *inputs)


def split(fn: Callable[..., jax.Array], params: Any) -> tuple[Any, Any, Any]:
    """Returns `fn(trainable, frozen, *inputs)`, the adapters and the frozen base."""
    return on_split_params(fn), *lj.split(params)


def materialized(apply: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Returns `apply` on W + scale A B, which every call computes again."""
    return lambda params, *inputs: apply(lj.merge(params), *inputs)


def steps(job: Job) -> dict[str, Contender]:
    """Returns the training steps; each owns its state and donates it."""
    apply, tx = task(job).apply, optax.adamw(RATE)
    ignore_frozen = lambda fn: lambda params, _, *inputs: fn(params, *inputs)
    lora, only = lj.lora(apply), lj.adapters_only(tx)
    only_b = optax.partition({"lora_a": optax.set_to_zero(), "lora_b": tx}, lj.labels)
    is_trained = is_bias(job)
    biases = [choose(task(job).plain, is_trained, keep) for keep in (True, False)]
    return {
        "full": step(job, tx, ignore_frozen(apply), task(job).plain, {}),
        "split": step(job, tx, *split(lora, adapted(job))),
        "adapters_only": step(job, only, ignore_frozen(lora), adapted(job), {}),
        "materialized": step(job, tx, *split(materialized(apply), adapted(job))),
        "A frozen": step(job, only_b, *split(lora, adapted(job))),
        "DoRA": step(job, tx, *split(lora, adapted(job, dora=True))),
        "int8 base": step(job, tx, *split(lora, quantized(job, "int8"))),
        "NF4 base": step(job, tx, *split(lora, quantized(job, "nf4"))),
        "biases": step(job, tx, on_split_params(apply), *biases),
    }


def step(job: Job, tx: Any, apply: Any, trainable: Any, frozen: Any) -> Contender:
    """Returns one compiled training step with its own copy of the state it donates."""
    trainable = training.copied(trainable)
    state, batch = (trainable, tx.init(trainable)), task(job).batch
    jitted = jax.jit(training.step(apply, tx), donate_argnums=0)
    compiled = jitted.lower(state, frozen, *batch).compile()

    def run():
        nonlocal state
        state, loss = compiled(state, frozen, *batch)
        jax.block_until_ready((state, loss))

    return contender(run, compiled)


def forwards(job: Job) -> dict[str, Contender]:
    """Returns the forward passes."""
    apply, plain, params = task(job).apply, task(job).plain, adapted(job)
    lora = lj.lora(apply)
    return {
        "plain": forward(job, apply, plain),
        "LoRA": forward(job, lora, params),
        "materialized": forward(job, materialized(apply), params),
        "int8 base": forward(job, lora, quantized(job, "int8")),
        "NF4 base": forward(job, lora, quantized(job, "nf4")),
    }


def forward(job: Job, apply: Callable[..., jax.Array], params: Any) -> Contender:
    """Returns one compiled forward pass."""
    args = params, *task(job).inputs
    compiled = jax.jit(apply).lower(*args).compile()
    return contender(lambda: jax.block_until_ready(compiled(*args)), compiled)


def contender(run: Callable[[], Any], compiled: Any) -> Contender:
    memory = compiled.memory_analysis().temp_size_in_bytes
    return Contender(run, compiled.cost_analysis()["flops"], memory)


def floor(job: Job, found: dict[str, Any]) -> dict[str, float]:
    """Returns the FLOPs of a LoRA step that computes no frozen weight's gradient.

    A step that trains the biases of the adapted layers computes the gradients of these
    layers' outputs, as LoRA does, and no kernel's gradient. LoRA adds two products per
    adapter in the forward pass and four in the backward pass, with 2 r FLOPs for each
    token and each input or output. The floor of the forward pass is the plain one and
    the two products.

    Args:
      job: The job that was timed.
      found: The results of `compare` for it.
    """
    return {
        "step": found["step"]["biases"]["flops"] + 3 * low_rank_flops(job),
        "forward": found["forward"]["plain"]["flops"] + low_rank_flops(job),
    }


def low_rank_flops(job: Job) -> int:
    """Returns the FLOPs of the adapters' products in a forward pass."""
    sides = [
        sum(x.shape)
        for path, x in jax.tree_util.tree_leaves_with_path(task(job).plain)
        if adapts(job, path, "kernel")
    ]
    return 2 * job.batch * job.length * job.rank * sum(sides)


def adapts(job: Job, path: Any, name: str) -> bool:
    """Returns whether a leaf has this name and its layer has an adapter."""
    return path[-1].key == name and path[-2].key in task(job).targets


def is_bias(job: Job) -> Any:
    """Returns a tree that is True at the biases of layers with an adapter."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: adapts(job, path, "bias"), task(job).plain
    )


def choose(params: Any, chosen: Any, keep: bool) -> Any:
    """Returns the chosen leaves, or all others; None replaces the rest."""
    return jax.tree.map(lambda x, c: x if c == keep else None, params, chosen)


# The peers. Each must train exactly as many parameters as lora_jax does.


def qwix_contenders(job: Job, kind: str) -> dict[str, Contender]:
    """Returns the contenders of qwix on the same model, in floats and in NF4.

    Raises:
      ImportError: If qwix is not installed.
    """
    ready = {}
    for name, options in (("qwix", {}), ("qwix NF4", QLORA)):
        apply, *pair = qwix_parts(job, **options)
        if kind == "forward":
            ready[name] = forward(job, apply, lj.combine(*pair))
        else:
            ready[name] = step(job, optax.adamw(RATE), on_split_params(apply), *pair)
    return ready


def qwix_parts(job: Job, **options: Any) -> tuple[Any, Any, Any]:
    """Returns qwix's `fn(params, *inputs)`, its adapters and its frozen base."""
    qwix = importlib.import_module("qwix")
    inputs, names = task(job).inputs, "|".join(task(job).targets)
    provider = qwix.LoraProvider(
        module_path=f"(.*/)?({names})", rank=job.rank, alpha=job.rank, **options
    )
    model = qwix.apply_lora_to_model(task(job).model, provider)
    params = model.init(jax.random.key(0), *inputs)["params"]
    apply = lambda params, *inputs: model.apply({"params": params}, *inputs)
    is_adapter = lambda path, x: "_lora_" in jax.tree_util.keystr(path)
    chosen = jax.tree_util.tree_map_with_path(is_adapter, params)
    adapters, base = (choose(params, chosen, keep) for keep in (True, False))
    check_count("qwix", sum(x.size for x in jax.tree.leaves(adapters)), job)
    return apply, adapters, base


def torch_contenders(job: Job, kind: str) -> dict[str, Contender]:
    """Returns the contenders of torch, and of PEFT on it, on a model of equal layers.

    Raises:
      ImportError: If torch or PEFT is not installed.
    """
    import peft
    import torch
    from models import torch_models

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if jax.default_backend() != ("gpu" if device == "cuda" else "cpu"):
        raise ImportError(f"torch runs on {device}, but JAX does not")
    dtype = getattr(torch, job.dtype)
    inputs = [
        torch.tensor(np.asarray(x), device=device).long() for x in task(job).inputs
    ]
    labels = torch.tensor(np.asarray(task(job).labels), device=device).long()
    config = peft.LoraConfig(
        r=job.rank, lora_alpha=job.rank, target_modules=list(task(job).targets)
    )
    ready = {}
    for name in ("torch", "PEFT on torch"):
        model = torch_models.model(job.arch).to(device, dtype)
        plain = sum(x.numel() for x in model.parameters())
        check_same(
            "torch", plain, sum(x.size for x in jax.tree.leaves(task(job).plain))
        )
        if name == "PEFT on torch":
            model = peft.get_peft_model(model, config)
            trained = [x for x in model.parameters() if x.requires_grad]
            check_count("PEFT", sum(x.numel() for x in trained), job)
        run = torch_models.step if kind == "step" else torch_models.forward
        ready[name] = Contender(run(model, inputs, labels, RATE))
    return ready


def check_count(peer: str, found: int, job: Job) -> None:
    """Raises RuntimeError unless a peer's adapters have as many parameters as ours."""
    check_same(peer, found, lj.count(adapted(job)).trainable)


def check_same(peer: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise RuntimeError(f"{peer} has {found:,} parameters, lora_jax {wanted:,}.")


# Results.


def title(name: str, job: Job) -> str:
    """Returns one line that describes the job."""
    if job.arch is None:
        what = "MiniLM, 6 layers of width 384"
    else:
        what = f"{job.arch.layers} layers of width {job.arch.width}"
    return (
        f"{name}: {what}, {job.batch} x {job.length} tokens, rank {job.rank}, "
        f"{job.dtype}"
    )


def ratio(results: dict[str, Any], kind: str, name: str, other: str) -> float | None:
    """Returns the ratio of one target, or None if a contender was skipped."""
    if kind == "flops":
        count = lambda x: (
            results["floor"]["step"] if x == "floor" else results["step"][x]["flops"]
        )
        return count(name) / count(other)
    if name not in results[kind] or other not in results[kind]:
        return None
    median = lambda x: np.median(results[kind][x]["ms"])
    return median(name) / median(other)


def table(results: dict[str, Any]) -> str:
    """Returns a job's medians and ratios, and the quartiles of the ratios per turn."""
    lines = []
    for kind, base in (("step", "full"), ("forward", "plain")):
        lines += [
            f"| {kind} | / {base} | quartiles | median, ms | GFLOP | / floor "
            "| temporaries, MB |",
            "|---|---|---|---|---|---|---|",
        ]
        first = np.array(results[kind][base]["ms"])
        for name, found in results[kind].items():
            row, memory = cells(found, first, results["floor"][kind], 1), ""
            if found["flops"] is not None:
                memory = f"{found['temporaries'] / 1e6:.1f}"
            lines.append(f"| {name} | {' | '.join([*row, memory])} |")
        least = results["floor"][kind] / 1e9
        lines += [f"| floor | | | | {least:.1f} | 1 | |", ""]
    return "\n".join(lines)


def cells(
    found: dict[str, Any], first: np.ndarray, floor: float, digits: int
) -> list[str]:
    """Returns a contender's times relative to the first one, and XLA's FLOPs."""
    ms, flops = np.array(found["ms"]), found["flops"]
    low, high = np.percentile(ms / first, [25, 75])
    counts = ["", ""]
    if flops is not None:
        counts = [f"{flops / 1e9:.1f}", f"{flops / floor:.3f}"]
    return [
        f"{np.median(ms) / np.median(first):.2f}",
        f"{low:.2f} to {high:.2f}",
        f"{np.median(ms):,.{digits}f}",
        *counts,
    ]


def verdict(what: str, found: float, most: float) -> str:
    """Returns the table row of an aim."""
    met = "met" if found <= most else "not met"
    return f"| {what} | {found:.3f} | {most:.2f} | {met} |"


def targets(results: dict[str, Any]) -> str:
    """Returns a table of the aims and the ratios that were measured."""
    lines = ["| aim | ratio | at most | |", "|---|---|---|---|"]
    for what, (kind, name, other, most) in TARGETS.items():
        found = ratio(results, kind, name, other)
        if found is None:
            lines.append(f"| {what} | not run | {most:.2f} | |")
        else:
            lines.append(verdict(what, found, most))
    return "\n".join([*lines, ""])


def figure(path: Path, jobs: dict[str, Any]) -> None:
    """Draws each step's time relative to the full one: medians with quartiles."""
    names = [x for x in COLORS if any(x in job["step"] for job in jobs.values())]
    fig = Figure(figsize=(max(7, 1.5 + 1.6 * len(jobs)), 4.4), layout="constrained")
    axes, width = fig.subplots(), 0.8 / len(names)
    for i, name in enumerate(names):
        for j, job in enumerate(jobs.values()):
            if name not in job["step"]:
                continue
            ratios = np.array(job["step"][name]["ms"]) / job["step"]["full"]["ms"]
            low, middle, high = np.percentile(ratios, [25, 50, 75])
            axes.bar(
                *(j + (i - (len(names) - 1) / 2) * width, middle, width),
                yerr=[[middle - low], [high - middle]],
                color=COLORS[name],
                ecolor="#333333",
                error_kw={"linewidth": 0.8},
                label=None if j else name,
            )
            if middle > TOP:
                axes.text(j, TOP, f"{name}: {middle:.1f}", ha="center", va="bottom")
    axes.set_ylim(0, TOP)
    axes.axhline(1, color=COLORS["full"], linewidth=1)
    axes.set_xticks(range(len(jobs)), list(jobs))
    axes.set_ylabel("time of a step / full fine-tuning's")
    axes.set_title(
        "A training step, relative to full fine-tuning on the same device", pad=20
    )
    axes.spines[["top", "right"]].set_visible(False)
    fig.legend(loc="outside lower center", ncols=4, frameon=False)
    fig.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
