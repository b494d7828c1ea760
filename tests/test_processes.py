"""Tests that two processes compute, save, load and fail like one."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import textwrap
import time

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import lora_jax as lj

ROOT = pathlib.Path(lj.__file__).parents[1]
LIMIT = 180  # seconds, for JAX to start twice and compile, next to other work
GRACE = 30  # seconds that a process may live on when the other one has failed
DRAWN = np.random.default_rng(0)
ARRAYS = {
    "up": DRAWN.standard_normal((8, 16)).astype(np.float32),
    "head": DRAWN.standard_normal((16, 4)).astype(np.float32),
    "x": DRAWN.standard_normal((4, 8)).astype(np.float32),
}
NAMES = {"up": "model.up", "head": "model.head", "norm": "model.norm"}

# The start of the code of every process: `place` shards an array over the devices.
COMMON = """
import numpy as np, jax, jax.numpy as jnp, optax
import lora_jax as lj

def fn(params, x):
    h = jnp.tanh(x @ params["up"]["kernel"]) * params["norm"]["scale"][None]
    return h @ params["head"]["kernel"]

def base(arrays, place):
    return {
        "up": {"kernel": place(arrays["up"], "data", "model")},
        "norm": {"scale": place(np.ones(16, np.float32), "model")},
        "head": {"kernel": place(arrays["head"], "model")},
    }

def trained(plain, x):
    params, tx = lj.lorafy(plain, 2, alpha=3.0, also="norm"), optax.sgd(0.1)

    @jax.jit
    def step(adapters, rest, x):
        loss = lambda a: jnp.mean((lj.lora(fn)(lj.combine(a, rest), x) - 1) ** 2)
        grads = jax.grad(loss)(adapters)
        return jax.tree.map(lambda x, g: x - g / 10, adapters, grads)

    adapters, rest = lj.split(params)
    for _ in range(5):
        adapters = step(adapters, rest, x)
    return lj.combine(adapters, rest)
"""
START = """
import sys
import jax
me, port, folder, across = sys.argv[1:]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"localhost:{port}", 2, int(me), initialization_timeout=60)
import os
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
devices = np.array(jax.devices()).reshape(2, 2)  # a row is a process
first = Mesh(devices if across == "data" else devices.T, ("data", "model"))
other = Mesh(devices.reshape(1, 4), ("data", "model"))

def placer(mesh):
    def place(x, *axes):
        where = NamedSharding(mesh, P(*axes))
        return jax.make_array_from_callback(x.shape, where, lambda at: x[at])
    return place

arrays = dict(np.load(os.path.join(folder, "arrays.npz")))
file, peft = os.path.join(folder, "a.safetensors"), os.path.join(folder, "peft")
plain = base(arrays, placer(first))
"""


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def ended(commands, env):
    """Returns the exit codes and outputs of processes, and kills those that remain."""
    started, outputs = [], [tempfile.TemporaryFile() for _ in commands]
    try:
        for command, output in zip(commands, outputs, strict=True):
            pipes = dict(stdout=output, stderr=subprocess.STDOUT)
            started.append(subprocess.Popen(command, env=env, **pipes))
        end, failed = time.monotonic() + LIMIT, False
        while any(p.poll() is None for p in started) and time.monotonic() < end:
            if not failed and any(p.poll() for p in started):
                end, failed = min(end, time.monotonic() + GRACE), True
            time.sleep(0.05)
    finally:
        for p in started:
            p.kill()
            p.wait()
    texts = []
    for output in outputs:
        output.seek(0)
        texts.append(output.read().decode(errors="replace"))
        output.close()
    return [p.returncode for p in started], texts


def run(code, folder, across="data", port=None):
    """Returns the exit codes and outputs of two processes that run some code."""
    np.savez(folder / "arrays.npz", **ARRAYS)
    script = folder / "script.py"
    script.write_text(COMMON + START + textwrap.dedent(code))
    keep = {"JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"}
    env = {k: x for k, x in os.environ.items() if k[:4] != "JAX_" or k in keep}
    env |= {"PYTHONPATH": str(ROOT)}
    for _ in range(3):  # another program may take the port before JAX does
        given = [str(port or free_port()), str(folder), across]
        commands = [[sys.executable, str(script), me, *given] for me in "01"]
        codes, texts = ended(commands, env)
        # The message of gRPC. JAX 0.9 ends with a signal and no message.
        if not any("Failed to add port" in text for text in texts):
            return codes, texts
        port = None
    pytest.fail("three ports in a row were taken:\n" + "\n".join(texts))


def header(path):
    with safe_open(path, framework="numpy") as file:
        return json.loads(file.metadata()["lora_jax"])


@pytest.fixture
def one():
    """Returns the tree that one process trains."""
    names = {}
    exec(COMMON, names)
    plain = names["base"](ARRAYS, lambda x, *_: jnp.asarray(x))
    return names["trained"](plain, ARRAYS["x"])


@pytest.mark.parametrize(
    "across", ["data", pytest.param("model", marks=pytest.mark.slow)]
)
def test_every_verb_on_two_processes_equals_one(tmp_path, one, across, close):
    """Train sharded over both, save, export, and load onto another mesh.

    Rows of the batch are on the axis "data", and so are the rows of a kernel.
    """
    code = """
    params = trained(plain, placer(first)(arrays["x"], "data"))
    lj.save(file, params)
    assert os.path.exists(file)  # in each, as soon as it returns
    names = {"up": "model.up", "head": "model.head", "norm": "model.norm"}
    lj.export_peft(peft, params, names)
    moved = base(arrays, placer(other))
    lora = jax.jit(lj.lora(fn))
    total = jax.jit(lambda params: lora(params, arrays["x"]).sum())
    for back in (
        lj.load(file, moved), lj.load(file, plain), lj.import_peft(peft, moved, names)
    ):
        print("total", float(total(back)))
    assert not lj.load(file, moved)["up"]["lora_b"].is_fully_addressable
    wrong = base({n: x[::-1] for n, x in arrays.items()}, placer(first))
    try:
        lj.load(file, wrong)
    except ValueError as error:
        print("refused", "another base" in str(error))
    """
    codes, texts = run(code, tmp_path, across)
    assert codes == [0, 0], "\n".join(texts)
    names = {}
    exec(COMMON, names)
    want = float(lj.lora(names["fn"])(one, ARRAYS["x"]).sum())
    for text in texts:
        lines = [line.split() for line in text.splitlines()]
        totals = [float(x[1]) for x in lines if x[:1] == ["total"]]
        np.testing.assert_allclose(totals, [want] * 3, rtol=1e-5)
        assert ["refused", "True"] in lines
    plain = lj.strip(one)
    close(lj.load(tmp_path / "a.safetensors", plain), one)
    lj.save(tmp_path / "one.safetensors", one)
    files = ["one.safetensors", "a.safetensors"]
    mine, theirs = (header(tmp_path / name) for name in files)
    for entry in mine, theirs:
        del entry["sha256"]  # of values that are equal to rounding
    assert mine == theirs
    lj.export_peft(tmp_path / "own", one, NAMES)
    config = "adapter_config.json"
    own, made = (
        json.loads((tmp_path / n / config).read_text()) for n in ("own", "peft")
    )
    assert own == made
    tensors = "adapter_model.safetensors"
    own, made = (load_file(tmp_path / n / tensors) for n in ("own", "peft"))
    close(made, own)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {
        "arrays.npz",
        "script.py",
        "a.safetensors",
        "one.safetensors",
        "own",
        "peft",
    }


@pytest.mark.slow
def test_every_verb_on_arrays_that_span_processes(tmp_path):
    """Each process compares with the same verbs on arrays of its own."""
    code = """
    from jax.experimental.multihost_utils import process_allgather

    alone = base(arrays, lambda x, *_: jnp.asarray(x))

    def drawn(plain, rank, seed, **options):
        adapters, rest = lj.split(lj.lorafy(plain, rank, alpha=3.0, **options))
        rng = np.random.default_rng(seed)

        def draw(x):
            value = rng.standard_normal(x.shape).astype(np.float32) / 2
            return jax.make_array_from_callback(x.shape, x.sharding, lambda i: value[i])

        return lj.combine(jax.tree.map(draw, adapters), rest)

    one, two = lambda b: drawn(b, 2, 0), lambda b: drawn(b, 3, 1)
    stacked = lambda b: lj.stack([one(b), two(b)])
    rows = lambda tree: jax.vmap(lj.lora(fn), in_axes=(lj.in_axes(tree), 0))
    few = lambda b: lj.quantize(b, "nf4", block=4)
    checkpoint = {f"{name}.weight": arrays[name].T for name in ("up", "head")}
    verbs = dict(
        also=lambda b: lj.merge(drawn(b, 2, 0, dora=True, also="norm")),
        quantized=lambda b: jax.jit(lj.lora(fn))(drawn(few(b), 2, 0), arrays["x"]),
        back=lambda b: lj.dequantize(few(b)),
        detached=lambda b: lj.merge(lj.attach(lj.detach(one(b)), b)),
        added=lambda b: lj.merge(lj.add(one(b), two(b), weights=[0.5, 2.0])),
        scaled=lambda b: lj.strip(lj.rescale(one(b), -1.0)),
        larger=lambda b: lj.merge(lj.resize(one(b), 3)),
        smaller=lambda b: lj.merge(lj.resize(one(b), 1)),
        extracted=lambda b: lj.merge(lj.extract(lj.merge(one(b)), b, 2)),
        principal=lambda b: lj.merge(lj.principal(lj.lorafy(b, 2))),
        taken=lambda b: lj.merge(lj.take(stacked(b), 1)),
        rows=lambda b: rows(lj.take(stacked(b), np.array([1, 0, 1, 0])))(
            lj.take(stacked(b), np.array([1, 0, 1, 0])), arrays["x"]
        ),
        prints=lambda b: print(lj.count(one(b)), lj.explain(fn, one(b), arrays["x"])),
        named=lambda b: lj.find_names(b, checkpoint),
    )
    gathered = lambda x: process_allgather(x, tiled=True) if is_array(x) else x
    is_array = lambda x: isinstance(x, jax.Array) and not x.is_fully_addressable
    for name, verb in verbs.items():
        want, got = verb(alone), jax.tree.map(gathered, verb(plain))
        assert jax.tree.structure(got) == jax.tree.structure(want), name
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
            if isinstance(y, str):
                assert x == y, name
            else:
                np.testing.assert_allclose(x, y, atol=1e-4, err_msg=name)
        print("verb", name)
    """
    codes, texts = run(code, tmp_path)
    assert codes == [0, 0], "\n".join(texts)
    assert all(text.count("verb ") == 14 for text in texts)


@pytest.mark.slow
def test_agreed_raises_in_both_processes_if_one_fails(tmp_path):
    code = """
    import time
    params = lj.lorafy(plain, 2)

    def tried(name, call):
        begun = time.monotonic()
        try:
            call()
            print(name, "did not fail")
        except (ValueError, OSError, RuntimeError, KeyboardInterrupt) as error:
            print(name, type(error).__name__, error)
            assert time.monotonic() - begun < 30

    def stopped(*_):
        raise KeyboardInterrupt("Ctrl-C")

    tried("folder", lambda: lj.save(folder, params))
    mine = params if int(me) else plain  # only the first has no adapters
    tried("tree", lambda: lj.save(file, mine))
    tried("rank", lambda: lj.save(file, lj.lorafy(plain, 2 + int(me))))
    names = {} if int(me) else {"*": "m.{}"}
    tried("peft", lambda: lj.export_peft(peft, params, names))
    tried("names", lambda: lj.export_peft(peft, params, {"*": f"m{me}.{{}}"}))
    tried("load", lambda: lj.load(file + me, plain))
    bad = jax.tree.map(lambda x: x * jnp.nan, params)
    tried("nan", lambda: lj.save(file, bad))
    if not int(me):
        write, lj._save.write = lj._save.write, stopped
    tried("stop", lambda: lj.save(file, params))
    if not int(me):
        lj._save.write = write
    assert not os.path.exists(file)
    lj.save(file, params)  # and after all that they still work together
    lj.save(file + "1", jax.tree.map(lambda x: x + 1, params))
    tried("file", lambda: lj.load(file + "1" * int(me), plain))
    checkpoint = {f"{name}.weight": arrays[name].T for name in ("up", "head")}
    if int(me):
        checkpoint = file + ".no"
    tried("find", lambda: lj.find_names(plain, checkpoint))
    """
    codes, texts = run(code, tmp_path)
    assert codes == [0, 0], "\n".join(texts)
    first, second = texts
    for name, own, text in [
        ("folder", "ValueError", "is a folder. Pass the name of a file"),
        ("tree", "ValueError", "have no adapters"),
        ("stop", "KeyboardInterrupt", "Ctrl-C"),
    ]:
        assert f"{name} {own}" in first and text in first
        assert f"{name} RuntimeError save failed in process 0. There: {own}" in second
    assert "peft RuntimeError export_peft failed in process 1" in first
    assert "find RuntimeError find_names failed in process 1" in first
    for text in texts:
        assert "load FileNotFoundError" in text
        assert "lora_a' is not finite" in text
        for message in (
            "rank ValueError save has other adapters in process 1 than in process 0. "
            "Call it with the same arguments in every process.",
            "names ValueError export_peft has other adapters or names in process 1",
            "file ValueError load has other file or base in process 1",
        ):
            assert message in text
        assert "did not fail" not in text
    assert (tmp_path / "a.safetensors").is_file()
    assert not (tmp_path / "peft").exists()


DEATHS = {"before anything is written": 1, "while the first writes": 0}


@pytest.mark.slow
@pytest.mark.parametrize("when", DEATHS)
def test_save_keeps_the_old_file_if_a_process_dies(tmp_path, when):
    code = """
    params = lj.lorafy(plain, 2)
    lj.save(file, params)
    moved = jax.tree.map(lambda x: x + 1, params)
    if int(me) == DIES and DIES:
        lj._save.in_memory = lambda *_: os._exit(3)
    elif int(me) == DIES:
        os.fsync = lambda *_: os._exit(3)
    try:
        lj.save(file, moved)
        print("saved", flush=True)
    except Exception as error:
        print("failed with", type(error).__name__, flush=True)
        os._exit(4)  # JAX itself would wait for the other to leave with it
    """
    dies = DEATHS[when]
    codes, texts = run(code.replace("DIES", str(dies)), tmp_path)
    # The other process gets an error of JAX, or JAX ends it: no need to kill it here.
    assert codes[dies] == 3 and codes[1 - dies] not in (0, -9), "\n".join(texts)
    assert "saved" not in "".join(texts)
    plain = {name: {"kernel": jnp.asarray(ARRAYS[name])} for name in ("up", "head")}
    plain["norm"] = {"scale": jnp.ones(16)}
    path = tmp_path / "a.safetensors"
    back = lj.load(path, plain)
    assert not back["up"]["lora_b"].any()  # all of the old one
    lj.save(path, back)
    assert not [p for p in tmp_path.iterdir() if p.suffix == ".tmp"]


@pytest.mark.slow
def test_run_takes_another_port_if_one_is_taken(tmp_path):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        s.listen()
        codes, texts = run(
            "print(len(jax.devices()))", tmp_path, port=s.getsockname()[1]
        )
    assert codes == [0, 0], "\n".join(texts)
    assert all("4" in text.splitlines() for text in texts)
