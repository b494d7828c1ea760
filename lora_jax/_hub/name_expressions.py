"""Python's regular expressions on names of modules, matched in bounded time.

A config may come from anywhere, and `re` can take forever: it tries one way through an
expression after another, and nested quantifiers such as "(a+)+b" have exponentially
many. Here each part of an expression maps the set of positions where its matches may
start to the set of positions where they end, and no position is tried twice. This gives
what `re` finds, because a test needs no groups: https://swtch.com/~rsc/regexp/
"""

import functools
import re
from collections.abc import Callable

# A set of positions in a name is an integer with a bit for each of them. Bit i is the
# position before character i, and the last bit is the end of the name.
Positions = int
NameTest = Callable[[str], bool]

# Limits that no expression for the modules of a model needs. Together they bound the
# time of one test to some milliseconds.
MOST_CHARACTERS = 100_000
MOST_DEEP = 50  # parentheses within each other
MOST_REPEATS = 1000  # in a quantifier, "{m,n}"
MOST_STEPS = 5_000  # of one test

QUANTIFIER = re.compile(r"(?:[*+?]|\{([0-9]*)(,?)([0-9]*)\})([?+]?)")
# A character that stands for itself, perhaps after a backslash.
LITERAL = re.compile(r"[^\\\[(.^$]|\\[^a-zA-Z0-9]", re.DOTALL)
# Other escapes of one character. "\N{...}" and digits are rare, or references.
ESCAPE = re.compile(r"\\(?:x..|u.{4}|U.{8}|[^0-9Nz])", re.DOTALL)
GROUP = re.compile(r"\((?:\?(?::|P<\w+>|<?[=!]))?(?!\?)")


class Name:
    """A name, with what has been computed of it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.every = (2 << len(text)) - 1
        self.steps = 0
        self.before: dict[str, Positions] = {}  # the positions before each character
        for i, character in enumerate(text):
            self.before[character] = self.before.get(character, 0) | 1 << i
        self.known: dict[tuple[object, Positions], Positions] = {}

    def once(self, part: "Part", starts: Positions) -> Positions:
        """Returns what a part does, computed once for each set of positions."""
        key = part, starts
        if key not in self.known:
            self.known[key] = part(self, starts)
        return self.known[key]

    def count_step(self) -> None:
        self.steps += 1
        if self.steps > MOST_STEPS:
            raise TimeoutError


Part = Callable[[Name, Positions], Positions]


def compile_expression(text: str, *, whole: bool) -> NameTest:
    """Returns the test whether an expression matches a name.

    Args:
      text: The expression.
      whole: Whether it must match all of the name, as with `re.fullmatch`, or only its
        start, as with `re.match`.

    Raises:
      ValueError: If it is no expression, or none whose matching time can be bounded.
        The text of the error continues a sentence.
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"has {len(text)} characters, and {MOST_CHARACTERS} at most")
    try:
        re.compile(text)  # so that the parser below sees valid expressions only
    except re.error as error:
        raise ValueError(f"is no pattern: {error}") from error
    except (RecursionError, OverflowError) as error:
        raise ValueError(f"cannot be read by Python's re: {error}") from error
    part, _ = _alternatives(text, 0, 0)

    def test(module: str) -> bool:
        name = _name(module)
        name.steps = 0
        try:
            ends = part(name, 1)
        except TimeoutError:
            raise ValueError(
                f"The expression {text[:100]!r} takes too long to match {module!r}. "
                "Write the names of the modules into the config instead."
            ) from None
        return bool(ends >> len(module) if whole else ends)

    return test


# The rules of a config test one name after another, and each has several expressions.
_name = functools.lru_cache(maxsize=8)(Name)


def _alternatives(text: str, i: int, depth: int) -> tuple[Part, int]:
    """Parses "a|b" up to a closing parenthesis, and returns where it ends."""
    if depth > MOST_DEEP:
        raise ValueError(f"has more than {MOST_DEEP} parentheses within each other")
    branches = []
    while True:
        branch, i = _sequence(text, i, depth)
        branches.append(branch)
        if text[i : i + 1] != "|":
            break
        i += 1
    if len(branches) == 1:
        return branches[0], i

    def alternatives(name: Name, starts: Positions) -> Positions:
        ends = 0
        for branch in branches:
            ends |= branch(name, starts)
        return ends

    return alternatives, i


def _sequence(text: str, i: int, depth: int) -> tuple[Part, int]:
    parts: list[Part] = []
    literal = ""
    while i < len(text) and text[i] not in "|)":
        found = LITERAL.match(text, i)
        repeats = _quantifier(text, found.end()) if found else None
        if found and repeats is None:
            literal += found[0][-1]
            i = found.end()
            continue
        if literal:
            parts.append(_literal(literal))
            literal = ""
        is_group = text[i] == "("
        if found:
            part, i = _literal(found[0][-1]), found.end()
        else:
            part, i = _item(text, i, depth)
            repeats = _quantifier(text, i)
        if repeats is not None:
            low, high, i = repeats
            part = _repeated(part, low, high, is_group=is_group)
        parts.append(part)
    if literal:
        parts.append(_literal(literal))

    def sequence(name: Name, starts: Positions) -> Positions:
        for part in parts:
            if not starts:
                break
            name.count_step()
            starts = part(name, starts)
        return starts

    return sequence, i


def _item(text: str, i: int, depth: int) -> tuple[Part, int]:
    """Parses a group, an assertion, a class or an escape."""
    if text[i] == "(":
        found = GROUP.match(text, i)
        if found is None:
            raise ValueError(
                f"has the group {text[i : i + 4]!r}, which is not supported"
            )
        inner, end = _alternatives(text, found.end(), depth + 1)
        if found[0].endswith(("=", "!")):
            inner = _look(inner, behind="<" in found[0], wanted=found[0].endswith("="))
        return inner, end + 1
    if text[i] in "^$" or text[i : i + 2] in (r"\A", r"\Z", r"\b", r"\B"):
        item = text[i] if text[i] in "^$" else text[i : i + 2]
        return _assertion(item), i + len(item)
    if text[i] == "[":
        end = i + 2 + (text[i + 1] == "^")  # the first character may be "]"
        while text[end] != "]":
            end += 1 + (text[end] == "\\")
        return _one_of(text[i : end + 1]), end + 1
    if text[i] == ".":
        return _one_of("."), i + 1
    found = ESCAPE.match(text, i)
    if found is None:
        raise ValueError(f"has {text[i : i + 2]!r}, which is not supported")
    return _one_of(found[0]), found.end()


def _quantifier(text: str, i: int) -> tuple[int, int | None, int] | None:
    """Parses a quantifier: the least and the most repeats, and where it ends."""
    found = QUANTIFIER.match(text, i)
    # Python takes "{" and "{}" as literals.
    if found is None or found[0].startswith("{}"):
        return None
    if found[4] == "+":
        raise ValueError(f"has {found[0]!r}, a possessive quantifier")
    if text[i] != "{":
        low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}[text[i]]
        return low, high, found.end()
    low = int(found[1] or 0)
    high = (int(found[3]) if found[3] else None) if found[2] else low
    if max(low, high or 0) > MOST_REPEATS:
        raise ValueError(f"has {found[0]!r}, more than {MOST_REPEATS} repeats")
    return low, high, found.end()


def _literal(text: str) -> Part:
    def literal(name: Name, starts: Positions) -> Positions:
        if starts & (starts - 1) == 0:  # one position
            same = name.text.startswith(text, starts.bit_length() - 1)
            return starts << len(text) if same else 0
        for character in text:
            starts = (starts & name.before.get(character, 0)) << 1
            if not starts:
                break
        return starts

    return literal


def _one_of(text: str) -> Part:
    """Returns the part for a class, an escape or a dot: one character."""
    accepts = re.compile(text).fullmatch
    tested: dict[str, bool] = {}

    def before(name: Name, _: Positions) -> Positions:
        found = 0
        for character, positions in name.before.items():
            if character not in tested:
                tested[character] = accepts(character) is not None
            if tested[character]:
                found |= positions
        return found

    return lambda name, starts: (starts & name.once(before, 0)) << 1


def _assertion(item: str) -> Part:
    matches_at = re.compile(item)

    def held(name: Name, _: Positions) -> Positions:
        found = matches_at.finditer(name.text)
        return sum(1 << match.start() for match in found)

    return lambda name, starts: starts & name.once(held, 0)


def _look(inner: Part, *, behind: bool, wanted: bool) -> Part:
    def look(name: Name, starts: Positions) -> Positions:
        if behind:
            found = name.once(inner, name.every)
        else:
            found = 0
            for start in _each(starts):
                name.count_step()
                found |= start if name.once(inner, start) else 0
        return starts & (found if wanted else ~found)

    return look


def _repeated(part: Part, low: int, high: int | None, *, is_group: bool) -> Part:
    """Returns the part for a quantifier.

    A group takes one position at a time, so that each quantifier within another one
    computes each position once.
    """

    def again(name: Name, starts: Positions) -> Positions:
        name.count_step()
        if not is_group:
            return part(name, starts)
        ends = 0
        for start in _each(starts):
            name.count_step()
            ends |= name.once(part, start)
        return ends

    def repeated(name: Name, starts: Positions) -> Positions:
        for _ in range(low):
            ends = again(name, starts)
            if ends == starts:
                break  # so that further repeats change nothing
            starts = ends
        if high is None and not is_group:
            # The carry of the sum runs through adjacent bits: all characters that the
            # part accepts. Cameron et al., "Bitwise data parallelism in regular
            # expression matching", 2014, MatchStar. https://doi.org/10.1145/2628071.2628079
            accepted = name.once(part, name.every) >> 1
            return (((starts & accepted) + accepted) ^ accepted) | starts
        ends, count = starts, low
        while starts and (high is None or count < high):
            starts = again(name, starts) & ~ends
            ends |= starts
            count += 1
        return ends

    return repeated


def _each(positions: Positions) -> list[Positions]:
    found = []
    while positions:
        found.append(positions & -positions)
        positions &= positions - 1
    return found
