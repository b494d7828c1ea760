"""to_peft.py runs end to end on a tiny Llama, and refuses wrong options."""

import json
import re

import jax
import numpy as np
import pytest
import to_peft
from models import folder, smollm2

import lora_jax as lj

pytestmark = pytest.mark.usefixtures("third_party")
GAPS = {"largest": 20.0, "merged": 1e-5, "peft": 2e-5, "base": 3.0}


@pytest.fixture
def given(tiny_smollm2, tmp_path, monkeypatch):
    """Returns the command line of a short run, with a tiny model instead of a file."""
    monkeypatch.setattr(to_peft, "missing", lambda check: [])
    rng = np.random.default_rng(0)
    words = ["the", "then", "other", "he", "film"]
    lines = [f"{' '.join(rng.choice(words, 5))} {i},{i % 2}" for i in range(60)]
    (tmp_path / "data.csv").write_text("\n".join(["text,label", *lines]))
    tiny_smollm2.write(tmp_path / "tiny.gguf")

    def options(*more, **changes):
        named = {
            "weights": tmp_path / "tiny.gguf",
            "data": tmp_path / "data.csv",
            "output": tmp_path / "new" / "output",
            "rank": 2,
            "steps": 8,
            "length": 16,
            "held-out": 20,
            "tokens": 3,
        }
        named |= {name.replace("_", "-"): value for name, value in changes.items()}
        return [*(f"--{name}={value}" for name, value in named.items()), *more]

    return options


@pytest.mark.slow
def test_main_end_to_end(given, tmp_path, capsys, tiny_smollm2):
    to_peft.main(given("--no-check"))
    output = tmp_path / "new" / "output"
    base = smollm2.load(tmp_path / "tiny.gguf").params
    params = lj.import_peft(output / "adapter", base, folder.names(smollm2.ARCH))
    kernels = params["blocks"]["mlp"]["down"], params["blocks"]["attention"]["key"]
    assert all(abs(kernel["lora_b"]).max() > 0 for kernel in kernels)
    config = json.loads((output / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM" and config["r"] == 2

    results = json.loads((output / "to_peft.json").read_text())
    before, after = results["before"], results["after"]
    assert after["loss"] < before["loss"] and len(results["losses"]) == 8
    assert before["text"].startswith("the film")
    assert "check" not in results and results["settings"]["rank"] == 2
    assert (output / "to_peft.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr()
    count = lj.count(params)
    assert f"trainable {count.trainable:,} of" in shown.out
    assert re.search(r"held-out loss \d\.\d+ before, \d\.\d+ after 8 steps", shown.out)
    assert "before: the film" in shown.out and "after: the film" in shown.out
    assert re.search(r"step 8/8: lora loss \d\.\d+", shown.err)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("more", [[], ["--unrolled", "--targets", "mlp", "tokens"]])
def test_main_checks_the_adapter_with_peft(given, tmp_path, capsys, more):
    for name in ("torch", "transformers", "peft"):
        pytest.importorskip(name)
    to_peft.main(given(*more))
    results = json.loads((tmp_path / "new" / "output" / "to_peft.json").read_text())
    found = results["check"]
    assert found["peft"] < 1e-4 * found["largest"] < 0.01 * found["base"]
    assert "PEFT's differ by" in capsys.readouterr().out


def test_rows_cut_one_stream_of_tokens(tiny_smollm2):
    tokenizer = smollm2.tokenizer(tiny_smollm2.fields)
    texts = ["the film", "he", "then 12"]
    ids, labels = to_peft.rows(tokenizer, texts, 4)
    assert ids.dtype == labels.dtype == np.int32 and ids.shape == labels.shape
    stream = [i for text in texts for i in (*tokenizer.encode(text).ids, 0)]
    assert len(stream) % 4 != 1  # something is dropped
    count = (len(stream) - 1) // 4
    assert ids.ravel().tolist() == stream[: 4 * count]
    assert labels.ravel().tolist() == stream[1 : 4 * count + 1]
    assert to_peft.rows(tokenizer, ["he"], 4)[0].shape == (0, 4)
    tiny_smollm2.fields["tokenizer.ggml.tokens"][0] = "<end>"
    with pytest.raises(ValueError, match=r"has no token <\|endoftext\|>"):
        to_peft.rows(smollm2.tokenizer(tiny_smollm2.fields), texts, 4)


def test_loss_of_a_model_with_known_predictions():
    """The model predicts the next integer with certainty: right, then wrong labels."""

    def apply(params, ids):
        return params * jax.nn.one_hot(ids + 1, 8)

    ids = np.array([[1, 2, 3], [4, 5, 6], [0, 1, 2]], np.int32)
    sure = np.float32(50)
    assert to_peft.loss(apply, sure, (ids, ids + 1), 1) == pytest.approx(0, abs=1e-5)
    assert to_peft.loss(apply, sure, (ids, ids), 2) == pytest.approx(50, abs=1e-3)
    assert to_peft.loss(apply, sure * 0, (ids, ids), 2) == pytest.approx(np.log(8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "0 is not a whole number from 1"),
        ({"alpha": "nan"}, "nan is not a finite number above 0"),
        ({"lr": "-1"}, "-1 is not a finite number above 0"),
        ({"weights": "gone"}, "there is no file gone"),
        ({"data": "gone"}, "there is no file gone"),
        ({"output": __file__}, "is not a folder"),
        ({"prompt": ""}, "--prompt is empty"),
        ({"targets": "blocks_1"}, "--targets blocks_1: No weight matches 'blocks_1'"),
        ({"held_out": 60}, "Cannot hold out 60 of 60"),
        ({"data": __file__}, "has no column label and no column text"),
        ({"batch": 80}, r"rows of 16 tokens are less than one batch of 80.*fewer"),
        ({"held_out": 2}, r"rows of 16 tokens are less than one .* more --held-out"),
    ],
)
def test_main_refuses_bad_options_before_any_work(
    given, tmp_path, capsys, monkeypatch, changes, message
):
    monkeypatch.setattr(smollm2.wheels, "wheel", lambda *_: pytest.fail("download"))
    monkeypatch.setattr(to_peft, "train", lambda *_: pytest.fail("work"))
    with pytest.raises(SystemExit) as error:
        to_peft.main(given(**changes))
    assert error.value.code == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


def test_main_refuses_bad_targets_before_the_download(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(to_peft, "missing", lambda check: [])
    monkeypatch.setattr(smollm2.wheels, "wheel", lambda *_: pytest.fail("download"))
    with pytest.raises(SystemExit) as error:
        to_peft.main(["--targets", "blocks_1", f"--output={tmp_path}"])
    assert error.value.code == 2
    assert "--targets blocks_1: No weight matches" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("check", "names", "found"),
    [
        ("--check", ["gguf", "torch"], r"gguf and torch must be .*peers\]\"\.$"),
        ("--check", ["peft"], r"peft must be installed: .* Or write --no-check\.$"),
        ("--no-check", ["gguf"], r"gguf must be installed: pip install"),
    ],
)
def test_main_names_packages_that_are_not_installed(
    capsys, monkeypatch, check, names, found
):
    have = lambda name: None if name in names else name
    monkeypatch.setattr(to_peft.importlib.util, "find_spec", have)
    with pytest.raises(SystemExit):
        to_peft.main([check])
    assert re.search(found, capsys.readouterr().err.strip())


def test_main_refuses_a_folder_with_other_files_before_training(
    given, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "new" / "output" / "adapter"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    monkeypatch.setattr(to_peft, "train", lambda *_: pytest.fail("trained"))
    with pytest.raises(SystemExit) as error:
        to_peft.main(given("--no-check"))
    assert error.value.code == 2
    shown = capsys.readouterr().err
    assert "contains other files: notes.txt. Write another" in shown
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("where", ["train", "summary", "export"])
def test_main_leaves_old_files_at_ctrl_c(given, tmp_path, monkeypatch, capsys, where):
    output = tmp_path / "new" / "output"
    (output / "adapter").mkdir(parents=True)
    names = ["adapter/adapter_config.json", "to_peft.json"]
    for name in names:
        (output / name).write_text("old")

    def stop(*args):
        raise KeyboardInterrupt

    fitted = to_peft.finetune.Fitted(None, [3.0, 3.0], [0.1, 0.1])
    monkeypatch.setattr(to_peft, "evaluate", lambda *_: {"loss": 3.0, "text": "the"})
    monkeypatch.setattr(to_peft, "train", lambda f, x, *_: (x, fitted, {}))
    if where == "export":  # the final export; the trial one writes to another folder
        export = to_peft.export
        final = lambda x, path, args: (stop if output in path.parents else export)(
            x, path, args
        )
        monkeypatch.setattr(to_peft, where, final)
    else:
        monkeypatch.setattr(to_peft, where, stop)
    with pytest.raises(SystemExit) as error:
        to_peft.main(given("--no-check"))
    assert error.value.code == 130
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r": stopped.*; nothing was written to .*output$", line)
    assert ("after all 8 steps" in line) == (where != "train")
    found = [p for p in output.rglob("*") if p.is_file()]
    assert sorted(str(p.relative_to(output)) for p in found) == names
    assert {p.read_text() for p in found} == {"old"}


def test_main_without_network_ends_with_instructions(tmp_path, capsys, monkeypatch):
    def offline(*_):
        raise OSError("Cannot fetch thing")

    monkeypatch.setattr(to_peft, "missing", lambda check: [])
    monkeypatch.setattr(to_peft, "check_adapters", lambda *_: None)
    monkeypatch.setattr(to_peft.reviews.wheels, "wheel", offline)
    with pytest.raises(SystemExit) as error:
        to_peft.main([f"--output={tmp_path}"])
    assert error.value.code == 1
    assert "Cannot fetch thing" in capsys.readouterr().err


def test_main_fails_if_the_loss_did_not_fall(given, tmp_path, monkeypatch):
    fitted = to_peft.finetune.Fitted(None, [3.0, 3.0], [0.1, 0.1])
    stubs = {
        "adapt": lambda *_: {},
        "evaluate": lambda *_: {"loss": 3.0, "text": "the film"},
        "train": lambda *_: ({}, fitted, {}),
        "figure": lambda *_: None,
        "export": lambda *_: None,
    }
    for name, stub in stubs.items():
        monkeypatch.setattr(to_peft, name, stub)
    monkeypatch.setattr(lj, "count", lambda params: len(params))
    with pytest.raises(SystemExit, match="The held-out loss did not fall: write"):
        to_peft.main(given("--no-check"))
    assert (tmp_path / "new" / "output" / "to_peft.json").is_file()


@pytest.mark.parametrize("name", ["merged", "peft"])
@pytest.mark.parametrize("gap", [0.03, np.nan])
def test_agreement_refuses_logits_that_differ(name, gap):
    assert "merged model's differ by 1.0e-05, PEFT's" in to_peft.agreement(GAPS)
    with pytest.raises(SystemExit, match=r"rounding explains at most 2\.0e-02"):
        to_peft.agreement(GAPS | {name: gap})
