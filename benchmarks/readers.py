"""Readers of the command line's options: what is wrong is said before any work."""

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Help that says each default once, and none of an option that has none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return (
            action.help if action.default is None else super()._get_help_string(action)
        )


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


def targets(args: argparse.Namespace, error: ValueError, example: str) -> ValueError:
    """Returns what `lorafy` says of the targets in terms of the option.

    Nothing else of the command line can be wrong there: ranks and alphas are checked as
    they are read.
    """
    said = re.split(r" Write ", str(error))[0].replace(" of targets", "")
    return ValueError(
        f"--targets {' '.join(args.targets)}: {said} Write patterns of what to adapt, "
        f"for example --targets {example}"
    )
