"""Parts of every benchmark script: its output files, and its messages on exit."""

import argparse
import contextlib
import json
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Yields a staging folder whose contents move into `folder` at the end.

    If the job ends early, by an error or by Ctrl-C, `folder` stays as it was. New files
    and new folders replace old ones of the same name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=folder) as name:
        new, old = Path(name, "new"), Path(name, "old")
        new.mkdir()
        old.mkdir()
        yield new
        # Ctrl-C has to wait for these short moves: an interrupt between them would
        # leave files of two different jobs in one folder.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            for path in sorted(new.iterdir()):
                target = folder / path.name
                if target.is_dir():
                    os.rename(target, old / path.name)
                os.replace(path, target)
        finally:
            signal.signal(signal.SIGINT, before)


def write_json(path: Path, found: Any) -> None:
    """Writes the results of a job as indented JSON."""
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def exit_on_interrupt(parser: argparse.ArgumentParser, folder: Path) -> Iterator[None]:
    """Ends the program at Ctrl-C with one line that names the phase; see `phase`."""
    try:
        yield
    except KeyboardInterrupt as stop:
        what = " ".join(["stopped", *map(str, stop.args)])
        text = f"{parser.prog}: {what}; nothing was written to {folder}\n"
        parser.exit(128 + signal.SIGINT, text)


@contextlib.contextmanager
def exit_on_error(
    parser: argparse.ArgumentParser, missing: type[Exception]
) -> Iterator[None]:
    """Ends the program with one line on a wrong option or a missing resource.

    A ValueError is a usage error, with status 2. An error of the type `missing`, for a
    file, a download or a device that is not available, has status 1.
    """
    try:
        yield
    except ValueError as error:
        parser.error(str(error))
    except missing as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


@contextlib.contextmanager
def phase(name: str | Callable[[], str]) -> Iterator[None]:
    """Names the phase, such as "before training", for `exit_on_interrupt`.

    A function is called at Ctrl-C. It can report the progress of a loop inside this
    context, so that no moment between two iterations is without a phase.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        names = stop.args or [name() if callable(name) else name]
        raise KeyboardInterrupt(*names) from None
