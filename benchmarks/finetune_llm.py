"""Fine-tunes a language model from a Hugging Face folder with LoRA, on your own texts.

    python benchmarks/finetune_llm.py Llama-3.2-1B-Instruct --data chats.jsonl
    python benchmarks/finetune_llm.py  # SmolLM2-135M, on film reviews

The folder has config.json, safetensors (also in 4 bits of bitsandbytes) and
tokenizer.json. The data has {"messages": [...]} or {"text": "..."} on each line; of
messages only the assistant's turns are trained. Writes the adapter, the same for PEFT,
a figure and, with --merged, the merged checkpoint into benchmarks/results/finetune_llm.

Ctrl-C saves the run, and --resume with the same options continues it to the same
losses. On several devices weights and batches are split over all of them (fully sharded
data parallelism). On a chip with little memory write --base nf4 --table int8.

Without a folder, SmolLM2-135M-Instruct learns to tell whether a film review is
positive. That takes under ten minutes on two CPU cores.
"""

import argparse
import contextlib
import functools
import math
import re
import statistics
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import llm_memory
import memory
import numpy as np
import optax
import report
import run_state
import script
import training
from data import chat, reviews, smollm2_folder
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from models import folder as folders
from models.architectures import Architecture, Model
from models.generation import generate
from option_types import (
    DefaultsFormatter,
    existing_file,
    folder,
    integer_from,
    positive,
    targets_error,
)
from tqdm import tqdm

import lora_jax as lj

FLOATS = ["bfloat16", "float16", "float32"]
AXIS = "devices"
QUESTION = "Is this film review positive or negative?"
WORDS = "negative", "positive"  # by label
# A stopped run continues to the same losses only with the same values of these.
FIXED = (
    *("rank", "alpha", "rslora", "targets", "base", "table", "dtype", "length"),
    *("batch", "accumulate", "steps", "rate", "clip", "remat"),
    *("chunk", "eval", "seed"),
)


class Job(NamedTuple):
    """The model with new adapters, and its data."""

    model: Model
    params: dict  # with adapters
    names: dict[str, Any]  # the PyTorch module of each leaf
    format: chat.Format
    train: chat.Rows
    held: chat.Rows | None
    prompt: tuple[str, list[int]]  # to continue, before and after training
    mesh: Mesh | None  # None: one device


class Run(NamedTuple):
    """The state of training after a number of steps."""

    state: tuple[Any, Any]  # trainable parameters and optimizer state
    losses: list[float]
    seconds: list[float]
    held: dict[int, float]  # held-out losses by step


class Compiled(NamedTuple):
    """The compiled step, and its memory in bytes; see `training.memory`."""

    step: Callable[..., tuple[Any, dict[str, jax.Array]]]
    memory: dict[str, int]


def main(argv: list[str] | None = None) -> None:
    """Runs the job with the options of the command line."""
    began = time.perf_counter()
    parser = options()
    args = parser.parse_args(argv)
    with script.exit_on_interrupt(parser, args.output):
        with script.exit_on_error(parser, OSError), llm_memory.exit_without(args):
            with script.phase("before training"):
                job = prepare(args)
                trial_export(job)
        with llm_memory.exit_without(args):
            run(parser, job, args)
    seconds = time.perf_counter() - began
    print(f"{seconds:.0f} s in all; the files are in {args.output}")


# The command line.


def options() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(
        description="Fine-tunes a language model from a Hugging Face folder with LoRA.",
        formatter_class=DefaultsFormatter,
    )
    add = parser.add_argument
    default = "default: SmolLM2-135M-Instruct, from the package index"
    add("folder", type=model_folder, nargs="?", help=f"the model; {default}")
    lines = "JSON lines of messages or text; default: film reviews"
    add("--data", type=existing_file, help=lines)
    add_training(parser)
    held = "examples to evaluate on, which are not trained; 0: none"
    add("--eval", type=integer_from(0), default=48, help=held)
    every = "steps between evaluations, which save the run too; default: a third"
    add("--every", type=integer_from(1), help=every)
    add("--sample", type=integer_from(1), default=48, help="tokens to generate at most")
    add("--resume", action="store_true", help="continue the stopped run in --output")
    add("--merged", action="store_true", help="write the merged checkpoint too")
    output = Path(__file__).parent / "results" / "finetune_llm"
    add("--output", type=folder, default=output, help="where the files are written")
    return parser


def add_training(parser: argparse.ArgumentParser) -> None:
    """Adds the options that the training step depends on."""
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--rank", type=integer_from(1), default=16, help="rank of every adapter")
    add("--alpha", type=positive, default=32.0, help="the scale is alpha / rank")
    add("--rslora", action=switch, default=False, help="alpha / sqrt(rank) instead")
    default = ["blocks*/*/kernel"]
    add("--targets", nargs="+", default=default, help="patterns of what to adapt")
    base = "format of the frozen weights, quantized ones of the kernels; default: dtype"
    add("--base", choices=[*memory.QUANTIZED, *FLOATS], help=base)
    table = "format of the token embedding and the head"
    add("--table", choices=memory.QUANTIZED, help=table)
    dtype = "of the activations; default: float32 on CPUs, else bfloat16"
    add("--dtype", choices=FLOATS, help=dtype)
    add("--length", type=integer_from(2), default=512, help="tokens in a row")
    add("--batch", type=integer_from(1), default=1, help="rows at a time")
    add("--accumulate", type=integer_from(1), default=1, help="batches in each step")
    add("--steps", type=integer_from(1), default=60, help="steps of the optimizer")
    add("--rate", type=positive, default=1e-3, help="peak learning rate")
    add("--clip", type=positive, default=1.0, help="the gradient's largest norm")
    remat = "keep only each layer's input; default: if a folder is given"
    add("--remat", action=switch, help=remat)
    chunk = "tokens of a row whose logits exist at a time; default: at most 128"
    add("--chunk", type=integer_from(1), help=chunk)
    seed = "seed of the data's order and of the new adapters"
    add("--seed", type=integer_from(0), default=1, help=seed)


def model_folder(text: str) -> Path:
    """Parses the path of an existing folder."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text}")
    return Path(text)


def complete(args: argparse.Namespace, count: int) -> None:
    """Fills in the defaults that depend on other options, for `count` devices.

    Raises:
      ValueError: If two options do not fit each other.
    """
    cpu = jax.default_backend() == "cpu"
    args.dtype = args.dtype or ("float32" if cpu else "bfloat16")
    if args.remat is None:  # SmolLM2 is small enough to do without, which saves time
        args.remat = getattr(args, "folder", "") is not None
    if args.chunk is None:
        args.chunk = max(n for n in range(1, 129) if args.length % n == 0)
    if args.length % args.chunk:
        raise ValueError(
            f"--chunk {args.chunk} does not divide --length {args.length}."
        )
    if args.batch % count:
        raise ValueError(
            f"--batch {args.batch} cannot be split over {count} devices: write a "
            f"multiple of {count}."
        )


# The start. Wrong options, folders and data are errors before the weights are read.


def prepare(args: argparse.Namespace) -> Job:
    """Returns the model, its parameters with adapters, and the data in rows.

    Raises:
      OSError: If a file cannot be read, written or fetched.
      ValueError: If an option, the model's folder or the data is wrong.
    """
    complete(args, len(jax.devices()))
    args.every = args.every or max(1, args.steps // 3)
    check_output(args)
    path = args.folder
    if path is not None:  # before the data
        arch = folders.read_config(path)
    records = read_records(args)
    if path is None:
        path = smollm2_folder.ready()
        arch = folders.read_config(path)
    made = chat.load_format(path, chats=any(x.messages for x in records))
    train, held = split(records, args)
    rows = rows_of(made, train, args, "training", arch)
    evaluated = rows_of(made, held, args, "evaluation", arch) if held else None
    prompt = chat.prompt_of(made, (held or train)[0])
    plain = Model(arch, True, args.remat, jnp.dtype(args.dtype), param_dtype(args))
    shapes = folders.shapes(plain)
    axes = find_axes(plain, shapes)
    adapt(shapes, args, axes)  # raises for wrong targets
    args.output.mkdir(parents=True, exist_ok=True)
    devices = jax.devices()
    mesh = Mesh(np.array(devices), AXIS) if len(devices) > 1 else None
    model, base = folders.load(
        path,
        args.base if args.base in memory.QUANTIZED else None,
        args.table,
        remat=args.remat,
        dtype=jnp.dtype(args.dtype),
        param_dtype=param_dtype(args),
        sharding=mesh,
    )
    args.folder = path
    params = adapt(base, args, axes)
    return Job(
        *(model, params, folders.names(arch), made, rows, evaluated, prompt, mesh)
    )


def check_output(args: argparse.Namespace) -> None:
    """Checks whether the output fits --resume.

    Raises:
      ValueError: If there is no run to resume, if it had other options, or if a new run
        would replace a stopped one.
    """
    if args.resume:
        saved = run_state.read_run(args.output)["settings"]
        given = training.settings(args)
        if wrong := run_state.difference(saved, given, FIXED):
            raise ValueError(wrong)
    elif run_state.exists(args.output):
        raise ValueError(
            f"{args.output} has a stopped run: write --resume to continue it, another "
            f"--output, or remove {args.output / run_state.NAME}."
        )


def read_records(args: argparse.Namespace) -> list[chat.Record]:
    """Returns the records of --data, or the film reviews as chats."""
    if args.data is not None:
        return chat.read(args.data)
    texts, labels = reviews.load()
    return [
        chat.record(
            {
                "messages": [
                    {"role": "system", "content": QUESTION},
                    {"role": "user", "content": text},
                    {"role": "assistant", "content": WORDS[label]},
                ]
            },
            f"film review {i}",
        )
        for i, (text, label) in enumerate(zip(texts, labels, strict=True))
    ]


def split(
    records: list[chat.Record], args: argparse.Namespace
) -> tuple[list[chat.Record], list[chat.Record]]:
    """Splits the records at random into a training and a held-out part.

    Their order is random too: a row has several, and those of a file may be sorted.

    Raises:
      ValueError: If nothing would be left to train on.
    """
    if args.eval >= len(records):
        raise ValueError(
            f"The data has {len(records)} examples, so --eval {args.eval} leaves none "
            f"to train on. Write --eval {len(records) // 10}."
        )
    order = np.random.default_rng(args.seed).permutation(len(records))
    held, train = order[: args.eval], order[args.eval :]
    return [records[i] for i in train], [records[i] for i in held]


def rows_of(
    made: chat.Format,
    records: Sequence[chat.Record],
    args: argparse.Namespace,
    what: str,
    arch: Architecture,
) -> chat.Rows:
    """Returns the records as rows, and prints what was cut.

    Raises:
      ValueError: If no token is trained, or the model does not have a token.
    """
    examples = chat.encode(made, records)
    most = max((int(x.ids.max(initial=0)) for x in examples), default=0)
    if most >= arch.vocab:
        raise ValueError(
            f"{made.folder / 'tokenizer.json'} has a token {most}, the model has "
            f"{arch.vocab}: it is another model's tokenizer."
        )
    rows, cut, dropped = chat.pack(examples, args.length)
    if cut:
        print(
            f"{what}: {cut} of {len(examples)} examples are longer than --length "
            f"{args.length} and were cut there"
        )
    if dropped:
        print(f"{what}: {dropped} examples were left out: no token would be trained")
    if not len(rows.ids):
        raise ValueError(
            f"No example for {what} has a token to train within --length "
            f"{args.length}. Write a greater one."
        )
    tokens, trained = int((rows.segments > 0).sum()), int((rows.labels >= 0).sum())
    print(
        f"{what}: {len(examples) - dropped:,} examples in {len(rows.ids):,} rows of "
        f"{args.length} tokens, {tokens / rows.ids.size:.0%} full, {trained:,} tokens "
        "trained"
    )
    return rows


def param_dtype(args: argparse.Namespace) -> Any:
    """Returns the dtype of the weights that are not quantized."""
    return jnp.dtype(args.base if args.base in FLOATS else args.dtype)


def find_axes(model: Model, shapes: dict) -> dict[str, lj.Axes]:
    """Returns the axes of each weight: layers, inputs and outputs."""
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    apply = lambda params, ids: model.apply({"params": params}, ids)
    return lj.find_axes(apply, shapes, ids)


def adapt(params: dict, args: argparse.Namespace, axes: dict[str, lj.Axes]) -> dict:
    """Adds adapters to a tree of arrays or of shapes.

    Raises:
      ValueError: If a target is no adaptable weight.
    """
    how = dict(alpha=args.alpha, rslora=args.rslora, axes=axes)
    key = jax.random.key(args.seed)
    try:
        return lj.lorafy(params, args.rank, targets=args.targets, key=key, **how)
    except ValueError as error:
        raise targets_error(args, error, "query value") from None


def trial_export(job: Job) -> None:
    """Exports the new adapters, which raises now the errors of the final export."""
    with tempfile.TemporaryDirectory() as trial:
        export(Path(trial, "peft"), job)


def export(path: Path, job: Job) -> None:
    """Writes the adapters into a folder in PEFT's format."""
    base = str(job.format.folder.resolve())
    lj.export_peft(path, job.params, job.names, base_model=base, task_type="CAUSAL_LM")


# Training.


def decoder_loss(model: Model, chunk: int) -> Callable[..., jax.Array]:
    """Returns the loss of rows, for parameters with adapters and quantized weights.

    The batch is `ids, segments, positions, labels`, each (rows, length).
    """
    run = lambda method, params, *x: model.apply({"params": params}, *x, method=method)
    parts = [functools.partial(run, name) for name in ("hidden", "logits")]
    return training.loss_in_chunks(*parts, chunk, adapted=True)


def optimizer(args: argparse.Namespace) -> optax.GradientTransformation:
    """Returns adamw with warm-up, cosine decay and a clipped gradient."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, args.rate, warmup_steps=args.steps // 10, decay_steps=args.steps
    )
    clip = optax.clip_by_global_norm(args.clip)
    return optax.chain(clip, optax.adamw(schedule))


def start(job: Job, args: argparse.Namespace) -> tuple[Job, Run, Any]:
    """Returns the job and the run at their start, or restored, and the frozen weights.

    Raises:
      ValueError: If the saved run has other data, or its files are damaged.
    """
    tx, base = optimizer(args), lj.strip(job.params)
    trainable, _ = lj.split(job.params)
    state = placed(tx, tx.init(trainable), trainable, job.mesh)
    run = Run((), [], [], {})
    if args.resume:
        saved = run_state.read_run(args.output)
        if saved["data"] != data_digest(job):
            raise ValueError(
                f"The stopped run in {args.output} had other data, or another "
                "tokenizer. Pass the same ones, or start anew in another --output."
            )
        params, state = run_state.restore(args.output, base, state)
        job = job._replace(params=params)
        held = {int(step): loss for step, loss in saved["held"].items()}
        run = Run((), saved["losses"], saved["seconds"], held)
    trainable, frozen = lj.split(job.params)
    # Copies, because the first step deletes its arguments.
    return job, run._replace(state=training.copied((trainable, state))), frozen


def placed(
    tx: optax.GradientTransformation, state: Any, like: Any, mesh: Mesh | None
) -> Any:
    """Puts an optimizer state on the devices of its parameters."""
    if mesh is None:
        return state
    everywhere = NamedSharding(mesh, PartitionSpec())
    return optax.tree_map_params(
        tx,
        lambda x, like: jax.device_put(x, like.sharding),
        state,
        like,
        transform_non_params=lambda x: jax.device_put(x, everywhere),
    )


def compile_step(job: Job, state: Any, frozen: Any, args: argparse.Namespace) -> Any:
    """Compiles the training step, which donates its state, and reads its memory."""
    loss, tx = decoder_loss(job.model, args.chunk), optimizer(args)
    batch = batch_of(job, args, 0)
    shardings = {}
    if job.mesh is not None:
        everywhere = NamedSharding(job.mesh, PartitionSpec())
        where = jax.tree.map(lambda x: x.sharding, state), everywhere
        shardings = {"out_shardings": where}
    step = jax.jit(training.accumulated_update(loss, tx), donate_argnums=0, **shardings)
    compiled = step.lower(state, frozen, batch).compile()
    return Compiled(compiled, training.memory(compiled, state, frozen, batch))


def batch_of(job: Job, args: argparse.Namespace, step: int) -> tuple[jax.Array, ...]:
    """Returns the rows of a step, counted from 0: (accumulate, batch, length) each."""
    count = args.accumulate * args.batch
    rows = chat.stream(len(job.train.ids), args.seed, step * count, count)
    split = lambda x: x[rows].reshape(args.accumulate, args.batch, -1)
    return put(tuple(map(split, job.train)), job.mesh, 1)


def put(batch: tuple[np.ndarray, ...], mesh: Mesh | None, dim: int) -> Any:
    """Puts a batch on the devices, split along the dimension `dim`."""
    if mesh is None:
        return jax.device_put(batch)
    spec = PartitionSpec(*[None] * dim, AXIS)
    return jax.device_put(batch, NamedSharding(mesh, spec))


class Evaluation:
    """Computes the mean loss of all trained tokens of the held-out rows."""

    def __init__(self, job: Job, args: argparse.Namespace):
        self.held, self.mesh, self.size = job.held, job.mesh, args.batch
        self.run = jax.jit(
            functools.partial(decoder_loss(job.model, args.chunk), total=1.0)
        )

    def __call__(self, params: Any) -> float | None:
        """Returns the loss, or None without held-out rows."""
        if self.held is None:
            return None
        total = 0.0
        for i in range(0, len(self.held.ids), self.size):
            part = [x[i : i + self.size] for x in self.held]
            short = self.size - len(part[0])
            pads = 0, 0, 0, chat.IGNORED
            part = tuple(
                np.pad(x, ((0, short), (0, 0)), constant_values=pad)
                for x, pad in zip(part, pads, strict=True)
            )
            total += float(self.run(params, *put(part, self.mesh, 0)))
        return total / int((self.held.labels >= 0).sum())


def run(parser: argparse.ArgumentParser, job: Job, args: argparse.Namespace) -> None:
    """Trains, evaluates, and writes the files."""
    with script.phase("before training"), script.exit_on_error(parser, OSError):
        job, now, frozen = start(job, args)
        print(lj.count(job.params))
        compiled = compile_step(job, now.state, frozen, args)
        print(f"one step: {llm_memory.sizes(compiled.memory)}")
    evaluation = Evaluation(job, args)
    before = (
        sample(job, lj.combine(now.state[0], frozen), args) if not now.losses else None
    )
    with llm_memory.exit_without(args, compiled.memory):
        now = fit(parser, compiled, now, frozen, evaluation, job, args)
    done = f"after all {args.steps} steps, while the files were written"
    with script.phase(done):
        job = job._replace(params=lj.combine(now.state[0], frozen))
        finish(job, now, compiled, before, args)


def fit(
    parser: argparse.ArgumentParser,
    compiled: Compiled,
    now: Run,
    frozen: Any,
    evaluation: Evaluation,
    job: Job,
    args: argparse.Namespace,
) -> Run:
    """Trains until all steps are done.

    Ctrl-C saves the run and ends the program; so does a loss that is not finite, after
    the last good adapter is written.
    """
    params = lambda: lj.combine(now.state[0], frozen)
    save = lambda: run_state.save(
        args.output, params(), now.state[1], about(now, job, args)
    )
    with run_state.interrupts() as stop, progress(args, job, compiled) as show:
        if 0 not in now.held and (loss := evaluation(params())) is not None:
            now.held[0] = loss
        for step in range(len(now.losses), args.steps):
            if stop.is_set():
                break
            began = time.perf_counter()
            batch = batch_of(job, args, step)
            state, found = compiled.step(now.state, frozen, batch)
            loss = float(found["loss"])
            now = now._replace(state=state)
            if not math.isfinite(loss):
                stop_at_nan(parser, step, params(), args)
            now.losses.append(loss)
            now.seconds.append(time.perf_counter() - began)
            if (step + 1) % args.every == 0 or step + 1 == args.steps:
                if (held := evaluation(params())) is not None:
                    now.held[step + 1] = held
                save()
            show(now)
    if len(now.losses) < args.steps:
        save()
        parser.exit(
            128 + 2,  # SIGINT
            f"{parser.prog}: stopped after step {len(now.losses)} of {args.steps}; the "
            f"run is saved in {args.output}: write --resume to continue it\n",
        )
    return now


def stop_at_nan(
    parser: argparse.ArgumentParser, step: int, params: Any, args: argparse.Namespace
) -> None:
    """Ends the program after it wrote the last good adapter, which the step kept."""
    with script.staged(args.output) as new:
        lj.save(new / "adapter.safetensors", params)
    run_state.remove(args.output)  # to continue it would end in the same step
    kept = f"that of step {step}" if step else "the initial one"
    parser.exit(
        1,
        f"{parser.prog}: the loss is not finite in step {step + 1}. The adapter in "
        f"{args.output} is the last good one, {kept}. Write a smaller --rate, or a "
        "smaller --clip\n",
    )


def about(now: Run, job: Job, args: argparse.Namespace) -> dict[str, Any]:
    """Returns what a checkpoint holds besides arrays."""
    return {
        "step": len(now.losses),
        "losses": now.losses,
        "seconds": now.seconds,
        "held": now.held,
        "data": data_digest(job),
        "settings": training.settings(args),
        "versions": training.versions(),
    }


def data_digest(job: Job) -> str:
    """Returns a digest of the training and the held-out rows."""
    return run_state.digest([*job.train, *(job.held or ())])


def sample(job: Job, params: Any, args: argparse.Namespace) -> str:
    """Returns the most likely continuation of the prompt."""
    ids = np.array([job.prompt[1][-args.length :]], np.int32)
    lengths = np.array([ids.shape[1]], np.int32)
    ends = job.format.special.get("eos_token")
    stop = None if ends is None else job.format.tokenizer.token_to_id(ends)
    found = generate(job.model, params, ids, lengths, args.sample, stop=stop)
    tokens = np.asarray(found.ids)[0, lengths[0] : found.lengths[0]].tolist()
    return job.format.tokenizer.decode(tokens, skip_special_tokens=False)


# Progress.


@contextlib.contextmanager
def progress(
    args: argparse.Namespace, job: Job, compiled: Compiled
) -> Iterator[Callable[[Run], None]]:
    """Yields a function that shows progress: a bar on a terminal, otherwise lines."""
    full = float((job.train.segments > 0).mean())
    tokens = full * args.accumulate * args.batch * args.length  # in a step, on average

    def state(now: Run) -> str:
        rate = tokens / statistics.mean(now.seconds[-10:])
        text = f"loss {statistics.mean(now.losses[-10:]):.3f}, {rate:,.0f} tokens/s"
        if now.held:
            text += f", held-out {[*now.held.values()][-1]:.3f}"
        return f"{text}, {llm_memory.used()}"

    def line(now: Run) -> None:
        done = len(now.losses)
        if done % max(1, args.steps // 10) == 0 or done == args.steps:
            text = f"step {done}/{args.steps}: {state(now)}"
            print(text, file=sys.stderr, flush=True)

    if not sys.stderr.isatty():
        yield line
        return
    layout = "{percentage:3.0f}%|{bar}| {n}/{total}, {remaining} left{postfix}"
    with tqdm(total=args.steps, bar_format=layout) as bar:

        def show(now: Run) -> None:
            bar.set_postfix_str(state(now), refresh=False)
            bar.update(len(now.losses) - bar.n)

        yield show


# Results.


def finish(
    job: Job, now: Run, compiled: Compiled, before: str | None, args: argparse.Namespace
) -> None:
    """Writes the adapter in all formats, the results and the figure."""
    found: dict[str, Any] = about(now, job, args) | {"memory": compiled.memory}
    steady = now.seconds[1:] or now.seconds
    found |= {
        "prompt": job.prompt[0],
        "before": before,
        "after": sample(job, job.params, args),
        "step_s": statistics.median(steady),
        "peak_resident": llm_memory.peak_resident(),
        "trainable": lj.count(job.params).trainable,
    }
    with script.staged(args.output) as new:
        lj.save(new / "adapter.safetensors", job.params)
        export(new / "peft", job)
        if args.merged:
            folder = job.format.folder
            lj.export_weights(new / "merged", job.params, job.names, folder)
        script.write_json(new / "finetune_llm.json", found)
        report.held_losses(new / "finetune_llm.png", found["losses"], found["held"])
    run_state.remove(args.output)
    print(summary(found))


def summary(found: dict[str, Any]) -> str:
    """Returns the losses and the samples, before and after training."""
    lines = []
    if found["held"]:
        held = [*found["held"].values()]
        lines.append(
            f"held-out loss {held[0]:.3f} before, {held[-1]:.3f} after "
            f"{found['step']} steps of {found['step_s']:.2f} s"
        )
    lines.append(show_text("prompt", found["prompt"]))
    if found["before"] is not None:
        lines.append(show_text("before", found["before"]))
    lines.append(show_text("after", found["after"]))
    return "\n".join(lines)


def show_text(name: str, text: str) -> str:
    """Returns the end of a text in a few lines."""
    text = re.sub(r"\s+", " ", text).strip()
    text = text if len(text) < 600 else f"... {text[-590:]}"
    return textwrap.fill(f"{name}: {text}", 80, subsequent_indent="  ")


if __name__ == "__main__":
    main()
