"""Times the import of a checkpoint into a quantized tree, and measures its memory.

    python benchmarks/load.py --model llama-3.2-1b

Writes a random checkpoint with the published shapes, in bfloat16 and file by file, and
reads it in processes of their own: by `import_weights` into NF4 with int8 tables, and
by safetensors, `jnp.asarray` and `quantize`. The peak is the most memory that a process
had resident, which includes the pages of files that it read.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from models.architectures import ARCHITECTURES, Architecture, Model
from models.folder import names as module_names
from script import exit_on_error, exit_on_interrupt, phase, staged, write_json

import lora_jax as lj

METHODS = ("import_weights", "eager")
LLAMAS = [name for name in ARCHITECTURES if name.startswith(("llama", "smollm"))]
HOW = {"kernel": "nf4", "embedding": "int8"}
SHARD = 5e9  # bytes of a file, as on the hub


def tensors_of(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Returns the tensors of a Llama's checkpoint, with their shapes."""
    d, size = arch.width, arch.head_dim or arch.width // arch.heads
    kv = size * (arch.kv_heads or arch.heads)
    layer = {
        "self_attn.q_proj": (arch.heads * size, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, arch.heads * size),
        "mlp.gate_proj": (arch.mlp, d),
        "mlp.up_proj": (arch.mlp, d),
        "mlp.down_proj": (d, arch.mlp),
        "input_layernorm": (d,),
        "post_attention_layernorm": (d,),
    }
    found = {"model.embed_tokens.weight": (arch.vocab, d), "model.norm.weight": (d,)}
    for i in range(arch.layers):
        found |= {f"model.layers.{i}.{n}.weight": shape for n, shape in layer.items()}
    return found if arch.tied else found | {"lm_head.weight": (arch.vocab, d)}


def write_checkpoint(folder: Path, arch: Architecture) -> dict[str, int]:
    """Writes random tensors; returns the bytes of all and of the largest."""
    shapes = tensors_of(arch)
    sizes = {name: 2 * int(np.prod(shape)) for name, shape in shapes.items()}
    files: list[list[str]] = [[]]
    for name in shapes:
        if files[-1] and sum(map(sizes.get, [*files[-1], name])) > SHARD:
            files.append([])
        files[-1].append(name)
    rng, where = np.random.default_rng(0), {}
    for i, names in enumerate(files):
        # Drawing every element would take minutes: each tensor repeats a few.
        draw = lambda: rng.standard_normal(2**20, np.float32).astype(ml_dtypes.bfloat16)
        part = {name: np.resize(draw(), shapes[name]) for name in names}
        file = f"model-{i + 1:05}-of-{len(files):05}.safetensors"
        safetensors.numpy.save_file(part, folder / file)
        where |= dict.fromkeys(names, file)
    index = json.dumps({"weight_map": where})
    (folder / "model.safetensors.index.json").write_text(index)
    return {"bytes": sum(sizes.values()), "largest": max(sizes.values())}


def read(folder: Path, arch: Architecture, method: str) -> dict[str, float]:
    """Reads the checkpoint in this process; returns the seconds and the memory."""
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    like = jax.eval_shape(Model(arch).init, jax.random.key(0), ids)
    jax.block_until_ready(jnp.zeros(8))  # starts the backend
    before, begun = peak(), time.perf_counter()
    if method == "import_weights":
        params = lj.import_weights(folder, like, module_names(arch), how=HOW)
    else:
        params = eager(folder, like, module_names(arch))
    jax.block_until_ready(params)
    seconds = time.perf_counter() - begun
    # Two codes of 4 bits are in a byte.
    bits = lambda x: 4 if x.dtype == jnp.int4 else 8 * x.dtype.itemsize
    result = sum(x.size * bits(x) // 8 for x in jax.tree.leaves(params))
    return {"seconds": seconds, "before": before, "peak": peak(), "result": result}


def eager(folder: Path, like, names):
    """Loads all tensors, makes the plain tree of them, and quantizes it."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= safetensors.numpy.load_file(file)
    leaves, axes = {}, {}
    for path, leaf in flatten_dict(like["params"], sep="/").items():
        (pattern,) = (p for p in names if path.startswith(p.removeprefix("params/")))
        name = names[pattern]
        name = f"{name if isinstance(name, str) else name[0]}.weight"
        layers = range(leaf.shape[0]) if "{layer}" in name else [0]
        each = [tensors.pop(name.format(layer=i)) for i in layers]
        each = [x.T if path.endswith("kernel") else x for x in each]
        leaves[path] = jnp.asarray(np.stack(each) if "{layer}" in name else each[0])
        if leaf.ndim == 3:
            axes[f"params/{path}"] = lj.Axes((0,), (1,), (2,))
    params = {"params": unflatten_dict(leaves, sep="/")}
    return lj.quantize(params, HOW, axes=axes)


def peak() -> int:
    """Returns the most memory that this process had resident, in bytes."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s*(\d+) kB", status)
    assert found, "the system reports no peak"
    return int(found[1]) * 1024


def measure(folder: Path, model: str, method: str) -> dict[str, float]:
    """Runs `read` in a process of its own."""
    command = [sys.executable, __file__, "--model", model, "--read", method]
    run = subprocess.run(
        [*command, "--folder", str(folder)], capture_output=True, text=True
    )
    if run.returncode:
        raise OSError(f"{method} failed, status {run.returncode}: {run.stderr[-500:]}")
    return json.loads(run.stdout.splitlines()[-1])


def table(found: dict[str, dict[str, float]], about: dict[str, int]) -> str:
    """Returns a row for each method."""
    gb = lambda n: f"{n / 1e9:.2f}"
    lines = ["| | seconds | peak, GB | result, GB | (peak - result) / largest tensor |"]
    lines += ["|---|--:|--:|--:|--:|"]
    for method, x in found.items():
        share = (x["peak"] - x["result"]) / about["largest"]
        lines.append(
            f"| {method} | {x['seconds']:.1f} | {gb(x['peak'])} | {gb(x['result'])} | "
            f"{share:.2f} |"
        )
    return "\n".join(lines)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="load.py", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--model", choices=LLAMAS, default="llama-3.2-1b")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--layers", type=int, help="fewer layers than published")
    parser.add_argument("--output", type=Path, default=Path("results"))
    parser.add_argument("--read", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    arch = ARCHITECTURES[options.model]
    if options.read:
        about = json.loads((options.folder / "about.json").read_text())
        arch = Architecture(**about["arch"])
        print(json.dumps(read(options.folder, arch, options.read)))
        return
    with exit_on_interrupt(parser, options.output), exit_on_error(parser, OSError):
        if options.layers is not None:
            if not 0 < options.layers <= arch.layers:
                raise ValueError(f"--layers must be between 1 and {arch.layers}.")
            arch = arch.__class__(**vars(arch) | {"layers": options.layers})
        with staged(options.output) as out, tempfile.TemporaryDirectory(dir=out) as tmp:
            folder = Path(tmp)
            with phase("while it wrote the checkpoint"):
                about = write_checkpoint(folder, arch)
            text = json.dumps(about | {"arch": vars(arch)})
            (folder / "about.json").write_text(text)
            found = {}
            for method in options.methods:
                with phase(f"during {method}"):
                    found[method] = measure(folder, options.model, method)
            text = table(found, about)
            (out / "load.md").write_text(text + "\n")
            write_json(out / "load.json", {"about": about, "methods": found})
        print(f"{options.model}, {about['bytes'] / 1e9:.2f} GB in bfloat16, into NF4")
        print(text)


if __name__ == "__main__":
    main()
