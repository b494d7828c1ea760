"""Readers of the command line's options: what is wrong is said before any work."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path


def whole(least: int) -> Callable[[str], int]:
    """Returns the reader of an option: a whole number of at least `least`."""

    def read(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and least <= int(text) < 2**31):
            raise argparse.ArgumentTypeError(
                f"{text} is not a whole number from {least} to {2**31 - 1}"
            )
        return int(text)

    return read


def positive(text: str) -> float:
    """Reads an option: a finite number above zero."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
    return value


def existing(text: str) -> Path:
    """Reads an option: a file that is there."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return Path(text)


def folder(text: str) -> Path:
    """Reads an option: a folder, or a place where there is nothing yet."""
    if Path(text).exists() and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a folder")
    return Path(text)
