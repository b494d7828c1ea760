"""Fine-tunes a pretrained encoder for sentiment, with LoRA, its variants, and in full.

    python benchmarks/finetune.py  # with LoRA, and in full
    python benchmarks/finetune.py --method lora dora pissa lora+ full

All methods start from the same all-MiniLM-L6-v2 and see the same batches of Rotten
Tomatoes sentences. Prints a table; writes the adapters, the results and a figure into
benchmarks/results. Takes a few minutes on two CPU cores.
"""

import argparse
import contextlib
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import report
import safetensors.numpy
import script
import training
from data import reviews
from flax.traverse_util import flatten_dict
from models import minilm
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

LENGTH = 48  # tokens of a sentence; longer ones are truncated
HEAD = ("head",)  # has new weights, so it is trained in full, next to the adapters

Batch = tuple[np.ndarray, np.ndarray, np.ndarray]  # ids, mask (n, LENGTH); labels (n,)


class Method(NamedTuple):
    """A training method, compiled for its initial state."""

    step: Callable[..., tuple[Any, jax.Array]]  # (state, frozen, *batch): state, loss
    state: Any  # trainable parameters and optimizer state; the first step donates them
    frozen: Any
    memory: dict[str, int]
    start: Any = None  # with adapters: the entire tree before the first step


class Fitted(NamedTuple):
    """The trained parameters, and the loss and the seconds of every step."""

    trainable: Any
    losses: list[float]
    seconds: list[float]


def main(argv: list[str] | None = None) -> None:
    """Runs the job with the options of the command line."""
    began = time.perf_counter()
    parser = options()
    args = parser.parse_args(argv)
    with script.exit_on_interrupt(parser, args.output):
        with script.exit_on_error(parser, OSError):
            with script.phase("before training"):
                job = prepare(args)
        run(*job, args)
    print(f"{time.perf_counter() - began:.0f} s in all; the files are in {args.output}")


def run(
    model: minilm.Classifier,
    pretrained: dict,
    train: Batch,
    held: Batch,
    args: argparse.Namespace,
) -> None:
    """Trains, tests, and writes the files, all of them or none."""
    with script.phase("before training"):
        methods = {
            name: compile_full(model, pretrained, train, args)
            if name == "full"
            else compile_lora(model, pretrained, train, args, name)
            for name in args.method
        }
    fitted = fit(methods, train, args)
    done = f"after all {args.steps} steps, during the tests"
    with script.phase(done), script.staged(args.output) as new:
        found: dict[str, Any] = {}
        for name, method in methods.items():
            trained = fitted[name].trainable
            if name == "full":
                found[name] = evaluate_full(model, trained, held)
            else:
                params = lj.combine(trained, method.frozen)
                start = method.start if name == "pissa" else None
                suffix = "" if name == "lora" else f"_{name}"
                path = new / f"adapter{suffix}.safetensors"
                found[name] = evaluate_lora(
                    model, params, pretrained, held, path, start
                )
            step_ms = 1000 * statistics.median(fitted[name].seconds)
            found[name] |= {"step_ms": step_ms, "memory": method.memory}
        found["settings"] = training.settings(args)
        found["versions"] = training.versions()
        script.write_json(new / "finetune.json", found)
        losses = {name: fit.losses for name, fit in fitted.items()}
        report.figure(new / "finetune.png", found, losses)
        print(report.table(found))


# The command line.


def options() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(
        description="Fine-tunes MiniLM for sentiment, with adapters and in full.",
        formatter_class=DefaultsFormatter,
    )
    add = parser.add_argument
    add("--rank", type=integer_from(1), default=8, help="rank of every adapter")
    add("--alpha", type=positive, default=16.0, help="the scale is alpha / rank")
    add("--targets", nargs="+", default=["layer_*"], help="patterns of what to adapt")
    add("--steps", type=integer_from(1), default=240, help="steps of each method")
    add("--batch", type=integer_from(1), default=32, help="sentences per step")
    seeds = "seed of the data and of the new weights"
    add("--seed", type=integer_from(0), default=1, help=seeds)
    add("--lora-lr", type=positive, default=2e-3, help="peak learning rate of adapters")
    add("--lora-plus-ratio", type=positive, default=16.0, help="LoRA+: B's rate / A's")
    add("--full-lr", type=positive, default=5e-5, help="peak rate of full fine-tuning")
    names, default = [*report.NAMES], ["lora", "full"]
    add("--method", nargs="+", choices=names, default=default, help="methods to run")
    add("--held-out", type=integer_from(1), default=1000, help="sentences to test on")
    output = Path(__file__).parent / "results"
    add("--output", type=folder, default=output, help="where the files are written")
    add(
        "--weights",
        type=existing_file,
        help="model.safetensors, instead of the download",
    )
    elsewhere = "tokenizer.json, if not next to --weights"
    add("--tokenizer", type=existing_file, help=elsewhere)
    add("--data", type=existing_file, help="csv of text,label, instead of the download")
    return parser


# The start of all methods. Wrong options are errors before any download.


def prepare(args: argparse.Namespace) -> tuple[minilm.Classifier, dict, Batch, Batch]:
    """Returns the model, its pretrained parameters, the training and the test data.

    Raises:
      OSError: If a file cannot be read, written or fetched.
      ValueError: If an option does not fit the model or the data.
    """
    sizes, encoder = minilm.SIZES, None
    if args.weights is not None:
        tensors = minilm.tensors(args.weights)
        sizes, encoder = minilm.measure(tensors), minilm.convert(tensors)
        args.tokenizer = args.tokenizer or args.weights.with_name("tokenizer.json")
    if args.tokenizer is not None:
        check_local(sizes, args.tokenizer)
    model = minilm.Classifier(sizes)
    if {*args.method} != {"full"}:
        adapt(shapes(model), args)  # raises for wrong targets, from shapes alone
    args.output.mkdir(parents=True, exist_ok=True)
    parts = reviews.split(reviews.load(args.data), args.held_out, args.seed)
    if len(parts[0][0]) < args.batch:
        raise ValueError(
            f"{len(parts[0][0])} sentences remain for training, less than one batch "
            f"of {args.batch}. Write a smaller --batch or --held-out."
        )
    pretrained = {
        "encoder": encoder or minilm.convert(minilm.tensors()),
        "head": minilm.head(jax.random.key(args.seed), sizes["features"]),
    }
    tokenizer = minilm.tokenizer(args.tokenizer)
    train, held = (
        (*minilm.encode(tokenizer, texts, LENGTH), labels) for texts, labels in parts
    )
    return model, pretrained, train, held


def check_local(sizes: Mapping[str, int], tokenizer: Path) -> None:
    """Raises ValueError unless the local files fit each other and this job."""
    if sizes["positions"] < LENGTH:
        raise ValueError(
            f"--weights has {sizes['positions']} positions, fewer than the {LENGTH} "
            "needed."
        )
    if not tokenizer.is_file():
        raise ValueError(f"There is no file {tokenizer}. Write --tokenizer PATH.")
    tokens = minilm.tokenizer(tokenizer).get_vocab_size()
    if tokens > sizes["vocab"]:
        raise ValueError(
            f"{tokenizer} has {tokens} tokens, the weights have {sizes['vocab']}: "
            "write --tokenizer with the model's own tokenizer."
        )


def shapes(model: minilm.Classifier) -> dict:
    """Returns the shapes and dtypes of the model's parameters."""
    ids = jax.ShapeDtypeStruct((1, LENGTH), np.int32)
    return jax.eval_shape(model.init, jax.random.key(0), ids, ids)["params"]


def adapt(params: dict, args: argparse.Namespace, method: str = "lora") -> dict:
    """Adds adapters to the targets, and a trainable copy of the head.

    The adapters use another random key than the new head.

    Raises:
      ValueError: If a target is no adaptable weight, or is the head.
    """
    given = dict(alpha=args.alpha, exclude=HEAD, also=HEAD, dora=method == "dora")
    key = jax.random.fold_in(jax.random.key(args.seed), 1)
    try:
        new = lj.lorafy(params, args.rank, targets=args.targets, key=key, **given)
    except ValueError as error:
        raise targets_error(args, error, "query value") from None
    return lj.principal(new) if method == "pissa" else new


# Training. Methods differ in the parameters they train, the rates and the function.


def compile_lora(
    model: minilm.Classifier,
    pretrained: dict,
    data: Batch,
    args: argparse.Namespace,
    method: str = "lora",
) -> Method:
    """Compiles LoRA or a variant, which trains the adapters and the head only."""

    def apply(adapters, base, ids, mask):
        params = lj.combine(adapters, base)
        return lj.lora(model.apply)({"params": params}, ids, mask)

    params = adapt(training.copied(pretrained), args, method)
    adapters, base = lj.split(params)
    rate = args.lora_lr
    if method == "lora+":
        # The geometric mean of the two rates is that of LoRA.
        factor = math.sqrt(args.lora_plus_ratio)
        rate = dict(lora_a=rate / factor, lora_b=rate * factor, lora_w=rate)
    made = compile_method(apply, training.copied(adapters), base, rate, data, args)
    return made._replace(start=params)


def compile_full(
    model: minilm.Classifier, pretrained: dict, data: Batch, args: argparse.Namespace
) -> Method:
    """Compiles full fine-tuning, which trains every parameter."""

    def apply(params, _, ids, mask):
        return model.apply({"params": params}, ids, mask)

    trainable = training.copied(pretrained)
    return compile_method(apply, trainable, {}, args.full_lr, data, args)


def compile_method(
    apply: Callable[..., jax.Array],
    trainable: Any,
    frozen: Any,
    rate: float | Mapping[str, float],
    data: Batch,
    args: argparse.Namespace,
) -> Method:
    """Compiles one training step that donates its state, and reads its memory.

    `rate` is the peak learning rate, or a mapping from each label of `lj.labels` to
    its rate.
    """

    def adamw(rate: float) -> optax.GradientTransformation:
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, rate, warmup_steps=args.steps // 10, decay_steps=args.steps
        )
        return optax.adamw(schedule)

    if isinstance(rate, Mapping):
        each = {label: adamw(own) for label, own in rate.items()}
        tx = optax.partition(each, lj.labels)
    else:
        tx = adamw(rate)
    state = trainable, tx.init(trainable)
    batch = tuple(x[: args.batch] for x in data)
    step = jax.jit(training.step(apply, tx), donate_argnums=0)
    compiled = step.lower(state, frozen, *batch).compile()
    memory = training.memory(compiled, state, frozen, batch)
    return Method(compiled, state, frozen, memory)


def fit(
    methods: Mapping[str, Method],
    data: Batch,
    args: argparse.Namespace,
    show: Callable[[Mapping[str, Fitted]], None] | None = None,
) -> dict[str, Fitted]:
    """Trains all methods in turn, step by step, so that noise affects them alike.

    After each step `show` is called with the results so far. None shows the progress
    on the terminal.
    """
    fitted = {name: Fitted(method.state[0], [], []) for name, method in methods.items()}
    states = {name: method.state for name, method in methods.items()}
    shown = (
        contextlib.nullcontext(show) if show else progress(list(methods), args.steps)
    )
    step = 1
    with script.phase(lambda: f"in step {step} of {args.steps}"), shown as show:
        for step, batch in enumerate(batches(data, args), 1):
            for name, method in methods.items():
                began = time.perf_counter()
                states[name], loss = jax.block_until_ready(
                    method.step(states[name], method.frozen, *batch)
                )
                fitted[name].seconds.append(time.perf_counter() - began)
                fitted[name].losses.append(float(loss))
                check_loss(name, step, loss, args)
            show(fitted)
    return {
        name: fit._replace(trainable=states[name][0]) for name, fit in fitted.items()
    }


def check_loss(name: str, step: int, loss: Any, args: argparse.Namespace) -> None:
    """Ends the job if the loss is not finite."""
    if not math.isfinite(loss):
        own = "full" if name == "full" else "lora"
        option = f"--{own}-lr" if hasattr(args, f"{own}_lr") else "--lr"
        sys.exit(
            f"The loss of {name} became {loss} in step {step}: write a smaller "
            f"{option}."
        )


def batches(data: Batch, args: argparse.Namespace) -> Iterator[Batch]:
    """Yields a batch for every step; each epoch has its own order of the data."""
    rng = np.random.default_rng(args.seed)
    count = len(data[-1]) // args.batch
    for step in range(args.steps):
        if step % count == 0:
            order = rng.permutation(len(data[-1]))
        rows = order[step % count * args.batch :][: args.batch]
        yield tuple(x[rows] for x in data)


@contextlib.contextmanager
def progress(
    names: list[str], steps: int
) -> Iterator[Callable[[Mapping[str, Fitted]], None]]:
    """Yields a function that shows progress: bars on a terminal, otherwise lines."""

    def state(fit: Fitted) -> str:
        rate = 1 / statistics.mean(fit.seconds[-10:])
        return f"loss {statistics.mean(fit.losses[-10:]):.3f}, {rate:.2f} steps/s"

    def lines(fitted: Mapping[str, Fitted]) -> None:
        done = len(fitted[names[0]].losses)
        if done % max(1, steps // 10) == 0 or done == steps:
            states = "; ".join(f"{name} {state(fitted[name])}" for name in names)
            print(f"step {done}/{steps}: {states}", file=sys.stderr, flush=True)

    if not sys.stderr.isatty():
        yield lines
        return
    layout = "{desc} {percentage:3.0f}%|{bar}| {n}/{total}, {remaining} left{postfix}"
    width = max(map(len, names))
    with contextlib.ExitStack() as stack:
        made = {
            name: stack.enter_context(
                tqdm(total=steps, desc=name.ljust(width), position=i, bar_format=layout)
            )
            for i, name in enumerate(names)
        }

        def bars(fitted: Mapping[str, Fitted]) -> None:
            for name, bar in made.items():
                bar.set_postfix_str(state(fitted[name]), refresh=False)
                bar.update()

        yield bars


# Results.


def evaluate_lora(
    model: minilm.Classifier,
    params: dict,
    pretrained: dict,
    held: Batch,
    path: Path,
    start: dict | None = None,
) -> dict[str, Any]:
    """Saves the adapter, and tests it as trained, merged, and reloaded from the file.

    With `start`, the tree that PiSSA began with, the saved and merged adapters are
    those of the pretrained weights: the trained adapters minus the initial ones.
    """
    adapted = lj.lora(model.apply)
    logits = predict(adapted, params, held)
    trainable, total, _ = lj.count(params)
    if start is not None:
        moved = lj.add(params, lj.rescale(start, -1))
        params = lj.attach(lj.detach(moved), pretrained)
    lj.save(path, params)
    merged = predict(model.apply, lj.merge(params), held)
    reloaded = predict(adapted, lj.load(path, pretrained), held)
    check_logits("The merged model", merged, logits, held)
    check_logits("The reloaded adapter", reloaded, logits, held)
    return {
        "accuracy": accuracy(logits, held),
        "trainable": trainable,
        "total": total,
        "adapter_bytes": os.path.getsize(path),
        "merged_accuracy": accuracy(merged, held),
        "reloaded_accuracy": accuracy(reloaded, held),
    }


def evaluate_full(
    model: minilm.Classifier, params: dict, held: Batch
) -> dict[str, Any]:
    """Tests the fully trained model, and measures its size as a file."""
    total = sum(x.size for x in jax.tree.leaves(params))
    flat = flatten_dict(jax.tree.map(np.asarray, params), sep="/")
    return {
        "accuracy": accuracy(predict(model.apply, params, held), held),
        "trainable": total,
        "total": total,
        "adapter_bytes": len(safetensors.numpy.save(flat)),
    }


def predict(apply: Callable[..., jax.Array], params: dict, held: Batch) -> np.ndarray:
    """Returns the logits of the held-out sentences, (n, 2)."""
    run = jax.jit(apply)
    ids, mask, _ = held
    # In full precision, so that rounding alone changes no prediction on any device.
    with jax.default_matmul_precision("highest"):
        parts = [
            run({"params": params}, ids[i : i + 250], mask[i : i + 250])
            for i in range(0, len(ids), 250)
        ]
    return np.concatenate(parts)


def accuracy(logits: np.ndarray, held: Batch) -> float:
    """Returns the fraction of sentences whose label has the larger logit."""
    return float(np.mean(logits.argmax(1) == held[-1]))


def check_logits(
    who: str, logits: np.ndarray, expected: np.ndarray, held: Batch
) -> None:
    """Ends the job unless `logits` equal those of the trained model up to rounding."""
    found, wanted = accuracy(logits, held), accuracy(expected, held)
    worst = np.abs(logits - expected).max()
    if found != wanted or worst > 1e-3 * max(1, np.abs(expected).max()):
        sys.exit(
            f"{who} has held-out accuracy {found}, training ended with {wanted}; the "
            f"logits differ by up to {worst:.2g}."
        )


if __name__ == "__main__":
    main()
