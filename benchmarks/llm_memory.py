"""What finetune_llm.py and plan_llm.py say of memory: planned, used, not sufficient."""

import argparse
import contextlib
import sys
from collections.abc import Iterator

import jax
import memory


def sizes(parts: dict[str, int]) -> str:
    """Returns the memory of a step as text."""
    size, unit = (1e9, "GB") if parts["peak"] > 1e8 else (1e6, "MB")
    show = lambda n: f"{n / size:.3g} {unit}"
    rest = ", ".join(
        f"{show(parts[name])} {name}"
        for name in ("parameters", "optimizer", "temporaries")
    )
    return f"{show(parts['peak'])} of memory ({rest})"


def used() -> str:
    """Returns the largest memory in use so far, of a device or of this process."""
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return f"{stats['peak_bytes_in_use'] / 1e9:.2f} GB on the device"
    return f"{peak_resident() / 1e9:.2f} GB"


def peak_resident() -> int:
    """Returns the largest resident memory of this process so far, in bytes."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextlib.contextmanager
def exit_without(
    args: argparse.Namespace, parts: dict[str, int] | None = None
) -> Iterator[None]:
    """Ends the program with advice if the device's memory is not sufficient.

    `parts` is the step's memory, once it is known; see `training.memory`.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sys.exit(advice(str(error), args, parts))


def advice(text: str, args: argparse.Namespace, parts: dict[str, int] | None) -> str:
    """Returns which options need less memory, with what is known of the step's."""
    found = memory.refusal(text)
    known = f": XLA plans {sizes(parts)} for the step" if parts else ""
    if found["peak"]:
        known = f": the step needs {found['peak'] / 1e9:.1f} GB, and there are "
        known += f"{found['limit'] / 1e9:.1f} GB"
    options = []
    if args.batch > len(jax.devices()):
        half = max(len(jax.devices()), args.batch // 2)
        options.append(f"--batch {half} --accumulate {2 * args.accumulate}")
    if not args.remat:
        options.append("--remat")
    if args.base not in memory.QUANTIZED:
        options.append("--base nf4")
    if args.table is None:
        options.append("--table int8")
    if args.chunk and args.chunk > 32:
        options.append("--chunk 32")
    options.append(f"--length {max(2, args.length // 2)}")
    return (
        f"finetune_llm.py: not enough memory{known}. Write, from the first on, "
        f"{', then '.join(options)}. plan_llm.py predicts a step's memory"
    )
