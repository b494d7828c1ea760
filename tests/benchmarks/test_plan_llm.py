"""plan_llm.py plans and runs the very step of finetune_llm.py."""

import json

import finetune_llm
import jax
import plan_llm
import pytest

import lora_jax as lj

pytestmark = pytest.mark.usefixtures("third_party")
GIVEN = "--rank=2", "--length=32", "--base=nf4", "--table=int8", "--steps=4"


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Runs on one of the simulated devices."""
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: first)


def outline(tree):
    """Returns the shapes and dtypes of a tree, by path."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path): (x.shape, x.dtype) for path, x in leaves}


def test_arguments_are_those_of_a_real_step(tmp_path, tiny_llm):
    model = tiny_llm.write(tmp_path / "model")
    data = tiny_llm.write_lines(tmp_path / "data.jsonl", tiny_llm.chats(12))
    more = f"--output={tmp_path}", "--batch=2", "--accumulate=2"
    given = str(model), *GIVEN, *more
    planned = plan_llm.prepare(plan_llm.options().parse_args(given))
    real = [*given, f"--data={data}", "--eval=2"]
    args = finetune_llm.options().parse_args(real)
    job = finetune_llm.prepare(args)
    trainable, frozen = lj.split(job.params)
    state = trainable, finetune_llm.optimizer(args).init(trainable)
    want = state, frozen, finetune_llm.batch_of(job, args, 0)
    got = plan_llm.arguments(planned, 2)
    assert outline(got) == outline((*want[:2], tuple(want[2])))


@pytest.mark.slow
def test_main_takes_a_step_with_random_weights(tmp_path, tiny_llm, capsys):
    model = tiny_llm.write(tmp_path / "model")
    plan_llm.main([str(model), *GIVEN, f"--output={tmp_path}", "--run=2"])
    found = json.loads((tmp_path / "plan_llm.json").read_text())["run"]
    assert len(found["seconds"]) == len(found["losses"]) == 2
    assert "XLA plans" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["nothing"], "nothing is neither a folder nor one of gpt2-medium"),
        (["vit-h"], "vit-h takes images"),
        (["smollm2-135m", "--chunk=7"], "--chunk 7 does not divide --length 512"),
        (["smollm2-135m", "--targets=q"], "--targets q: No weight matches"),
    ],
)
def test_main_refuses_bad_options(tmp_path, capsys, given, message):
    with pytest.raises(SystemExit) as error:
        plan_llm.main([*given, f"--output={tmp_path}"])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
