"""Runs the tests with strict JAX settings: no promotion of dtypes or ranks."""

import ast
import dataclasses
import hashlib
import importlib.util
import os
import pathlib
import platform
import re
import sys
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax.experimental.compilation_cache import compilation_cache

import lora_jax as lj

# The tests mostly compile. These flags disable optimization, a quarter of that time.
# They are part of the key of JAX's cache, so a worker must not add them again to the
# flags that it inherits.
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if FLAGS not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}".strip()

TESTS = pathlib.Path(__file__).parent
CACHES = TESTS.parent / ".pytest_cache" / "d"  # `pytest --cache-clear` removes it
CACHE_BYTES = 500_000_000


def cache_name():
    """Returns a name for the cache of this version of JAX on this processor.

    XLA compiles for the instructions of the processor, but JAX's own cache key does not
    contain them.
    """
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    features = {x for x in lines if x.startswith(("flags", "Features", "model name"))}
    machine = f"{platform.machine()} {platform.processor()} {sorted(features)}"
    digest = hashlib.sha256(f"{machine} {os.environ['XLA_FLAGS']}".encode()).hexdigest()
    return f"jax-{version('jax')}-{version('jaxlib')}-{digest[:8]}"


# All runs and all workers share the cache. The environment variables pass it on to
# processes that a test starts.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHES / cache_name()))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config):
    """Deletes the oldest files of the caches if their size exceeds CACHE_BYTES."""
    if hasattr(config, "workerinput"):
        return
    files = [(path, path.stat()) for path in CACHES.glob("jax-*/*") if path.is_file()]
    size = sum(stat.st_size for _, stat in files)
    if size > CACHE_BYTES:
        for path, stat in sorted(files, key=lambda file: file[1].st_mtime):
            path.unlink(missing_ok=True)
            size -= stat.st_size
            if size < CACHE_BYTES / 2:
                break


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks the tests of the benchmarks, and runs slow tests first.

    `-m` excludes tests within the yield. Of what remains pytest-xdist gives the first
    half to one worker and the second half to the other, which steal from the ends of
    each other's lists. So both begin with slow tests: at the end of a list, one of them
    would run alone.
    """
    for item in items:
        if TESTS / "benchmarks" in item.path.parents:
            item.add_marker("benchmarks")
    yield
    slow = [item for item in items if item.get_closest_marker("slow")]
    rest = [item for item in items if not item.get_closest_marker("slow")]
    half = len(items) // 2 - len(slow[::2])
    items[:] = [*slow[::2], *rest[:half], *slow[1::2], *rest[half:]]


@pytest.fixture
def optax_promotion():
    """Allows dtype promotion, because Optax multiplies floats by integers."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def third_party():
    """Allows promotion for third-party models, which need JAX's default settings."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def one_thread():
    """Limits PyTorch to one thread: each worker of the tests has one core."""
    pytest.importorskip("torch").set_num_threads(1)


@pytest.fixture
def uncached():
    """Disables JAX's cache, which cannot load programs for an absent chip."""

    def enable(yes):
        jax.config.update("jax_enable_compilation_cache", yes)
        compilation_cache.reset_cache()

    enable(False)
    yield
    enable(True)


@pytest.fixture
def randomized():
    """Returns a function that sets random factors, because B = 0 would hide errors."""

    def randomize(params, seed=0):
        adapters, base = lj.split(params)
        leaves, treedef = jax.tree.flatten(adapters)
        rng = np.random.default_rng(seed)
        # From JAX 0.12 on, `jnp.asarray` compiles a program for each shape.
        drawn = [
            jax.device_put(np.asarray(0.5 * rng.standard_normal(x.shape), x.dtype))
            for x in leaves
        ]
        return lj.combine(treedef.unflatten(drawn), base)

    return randomize


@pytest.fixture
def close():
    """Returns a function that asserts that two trees are equal up to rounding."""

    def check(got, want, atol=1e-5):
        assert jax.tree.structure(got) == jax.tree.structure(want)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert jnp.shape(x) == jnp.shape(y)
            np.testing.assert_allclose(
                np.asarray(x, np.float64),
                np.asarray(y, np.float64),
                atol=atol,
                rtol=1e-5,
            )

    return check


@pytest.fixture
def calls():
    """Returns a function that counts the calls of Python functions in another one.

    The count for twice the leaves shows what is quadratic, on a busy machine too.
    """

    def count(function):
        total = 0

        def trace(frame, event, arg):
            nonlocal total
            total += event in ("call", "c_call")

        sys.setprofile(trace)
        try:
            function()
        finally:
            sys.setprofile(None)
        return total

    return count


# A block of Python on a page, and the block of text after it, which it prints.
BLOCK = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)


@pytest.fixture
def run_page(tmp_path, monkeypatch, capsys, third_party):
    """Returns a function that runs the code of a page, in an empty folder.

    A block prints the text block after it, or what its comments say:
    `print(x)  # (2, 3)`. Pages that import a package which is not installed are
    skipped. The folders "checkpoint" and "llama" have weights that pages import.
    """

    def run(path, names=None):
        names = {} if names is None else names
        blocks = BLOCK.findall(path.read_text(encoding="utf-8"))
        for code, _ in blocks:
            for node in ast.walk(ast.parse(code)):
                if isinstance(node, ast.Import):
                    modules = [alias.name for alias in node.names]
                else:
                    modules = [node.module] if isinstance(node, ast.ImportFrom) else []
                # Not imported here: a page may set what an import reads.
                for package in {module.split(".")[0] for module in modules}:
                    if importlib.util.find_spec(package) is None:
                        pytest.skip(f"{package} is not installed")
        for code, text in blocks:
            exec(compile(code, path.name, "exec"), names)
            comments = re.findall(r"^ *print\(.*\)  # (.+)$", code, re.MULTILINE)
            expected = text or "".join(f"{line}\n" for line in comments)
            assert capsys.readouterr().out == expected, code
        return names

    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoint").mkdir()
    layer = "model.layers.{}.self_attn.q_proj.weight"
    draw = lambda i: np.random.default_rng(i).normal(size=(64, 64)).astype(np.float32)
    tensors = {layer.format(i): draw(i) for i in range(2)}
    safetensors.numpy.save_file(tensors, tmp_path / "checkpoint/model.safetensors")
    (tmp_path / "llama").mkdir()
    safetensors.numpy.save_file(tiny_llama(), tmp_path / "llama/model.safetensors")
    return run


def tiny_llama():
    """Returns the tensors of a Llama of one layer, with 2 heads of 8, one for keys."""
    attention = {"q_proj": (16, 16), "k_proj": (8, 16), "v_proj": (8, 16)}
    attention |= {"o_proj": (16, 16)}
    mlp = {"gate_proj": (24, 16), "up_proj": (24, 16), "down_proj": (16, 24)}
    shapes = {
        "embed_tokens": (32, 16),
        **{f"layers.0.self_attn.{name}": shape for name, shape in attention.items()},
        **{f"layers.0.mlp.{name}": shape for name, shape in mlp.items()},
    }
    rng = np.random.default_rng(0)
    tensors = {
        f"model.{name}.weight": rng.normal(0, 0.3, shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    norms = "layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm"
    return tensors | {f"model.{name}.weight": np.ones(16, np.float32) for name in norms}


@dataclasses.dataclass
class TinyGGUF:
    """The content of a GGUF."""

    fields: dict
    tensors: dict  # float32; a matrix is (out, in)

    def write(self, path, kind_of=lambda name: "Q4_1"):
        """Writes a GGUF; `kind_of` returns a matrix's type, or None for float32."""
        gguf = pytest.importorskip("gguf")
        writer = gguf.GGUFWriter(path, self.fields["general.architecture"])
        for name, value in self.fields.items():
            if name == "general.architecture":
                continue  # already written
            if isinstance(value, list):
                writer.add_array(name, value)
            elif isinstance(value, str):
                writer.add_string(name, value)
            elif isinstance(value, float):
                writer.add_float32(name, value)
            else:
                writer.add_uint32(name, value)
        for name, x in self.tensors.items():
            kind = kind_of(name) if x.ndim == 2 else None
            written = x
            if kind is not None:
                kind = gguf.GGMLQuantizationType[kind]
                written = gguf.quants.quantize(x, kind)
            writer.add_tensor(name, written, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


@pytest.fixture
def tiny_smollm2():
    """Returns the content of a GGUF of a tiny Llama: fields and random tensors."""
    from tokenizers.pre_tokenizers import ByteLevel

    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*control, *sorted(ByteLevel.alphabet()), "he", "the", "Ġthe", "12"]
    fields = {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.context_length": 128,
        "llama.embedding_length": 32,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.feed_forward_length": 64,
        "llama.vocab_size": len(tokens),
        "llama.rope.freq_base": 100.0,
        "llama.rope.dimension_count": 8,
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(control) + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": ["h e", "t he", "Ġ the", "1 2"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    shapes = {"token_embd": (len(tokens), 32), "output_norm": (32,)}
    for i in range(2):
        shapes |= {f"blk.{i}.{name}_norm": (32,) for name in ("attn", "ffn")}
        shapes |= {f"blk.{i}.attn_{name}": (32, 32) for name in ("q", "output")}
        shapes |= {f"blk.{i}.attn_{name}": (16, 32) for name in ("k", "v")}
        shapes |= {f"blk.{i}.ffn_{name}": (64, 32) for name in ("gate", "up")}
        shapes |= {f"blk.{i}.ffn_down": (32, 64)}
    rng = np.random.default_rng(0)
    tensors = {
        f"{name}.weight": (0.3 * rng.normal(size=shape) + (len(shape) == 1)).astype(
            np.float32
        )
        for name, shape in shapes.items()
    }
    return TinyGGUF(fields, tensors)
