"""finetune.py runs end to end on a tiny model, and refuses wrong options."""

import argparse
import json
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import finetune
import jax
import numpy as np
import pytest
import report
import training
from models import minilm
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import lora_jax as lj

GOOD, BAD = ["fine", "moving", "funny"], ["dull", "long", "empty"]
WORDS = ["[PAD]", "[UNK]", *GOOD, *BAD, *(f"w{i}" for i in range(24))]
SIZES = dict(vocab=32, positions=48, types=2, features=64, mlp=96, layers=1)
METHOD = {"accuracy", "trainable", "total", "step_ms", "adapter_bytes", "memory"}
AGAIN = {"merged_accuracy", "reloaded_accuracy"}
MEMORY = {"parameters", "unread", "gradients", "optimizer", "temporaries", "peak"}
pytestmark = pytest.mark.usefixtures("optax_promotion")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Writes a random encoder, its tokenizer, and sentences that one word decides."""
    folder = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(0)
    tensors = {
        name: np.float32(0.3) * rng.normal(size=shape).astype(np.float32)
        for name, (_, shape) in minilm.expected(SIZES).items()
    }
    for name in tensors:
        if name.endswith("LayerNorm.weight"):
            tensors[name] += np.float32(1)
    save_file(tensors, folder / "model.safetensors")
    vocab = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    lines = ["text,label"]
    for _ in range(120):
        label = rng.integers(2)
        words = [*rng.choice(WORDS[8:], 6), rng.choice([BAD, GOOD][label])]
        lines.append(f"{' '.join(rng.permutation(words))},{label}")
    (folder / "data.csv").write_text("\n".join(lines))
    return folder


def options(files, folder, **changes):
    """Returns the command line of a short run on the tiny files; `None` omits one."""
    given = {
        "weights": files / "model.safetensors",
        "data": files / "data.csv",
        "output": folder,
        "rank": 4,
        "steps": 12,
        "batch": 8,
        "held-out": 40,
        "lora-lr": 0.01,
    }
    given |= {name.replace("_", "-"): value for name, value in changes.items()}
    return [f"--{name}={value}" for name, value in given.items() if value is not None]


@pytest.mark.slow
def test_main_end_to_end(files, tmp_path, capsys):
    finetune.main(options(files, tmp_path / "new" / "folder"))
    output = tmp_path / "new" / "folder"
    results = json.loads((output / "finetune.json").read_text())
    lora, full = results["lora"], results["full"]
    assert set(lora) == METHOD | AGAIN and set(full) == METHOD
    assert set(lora["memory"]) == set(full["memory"]) == MEMORY
    assert lora["merged_accuracy"] == lora["reloaded_accuracy"] == lora["accuracy"]

    # Six kernels of rank 4, and the head.
    adapters = 4 * (4 * (64 + 64) + 2 * (64 + 96))
    assert lora["trainable"] == adapters + 2 * 64 + 2
    assert full["trainable"] == full["total"] < lora["total"]
    assert lora["memory"]["gradients"] == 4 * lora["trainable"]
    assert lora["memory"]["optimizer"] < full["memory"]["optimizer"] / 2
    assert full["memory"]["parameters"] == 4 * full["total"]
    # The step reads only the head's copy, so it has parameters for one head.
    scales, head = 6, 2 * 64 + 2
    assert lora["memory"]["parameters"] == 4 * (full["total"] + adapters + scales)
    assert lora["memory"]["unread"] == 4 * head
    assert full["memory"]["unread"] == 0

    path = output / "adapter.safetensors"
    assert lora["adapter_bytes"] == path.stat().st_size
    saved = load_file(path)
    assert sum(x.size for x in saved.values()) == lora["trainable"] + scales
    assert {"head/lora_w", "head/bias_lora_w"} < set(saved)
    assert len(list(output.iterdir())) == 3
    assert (output / "finetune.png").read_bytes().startswith(b"\x89PNG")
    assert results["settings"]["rank"] == 4
    assert results["versions"]["jax"] == jax.__version__

    shown = capsys.readouterr()
    assert re.search(r"held-out accuracy +0\.\d{3} +0\.\d{3} ", shown.out)
    assert "LoRA / full" in shown.out
    lines = [line for line in shown.err.splitlines() if line.startswith("step ")]
    assert len(lines) == 12
    assert re.match(r"step 12/12: lora loss \d\.\d+, .* steps/s; full loss", lines[-1])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_main_with_one_method(files, tmp_path, capsys, method):
    finetune.main(options(files, tmp_path, method=method, steps=2, targets="query"))
    results = json.loads((tmp_path / "finetune.json").read_text())
    assert [name for name in ("lora", "full") if name in results] == [method]
    assert ("merged_accuracy" in results[method]) == (method == "lora")
    assert "LoRA / full" not in capsys.readouterr().out


@pytest.mark.slow
def test_main_with_every_method(files, tmp_path, capsys):
    given = options(files, tmp_path, steps=3, targets="query")
    finetune.main([*given, "--method", *report.NAMES])
    results = json.loads((tmp_path / "finetune.json").read_text())
    assert [*results] == [*report.NAMES, "settings", "versions"]
    shown = capsys.readouterr().out
    header, _, accuracies, *_ = shown.splitlines()
    assert header.split() == [*report.NAMES.values()]
    found = [f"{results[name]['accuracy']:.3f}" for name in report.NAMES]
    assert accuracies.split()[-5:] == found
    assert "the plain model: LoRA 0." in shown and ", LoRA+ 0." in shown

    # All have as many trainable parameters, except DoRA's magnitudes. PiSSA's file has
    # the sum of the trained and the initial rank.
    for name in report.NAMES.keys() - {"full"}:
        more = 64 if name == "dora" else 0
        assert results[name]["trainable"] == 4 * (64 + 64) + more + 2 * 64 + 2
        assert AGAIN < set(results[name])
        suffix = "" if name == "lora" else f"_{name}"
        saved = load_file(tmp_path / f"adapter{suffix}.safetensors")
        (a,) = (x for path, x in saved.items() if path.endswith("lora_a"))
        assert a.shape[-1] == (8 if name == "pissa" else 4)
        magnitudes = [x for path, x in saved.items() if path.endswith("magnitude")]
        assert len(magnitudes) == (name == "dora")


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("lora", {"lora_a": 0, "lora_b": 0.01, "lora_w": 0.01}),
        ("lora+", {"lora_a": 0, "lora_b": 0.02, "lora_w": 0.01}),
        ("pissa", {"lora_a": 0.01, "lora_b": 0.01, "lora_w": 0.01}),
        (
            "dora",
            {"lora_a": 0, "lora_b": 0.01, "lora_magnitude": 0.01, "lora_w": 0.01},
        ),
    ],
)
def test_fit_changes_each_parameter_by_its_rate_in_the_first_step(
    files, tmp_path, method, changes
):
    """Adam's first step equals the rate; A's gradient is zero as long as B is zero."""
    given = options(files, tmp_path, steps=1, targets="query", lora_plus_ratio=4)
    args = finetune.options().parse_args(given)
    model, pretrained, train, _ = finetune.prepare(args)
    made = finetune.compile_lora(model, pretrained, train, args, method)
    trained = finetune.fit({method: made}, train, args, lambda _: None)[method][0]
    before, _ = lj.split(made.start)  # copies that the step did not donate
    rows = map(jax.tree.leaves, (lj.labels(before), before, trained))
    found = dict.fromkeys(changes, 0)
    for label, x, y in zip(*rows, strict=True):
        found[label] = max(found[label], np.abs(x - y).max())
    assert found == pytest.approx(changes, rel=0.01, abs=1e-4)


def test_progress_shows_bars_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(finetune.sys.stderr, "isatty", lambda: True, raising=False)
    with finetune.progress(["lora", "full"], 2) as show:
        for _ in range(2):
            fitted = finetune.Fitted(None, [0.5, 0.25], [0.5])
            show({"lora": fitted, "full": fitted})
    shown = capsys.readouterr().err
    for name in ("lora", "full"):
        assert re.search(name + r" +100%.* 2/2, .*loss 0\.375, 2\.00 steps/s", shown)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "0 is not a whole number from 1"),
        ({"steps": -5}, "-5 is not a whole number from 1"),
        ({"batch": "many"}, "many is not a whole number"),
        ({"seed": -1}, "-1 is not a whole number from 0"),
        ({"seed": 2**31}, "is not a whole number from 0 to 2147483647"),
        ({"alpha": "nan"}, "nan is not a finite number above 0"),
        ({"alpha": "-1"}, "-1 is not a finite number above 0"),
        ({"lora_lr": "inf"}, "inf is not a finite number above 0"),
        ({"full_lr": "fast"}, "fast is not a finite number above 0"),
        ({"method": "some"}, "invalid choice: 'some'"),
        ({"method": "both"}, "invalid choice: 'both'"),
        ({"lora_plus_ratio": "0"}, "0 is not a finite number above 0"),
        ({"method": "pissa", "targets": "layer_9"}, "No weight matches"),
        ({"weights": "gone"}, "there is no file gone"),
        ({"data": "gone"}, "there is no file gone"),
        ({"output": __file__}, "is not a folder"),
        ({"targets": "layer_9"}, "error: --targets layer_9: No weight matches"),
        ({"targets": "querry"}, "patterns of what to adapt, .* --targets query value"),
        ({"targets": "head"}, "error: --targets head: There is nothing to adapt"),
        ({"targets": "bias"}, "'bias': '.*/bias' is float32 of shape"),
        ({"held_out": 100000}, "Cannot hold out 100000 of"),
        ({"batch": 100}, "less than one batch of 100"),
        ({"weights": __file__, "tokenizer": __file__}, "not a safetensors file"),
        ({"tokenizer": __file__}, r"is not a tokenizer\.json"),
        ({"data": __file__}, "has no column label and no column text"),
    ],
)
def test_main_refuses_bad_options_before_any_work(
    files, tmp_path, capsys, monkeypatch, changes, message
):
    monkeypatch.setattr(minilm.wheels, "wheel", lambda *_: pytest.fail("download"))
    monkeypatch.setattr(finetune, "compile_method", lambda *_: pytest.fail("work"))
    with pytest.raises(SystemExit) as error:
        finetune.main(options(files, tmp_path / "output", **changes))
    assert error.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("usage: ")
    assert re.search(message, shown)
    # The message names options only, no code.
    assert not re.search(r"lorafy|params|targets=|exclude=|\w\(", shown)


def test_main_refuses_bad_targets_before_the_download(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(minilm.wheels, "wheel", lambda *_: pytest.fail("download"))
    with pytest.raises(SystemExit) as error:
        finetune.main(["--targets", "layer_6", "--output", str(tmp_path)])
    assert error.value.code == 2
    assert "--targets layer_6: No weight matches" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["batches", "show"])
def test_fit_reports_the_step_at_ctrl_c(monkeypatch, where):
    """An interrupt while the next batch is drawn, or while progress is shown."""

    def batches(*_):
        for step in range(1, 5):
            if where == "batches" and step == 3:
                raise KeyboardInterrupt
            yield ()

    shown = []

    def show(_):
        shown.append(None)
        if where == "show" and len(shown) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "batches", batches)
    with pytest.raises(KeyboardInterrupt, match=r"^in step 2 of 4$"):
        finetune.fit({}, (), argparse.Namespace(steps=4), show)
    assert len(shown) == 2


@pytest.mark.slow
def test_main_ends_at_ctrl_c_with_one_line(files, tmp_path):
    """Sends the signal to a separate process, like a terminal."""
    old = {"finetune.json": "{}", "adapter.safetensors": "old"}
    for name, text in old.items():
        (tmp_path / name).write_text(text)
    given = options(files, tmp_path, steps=4000, method="lora", targets="query")
    # A shell may ignore SIGINT in its background processes, and Python inherits that.
    code = "import runpy, signal, sys; sys.argv = sys.argv[1:]; "
    code += "signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    script = Path(finetune.__file__)
    command = [sys.executable, "-c", code, script.name, *given]
    pipe = dict(stderr=subprocess.PIPE, text=True, cwd=script.parent)
    with subprocess.Popen(command, **pipe) as job:
        limit = threading.Timer(240, job.kill)
        limit.start()
        for line in job.stderr:
            if line.startswith("step "):
                job.send_signal(signal.SIGINT)
                break
        shown = line + job.stderr.read()
        limit.cancel()
    assert job.returncode == 128 + signal.SIGINT, shown
    assert "Traceback" not in shown
    words = r"finetune\.py: stopped in step \d+ of 4000; nothing was written to "
    assert re.fullmatch(words + re.escape(str(tmp_path)), shown.splitlines()[-1])
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == old


@pytest.mark.parametrize(
    ("table", "rows", "more", "message"),
    [
        ("word", 9, True, "has 32 tokens, the weights have 9: write --tokenizer"),
        ("position", 40, True, "--weights has 40 positions, fewer than the 48 needed"),
        ("word", 32, False, r"There is no file .*tokenizer\.json\. Write --tokenizer"),
    ],
)
def test_main_refuses_files_that_do_not_fit(
    files, tmp_path, capsys, table, rows, more, message
):
    tensors = load_file(files / "model.safetensors")
    name = f"{minilm.EMBEDDINGS[table]}.weight"
    weights = tmp_path / "model.safetensors"
    save_file({**tensors, name: tensors[name][:rows].copy()}, weights)
    tokenizer = files / "tokenizer.json" if more else None
    with pytest.raises(SystemExit) as error:
        finetune.main(options(files, tmp_path, weights=weights, tokenizer=tokenizer))
    assert error.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_main_without_network_ends_with_instructions(tmp_path, capsys, monkeypatch):
    def offline(*_):
        raise OSError("Cannot fetch thing")

    monkeypatch.setattr(minilm.wheels, "wheel", offline)
    with pytest.raises(SystemExit) as error:
        finetune.main(["--method=full", f"--output={tmp_path}"])
    assert error.value.code == 1
    shown = capsys.readouterr().err
    assert "Cannot fetch thing" in shown
    assert "usage" not in shown


def test_fit_fails_if_the_loss_is_not_finite():
    args = finetune.options().parse_args(["--batch=2"])
    method = finetune.Method(lambda *_: ((0, 0), np.float32(np.nan)), (0, 0), 0, {})
    message = r"full became nan in step 1: write a smaller --full-lr\.$"
    with pytest.raises(SystemExit, match=message):
        finetune.fit({"full": method}, (np.arange(4), np.arange(4)), args)
    message = r"lora\+ became nan in step 1: write a smaller --lora-lr\.$"
    with pytest.raises(SystemExit, match=message):
        finetune.fit({"lora+": method}, (np.arange(4), np.arange(4)), args)
    del args.lora_lr  # to_peft.py has only --lr
    with pytest.raises(SystemExit, match=r"lora became nan .* smaller --lr\.$"):
        finetune.fit({"lora": method}, (np.arange(4), np.arange(4)), args)


def test_check_logits_refuses_other_predictions():
    logits = np.array([[0.0, 1.0], [3.0, 0.0]], np.float32)
    held = None, None, np.array([1, 1], np.int32)
    finetune.check_logits("The copy", logits + np.float32(1e-6), logits, held)
    with pytest.raises(
        SystemExit, match=r"The copy has held-out accuracy 0\.0, .* 0\.5"
    ):
        finetune.check_logits("The copy", logits - 2 * logits[:1], logits, held)
    with pytest.raises(SystemExit, match=r"the logits differ by up to 0\.1"):
        finetune.check_logits("The copy", logits + np.float32(0.1), logits, held)


def test_batches_depend_on_the_seed_only():
    args = finetune.options().parse_args(["--steps=7", "--batch=4", "--seed=3"])
    rows = np.arange(13, dtype=np.int32)
    seen = [list(batch[-1]) for batch in finetune.batches((rows, rows, rows), args)]
    again = [list(batch[0]) for batch in finetune.batches((rows, rows, rows), args)]
    assert seen == again
    assert [len(batch) for batch in seen] == [4] * 7
    for first in (0, 3):  # an epoch is three batches without repeated sentences
        assert np.unique(seen[first : first + 3]).size == 12


def test_memory_adds_up_to_that_of_the_compiled_step():
    x = np.ones((4, 8), np.float32)

    def step(state, frozen, x):
        (w, m), b = state, frozen
        return (w - m * (x @ b).sum(), m), (x @ b).sum()

    state, frozen = (np.ones((3, 5), np.float32), np.float32(1)), np.ones((8, 2), "f4")
    compiled = jax.jit(step).lower(state, frozen, x).compile()
    parts = training.memory(compiled, state, frozen, (x,))
    assert (parts["parameters"], parts["gradients"]) == (4 * (15 + 16), 4 * 15)
    assert parts["optimizer"] == 4
    stats = compiled.memory_analysis()
    assert stats.argument_size_in_bytes == 4 * (15 + 16 + 1 + 32)
    assert parts["peak"] >= stats.argument_size_in_bytes + parts["temporaries"]
    unused = np.ones(9, np.float32)
    with pytest.raises(RuntimeError, match="a leaf is unused"):
        training.memory(compiled, state, (frozen, unused), (x,))


@pytest.mark.parametrize(
    ("leaf", "copy"),
    [("kernel", "lora_w"), ("embedding", "lora_w"), ("bias", "bias_lora_w")],
)
def test_memory_counts_leaves_that_a_copy_replaces(leaf, copy):
    plain, trained = np.ones((8, 2), np.float16), np.ones((8, 2), np.float32)
    adapters = {"head": {leaf: None, copy: trained}, "body": {"kernel": None}}
    kernel, x = np.ones((8, 8), np.float32), np.ones((4, 8), np.float32)
    base = {"head": {leaf: plain, copy: None}, "body": {"kernel": kernel}}

    def step(state, base, x):
        (adapters, m), w = state, base["body"]["kernel"]
        y = x @ w @ adapters["head"][copy]
        return (jax.tree.map(lambda a: a - m * y.sum(), adapters), m), y.sum()

    state = adapters, np.float32(1)
    compiled = jax.jit(step).lower(state, base, x).compile()
    parts = training.memory(compiled, state, base, (x,))
    stats = compiled.memory_analysis()
    assert parts["unread"] == 2 * 16
    assert parts["parameters"] == 4 * (16 + 64)
    assert stats.argument_size_in_bytes == 4 * (16 + 64 + 1 + 32)
    assert parts["peak"] >= stats.argument_size_in_bytes + parts["unread"]
    # Any other unused leaf is an error.
    base["body"]["bias"] = np.ones(5, np.float32)
    with pytest.raises(RuntimeError, match=r"and 32 that trained copies replace"):
        training.memory(compiled, state, base, (x,))


def test_spread_separates_labels_and_smooth_keeps_constants():
    placed = report.spread([1.0, 0.0, 0.1], 0.5)
    assert np.all(np.diff(placed[[1, 2, 0]]) >= 0.5 - 1e-9)
    np.testing.assert_allclose(placed.mean(), np.mean([1.0, 0.0, 0.1]))
    np.testing.assert_allclose(report.smooth(np.ones(50)), np.ones(50))
    np.testing.assert_allclose(report.smooth(np.array([2.0])), [2.0])
