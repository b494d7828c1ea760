"""A progress bar for long work, on a terminal only."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(what: str, total: int, unit: str) -> Iterator[Callable[[], None]]:
    """Yields a function that counts one unit as done: in a bar on a terminal."""
    done, shown = 0, sys.stderr.isatty()

    def tick() -> None:
        nonlocal done
        done += 1
        if shown:
            bar = "#" * (30 * done // total)
            sys.stderr.write(f"\r{what} |{bar:30}| {done}/{total} {unit}")
            sys.stderr.flush()

    try:
        yield tick
    finally:
        if shown and done:
            sys.stderr.write("\n")
