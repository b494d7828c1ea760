"""What a job leaves behind: all of its files, or none and a line that says so."""

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
def written(folder: Path) -> Iterator[Path]:
    """Gives a place for new files and folders, which move into `folder` at the end.

    Whatever ends the job before, an error or Ctrl-C, leaves `folder` as it was. A new
    folder takes the place of an old one of its name, as a file does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=folder) as name:
        new, old = Path(name, "new"), Path(name, "old")
        new.mkdir()
        old.mkdir()
        yield new
        # So short that Ctrl-C may wait: files of two jobs would not agree.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            for path in sorted(new.iterdir()):
                place = folder / path.name
                if place.is_dir():
                    os.rename(place, old / path.name)
                os.replace(path, place)
        finally:
            signal.signal(signal.SIGINT, before)


def write_json(path: Path, found: Any) -> None:
    """Writes what a job found, to be read by eye too."""
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def stoppable(parser: argparse.ArgumentParser, folder: Path) -> Iterator[None]:
    """Ends the program at Ctrl-C in one line that says what was done."""
    try:
        yield
    except KeyboardInterrupt as stop:
        what = " ".join(["stopped", *map(str, stop.args)])
        text = f"{parser.prog}: {what}; nothing was written to {folder}\n"
        parser.exit(128 + signal.SIGINT, text)


@contextlib.contextmanager
def refusing(
    parser: argparse.ArgumentParser, missing: type[Exception]
) -> Iterator[None]:
    """Ends the program in one line: for a wrong option, or for what is `missing`."""
    try:
        yield
    except ValueError as error:
        parser.error(str(error))
    except missing as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


@contextlib.contextmanager
def during(what: str | Callable[[], str]) -> Iterator[None]:
    """Lets `stoppable` say what Ctrl-C came in, such as "before training".

    A function is called at Ctrl-C: it says how far a loop has come that stands wholly
    within, so that no time between two of its steps is left out.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        said = stop.args or [what() if callable(what) else what]
        raise KeyboardInterrupt(*said) from None
