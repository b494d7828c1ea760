"""Two processes on this machine save, load and export as one does, and fail as one."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import textwrap
import time

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax as lj

ROOT = pathlib.Path(lj.__file__).parents[1]
LIMIT = 180  # seconds, for JAX to start twice and compile, beside other work
DRAWN = np.random.default_rng(0)
ARRAYS = {
    "up": DRAWN.standard_normal((8, 16)).astype(np.float32),
    "head": DRAWN.standard_normal((16, 4)).astype(np.float32),
    "x": DRAWN.standard_normal((4, 8)).astype(np.float32),
}
NAMES = {"up": "model.up", "head": "model.head", "norm": "model.norm"}

# What both processes, and this one alone, do: `place` puts an array over the devices.
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
port, me, folder, across = sys.argv[1:]
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


def run(code, folder, across="data"):
    """The exit codes and the outputs of two processes that run this; none is left."""
    np.savez(folder / "arrays.npz", **ARRAYS)
    script = folder / "script.py"
    script.write_text(COMMON + START + textwrap.dedent(code))
    keep = {"JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"}
    env = {k: x for k, x in os.environ.items() if k[:4] not in ("XLA_", "JAX_")}
    env |= {k: os.environ[k] for k in keep if k in os.environ}
    env |= {"PYTHONPATH": str(ROOT)}
    for _ in range(3):  # another program may take the port before JAX does
        port, started = str(free_port()), []
        try:
            for me in "01":
                command = [sys.executable, str(script), port, me, str(folder), across]
                pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
                started.append(subprocess.Popen(command, env=env, text=True, **pipes))
            end = time.monotonic() + LIMIT
            said = [p.communicate(timeout=end - time.monotonic())[0] for p in started]
        finally:
            for p in started:
                p.kill()
                p.wait()
                p.stdout.close()
        if not any("address already in use" in text.lower() for text in said):
            break
    return [p.returncode for p in started], said


@pytest.fixture
def one():
    """What one process makes of it: the trained tree."""
    names = {}
    exec(COMMON, names)
    plain = names["base"](ARRAYS, lambda x, *_: jnp.asarray(x))
    return names["trained"](plain, ARRAYS["x"])


@pytest.mark.parametrize(
    "across", ["data", pytest.param("model", marks=pytest.mark.slow)]
)
def test_two_processes_are_one(tmp_path, one, across, close):
    """Train sharded over both, save, export, and load onto another mesh."""
    code = """
    params = trained(plain, arrays["x"])
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
    codes, said = run(code, tmp_path, across)
    assert codes == [0, 0], "\n".join(said)
    names = {}
    exec(COMMON, names)
    want = float(lj.lora(names["fn"])(one, ARRAYS["x"]).sum())
    for text in said:
        lines = [line.split() for line in text.splitlines()]
        totals = [float(x[1]) for x in lines if x[:1] == ["total"]]
        np.testing.assert_allclose(totals, [want] * 3, rtol=1e-5)
        assert ["refused", "True"] in lines
    plain = lj.strip(one)
    close(lj.load(tmp_path / "a.safetensors", plain), one)
    lj.save(tmp_path / "one.safetensors", one)
    mine, theirs = (load_file(tmp_path / f"{n}.safetensors") for n in ("one", "a"))
    assert mine.keys() == theirs.keys()
    lj.export_peft(tmp_path / "own", one, NAMES)
    config = "adapter_config.json"
    own, made = (
        json.loads((tmp_path / n / config).read_text()) for n in ("own", "peft")
    )
    assert own == made
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
def test_an_error_in_one_is_an_error_in_both(tmp_path):
    code = """
    import time
    params = lj.lorafy(plain, 2)

    def tried(name, call):
        begun = time.monotonic()
        try:
            call()
            print(name, "did not fail")
        except (ValueError, OSError, RuntimeError) as error:
            print(name, type(error).__name__, error)
            assert time.monotonic() - begun < 30

    tried("folder", lambda: lj.save(folder, params))
    mine = params if int(me) else plain  # only the first has no adapters
    tried("tree", lambda: lj.save(file, mine))
    names = {} if int(me) else {"*": "m.{}"}
    tried("peft", lambda: lj.export_peft(peft, params, names))
    tried("load", lambda: lj.load(file + me, plain))
    bad = jax.tree.map(lambda x: x * jnp.nan, params)
    tried("nan", lambda: lj.save(file, bad))
    lj.save(file, params)  # and after all that they still work together
    """
    codes, said = run(code, tmp_path)
    assert codes == [0, 0], "\n".join(said)
    first, second = said
    for name, own, text in [
        ("folder", "ValueError", "is a folder. Give the name of a file"),
        ("tree", "ValueError", "have no adapters"),
    ]:
        assert f"{name} {own}" in first and text in first
        assert f"{name} RuntimeError save failed in process 0. There: {own}" in second
    assert "peft RuntimeError export_peft failed in process 1" in first
    assert "load FileNotFoundError" in first and "load FileNotFoundError" in second
    for text in said:
        assert "lora_a' is not finite" in text
        assert "did not fail" not in text
    assert (tmp_path / "a.safetensors").is_file()
    assert not (tmp_path / "peft").exists()


@pytest.mark.slow
def test_a_process_that_dies_while_saving_leaves_the_old_file(tmp_path):
    code = """
    params = lj.lorafy(plain, 2)
    lj.save(file, params)
    moved = jax.tree.map(lambda x: x + 1, params)
    if int(me):
        lj._save.in_memory = lambda *_: os._exit(3)
    try:
        lj.save(file, moved)
    except Exception as error:
        print("failed with", type(error).__name__, flush=True)
        os._exit(4)  # JAX itself would wait for the other to leave with it
    """
    codes, said = run(code, tmp_path)
    assert codes == [4, 3], "\n".join(said)
    assert "failed with" in said[0]
    plain = {name: {"kernel": jnp.asarray(ARRAYS[name])} for name in ("up", "head")}
    plain["norm"] = {"scale": jnp.ones(16)}
    back = lj.load(tmp_path / "a.safetensors", plain)
    assert not back["up"]["lora_b"].any()  # the old one, whole
    assert not [p for p in tmp_path.iterdir() if p.suffix == ".tmp"]
