"""Fine-tunes a language model with LoRA, and loads the adapter with PEFT on torch.

    pip install -e ".[demo,peers]" && python benchmarks/to_peft.py

SmolLM2-135M-Instruct learns to write like the Rotten Tomatoes sentences. Prints its
loss on held-out sentences and a sample of its text, before and after training. Writes
the adapter in PEFT's format, the results and a figure into benchmarks/results/to_peft.
Then loads the adapter with PEFT onto transformers' own model of the same file, and ends
with an error unless the logits of both are equal. Takes under five minutes on two CPU
cores.
"""

import argparse
import functools
import importlib.util
import statistics
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import finetune
import jax
import jax.numpy as jnp
import numpy as np
import optax
import report
import script
import training
from data import reviews
from models import smollm2
from models.architectures import Model
from models.folder import names as module_names
from models.generation import generate
from option_types import (
    DefaultsFormatter,
    existing_file,
    folder,
    integer_from,
    positive,
    targets_error,
)
from tokenizers import Tokenizer

import lora_jax as lj

END = "<|endoftext|>"  # separates two texts, as in pretraining
MOST = 1e-3  # times the largest logit: a larger difference is not rounding
PEERS = ("torch", "transformers", "peft")

Rows = tuple[np.ndarray, np.ndarray]  # tokens and the tokens after them, (n, length)
Apply = Callable[[Any, jax.Array], jax.Array]  # (params, ids) to logits


class Job(NamedTuple):
    """The model, its parameters and its data, before training."""

    model: Model
    params: dict
    tokenizer: Tokenizer
    train: Rows
    held: Rows
    prompt: np.ndarray  # (1, tokens)


def main(argv: list[str] | None = None) -> None:
    """Runs the job with the options of the command line."""
    began = time.perf_counter()
    parser = options()
    args = parser.parse_args(argv)
    with script.exit_on_interrupt(parser, args.output):
        with script.exit_on_error(parser, OSError):
            with script.phase("before training"):
                check_folder(args.output / "adapter")
                job = prepare(args)
                plain = function(job.model)
                params = adapt(plain, job.params, args)
                # A trial export raises now the errors of the final one.
                with tempfile.TemporaryDirectory() as trial:
                    export(params, Path(trial, "adapter"), args)
        fell = run(job, plain, params, args)
    print(f"{time.perf_counter() - began:.0f} s in all; the files are in {args.output}")
    if not fell:
        sys.exit("The held-out loss did not fall: write more --steps or another --lr.")


def run(job: Job, plain: Apply, params: dict, args: argparse.Namespace) -> bool:
    """Trains, evaluates, and writes the files, all of them or none.

    Returns:
      Whether the held-out loss fell.
    """
    adapted = lj.lora(plain)
    print(lj.count(params))
    with script.phase("before training"):
        found: dict[str, Any] = {"before": evaluate(adapted, params, job, args)}
    params, fitted, memory = train(adapted, params, job, args)
    done = f"after all {args.steps} steps, during the checks"
    with script.phase(done), script.staged(args.output) as new:
        found["after"] = evaluate(adapted, params, job, args)
        found |= {
            "losses": fitted.losses,
            "step_ms": 1000 * statistics.median(fitted.seconds),
            "memory": memory,
            "settings": training.settings(args),
            "versions": training.versions(),
        }
        figure(new / "to_peft.png", found)
        print(summary(found))
        export(params, new / "adapter", args)
        if args.check:
            found["versions"] |= {name: version(name) for name in PEERS}
            found["check"] = check(new / "adapter", args, plain, params, job)
        script.write_json(new / "to_peft.json", found)
    return found["after"]["loss"] < found["before"]["loss"]


# The command line.


def options() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(
        description="Fine-tunes SmolLM2 with LoRA, and loads the adapter with PEFT.",
        formatter_class=DefaultsFormatter,
    )
    add_training(parser)
    add = parser.add_argument
    check = dict(action=argparse.BooleanOptionalAction, default=True)
    add("--check", **check, help="load the adapter with PEFT, which needs torch")
    output = Path(__file__).parent / "results" / "to_peft"
    add("--output", type=folder, default=output, help="where the files are written")
    return parser


def add_training(parser: argparse.ArgumentParser) -> None:
    """Adds the options of any job that trains SmolLM2."""
    add = parser.add_argument
    add("--rank", type=integer_from(1), default=8, help="rank of every adapter")
    add("--alpha", type=positive, default=16.0, help="the scale is alpha / rank")
    add("--targets", nargs="+", default=["kernel"], help="patterns of what to adapt")
    add("--steps", type=integer_from(1), default=30, help="training steps")
    add("--batch", type=integer_from(1), default=4, help="rows per step")
    add("--length", type=integer_from(1), default=96, help="tokens per row")
    add("--lr", type=positive, default=2e-3, help="peak learning rate")
    seeds = "seed of the data and of the adapters"
    add("--seed", type=integer_from(0), default=1, help=seeds)
    add("--held-out", type=integer_from(1), default=64, help="sentences to test on")
    add("--prompt", default="the film", help="start of the sample of text")
    add(
        "--tokens", type=integer_from(1), default=24, help="tokens that the sample adds"
    )
    add("--remat", action="store_true", help="compute activations twice, keep fewer")
    add("--unrolled", action="store_true", help="unroll the layers instead of a scan")
    add("--weights", type=existing_file, help="a GGUF, instead of the download")
    add("--data", type=existing_file, help="csv of text,label, instead of the download")


# The start of training. Wrong options are errors before any download.


def prepare(args: argparse.Namespace) -> Job:
    """Loads the model and the data.

    Raises:
      OSError: If a file cannot be read, written or fetched.
      ValueError: If an option does not fit the model or the data, or a package that the
        options need is not installed.
    """
    if names := missing(args.check):
        more = "" if "gguf" in names else " Or write --no-check."
        raise ValueError(
            f"{' and '.join(names)} must be installed: "
            f'pip install -e ".[demo,peers]".{more}'
        )
    if not args.prompt:
        raise ValueError("--prompt is empty: write at least one word.")
    if args.weights is None:
        check_adapters(smollm2.build(smollm2.ARCH, not args.unrolled), args)
    args.output.mkdir(parents=True, exist_ok=True)
    texts = reviews.split(reviews.load(args.data), args.held_out, args.seed)
    model, params, tokenizer = smollm2.load(
        args.weights, scanned=not args.unrolled, remat=args.remat
    )
    if args.weights is not None:
        check_adapters(model, args)
    parts = [rows(tokenizer, sentences, args.length) for sentences, _ in texts]
    check_rows(parts, args)
    prompt = np.array([tokenizer.encode(args.prompt).ids], np.int32)
    return Job(model, jax.tree.map(jnp.asarray, params), tokenizer, *parts, prompt)


def missing(check: bool) -> list[str]:
    """Returns the required packages that are not installed."""
    needed = ("gguf", *(PEERS if check else ()))
    return [name for name in needed if importlib.util.find_spec(name) is None]


def check_rows(parts: Sequence[Rows], args: argparse.Namespace) -> None:
    """Raises ValueError if a part of the data is less than one batch."""
    advice = "fewer --held-out", "more --held-out"
    for part, more in zip(parts, advice, strict=True):
        if len(part[0]) < args.batch:
            raise ValueError(
                f"{len(part[0])} rows of {args.length} tokens are less than one batch "
                f"of {args.batch}. Write a smaller --batch or --length, or {more}."
            )


def check_folder(path: Path) -> None:
    """Raises ValueError if `path` contains files other than those of an adapter."""
    others = {"adapter"} if path.exists() else set()
    if path.is_dir():
        others = {x.name for x in path.iterdir()}
        others -= {"adapter_config.json", "adapter_model.safetensors"}
    if others:
        raise ValueError(
            f"{path}, the folder for the adapter, contains other files: "
            f"{', '.join(sorted(others)[:6])}. Write another --output."
        )


def check_adapters(model: Model, args: argparse.Namespace) -> None:
    """Raises ValueError if the targets do not fit, from shapes alone."""
    ids = jax.ShapeDtypeStruct((1, 2), np.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    adapt(function(model), shapes, args)


def function(model: Model) -> Apply:
    """Returns the model as a function of its parameters and of token ids."""
    return lambda params, ids: model.apply({"params": params}, ids)


def adapt(apply: Apply, params: dict, args: argparse.Namespace) -> dict:
    """Adds adapters to a tree of arrays or of shapes.

    Raises:
      ValueError: If a target is no adaptable weight.
    """
    given = dict(alpha=args.alpha, axes=axes(apply, params))
    key = jax.random.key(args.seed)
    try:
        return lj.lorafy(params, args.rank, targets=args.targets, key=key, **given)
    except ValueError as error:
        raise targets_error(args, error, "query value") from None


def axes(apply: Apply, params: dict) -> dict[str, lj.Axes]:
    """Returns the axes of each weight: layers, inputs and outputs."""
    return lj.find_axes(apply, params, jax.ShapeDtypeStruct((1, 2), np.int32))


def rows(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> Rows:
    """Concatenates sentences and cuts them into rows without padding.

    Args:
      tokenizer: From `smollm2.tokenizer`.
      texts: Sentences; the token END is appended to each.
      length: The number of tokens in a row; the remainder at the end is dropped.

    Returns:
      Two int32 arrays (rows, length): the tokens, and the token after each.

    Raises:
      ValueError: If the tokenizer has no token END.
    """
    end = tokenizer.token_to_id(END)
    if end is None:
        raise ValueError(f"The tokenizer has no token {END}: use the model's own.")
    found = tokenizer.encode_batch(list(texts))
    stream = np.array([i for row in found for i in (*row.ids, end)], np.int32)
    count = (len(stream) - 1) // length
    ids, labels = stream[: count * length], stream[1 : count * length + 1]
    return ids.reshape(count, length), labels.reshape(count, length)


# Training.


def train(
    adapted: Apply, params: dict, job: Job, args: argparse.Namespace
) -> tuple[dict, finetune.Fitted, dict[str, int]]:
    """Trains the adapters, and returns all parameters, the losses and the memory."""

    def apply(adapters, base, ids):
        return adapted(lj.combine(adapters, base), ids)

    adapters, base = lj.split(params)
    method = finetune.compile_method(apply, adapters, base, args.lr, job.train, args)
    fitted = finetune.fit({"lora": method}, job.train, args)["lora"]
    return lj.combine(fitted.trainable, base), fitted, method.memory


def evaluate(
    apply: Apply, params: dict, job: Job, args: argparse.Namespace
) -> dict[str, Any]:
    """Returns the held-out loss, in nats per token, and a sample of text."""
    ids = generate(job.model, params, job.prompt, None, args.tokens).ids[0]
    text = job.tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    # The model may start another sentence after the end of the first one.
    sample = text.split(END)[0]
    return {"loss": loss(apply, params, job.held, args.batch), "text": sample}


def loss(apply: Apply, params: dict, data: Rows, batch: int) -> float:
    """Returns the mean loss of the next token, in nats, over all complete batches."""
    parts = batches(data, batch)
    return float(np.mean([batch_loss(apply, params, *part) for part in parts]))


@functools.partial(jax.jit, static_argnums=0)
def batch_loss(
    apply: Apply, params: dict, ids: jax.Array, labels: jax.Array
) -> jax.Array:
    """Returns the mean loss of one batch."""
    logits = apply(params, ids)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def batches(data: Rows, batch: int) -> Iterator[Rows]:
    """Yields the complete batches of the rows, in order."""
    for i in range(0, len(data[0]) - batch + 1, batch):
        yield tuple(jnp.asarray(x[i : i + batch]) for x in data)


# Results.


def summary(results: dict[str, Any]) -> str:
    """Returns the losses and samples before and after training, and the time."""
    before, after = results["before"], results["after"]
    lines = [
        f"held-out loss {before['loss']:.3f} before, {after['loss']:.3f} after "
        f"{len(results['losses'])} steps of {results['step_ms'] / 1000:.2f} s"
    ]
    for name, found in (("before", before), ("after", after)):
        text = textwrap.shorten(f"{name}: {found['text']}", 2000)
        lines.append(textwrap.fill(text, 80, subsequent_indent="  "))
    return "\n".join(lines)


def figure(path: Path, results: dict[str, Any]) -> None:
    """Draws the training losses, their running mean and the held-out loss to a PNG."""
    losses, ink, other = results["losses"], report.LINES["lora"], report.LINES["full"]
    made, axes, end = report.token_losses(losses)
    ends = [results[name]["loss"] for name in ("before", "after")]
    axes.plot([0, len(losses)], ends, "o", color=other, clip_on=False, zorder=3)
    axes.annotate(
        f"held-out {ends[0]:.2f}",
        *((0, ends[0]), (8, 0)),
        textcoords="offset points",
        va="center",
        color=other,
        fontweight="bold",
    )
    bottom, top = axes.get_ylim()
    places = report.spread([ends[1], end], 0.06 * (top - bottom))
    report.label_right(axes, f"held-out {ends[1]:.2f}", places[0], other)
    report.label_right(axes, "training", places[1], ink)
    made.savefig(path)


# The comparison with PEFT.


def export(params: dict, path: Path, args: argparse.Namespace) -> None:
    """Writes the adapters into a folder in PEFT's format."""
    names = module_names(smollm2.ARCH, scanned=not args.unrolled)
    settings = dict(base_model=smollm2.HUB, task_type="CAUSAL_LM")
    lj.export_peft(path, params, names, **settings)


def check(
    path: Path, args: argparse.Namespace, plain: Apply, params: dict, job: Job
) -> dict[str, float]:
    """Ends the job unless the merged model and PEFT's give the trained model's logits.

    Returns:
      The largest logit of the trained model, and the largest difference to the logits
      of the merged model, of PEFT's and of the model before training.
    """
    theirs = peft_logits(path, args.weights)
    merged, base = lj.merge(params), lj.strip(params)
    run, run_adapted = jax.jit(plain), jax.jit(lj.lora(plain))
    gaps = []
    # In full precision, so that default rounding on some device does not matter.
    with jax.default_matmul_precision("highest"):
        for ids, _ in batches(job.held, args.batch):
            ours = run_adapted(params, ids)
            others = {
                "merged": run(merged, ids),
                "peft": jnp.asarray(theirs(np.asarray(ids))),
                "base": run(base, ids),
            }
            gap = {name: float(abs(x - ours).max()) for name, x in others.items()}
            gaps.append(gap | {"largest": float(abs(ours).max())})
    # NumPy's maximum propagates NaN, unlike Python's.
    found = {name: float(np.max([gap[name] for gap in gaps])) for name in gaps[0]}
    print(agreement(found))
    return found


def agreement(found: dict[str, float]) -> str:
    """Returns the differences as a sentence, or ends the job if one is too large."""
    most = MOST * found["largest"]
    names = {"merged": "the merged model's", "peft": "PEFT's"}
    text = (
        f"logits of up to {found['largest']:.1f}, which training changed by up to "
        f"{found['base']:.2f}: "
        + ", ".join(f"{who} differ by {found[name]:.1e}" for name, who in names.items())
    )
    for name in names:
        if not found[name] <= most:
            sys.exit(f"{text}; rounding explains at most {most:.1e}.")
    return text


def peft_logits(path: Path, weights: Path | None) -> Callable[[np.ndarray], np.ndarray]:
    """Loads a folder with PEFT onto transformers' model, and returns its function.

    The function maps ids (n, time) to logits.
    Ends the job unless the file and PEFT's model have exactly the same tensors.
    """
    import peft
    import torch
    from safetensors.torch import load_file

    base = smollm2.torch_model(weights)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).* keys")
        try:
            model = peft.PeftModel.from_pretrained(base, path, torch_device="cpu")
        except UserWarning as warning:
            sys.exit(
                f"PEFT does not find the tensors that it needs in {path}: {warning}"
            )
    model.eval()
    file = load_file(path / "adapter_model.safetensors")
    loaded = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    if lost := sorted(set(file) ^ set(loaded)):
        sys.exit(f"Only one of PEFT's model and the file has {', '.join(lost[:6])}.")
    if other := [name for name in file if not torch.equal(file[name], loaded[name])]:
        sys.exit(f"{other[0]} has other values in PEFT's model than in the file.")

    def run(ids: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor(ids).long()).logits.float().numpy()

    return run


if __name__ == "__main__":
    main()
