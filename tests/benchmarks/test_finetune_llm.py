"""finetune_llm.py runs end to end on a tiny model, continues, and refuses bad input."""

import json
import re
import signal

import finetune_llm
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import run_state
import training
from data import chat
from models import folder as folders

import lora_jax as lj

pytestmark = pytest.mark.usefixtures("third_party")


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Runs on one of the simulated devices, as most machines have one."""
    first = jax.devices()[:1]
    monkeypatch.setattr(finetune_llm.jax, "devices", lambda *_: first)


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_llm):
    """Writes a tiny model and chats that it can learn."""
    path = tmp_path_factory.mktemp("llm")
    tiny_llm.write(path / "model")
    tiny_llm.write_lines(path / "data.jsonl", tiny_llm.chats(40))
    return path


def options(files, output, *more, **changes):
    """Returns the command line of a short run; `None` omits an option."""
    given = {
        "data": files / "data.jsonl",
        "output": output,
        "rank": 2,
        "alpha": 2,
        "length": 64,
        "batch": 2,
        "steps": 6,
        "every": 3,
        "rate": 0.02,
        "eval": 4,
        "sample": 4,
    }
    given |= {name.replace("_", "-"): value for name, value in changes.items()}
    given = [f"--{name}={value}" for name, value in given.items() if value is not None]
    return [str(files / "model"), *given, *more]


def run(files, output, *more, **changes):
    """Runs the script and returns its results."""
    finetune_llm.main(options(files, output, *more, **changes))
    return json.loads((output / "finetune_llm.json").read_text())


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """Runs all steps once, with all exports; returns the folder and the results."""
    output = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch, jax.numpy_rank_promotion("allow"):
        first = jax.devices()[:1]
        patch.setattr(finetune_llm.jax, "devices", lambda *_: first)
        with jax.numpy_dtype_promotion("standard"):
            found = run(files, output, "--merged")
    return output, found


def test_main_writes_an_adapter_that_loads_again(files, whole):
    output, found = whole
    held = [*found["held"].values()]
    assert [*found["held"]] == ["0", "3", "6"] and held[-1] < held[0]
    assert len(found["losses"]) == 6
    names = {"adapter.safetensors", "peft", "merged", "finetune_llm.json"}
    assert {x.name for x in output.iterdir()} == names | {"finetune_llm.png"}

    model, base = folders.load(files / "model", dtype=jnp.float32)
    params = lj.load(output / "adapter.safetensors", base)
    map_ = folders.names(model.arch)
    again = lj.import_peft(output / "peft", base, map_)
    for x, y in zip(
        *map(jax.tree.leaves, map(lj.detach, (params, again))), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=1e-6)
    _, merged = folders.load(output / "merged", dtype=jnp.float32)
    adapters, _ = lj.split(params)
    want = lj.merge(params)
    kernel = lambda tree: np.asarray(tree["blocks"]["attention"]["query"]["kernel"])
    np.testing.assert_allclose(kernel(merged), kernel(want), atol=1e-5)
    assert np.abs(kernel(merged) - kernel(base)).max() > 1e-2
    assert sum(x.size for x in jax.tree.leaves(adapters)) == found["trainable"]


def test_main_stopped_by_ctrl_c_continues_to_the_same_losses(
    files, whole, tmp_path, capsys, monkeypatch
):
    real = finetune_llm.batch_of
    steps = []

    def batch_of(job, args, step):
        steps.append(step)
        if step == 4:
            signal.raise_signal(signal.SIGINT)
        return real(job, args, step)

    monkeypatch.setattr(finetune_llm, "batch_of", batch_of)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as error:
        run(files, tmp_path)
    assert signal.getsignal(signal.SIGINT) is before
    assert error.value.code == 130
    assert "stopped after step 5 of 6; the run is saved" in capsys.readouterr().err
    assert {x.name for x in tmp_path.iterdir()} == {"checkpoint"}
    monkeypatch.setattr(finetune_llm, "batch_of", real)

    # A new run must not replace it, nor another one continue it.
    for more, message in [
        ([], "has a stopped run: write --resume"),
        (["--resume", "--rate=0.1"], "had --rate 0.02, and this one has 0.1"),
        (["--resume", f"--data={files / 'other.jsonl'}"], "had other data"),
    ]:
        lines = (files / "data.jsonl").read_text().splitlines()
        (files / "other.jsonl").write_text("\n".join(lines[1:]))
        with pytest.raises(SystemExit) as error:
            run(files, tmp_path, *more)
        assert error.value.code == 2
        assert message in capsys.readouterr().err

    found = run(files, tmp_path, "--resume")
    assert found["losses"] == whole[1]["losses"]
    assert found["held"] == whole[1]["held"]
    assert found["after"] == whole[1]["after"]
    name = "adapter.safetensors"
    assert (tmp_path / name).read_bytes() == (whole[0] / name).read_bytes()
    assert not run_state.exists(tmp_path)


def test_main_keeps_the_last_good_adapter_if_the_loss_is_nan(
    files, whole, tmp_path, capsys, monkeypatch
):
    real = finetune_llm.Compiled

    def compiled(step, memory):
        seen = []

        def spoiled(state, frozen, batch):
            seen.append(None)
            if len(seen) == 4:  # the head's gradient becomes NaN, as from a bad batch
                frozen = jax.tree.map(
                    lambda x: x * jnp.nan if x.dtype == jnp.float32 else x, frozen
                )
            return step(state, frozen, batch)

        return real(spoiled, memory)

    removed = []
    monkeypatch.setattr(finetune_llm, "Compiled", compiled)
    monkeypatch.setattr(finetune_llm.run_state, "remove", removed.append)
    with pytest.raises(SystemExit) as error:
        run(files, tmp_path)
    assert error.value.code == 1
    shown = capsys.readouterr().err
    assert "not finite in step 4. The adapter in" in shown
    assert "that of step 3. Write a smaller --rate" in shown
    assert removed == [tmp_path]
    _, base = folders.load(files / "model", dtype=jnp.float32)
    kept = lj.load(tmp_path / "adapter.safetensors", base)
    saved = lj.load(tmp_path / "checkpoint" / "adapter.safetensors", base)
    for x, y in zip(*map(jax.tree.leaves, (kept, saved)), strict=True):
        np.testing.assert_array_equal(x, y)  # that of step 3, which --every saved


def job_of(files, *more, **changes):
    """Returns the job and its options."""
    given = options(files, files / "none", *more, **changes)
    args = finetune_llm.options().parse_args(given)
    return finetune_llm.prepare(args), args


def drawn(params, randomized):
    """Returns the halves of a tree with random factors."""
    return lj.split(randomized(params))


def test_step_of_several_batches_equals_one_large_batch(files, randomized):
    found = []
    for batch, accumulate in ((4, 1), (2, 2)):
        job, args = job_of(files, batch=batch, accumulate=accumulate, eval=0)
        trainable, frozen = drawn(job.params, randomized)
        loss = finetune_llm.decoder_loss(job.model, args.chunk)
        step = training.accumulated_update(loss, optax.sgd(1.0))
        state = trainable, optax.sgd(1.0).init(trainable)
        *inputs, labels = map(np.asarray, finetune_llm.batch_of(job, args, 0))
        # The batches must differ in how many tokens they train.
        rows = *inputs, labels.copy()
        rows[-1][0, 0] = chat.IGNORED
        (new, _), value = jax.jit(step)(state, frozen, rows)
        found.append((new, value))
    for x, y in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_decoder_loss_equals_optax_on_all_logits(files, randomized):
    """On quantized weights, with a head that is adapted and the token embedding too."""
    given = "--targets", "query", "tokens/embedding"
    job, args = job_of(files, *given, base="nf4", table="int8", chunk=16)
    params = randomized(job.params)
    adapters, base = lj.split(params)
    rows = [x[:2] for x in job.train]
    ids, segments, positions, labels = rows

    def all_logits(adapters):
        merged = lj.merge(lj.combine(adapters, base))
        logits = job.model.apply({"params": merged}, ids, segments, positions)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, np.maximum(labels, 0)
        )
        return (losses * (labels >= 0)).sum() / (labels >= 0).sum()

    chunked = finetune_llm.decoder_loss(job.model, args.chunk)
    found = [
        jax.jit(jax.value_and_grad(fn))(adapters)
        for fn in (all_logits, lambda x: chunked(lj.combine(x, base), *rows))
    ]
    for x, y in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_loss_dequantizes_the_head_once(files):
    job, args = job_of(files, table="int8", chunk=8)
    adapters, base = lj.split(job.params)
    loss = finetune_llm.decoder_loss(job.model, args.chunk)
    fn = lambda x: loss(lj.combine(x, base), *(x[:2] for x in job.train))
    text = str(jax.make_jaxpr(jax.grad(fn))(adapters))
    vocab, width = job.model.arch.vocab, job.model.arch.width
    table = rf"f32\[{vocab},{width}\] = convert_element_type"
    assert len(re.findall(table, text)) == 1
    assert "[2,64," + str(vocab) not in text
    assert f"f32[2,8,{vocab}]" in text


def test_rows_are_apart_in_the_model(files, randomized):
    """The loss of packed rows is that of each example alone."""
    job, args = job_of(files, chunk=16)
    params = randomized(job.params)
    loss = jax.jit(finetune_llm.decoder_loss(job.model, args.chunk))
    (several, *_), _ = np.nonzero(job.train.segments == 2)
    one = chat.take(job.train, np.array([several]))
    total = 0.0
    for number in range(1, one.segments.max() + 1):
        at = one.segments[0] == number
        alone = chat.Rows(*(np.zeros_like(x) for x in one))
        alone.labels[:] = chat.IGNORED
        for name in ("ids", "labels"):
            getattr(alone, name)[0, : at.sum()] = getattr(one, name)[0, at]
        alone.segments[0, : at.sum()] = 1
        alone.positions[0] = np.arange(args.length)
        total += float(loss(params, *alone, total=1.0))
    np.testing.assert_allclose(loss(params, *one, total=1.0), total, rtol=1e-5)


def test_main_on_several_devices_equals_one(files, whole, tmp_path, monkeypatch):
    devices = jax.local_devices()[:2]
    monkeypatch.setattr(finetune_llm.jax, "devices", lambda *_: devices)
    job, _ = job_of(files, base="nf4", table="int8")
    kernel = job.params["blocks"]["mlp"]["up"]["kernel"]
    assert len(kernel.values.sharding.device_set) == 2
    assert not kernel.values.sharding.is_fully_replicated
    found = run(files, tmp_path)
    np.testing.assert_allclose(found["losses"], whole[1]["losses"], rtol=1e-3)
    np.testing.assert_allclose(
        [*found["held"].values()], [*whole[1]["held"].values()], rtol=1e-3
    )


def test_split_shuffles_a_sorted_file(files, tmp_path):
    """A row has several records, and those of one kind would all be in one batch."""
    args = finetune_llm.options().parse_args(options(files, tmp_path, eval=20))
    records = [*range(100)]
    train, held = finetune_llm.split(records, args)
    assert sorted(train + held) == records and len(held) == 20
    for i in range(0, 80, 10):  # ten of one half by chance: 2 in 1,000
        assert min(train[i : i + 10]) < 50 <= max(train[i : i + 10])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "0 is not a whole number from 1"),
        ({"length": 1}, "1 is not a whole number from 2"),
        ({"base": "int3"}, "invalid choice: 'int3'"),
        ({"chunk": 7}, "--chunk 7 does not divide --length 64"),
        ({"data": "gone"}, "there is no file gone"),
        ({"targets": "querry"}, "error: --targets querry: No weight matches"),
        ({"eval": 40}, "40 examples, so --eval 40 leaves none .* --eval 4"),
        ({"length": 4}, "No example for training has a token to train"),
        ({"resume": None}, "has no checkpoint of a stopped run"),
    ],
)
def test_main_refuses_bad_options_before_the_weights(
    files, tmp_path, capsys, monkeypatch, changes, message
):
    monkeypatch.setattr(finetune_llm.folders, "load", lambda *_, **__: pytest.fail())
    more = ["--resume"] if "resume" in changes else []
    with pytest.raises(SystemExit) as error:
        run(files, tmp_path, *more, **changes)
    assert error.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_main_refuses_a_batch_that_does_not_divide_the_devices(
    files, tmp_path, capsys, monkeypatch
):
    devices = jax.local_devices()[:2]
    monkeypatch.setattr(finetune_llm.jax, "devices", lambda *_: devices)
    with pytest.raises(SystemExit) as error:
        run(files, tmp_path, batch=3)
    assert error.value.code == 2
    assert "--batch 3 cannot be split over 2 devices" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", None, "has no config.json"),
        ("tokenizer.json", None, r"has no tokenizer\.json"),
        ("chat_template.jinja", None, "has no chat template"),
        ("config.json", '{"model_type": "mamba"}', "'model_type' is 'mamba'"),
    ],
)
def test_main_refuses_folders_that_lack_a_file(
    files, tmp_path, capsys, tiny_llm, name, text, message
):
    folder = tiny_llm.write(tmp_path / "model")
    (folder / name).unlink()
    if text:
        (folder / name).write_text(text)
    with pytest.raises(SystemExit):
        finetune_llm.main([str(folder), *options(files, tmp_path / "output")[1:]])
    assert re.search(message, capsys.readouterr().err)


def test_main_refuses_another_models_tokenizer(files, tmp_path, capsys, tiny_llm):
    folder = tiny_llm.write(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    tiny_llm.dump(folder / "config.json", config | {"vocab_size": 5})
    with pytest.raises(SystemExit):
        finetune_llm.main([str(folder), *options(files, tmp_path / "output")[1:]])
    assert "the model has 5: it is another model's" in capsys.readouterr().err


@pytest.mark.slow
def test_main_without_a_folder_lowers_the_held_out_loss(tmp_path):
    shorter = "--steps=10 --length=128 --eval=16 --sample=8".split()
    finetune_llm.main([*shorter, f"--output={tmp_path}"])
    found = json.loads((tmp_path / "finetune_llm.json").read_text())
    held = [*found["held"].values()]
    assert held[-1] < 0.7 * held[0]


def test_main_out_of_memory_names_options(files, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in "
            "memory space hbm. Used 19.03G of 15.75G hbm."
        )

    monkeypatch.setattr(finetune_llm, "compile_step", refuse)
    with pytest.raises(SystemExit) as error:
        run(files, tmp_path, table="int8")
    assert re.search(
        r"the step needs 20\.4 GB, and there are 16\.9 GB\. Write, from the first on, "
        r"--batch 1 --accumulate 2, then --base nf4, then --chunk 32, then --length 32",
        str(error.value),
    )


def test_progress_shows_a_bar_on_a_terminal(files, capsys, monkeypatch):
    monkeypatch.setattr(finetune_llm.sys.stderr, "isatty", lambda: True, raising=False)
    rows = chat.Rows(*(np.ones((3, 8), np.int32) for _ in chat.Rows._fields))
    job = finetune_llm.Job(*[None] * 4, rows, *[None] * 3)
    args = finetune_llm.options().parse_args(["--steps=2", "--length=8", "--batch=1"])
    now = finetune_llm.Run((), [], [], {0: 2.0})
    with finetune_llm.progress(args, job, None) as show:
        for _ in range(2):
            now.losses.append(0.5)
            now.seconds.append(2.0)
            show(now)
    shown = capsys.readouterr().err
    assert re.search(r"100%.* 2/2, .*loss 0\.500, 4 tokens/s, held-out 2\.000", shown)
