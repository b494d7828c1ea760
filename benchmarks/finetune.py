"""Fine-tunes a real encoder for sentiment: with LoRA or its relatives, and in full.

    python benchmarks/finetune.py  # with LoRA, and in full
    python benchmarks/finetune.py --method lora dora pissa lora+ full

All start from the same all-MiniLM-L6-v2 and see the same batches of Rotten Tomatoes
sentences. Prints a table; writes the adapters, the numbers and a figure into
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

import files
import jax
import numpy as np
import optax
import report
import safetensors.numpy
import training
from data import reviews
from flax.traverse_util import flatten_dict
from models import minilm
from readers import Defaults, existing, folder, positive, targets, whole
from tqdm import tqdm

import lora_jax as lj

LENGTH = 48  # tokens of a sentence; longer ones are cut
HEAD = ("head",)  # new, so it trains whole beside the adapters

Batch = tuple[np.ndarray, np.ndarray, np.ndarray]  # ids, mask (n, LENGTH); labels (n,)


class Method(NamedTuple):
    """One way to train, compiled for its starting state."""

    step: Callable[..., tuple[Any, jax.Array]]  # (state, frozen, *batch): state, loss
    state: Any  # trainable parameters and optimizer state; the first step donates them
    frozen: Any
    memory: dict[str, int]
    start: Any = None  # of adapters: the whole tree before the first step


class Fitted(NamedTuple):
    """What training gave, and the loss and the seconds of every step."""

    trainable: Any
    losses: list[float]
    seconds: list[float]


def main(argv: list[str] | None = None) -> None:
    """Runs the job that the command line asks for."""
    began = time.perf_counter()
    parser = options()
    args = parser.parse_args(argv)
    with files.stoppable(parser, args.output):
        with files.refusing(parser, OSError):
            with files.during("before training"):
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
    with files.during("before training"):
        methods = {
            name: start_full(model, pretrained, train, args)
            if name == "full"
            else start_lora(model, pretrained, train, args, name)
            for name in args.method
        }
    fitted = fit(methods, train, args)
    done = f"after all {args.steps} steps, before the tests were done"
    with files.during(done), files.written(args.output) as new:
        found: dict[str, Any] = {}
        for name, method in methods.items():
            trained = fitted[name].trainable
            if name == "full":
                found[name] = judge_full(model, trained, held)
            else:
                params = lj.combine(trained, method.frozen)
                start = method.start if name == "pissa" else None
                end = "" if name == "lora" else f"_{name}"
                path = new / f"adapter{end}.safetensors"
                found[name] = judge_lora(model, params, pretrained, held, path, start)
            step_ms = 1000 * statistics.median(fitted[name].seconds)
            found[name] |= {"step_ms": step_ms, "memory": method.memory}
        found["settings"] = training.settings(args)
        found["versions"] = training.versions()
        files.write_json(new / "finetune.json", found)
        losses = {name: fit.losses for name, fit in fitted.items()}
        report.figure(new / "finetune.png", found, losses)
        print(report.table(found))


# The command line.


def options() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(
        description="Fine-tunes MiniLM for sentiment, with adapters and in full.",
        formatter_class=Defaults,
    )
    add = parser.add_argument
    add("--rank", type=whole(1), default=8, help="of every adapter")
    add("--alpha", type=positive, default=16.0, help="adapters weigh alpha / rank")
    add("--targets", nargs="+", default=["layer_*"], help="patterns of what to adapt")
    add("--steps", type=whole(1), default=240, help="of each method")
    add("--batch", type=whole(1), default=32, help="sentences of a step")
    add("--seed", type=whole(0), default=1, help="of the data and of the new weights")
    add("--lora-lr", type=positive, default=2e-3, help="peak learning rate of adapters")
    add("--lora-plus-ratio", type=positive, default=16.0, help="LoRA+: B's rate / A's")
    add("--full-lr", type=positive, default=5e-5, help="peak learning rate in full")
    names, default = [*report.NAMES], ["lora", "full"]
    add("--method", nargs="+", choices=names, default=default, help="what to run")
    add("--held-out", type=whole(1), default=1000, help="sentences to test on")
    place = Path(__file__).parent / "results"
    add("--output", type=folder, default=place, help="where the files are written")
    add("--weights", type=existing, help="model.safetensors, instead of the download")
    add("--tokenizer", type=existing, help="tokenizer.json, if not beside --weights")
    add("--data", type=existing, help="csv of text,label, instead of the download")
    return parser


# What all methods start from. What the options get wrong is found before a download.


def prepare(args: argparse.Namespace) -> tuple[minilm.Classifier, dict, Batch, Batch]:
    """Returns the model, its pretrained parameters, and the two parts of the data.

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
        adapt(shapes(model), args)  # refuses the targets by shapes alone
    args.output.mkdir(parents=True, exist_ok=True)
    parts = reviews.split(reviews.load(args.data), args.held_out, args.seed)
    if len(parts[0][0]) < args.batch:
        raise ValueError(
            f"{len(parts[0][0])} sentences are left to train on, less than one batch "
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
            f"--weights has {sizes['positions']} positions: {LENGTH} are needed."
        )
    if not tokenizer.is_file():
        raise ValueError(f"There is no {tokenizer}. Write --tokenizer with its place.")
    tokens = minilm.tokenizer(tokenizer).get_vocab_size()
    if tokens > sizes["vocab"]:
        raise ValueError(
            f"{tokenizer} has {tokens} tokens, the weights have {sizes['vocab']}: "
            "write --tokenizer with the model's own."
        )


def shapes(model: minilm.Classifier) -> dict:
    """Returns the model's parameters as shapes and dtypes, with no numbers made."""
    ids = jax.ShapeDtypeStruct((1, LENGTH), np.int32)
    return jax.eval_shape(model.init, jax.random.key(0), ids, ids)["params"]


def adapt(params: dict, args: argparse.Namespace, method: str = "lora") -> dict:
    """Adds the adapters, which draw from another key than the head, and its copy.

    Raises:
      ValueError: If the targets are no weights; the head has its copy already.
    """
    given = dict(alpha=args.alpha, exclude=HEAD, also=HEAD, dora=method == "dora")
    key = jax.random.fold_in(jax.random.key(args.seed), 1)
    try:
        new = lj.lorafy(params, args.rank, targets=args.targets, key=key, **given)
    except ValueError as error:
        raise targets(args, error, "query value") from None
    return lj.principal(new) if method == "pissa" else new


# Training: methods differ in what they train, in its rates and in the function called.


def start_lora(
    model: minilm.Classifier,
    pretrained: dict,
    data: Batch,
    args: argparse.Namespace,
    method: str = "lora",
) -> Method:
    """Compiles LoRA or its like: adapters and the head train, all else is frozen."""

    def apply(adapters, base, ids, mask):
        params = lj.combine(adapters, base)
        return lj.lora(model.apply)({"params": params}, ids, mask)

    params = adapt(training.copied(pretrained), args, method)
    adapters, base = lj.split(params)
    rate = args.lora_lr
    if method == "lora+":
        apart = math.sqrt(args.lora_plus_ratio)  # around the rate of LoRA
        rate = dict(lora_a=rate / apart, lora_b=rate * apart, lora_w=rate)
    made = start(apply, training.copied(adapters), base, rate, data, args)
    return made._replace(start=params)


def start_full(
    model: minilm.Classifier, pretrained: dict, data: Batch, args: argparse.Namespace
) -> Method:
    """Compiles full fine-tuning: everything trains."""

    def apply(params, _, ids, mask):
        return model.apply({"params": params}, ids, mask)

    return start(apply, training.copied(pretrained), {}, args.full_lr, data, args)


def start(
    apply: Callable[..., jax.Array],
    trainable: Any,
    frozen: Any,
    rate: float | Mapping[str, float],
    data: Batch,
    args: argparse.Namespace,
) -> Method:
    """Compiles one training step, with its state donated, and reads what it takes.

    `rate` is the peak learning rate, or that of each label of `lj.labels`.
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
    """Trains the methods side by side, step by step, so that noise hits them alike.

    After each step `show` is given what there is so far; None shows the progress.
    """
    fitted = {name: Fitted(method.state[0], [], []) for name, method in methods.items()}
    states = {name: method.state for name, method in methods.items()}
    shown = (
        contextlib.nullcontext(show) if show else progress(list(methods), args.steps)
    )
    step = 1
    with files.during(lambda: f"in step {step} of {args.steps}"), shown as show:
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
    """Ends the job if the loss is no number."""
    if not math.isfinite(loss):
        own = "full" if name == "full" else "lora"
        option = f"--{own}-lr" if hasattr(args, f"{own}_lr") else "--lr"
        sys.exit(
            f"The loss of {name} became {loss} in step {step}: write a smaller "
            f"{option}."
        )


def batches(data: Batch, args: argparse.Namespace) -> Iterator[Batch]:
    """Yields a batch for every step; each round over the data has its own order."""
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
    """Gives the function that shows a step: bars on a terminal, else some lines."""

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
    form = "{desc} {percentage:3.0f}%|{bar}| {n}/{total}, {remaining} left{postfix}"
    width = max(map(len, names))
    with contextlib.ExitStack() as stack:
        made = {
            name: stack.enter_context(
                tqdm(total=steps, desc=name.ljust(width), position=i, bar_format=form)
            )
            for i, name in enumerate(names)
        }

        def bars(fitted: Mapping[str, Fitted]) -> None:
            for name, bar in made.items():
                bar.set_postfix_str(state(fitted[name]), refresh=False)
                bar.update()

        yield bars


# What came of it.


def judge_lora(
    model: minilm.Classifier,
    params: dict,
    pretrained: dict,
    held: Batch,
    path: Path,
    start: dict | None = None,
) -> dict[str, Any]:
    """Saves the adapter, tests it, and tests it again merged, and again reloaded.

    With `start`, the tree that PiSSA began with, what is saved and merged are adapters
    of the pretrained weights: what trained less what was there at the start.
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
    agree("The merged model", merged, logits, held)
    agree("The reloaded adapter", reloaded, logits, held)
    return {
        "accuracy": accuracy(logits, held),
        "trainable": trainable,
        "total": total,
        "adapter_bytes": os.path.getsize(path),
        "merged_accuracy": accuracy(merged, held),
        "reloaded_accuracy": accuracy(reloaded, held),
    }


def judge_full(model: minilm.Classifier, params: dict, held: Batch) -> dict[str, Any]:
    """Tests the model that trained in full; its file would be the whole model."""
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
    # In full precision, so that on no device rounding alone turns a prediction.
    with jax.default_matmul_precision("highest"):
        parts = [
            run({"params": params}, ids[i : i + 250], mask[i : i + 250])
            for i in range(0, len(ids), 250)
        ]
    return np.concatenate(parts)


def accuracy(logits: np.ndarray, held: Batch) -> float:
    """Returns the share of sentences whose label has the larger logit."""
    return float(np.mean(logits.argmax(1) == held[-1]))


def agree(who: str, logits: np.ndarray, expected: np.ndarray, held: Batch) -> None:
    """Ends the job unless `logits` are the trained model's, up to rounding."""
    found, wanted = accuracy(logits, held), accuracy(expected, held)
    worst = np.abs(logits - expected).max()
    if found != wanted or worst > 1e-3 * max(1, np.abs(expected).max()):
        sys.exit(
            f"{who} has held-out accuracy {found}, training ended with {wanted}; the "
            f"logits differ by up to {worst:.2g}."
        )


if __name__ == "__main__":
    main()
