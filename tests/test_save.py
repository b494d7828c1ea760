"""Tests of `save` and `load`: exact, small, atomic, and strict."""

import builtins
import json
import math
import os
import pickle
import signal
import struct
import subprocess
import sys
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lora_jax as lj
from lora_jax import _save, _write
from lora_jax._tree import flatten, path_name, unbox

RNG = np.random.default_rng(0)


def weight(*shape, dtype=jnp.float32):
    return jax.device_put(np.asarray(RNG.standard_normal(shape), dtype))


def draw(key, shape, dtype):
    return jax.device_put(np.asarray(RNG.standard_normal(shape), dtype))


def layer(wrap=lambda x, names: x):
    kernel = wrap(weight(4, 3), ("in", "out"))
    return {"kernel": kernel, "bias": wrap(weight(3), ("out",))}


CONTAINERS = {
    "dict": lambda: {"m": layer(), "head": layer()},
    "frozen": lambda: flax.core.freeze({"m": layer(), "head": layer()}),
    "variables": lambda: {"params": {"m": layer(), "head": layer()}, "stats": None},
    "list": lambda: {"m": [layer(), layer()], "head": (layer(),)},
    "state": lambda: nnx.State(
        jax.tree.map(nnx.Param, {"m": {0: layer()}, "head": layer()})
    ),
    "partitioned": lambda: {"m": layer(nn.Partitioned), "head": layer(nn.Partitioned)},
    "logical": lambda: {
        "m": layer(nn.LogicallyPartitioned),
        "head": layer(nn.LogicallyPartitioned),
    },
    "slashes in names": lambda: {"m/~/linear": layer(), "head": layer()},
    "flat": lambda: {"m/kernel": weight(4, 3), "m/bias": weight(3), "head": weight(3)},
    "numpy": lambda: jax.tree.map(np.asarray, {"m": layer(), "head": layer()}),
}

each_container = pytest.mark.parametrize("kind", CONTAINERS)


def leaves(tree):
    return {path_name(path): unbox(leaf) for path, leaf in flatten(tree).items()}


def same(first, second):
    """Whether two trees are equal in containers, boxes, dtypes and bits."""
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=False)
    return jax.tree.structure(first) == jax.tree.structure(second) and all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in pairs
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapter.safetensors"


@pytest.fixture
def files(tmp_path):
    """Lists the folder, hidden files included."""
    return lambda: sorted(os.listdir(tmp_path))


def adapted(base=None, **options):
    base = {"m": layer(), "head": layer()} if base is None else base
    return lj.lorafy(base, 2, **{"targets": "m/*", "init": draw, "alpha": 3} | options)


# Round trips


@each_container
@pytest.mark.parametrize("also", [(), "head"])
def test_load_after_save_is_exact_in_every_container(kind, also, path, randomized):
    base = CONTAINERS[kind]()
    targets = "m/kernel" if kind == "flat" else "m*/kernel"
    options = {"targets": targets, "also": also, "init": draw}
    params = randomized(lj.lorafy(base, 2, alpha=5, **options))
    lj.save(path, params)
    loaded = lj.load(path, base)
    assert type(loaded) is type(params)
    assert same(loaded, params)
    assert any(name.endswith("lora_w") for name in leaves(loaded)) == bool(also)
    old, new = flatten(base), flatten(loaded)
    assert old and all(new[path] is leaf for path, leaf in old.items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_load_keeps_dtypes_and_bits(dtype, path):
    base = {"m": layer(), "head": {"w": weight(3, dtype=dtype), "n": jnp.int32(1)}}
    params = adapted(base, dtype=dtype, also="w")
    assert params["head"]["w_lora_w"].dtype == jnp.float32
    special = jnp.array([[-0.0, 1e-40], [1e30, -1e-30]], jnp.float32).astype(dtype)
    if dtype != "float16":
        params["m"]["lora_a"] = params["m"]["lora_a"].at[:2].set(special)
    params["m"]["lora_scale"] = jnp.float32(1 / 3)
    lj.save(path, params)
    assert same(lj.load(path, base), params)


def test_load_keeps_float64_or_refuses_it(path):
    with jax.enable_x64(True):
        base = {"m": {"kernel": jnp.asarray(RNG.standard_normal((4, 3)))}}
        params = adapted(base)
        assert params["m"]["lora_a"].dtype == np.float64
        lj.save(path, params)
        assert same(lj.load(path, base), params)
    with pytest.raises(ValueError, match=r"adapter.safetensors.*float64.*enable_x64"):
        lj.load(path, {"m": {"kernel": weight(4, 3)}})


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.T,
        lambda x: x[::-1, ::2],
        lambda x: np.asfortranarray(x),
        lambda x: x.astype(x.dtype.newbyteorder()),
        lambda x: x[0, 0],
    ],
    ids=["transposed", "strided", "column major", "swapped bytes", "a number"],
)
def test_save_accepts_numpy_views_of_any_layout(view, path):
    head = view(RNG.standard_normal((4, 4)).astype(np.float32))
    plain = np.array(head, np.float32, order="C")
    base = {"m": layer(), "head": np.zeros_like(plain)}
    lj.save(path, adapted(base, also="head") | {"head_lora_w": head})
    loaded = lj.load(path, base)
    assert np.asarray(loaded["head_lora_w"]).tobytes() == plain.tobytes()


def test_save_is_deterministic(tmp_path):
    params = adapted(also="head")
    names = [tmp_path / name for name in ("a", "b", "c")]
    lj.save(names[0], params)
    reordered = dict(reversed(params.items())) | {
        "m": dict(reversed(params["m"].items()))
    }
    lj.save(names[1], reordered)
    lj.save(names[2], lj.load(names[0], lj.strip(params)))
    assert len({name.read_bytes() for name in names}) == 1


def test_save_writes_the_adapters_and_little_else(path, files):
    big = {"m": {"kernel": np.zeros((1000, 500), np.float32), "bias": weight(500)}}
    lj.save(path, adapted(big))
    assert 12_000 < path.stat().st_size < 13_500  # 1,500 x 2 floats and a header
    assert files() == ["adapter.safetensors"]
    tensors = safetensors.numpy.load_file(path)
    assert {name: x.shape for name, x in tensors.items()} == {
        "m/lora_a": (1000, 2),
        "m/lora_b": (2, 500),
        "m/lora_scale": (),
    }


def test_save_describes_the_adapters_in_the_header(path):
    lj.save(path, adapted(alpha=3, also="head/bias"))
    header, _ = parse(path)
    assert set(header["__metadata__"]) == {"lora_jax"}
    entry = json.loads(header["__metadata__"]["lora_jax"])
    assert entry["version"] == 2
    copy = {"tensors": ["head/bias_lora_w"], "shape": [3]}
    assert entry["copies"] == {"head/bias": copy}
    assert set(entry["samples"]) == {"m/kernel"}
    assert set(entry["adapters"]) == {"m/kernel"}
    adapter = entry["adapters"]["m/kernel"]
    assert (adapter["rank"], adapter["scale"], adapter["shape"]) == (2, 1.5, [4, 3])
    assert set(entry["sha256"]) == set(header) - {"__metadata__"}


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_save_takes_a_str_or_path_and_replaces_an_existing_file(kind, path, files):
    lj.save(kind(path), adapted())
    new = adapted()
    lj.save(kind(path), new)
    assert same(lj.load(kind(path), lj.strip(new)), new)
    assert files() == ["adapter.safetensors"]


def test_save_follows_relative_paths_and_links(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("real")
    os.symlink("real/file", "link")
    params = adapted()
    lj.save("link", params)
    assert os.path.islink("link") and os.listdir("real") == ["file"]
    assert same(lj.load("link", lj.strip(params)), params)


def test_save_to_the_longest_name_of_a_file_system(tmp_path):
    path = tmp_path / ("x" * 255)
    lj.save(path, adapted())
    assert os.listdir(tmp_path) == [path.name]


# Boxes and shardings


AXES = {
    "fused": ((8, 4, 3, 2), ((0,), (2,), (1, 3)), ("y", None, None, "x")),
    "stack": ((2, 8, 4), ((0,), (1,), (2,)), ("x", None, "y")),
    "out first": ((4, 8), ((), (1,), (0,)), ("y", "x")),
    "size 1": ((2, 1, 8, 4), ((0,), (2,), (1, 3)), ("x", None, None, "y")),
    "second of two of 1": ((1, 1, 8, 4), ((1,), (2,), (0, 3)), (None, None, "y", "x")),
    "batch of 1": ((1, 4, 8), ((0,), (2,), (1,)), (None, "y", "x")),
}


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", AXES)
def test_load_places_and_boxes_adapters_like_lorafy(name, axis_type, path):
    shape, axes, spec = AXES[name]
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(axis_type,) * 2)
    kernel = jax.device_put(weight(*shape), NamedSharding(mesh, PartitionSpec(*spec)))
    names = ("a", "b", "c", "d")[: len(shape)]
    for base in ({"w": kernel}, {"w": nn.Partitioned(kernel, names, mesh=mesh)}):
        axes = lj.Axes(*axes)
        params = lj.lorafy(base, 2, targets="w", axes={"w": axes}, init=draw)
        lj.save(path, params)
        loaded = lj.load(path, base)
        assert same(loaded, params), "names of boxes are part of the structure"
        for part, x in leaves(loaded).items():
            wanted = leaves(params)[part].sharding
            assert x.sharding.is_equivalent_to(wanted, x.ndim), part


def test_load_places_adapters_on_the_device_of_their_weight(path):
    params = adapted(also="head")
    lj.save(path, params)
    base = jax.device_put(lj.strip(params), jax.devices()[2])
    loaded = lj.load(path, base)
    assert {x.device for x in jax.tree.leaves(loaded)} == {jax.devices()[2]}
    free = lj.load(path, lj.strip(params))
    assert not free["m"]["lora_a"].committed


def test_load_makes_lora_params_in_a_state(path):
    base = nnx.State({"m": {"kernel": nnx.Param(weight(4, 3))}})
    lj.save(path, adapted(base))
    loaded = flatten(lj.load(path, base))
    assert type(loaded["m", "lora_a"]) is nnx.LoRAParam
    # No filter of nnx trains the scale, neither as a LoRAParam nor as a Param.
    assert not isinstance(loaded["m", "lora_scale"], nnx.Param)


# Crashes


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["open", "write", "fsync", "replace"])
def test_save_leaves_the_old_file_and_nothing_else_after_a_crash(
    where, error, path, files, monkeypatch
):
    old = adapted()
    lj.save(path, old)
    before = path.read_bytes()

    def crash(*_, **__):
        raise error

    def torn(*args, **kwargs):
        file = builtins.open(*args, **kwargs)
        write = file.write

        class Torn:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

            def fileno(self):
                return file.fileno()

            def write(self, data):
                write(data[: len(data) // 2])
                raise error

        return Torn()

    with monkeypatch.context() as patch:
        if where in ("open", "write"):
            fake = crash if where == "open" else torn
            patch.setattr(_write, "open", fake, raising=False)
        else:
            patch.setattr(os, where, crash)
        with pytest.raises(type(error)):
            lj.save(path, adapted())
        with pytest.raises(type(error)):
            lj.save(path.with_name("new"), adapted())
    assert path.read_bytes() == before
    assert files() == ["adapter.safetensors"]
    assert same(lj.load(path, lj.strip(old)), old)


def test_save_syncs_the_file_before_the_rename(path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        spy = lambda *args, name=name, real=real: calls.append(name) or real(*args)
        monkeypatch.setattr(os, name, spy)
    lj.save(path, adapted())
    assert calls[:2] == ["fsync", "replace"]


def test_save_creates_no_folder(tmp_path):
    with pytest.raises(OSError):
        lj.save(tmp_path / "none" / "file", adapted())
    assert os.listdir(tmp_path) == []


# What save refuses


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (jnp.full((4, 2), jnp.nan), "'m/lora_a' is not finite: the training had div"),
        (jnp.full((4, 2), jnp.inf), "'m/lora_a' is not finite"),
        (jnp.full((4, 2), -jnp.inf, jnp.bfloat16), "'m/lora_a' is not finite"),
        (jnp.ones((4, 2), jnp.int8), "'m/lora_a' has dtype int8.*Cast it to one of fl"),
        (jnp.ones((4, 2), jnp.complex64), "'m/lora_a' has dtype complex64"),
        (
            jax.ShapeDtypeStruct((4, 2), jnp.float32),
            "'m/lora_a' has no values to save: it is a ShapeDtypeStruct.*outside jit",
        ),
        (jnp.ones((4, 5)), "'m/kernel' does not fit"),
    ],
)
def test_save_refuses_bad_values_and_leaves_the_old_file(value, match, path, files):
    params = adapted()
    lj.save(path, params)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=match):
        lj.save(path, params | {"m": params["m"] | {"lora_a": value}})
    assert path.read_bytes() == before
    assert files() == ["adapter.safetensors"]


def test_save_refuses_tracers(path, files):
    with pytest.raises(ValueError, match=r"has no values to save.*outside jit"):
        jax.jit(lambda params: lj.save(path, params))(adapted())
    assert files() == []


def test_save_checks_a_trained_copy_and_not_its_leaf(path, files):
    params = adapted(also="head/bias")
    params["head"]["bias"] = jnp.full(3, jnp.nan)
    lj.save(path, params)
    params["head"]["bias_lora_w"] = jnp.full(3, jnp.nan)
    with pytest.raises(ValueError, match="'head/bias_lora_w' is not finite"):
        lj.save(path, params)
    assert files() == ["adapter.safetensors"]


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "link to a device"])
def test_save_replaces_only_regular_files(kind, tmp_path, files):
    path = tmp_path / "adapter"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = "/dev/null"
    else:
        path.symlink_to("/dev/null")
    before, mode = files(), os.stat(path).st_mode
    with pytest.raises(ValueError, match=r"(a folder|not a regular file). Pass the n"):
        lj.save(path, adapted())
    assert (files(), os.stat(path).st_mode) == (before, mode)


KILLED = """
import os, signal, sys
import numpy as np
import lora_jax as lj
params = lj.lorafy({"kernel": np.ones((4, 3), np.float32)}, 2)
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
lj.save(sys.argv[1], params)
"""


def test_save_removes_the_temporary_file_of_a_killed_save(tmp_path, files):
    path, other = tmp_path / "adapter", tmp_path / "other"
    run = [sys.executable, "-c", KILLED]
    for target in (path, other):
        killed = subprocess.run([*run, target], timeout=120, capture_output=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(files()) == 2 and not path.exists()
    lj.save(path, adapted())
    assert "adapter" in files() and len(files()) == 2, "other's is not touched"
    lj.save(other, adapted())
    assert files() == ["adapter", "other"]


def test_save_leaves_a_save_in_progress_alone(path, files, monkeypatch):
    first, second, real = adapted(), adapted(), os.replace

    def interrupted(*names):
        monkeypatch.setattr(os, "replace", real)
        lj.save(path, second)
        real(*names)

    monkeypatch.setattr(os, "replace", interrupted)
    lj.save(path, first)
    assert same(lj.load(path, lj.strip(first)), first)
    assert files() == ["adapter.safetensors"]


# The check of the base


def test_load_refuses_another_base_of_the_same_shapes(path):
    base = {"a": layer(), "b": layer(), "n": jnp.ones(3)}
    params = lj.lorafy(base, 2, init=draw)
    lj.save(path, params)
    other = base | {"b": layer(), "n": jnp.zeros(3)}
    match = r"another base: the values compared of 'b/kernel' differ.*same_base=False\)"
    refuse(path, other, match)
    loaded = lj.load(path, other, same_base=False)
    assert same(lj.detach(loaded), lj.detach(params))
    assert same(lj.strip(loaded), other)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_load_accepts_a_base_that_was_cast_or_rounded(dtype, path):
    base = {"m": {"kernel": weight(64, 48)}}
    params = lj.lorafy(base, 2)
    lj.save(path, params)
    cast = jax.tree.map(lambda x: x.astype(dtype), base)
    assert lj.load(path, cast)["m"]["kernel"] is cast["m"]["kernel"]
    scale = jnp.max(jnp.abs(base["m"]["kernel"]), axis=0, keepdims=True) / 7
    rounded = jnp.round(base["m"]["kernel"] / scale) * scale
    assert same(lj.detach(lj.load(path, {"m": {"kernel": rounded}})), lj.detach(params))


def test_load_does_not_compare_an_abstract_base(path):
    params = adapted()
    lj.save(path, params)
    shapes = jax.eval_shape(lambda: lj.strip(params))
    assert same(lj.detach(lj.load(path, shapes)), lj.detach(params))


def test_load_accepts_another_leaf_for_a_trained_copy(path):
    """The copy replaces the leaf, which is often a head initialized for each task."""
    params = adapted(also="head")
    lj.save(path, params)
    loaded = lj.load(path, lj.strip(params) | {"head": layer()})
    assert same(lj.detach(loaded), lj.detach(params))


# What load refuses: the message names the file and what is wrong


def parse(path):
    """Returns the header and the data of a safetensors file."""
    data = path.read_bytes()
    (n,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + n]), data[8 + n :]


def compose(path, header, data):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def refuse(path, base, match):
    copy = jax.tree.map(lambda x: x, base)
    structure = jax.tree.structure(base)
    with pytest.raises(ValueError, match=match) as error:
        lj.load(path, base)
    assert str(path) in str(error.value)
    assert jax.tree.structure(base) == structure
    pairs = zip(jax.tree.leaves(base), jax.tree.leaves(copy), strict=True)
    assert all(x is y for x, y in pairs), "base is untouched"


@pytest.fixture
def saved(path):
    """Saves adapters; returns the path and the base."""
    params = adapted(also="head/bias")
    lj.save(path, params)
    return path, lj.strip(params)


def test_load_refuses_a_truncated_file(saved):
    path, base = saved
    data = path.read_bytes()
    (n,) = struct.unpack("<Q", data[:8])
    for length in (0, 1, 7, 8, 9, n, 8 + n, 9 + n, len(data) - 4, len(data) - 1):
        path.write_bytes(data[:length])
        refuse(path, base, "truncated; save the adapter again")
    for more in (b"\0", data):
        path.write_bytes(data + more)
        refuse(path, base, "not a complete safetensors file")


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("bomb",))


@pytest.mark.parametrize(
    "data",
    [
        lambda: b"",
        lambda: b"not a tensor in sight",
        lambda: RNG.bytes(1000),
        lambda: b"\0" * 1000,
        lambda: b"\xff" * 1000,
        lambda: pickle.dumps(Bomb()),
        lambda: struct.pack("<Q", 2) + b"{}",
        lambda: struct.pack("<Q", 4) + b"null",
        lambda: safetensors.numpy.save({"w": np.ones(3)}),
        lambda: safetensors.numpy.save({"w": np.ones(3)}, {"format": "pt"}),
    ],
)
def test_load_refuses_a_foreign_file(data, saved, files, monkeypatch):
    path, base = saved
    monkeypatch.chdir(path.parent)
    path.write_bytes(data())
    refuse(path, base, "not a complete safetensors|was not written by lora_jax.save")
    assert files() == ["adapter.safetensors"], "nothing in the file is run"


def test_load_distinguishes_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        lj.load(tmp_path / "none", {"kernel": weight(4, 3)})
    with pytest.raises(ValueError, match=r"is a folder\. Pass the file in it"):
        lj.load(tmp_path, {"kernel": weight(4, 3)})


def change_header(path, change):
    header, data = parse(path)
    entry = json.loads(header["__metadata__"]["lora_jax"])
    change(entry, header)
    header["__metadata__"]["lora_jax"] = json.dumps(entry)
    compose(path, header, data)


def edit(**changes):
    """Returns a change of fields of the header's `lora_jax` entry."""

    def apply(entry, header):
        for key, value in changes.items():
            entry[key] = value(entry[key]) if callable(value) else value

    return apply


def edit_adapter(**changes):
    def apply(entry, header):
        entry["adapters"]["m/kernel"] |= changes

    return apply


def drop(key):
    return lambda entry, header: entry.pop(key)


def drop_field(key):
    return lambda entry, header: entry["adapters"]["m/kernel"].pop(key)


def rename(old, new):
    def apply(entry, header):
        header[new] = header.pop(old)

    return apply


def swap(first, second):
    def apply(entry, header):
        header[first], header[second] = header[second], header[first]

    return apply


CORRUPT = "is corrupt"
VERSION = "format version .*reads version 2. Upgrade, pip install -U lora_jax"
ANY_PATH = "is corrupt|base has no weight|was saved for the shape"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (edit(version=3), "format version 3.*reads version 2"),
        (edit(version=1), VERSION),
        (edit(version=0), VERSION),
        (edit(version=None), VERSION),
        (edit(version="new"), VERSION),
        (edit(version=1.9), VERSION),
        (edit(version=math.inf), VERSION),
        (edit(version=[1]), VERSION),
        (drop("version"), CORRUPT),
        (drop("adapters"), CORRUPT),
        (drop("copies"), CORRUPT),
        (drop("samples"), CORRUPT),
        (drop("samples_sha256"), CORRUPT),
        (drop("sha256"), CORRUPT),
        (edit(adapters={}), CORRUPT),
        (edit(adapters=[]), CORRUPT),
        (edit(adapters=3), CORRUPT),
        (edit(adapters={"m/kernel": None}), CORRUPT),
        (edit(adapters=lambda a: {"m/kernal": a["m/kernel"]}), ANY_PATH),
        (edit(adapters=lambda a: {"head/kernel": a["m/kernel"]}), ANY_PATH),
        (edit(adapters=lambda a: a | {"x/kernel": a["m/kernel"]}), ANY_PATH),
        (edit_adapter(rank=3), "rank or scale of 'm/kernel'"),
        (edit_adapter(rank="2"), "rank or scale of 'm/kernel'"),
        (edit_adapter(scale=1.25), "rank or scale of 'm/kernel'"),
        (edit_adapter(scale=[1.5]), "rank or scale of 'm/kernel'"),
        (edit_adapter(scale=None), "rank or scale of 'm/kernel'"),
        (edit_adapter(shape=[4, 4]), r"'m/kernel' was saved for the shape \(4, 4\)"),
        (edit_adapter(shape=[4]), r"'m/kernel' was saved for the shape \(4,\)"),
        (edit_adapter(shape="43"), CORRUPT),
        (edit_adapter(shape=[4, 3.5]), CORRUPT),
        (edit_adapter(shape=None), CORRUPT),
        (drop_field("rank"), CORRUPT),
        (drop_field("scale"), CORRUPT),
        (drop_field("shape"), CORRUPT),
        (edit(copies={}), "tensor 'head/bias_lora_w' belongs to no adapter"),
        (edit(sha256=lambda d: d | {"x/lora_w": "0" * 64}), "'x/lora_w' was removed"),
        (edit(copies=lambda c: {"head/x": c["head/bias"]}), "base has no weight 'hea"),
        (edit(copies=lambda c: {"m/bias": c["head/bias"]}), "leaves of 'm/bias'"),
        (
            edit(copies={"head/bias": {"tensors": ["x"], "shape": [3]}}),
            "tensor 'head/b",
        ),
        (edit(copies={"head/bias": {"tensors": [], "shape": [3]}}), CORRUPT),
        (edit(copies={"head/bias": {"tensors": [3], "shape": [3]}}), CORRUPT),
        (edit(copies={"head/bias": {"tensors": ["head/bias_lora_w"]}}), CORRUPT),
        (edit(copies=None), CORRUPT),
        (edit(copies=[3]), CORRUPT),
        (edit(samples={}), CORRUPT),
        (edit(samples=None), CORRUPT),
        (edit(samples=lambda s: s | {"m/kernel": "00" * 64}), CORRUPT),
        (edit(samples=lambda s: s | {"m/kernel": s["m/kernel"][:-4]}), CORRUPT),
        (edit(samples=lambda s: s | {"m/other": s["m/kernel"]}), CORRUPT),
        (edit(sha256={}), "tensor 'head/bias_lora_w' has changed"),
        (edit(sha256=None), CORRUPT),
        (edit(sha256=lambda d: d | {"m/lora_a": "0" * 64}), "'m/lora_a' has changed"),
        (
            edit(sha256=lambda d: d | {"m/lora_a": d["m/lora_b"]}),
            "'m/lora_a' has changed",
        ),
        (swap("m/lora_a", "m/lora_b"), "'m/lora_a' has changed"),
        (rename("m/lora_a", "m/lora_c"), "'m/lora_"),
        (rename("head/bias_lora_w", "head/lora_w"), "'head/"),
        (
            lambda entry, header: header["m/lora_a"].update(shape=[2, 4]),
            "'m/lora_a' has",
        ),
        (
            lambda entry, header: header["m/lora_a"].update(shape=[8]),
            "'m/lora_a' has ch",
        ),
        (
            lambda entry, header: header["m/lora_a"].update(dtype="I32"),
            "'m/lora_a' has",
        ),
        (
            lambda entry, header: header["m/lora_a"].update(dtype="F16"),
            "not a complete",
        ),
        (lambda entry, header: header["m/lora_a"].update(dtype="X"), "not a complete"),
        (lambda entry, header: header.pop("m/lora_a"), "not a complete"),
    ],
)
def test_load_refuses_a_changed_header(change, match, saved):
    path, base = saved
    change_header(path, change)
    refuse(path, base, match)


def test_load_refuses_factors_that_do_not_fit_the_header(saved):
    path, base = saved
    change_header(path, edit_adapter(shape=[3, 4]))
    base["m"]["kernel"] = weight(3, 4)
    refuse(path, base, r"corrupt: factors of shapes.*\(4, 2\).*'m/kernel'.*\(3, 4\)")


@pytest.mark.parametrize(
    "text", ["", "null", "3", "[]", "{", '"text"', "NaN", "{}", "[" * 100_000]
)
def test_load_refuses_a_header_that_does_not_parse(text, saved):
    path, base = saved
    header, data = parse(path)
    header["__metadata__"]["lora_jax"] = text
    compose(path, header, data)
    refuse(path, base, "is corrupt: its header cannot be read")


@pytest.mark.parametrize("name", ["m/lora_a", "m/lora_scale", "head/bias_lora_w"])
def test_load_names_a_changed_missing_or_extra_tensor(name, saved):
    path, base = saved
    header, _ = parse(path)
    tensors = safetensors.numpy.load_file(path)

    def write(**changes):
        new = {n: x for n, x in (tensors | changes).items() if x is not None}
        data = safetensors.numpy.save(new, header["__metadata__"])
        path.write_bytes(data)

    write()
    lj.load(path, base)  # rewriting the file changes nothing
    x = tensors[name]
    for value in (x + np.float32(1), -x, x.astype(np.float16)):
        write(**{name: np.asarray(value)})
        refuse(path, base, f"is corrupt: tensor '{name}' has changed")
    write(**{name: None})
    refuse(path, base, f"is corrupt: tensor '{name}' is missing")
    write(extra=np.ones(3, np.float32))
    refuse(path, base, "is corrupt: tensor 'extra' belongs to no adapter")


def test_load_keeps_the_dtype_of_a_trained_copy(path):
    base = {"m": layer(), "head": weight(3, dtype=jnp.bfloat16)}
    with jax.enable_x64(True):
        params = adapted(base, also="head")
        head = params["head_lora_w"].astype(jnp.float64) + 1e-12
        lj.save(path, params | {"head_lora_w": head})
        loaded = lj.load(path, base)["head_lora_w"]
        assert loaded.dtype == np.float64
        np.testing.assert_array_equal(loaded, head)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_load_refuses_values_that_are_not_finite(value, path, monkeypatch):
    params = adapted()
    bad = params | {"m": params["m"] | {"lora_b": jnp.full((2, 3), value)}}
    with monkeypatch.context() as patch:
        patch.setattr(_save, "check_finite", lambda *_: None)
        lj.save(path, bad)
    refuse(path, lj.strip(params), "'m/lora_b' is not finite")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda m: {"kernel": weight(4, 5)},
            r"'m/kernel' was saved for the shape \(4, 3",
        ),
        (lambda m: {"kernel": weight(3, 4)}, r"and base has \(3, 4\). Pass the param"),
        (lambda m: {"w": m["kernel"]}, "base has no weight 'm/kernel'. It has .*'m/w'"),
        (lambda m: {"kernel": None}, "base has no weight 'm/kernel'"),
        (
            lambda m: m | {"lora_a": weight(4, 2)},
            r"already has an adapter.*strip\(",
        ),
        (
            lambda m: m | {"lora_w": weight(4, 3)},
            r"already has an adapter.*strip\(",
        ),
    ],
)
def test_load_names_the_weight_of_base_that_does_not_fit(change, match, saved):
    path, base = saved
    refuse(path, base | {"m": change(base["m"])}, match)


def test_load_needs_the_leaf_of_a_trained_copy_with_its_shape(saved):
    path, base = saved
    long = base["head"] | {"bias": weight(5)}
    refuse(path, base | {"head": long}, r"'head/bias' was saved for the shape \(3,\)")
    integers = base["head"] | {"bias": jnp.ones(3, int)}
    refuse(path, base | {"head": integers}, "both must be floating")
    half = base["head"] | {"bias": base["head"]["bias"].astype(jnp.bfloat16)}
    loaded = lj.load(path, base | {"head": half})
    assert loaded["head"]["bias_lora_w"].dtype == jnp.float32
    del base["head"]["bias"]
    refuse(path, base, "base has no weight 'head/bias'")


class Weights(NamedTuple):
    w: Any


def test_load_refuses_a_container_that_takes_no_leaf(path):
    base = {"m": {"w": weight(4, 3)}}
    lj.save(path, adapted(base))
    with pytest.raises(ValueError, match="m is a Weights, which cannot gain or lose"):
        lj.load(path, {"m": Weights(base["m"]["w"])})


def fuzz(path, base, params, mutations):
    """Loads each mutation, which raises an error that names the file or is exact."""
    survived = 0
    for data in mutations:
        path.write_bytes(data)
        try:
            loaded = lj.load(path, base)
        except ValueError as error:
            assert str(path) in str(error)
        else:
            assert same(loaded, params)
            survived += 1
    return survived


def test_load_after_a_flipped_bit_raises_or_is_exact(path):
    params = lj.lorafy({"m": {"kernel": weight(3, 2)}}, 1, init=draw)
    lj.save(path, params)
    data = path.read_bytes()

    flips = (
        data[:i] + bytes([data[i] ^ (1 << (i % 8))]) + data[i + 1 :]
        for i in range(len(data))
    )
    survived = fuzz(path, lj.strip(params), params, flips)
    assert survived < 0.05 * len(data)


def test_load_after_cut_or_moved_bytes_raises_or_is_exact(path):
    params = lj.lorafy({"m": {"kernel": weight(3, 2)}}, 1, init=draw)
    lj.save(path, params)
    data = path.read_bytes()

    def changes():
        for _ in range(100):
            i, j, k = sorted(int(n) for n in RNG.integers(0, len(data), 3))
            yield data[:i] + data[j:]
            yield data[:j] + data[i:]
            yield data[:i] + data[j:k] + data[i:j] + data[k:]

    fuzz(path, lj.strip(params), params, changes())
