"""Types and help of command-line options; wrong values are errors before any work."""

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path


class DefaultsFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds its default to the help of each option, except to options without one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return (
            action.help if action.default is None else super()._get_help_string(action)
        )


def integer_from(least: int) -> Callable[[str], int]:
    """Returns a parser of integers of at least `least`."""

    def read(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and least <= int(text) < 2**31):
            raise argparse.ArgumentTypeError(
                f"{text} is not a whole number from {least} to {2**31 - 1}"
            )
        return int(text)

    return read


def positive(text: str) -> float:
    """Parses a finite number above zero."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
    return value


def existing_file(text: str) -> Path:
    """Parses the path of an existing file."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return Path(text)


def folder(text: str) -> Path:
    """Parses the path of a folder, which need not exist yet."""
    if Path(text).exists() and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a folder")
    return Path(text)


def targets_error(
    args: argparse.Namespace, error: ValueError, example: str
) -> ValueError:
    """Returns an error of `lorafy` about its targets in terms of the option --targets.

    No other option can cause an error of `lorafy`: ranks and alphas are checked when
    they are parsed.
    """
    cause = re.split(r" Write ", str(error))[0].replace(" of targets", "")
    return ValueError(
        f"--targets {' '.join(args.targets)}: {cause} Write patterns of what to adapt, "
        f"for example --targets {example}"
    )
