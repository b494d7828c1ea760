"""Tests that two processes compute, read, write and fail like one."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

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
            "names ValueError export_peft has other adapters or names or for_ in ",
            "file ValueError load has other file or base in process 1",
        ):
            assert message in text
        assert "did not fail" not in text
    assert (tmp_path / "a.safetensors").is_file()
    assert not (tmp_path / "peft").exists()


# A checkpoint, its map, and how to quantize it. Each process has some layers of q, some
# outputs of o, some rows of the table, a quarter of up on each device, and all of norm.
WIDTH, LAYERS = 64, 4
SHAPES = {"up": (128, WIDTH), "norm": (WIDTH,), "embed": (10, WIDTH)}
SHAPES |= {f"layers.{i}.{n}": (WIDTH, WIDTH) for i in range(LAYERS) for n in "qo"}
WEIGHTS = """
names = {
    "up": "up", "norm": "norm", "embed": ("embed", "lm_head"),
    "q": "layers.{layer}.q", "o": "layers.{layer}.o",
}
how = {"q": "nf4", "o": "int8"}

def abstract(place=lambda *axes: None):
    made = lambda shape, *axes: jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=place(*axes)
    )
    return {
        "up": {"kernel": made((64, 128), "data", "model")},
        "norm": {"scale": made((64,))},
        "embed": {"embedding": made((10, 64), "data")},
        "q": {"kernel": made((4, 64, 64), "data", None, "model")},
        "o": {"kernel": made((4, 64, 64), None, None, "data")},
    }
"""


def checkpoint(folder, scale=1.0, *, head=False):
    """Writes a checkpoint in two files, with their index; maybe with its tied head."""
    folder.mkdir()
    rng, where = np.random.default_rng(1), {}
    tensors = {
        f"{name}.weight": (scale * rng.standard_normal(shape)).astype(np.float32)
        for name, shape in SHAPES.items()
    }
    if head:
        tensors["lm_head.weight"] = tensors["embed.weight"]
    for i in range(2):
        part = dict([*tensors.items()][i::2])
        save_file(part, folder / f"{i}.safetensors", {"format": "pt"})
        where |= dict.fromkeys(part, f"{i}.safetensors")
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"architectures": ["MyForCausalLM"], "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.slow
def test_import_weights_and_export_weights_on_two_processes_equal_one(tmp_path):
    """Each process reads what its devices hold, and both together write one folder."""
    code = """
    import collections, json, safetensors

    read, opened = collections.Counter(), safetensors.safe_open

    def counted(name, x):
        read[name] += x.size
        return x

    class Part:  # counts the elements that are read of a tensor
        def __init__(self, name, part):
            self.name, self.part = name, part
            self.get_shape, self.get_dtype = part.get_shape, part.get_dtype

        def __getitem__(self, index):
            return counted(self.name, self.part[index])

    class File:
        def __init__(self, path, **options):
            self.file = opened(path, **options)
            self.keys = self.file.keys

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def get_tensor(self, name):
            return counted(name, self.file.get_tensor(name))

        def get_slice(self, name):
            return Part(name, self.file.get_slice(name))

    safetensors.safe_open = File
    like = abstract(lambda *axes: NamedSharding(first, P(*axes)))
    source = os.path.join(folder, "base")
    params = lj.import_weights(source, like, names, how=how)
    safetensors.safe_open = opened
    print("read", json.dumps(read))
    want = np.load(os.path.join(folder, "want.npz"))
    leaves = jax.tree.leaves(params)
    assert [str(x.dtype) for x in leaves] == want["dtypes"].tolist()
    for i, x in enumerate(leaves):
        one = want[f"arr_{i}"]
        assert x.shape == one.shape
        for shard in x.addressable_shards:
            got = np.asarray(shard.data).astype(one.dtype)
            np.testing.assert_array_equal(got, one[shard.index])
    assert params["up"]["kernel"].sharding == like["up"]["kernel"].sharding
    assert not params["up"]["kernel"].is_fully_addressable
    assert not params["q"]["kernel"].values.is_fully_addressable
    params = lj.load(file, params)
    out = os.path.join(folder, "out")
    lj.export_weights(out, params, names, source, shard_bytes=50_000)
    assert os.path.exists(os.path.join(out, "config.json"))  # in each, as it returns
    """
    base, names = checkpoint(tmp_path / "base"), {}
    exec(COMMON + WEIGHTS, names)
    lists = names["names"], names["how"]
    one = lj.import_weights(base, names["abstract"](), lists[0], how=lists[1])
    leaves = [np.asarray(x) for x in jax.tree.leaves(one)]
    # NumPy's files have no 4-bit integers and no bfloat16; float32 has their values.
    wide = [x.astype(np.float32) for x in leaves]
    np.savez(tmp_path / "want.npz", *wide, dtypes=[str(x.dtype) for x in leaves])
    axes = {f"{name}/kernel": lj.Axes((0,), (1,), (2,)) for name in "qo"}
    adapters, rest = lj.split(lj.lorafy(one, 2, targets="*", axes=axes))
    rng = np.random.default_rng(2)
    draw = lambda x: jnp.asarray(rng.standard_normal(x.shape).astype(np.float32))
    one = lj.combine(jax.tree.map(draw, adapters), rest)
    lj.save(tmp_path / "a.safetensors", one)
    lj.export_weights(tmp_path / "one", one, lists[0], base, shard_bytes=50_000)

    codes, texts = run(WEIGHTS + textwrap.dedent(code), tmp_path)
    assert codes == [0, 0], "\n".join(texts)
    for i, text in enumerate(texts):
        (line,) = [x for x in text.splitlines() if x.startswith("read ")]
        held = {f"layers.{j}.q" for j in (2 * i, 2 * i + 1)}
        held |= SHAPES.keys() - {f"layers.{j}.q" for j in range(LAYERS)}
        share = lambda name: 1 if name == "norm" or name.endswith("q") else 2
        assert json.loads(line.removeprefix("read ")) == {
            f"{name}.weight": np.prod(SHAPES[name]) // share(name) for name in held
        }
    own, made = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("one", "out")
    )
    assert own == made and len(own) > 4
    before, after = (
        {
            n: x
            for file in (tmp_path / name).glob("*.safetensors")
            for n, x in load_file(file).items()
        }
        for name in ("base", "out")
    )
    changed = {n for n, x in after.items() if not np.array_equal(x, before[n])}
    assert before.keys() == after.keys()
    assert changed == before.keys() - {"norm.weight"}
    left = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert left == {"base", "one", "out"}


@pytest.mark.slow
def test_import_weights_and_export_weights_raise_in_both_processes(tmp_path):
    """One process has another checkpoint, or none: both raise, and write nothing."""
    code = """
    like = abstract(lambda *axes: NamedSharding(first, P(*axes)))
    path = lambda name: os.path.join(folder, name)
    read = lambda source, **options: lj.import_weights(
        path(source), like, names, **options
    )
    params = lj.lorafy(read("base"), 2, targets="up")
    write = lambda source, out="out", params=params, **options: lj.export_weights(
        path(out), params, names, path(source), **options
    )

    def tried(name, call):
        try:
            call()
            print(name, "did not fail")
        except (ValueError, OSError, RuntimeError) as error:
            print(name, type(error).__name__, error)
        assert sorted(os.listdir(folder)) == held, os.listdir(folder)

    held = sorted(os.listdir(folder))
    mine = lambda name: name if int(me) else "base"  # another in the second process
    tried("shard", lambda: read(mine("torn")))
    tried("large", lambda: read(mine("large"), dtype=jnp.float16))
    tried("other", lambda: read(mine("other")))
    tried("write shard", lambda: write(mine("torn")))
    tried("write other", lambda: write(mine("other")))
    tried("write values", lambda: write("large"))
    tried("write folder", lambda: write("base", "out" if int(me) else "full"))
    bad = jax.tree.map(lambda x: x * jnp.nan, lj.split(params)[0])
    bad = lj.combine(bad, lj.split(params)[1])
    tried("write nan", lambda: write("base", params=bad))
    from lora_jax._hub import export_weights as module

    def full(*args):
        raise OSError(28, "No space left")

    files, module.write_index = module.write_index, full
    tried("write disk", lambda: write("base", shard_bytes=50_000))
    module.write_index = files
    write("base")  # and after all that they still work together
    """
    checkpoint(tmp_path / "base")
    checkpoint(tmp_path / "large", 1e5)
    checkpoint(tmp_path / "other", head=True)
    checkpoint(tmp_path / "torn")
    (tmp_path / "torn" / "1.safetensors").unlink()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("")
    codes, texts = run(WEIGHTS + textwrap.dedent(code), tmp_path)
    assert codes == [0, 0], "\n".join(texts)
    first, second = texts
    for name, error in {
        "shard": "FileNotFoundError",
        "large": "ValueError: 'up/kernel' is not finite as float16",
        "write shard": "FileNotFoundError",
    }.items():
        what = "export_weights" if name.startswith("write") else "import_weights"
        there = f"{name} RuntimeError {what} failed in process 1. There: {error}"
        assert there in first and f"{name} {error.partition(':')[0]} " in second
    for name, error in {
        "write values": "ValueError: 'up/kernel' has other values than the tensor",
        "write disk": "OSError: [Errno 28] No space left",
        "write folder": "ValueError",
    }.items():
        there = f"{name} RuntimeError export_weights failed in process 0. There: "
        assert there + error in second and f"{name} {error.partition(':')[0]} " in first
    for text in texts:
        for message in (
            "other ValueError import_weights has other leaves or tensors in process 1",
            "write other ValueError export_weights has other adapters or tensors in pr",
            "write nan ValueError 'up/lora_a' is not finite",
        ):
            assert message in text
        assert "did not fail" not in text
    assert (tmp_path / "out" / "config.json").is_file()


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
