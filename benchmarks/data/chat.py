"""Reads chats and texts, encodes them for a language model, and packs them into rows.

A data file has a JSON object on each line: `{"messages": [{"role": "user", "content":
"..."}, {"role": "assistant", "content": "..."}]}` or `{"text": "..."}`.

Chats are rendered with the chat template of the model's folder, by jinja2 as
transformers does it. Only the assistant's turns are trained. They are found in one of
two ways. A template with `{% generation %}` marks them itself. For any other, the text
of the messages before a turn, with the prompt for the assistant at its end, is rendered
too, and so is the text that ends with the turn. The turn is what the second has beyond
the first. Both must be beginnings of the whole text. Some templates render a turn
otherwise once another follows (Qwen 3 drops its reasoning). Their chats become one
example per turn, each trained on its last turn, as the model meets it when it answers.
"""

import bisect
import datetime
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import numpy as np
from tokenizers import Tokenizer

ROLES = ("system", "user", "assistant")
OPEN, CLOSE = "\ufdd0", "\ufdd1"  # noncharacters: no text has them
IGNORED = -1  # the label of a token that is not trained
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")

Messages = list[dict[str, str]]


class Record(NamedTuple):
    """One line of a data file: messages or a text."""

    messages: Messages | None
    text: str | None
    where: str  # file and line, for error messages


class Format(NamedTuple):
    """A model folder's tokenizer, special tokens and chat template."""

    folder: Path
    tokenizer: Tokenizer
    special: dict[str, str]
    template: str | None


class Example(NamedTuple):
    """Tokens, and which of them are trained."""

    ids: np.ndarray  # int32
    trained: np.ndarray  # bool


class Rows(NamedTuple):
    """Examples side by side in rows; each array is int32 of (rows, length).

    A segment is the number of an example in its row, from 1 on, and 0 in the padding.
    Positions count from 0 in each example. A label is the next token of the same
    example, or `IGNORED` if that is not trained.
    """

    ids: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    labels: np.ndarray


class Packed(NamedTuple):
    """Rows, and how many examples did not fit as they are."""

    rows: Rows
    cut: int  # longer than a row
    dropped: int  # without a trained token, some of them because they were cut


# The data file.


def read(path: Path) -> list[Record]:
    """Reads a file of JSON lines; empty lines are skipped.

    Raises:
      OSError: If the file cannot be read.
      ValueError: If a line is not such an object, or there is none. The message names
        the file and the line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8: {error}.") from error
    found = [
        parse(line, f"{path}:{n}") for n, line in enumerate(lines, 1) if line.strip()
    ]
    if not found:
        raise ValueError(
            f'{path} is empty. Write lines such as {{"messages": [...]}} or '
            '{"text": "..."}.'
        )
    return found


def parse(line: str, where: str) -> Record:
    """Parses one line; `where` stands in error messages."""
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: not JSON ({error}). Each line is one JSON object."
        ) from error
    return record(found, where)


def record(found: Any, where: str) -> Record:
    """Checks a JSON object and returns its record.

    Raises:
      ValueError: If it has neither messages nor a text, a message has an unknown role
        or no text, or no message is the assistant's.
    """
    keys = {"messages", "text"} & set(found) if isinstance(found, dict) else set()
    if len(keys) != 1:
        raise ValueError(
            f'{where}: found {brief(found)}, but an object with either "messages" or '
            '"text" is needed.'
        )
    if keys == {"text"}:
        if not isinstance(found["text"], str) or not found["text"].strip():
            raise ValueError(f"{where}: the text is {brief(found['text'])}.")
        return Record(None, found["text"], where)
    messages = found["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: the messages are {brief(messages)}, not a list.")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise ValueError(
                f"{where}: message {i} is {brief(message)}, but an object with "
                '"role" and "content" is needed.'
            )
        if message["role"] not in ROLES:
            raise ValueError(
                f"{where}: message {i} has the unknown role {brief(message['role'])}. "
                f"Known are {', '.join(ROLES)}."
            )
        if not isinstance(message["content"], str):
            raise ValueError(
                f"{where}: the content of message {i} is {brief(message['content'])}, "
                "not a text."
            )
    assistant = [i for i, x in enumerate(messages) if x["role"] == "assistant"]
    if not assistant:
        raise ValueError(f"{where}: no message is the assistant's, so none is trained.")
    # Nothing is learned from what follows the assistant's last turn.
    return Record(messages[: assistant[-1] + 1], None, where)


def brief(found: Any) -> str:
    """Returns a value as short JSON for an error message."""
    text = json.dumps(found)
    return text if len(text) < 60 else f"{text[:56]} ..."


# The model's folder.


def load_format(folder: Path, *, chats: bool) -> Format:
    """Reads the tokenizer of a Hugging Face folder, and for `chats` its template.

    Raises:
      OSError: If a file cannot be read.
      ValueError: If the folder has no tokenizer.json or, for `chats`, no template.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} has no tokenizer.json. Save the model's fast tokenizer there: "
            f"AutoTokenizer.from_pretrained(...).save_pretrained({str(folder)!r})."
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more specific
        raise ValueError(f"{path} is not a tokenizer.json: {error}.") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    config = read_json(folder / "tokenizer_config.json")
    more = read_json(folder / "special_tokens_map.json")
    special = {
        name: token
        for name in SPECIAL
        if (token := content(config.get(name) or more.get(name)))
    }
    template = find_template(folder, config)
    if chats and template is None:
        raise ValueError(
            f"{folder} has no chat template, neither in chat_template.jinja nor in "
            "tokenizer_config.json: this is a base model. Take the chat model's, or "
            'write the data as lines of {"text": "..."}.'
        )
    return Format(folder, tokenizer, special, template)


def find_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Returns the chat template of a folder, or None."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):  # several, with names
        found = {x.get("name"): x.get("template") for x in found}.get("default")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; a missing file is an empty one.

    Raises:
      ValueError: If it is another kind of file.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a JSON object.")
    return found


def content(token: Any) -> str | None:
    """Returns a special token's text, which a config has directly or in an object."""
    return token.get("content") if isinstance(token, dict) else token


# Chats as texts.


class Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` around what the assistant wrote.

    The text in between gets noncharacters around it, so that its place is still known
    after filters and macros.
    """

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_marked")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(lineno)

    def _marked(self, caller):
        return f"{OPEN}{caller()}{CLOSE}"


class Template:
    """A compiled chat template; rendering raises ValueError where the template does."""

    def __init__(self, made: Format):
        def refuse(message: str):
            raise jinja2.TemplateError(message)

        # The sandbox matters: a template is a program from somebody's model folder.
        env = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[Generation, jinja2.ext.loopcontrols],
        )
        env.filters["tojson"] = lambda x, **how: json.dumps(
            x, **{"ensure_ascii": False} | how
        )
        env.globals["raise_exception"] = refuse
        # A fixed date, so that a resumed run has the same tokens.
        date = datetime.datetime(2024, 7, 26)
        env.globals["strftime_now"] = date.strftime
        self.special = made.special
        self.marks = bool(re.search(r"\{%-?\s*generation\b", made.template or ""))
        try:
            self.compiled = env.from_string(made.template or "")
        except jinja2.TemplateError as error:
            raise ValueError(
                f"The chat template of {made.folder} cannot be read: {error}."
            ) from error

    def render(self, messages: Messages, where: str, prompt: bool = False) -> str:
        """Renders messages, and with `prompt` the beginning of the next answer."""
        try:
            return self.compiled.render(
                messages=messages, add_generation_prompt=prompt, **self.special
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            roles = ", ".join(x["role"] for x in messages)
            raise ValueError(
                f"{where}: the chat template refuses the roles {roles}: {error}"
            ) from error


class Rendered(NamedTuple):
    """A text, and where in it the trained parts begin and end."""

    text: str
    spans: list[tuple[int, int]]


def render_chat(template: Template, record: Record) -> list[Rendered]:
    """Renders a chat as one text or, if its turns depend on what follows, several.

    Raises:
      ValueError: If the template refuses it, or the assistant's turns are not found.
    """
    messages, where = record.messages or [], record.where
    if template.marks:
        return [marked(template.render(messages, where), where)]
    text = template.render(messages, where)
    turns = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = template.render(messages[:i], where, prompt=True)
            turns.append((before, template.render(messages[: i + 1], where)))
    for before, after in turns:
        if not after.startswith(before):
            raise ValueError(
                f"{where}: the chat template renders what comes before an answer "
                "otherwise than with the answer, so that the answer's tokens are "
                "unknown. Add {% generation %} and {% endgeneration %} around it, in "
                "the template."
            )
    # The line break after a turn is no part of it.
    span = lambda before, after: (len(before), max(len(before), len(after.rstrip())))
    if all(text.startswith(after) for _, after in turns):
        return [Rendered(text, [span(*turn) for turn in turns])]
    return [Rendered(turn[1], [span(*turn)]) for turn in turns]


def marked(text: str, where: str) -> Rendered:
    """Removes the marks of `Generation` and returns where they were."""
    parts = re.split(f"([{OPEN}{CLOSE}])", text)
    if parts[1::2] != [OPEN, CLOSE] * (len(parts) // 4) or len(parts) < 2:
        raise ValueError(
            f"{where}: the chat template marks no part by {{% generation %}}."
        )
    ends = np.cumsum([len(x) for x in parts[::2]]).tolist()
    return Rendered("".join(parts[::2]), [*zip(ends[::2], ends[1::2], strict=False)])


# Texts as tokens.


def encode(made: Format, records: Sequence[Record]) -> list[Example]:
    """Encodes records: chats are trained on the assistant's turns, texts on everything.

    A text gets the special tokens that the tokenizer adds, and the end of text.

    Raises:
      ValueError: If the template refuses a chat, or the folder names no end of text.
    """
    template = Template(made) if any(x.messages for x in records) else None
    examples: list[Example] = []
    chats = [y for x in records if x.messages for y in render_chat(template, x)]
    # The rendered text has the special tokens already.
    found = made.tokenizer.encode_batch(
        [x.text for x in chats], add_special_tokens=False
    )
    for chat, row in zip(chats, found, strict=True):
        examples.append(Example(np.array(row.ids, np.int32), inside(row, chat.spans)))
    texts = [x.text for x in records if x.text is not None]
    if texts:
        end = end_of_text(made)
        for row in made.tokenizer.encode_batch(texts):
            ids = np.array([*row.ids, end], np.int32)
            examples.append(Example(ids, np.ones(len(ids), bool)))
    return examples


def inside(row: Any, spans: Iterable[tuple[int, int]]) -> np.ndarray:
    """Returns which tokens of an encoding begin within one of the spans.

    A token that begins before an answer and ends in it is not trained: the answer
    begins with other tokens when the model writes it after the prompt.
    """
    starts, ends = np.array(row.offsets, np.int64).reshape(-1, 2).T
    found = np.zeros(len(starts), bool)
    for first, last in spans:
        found |= (starts >= first) & (starts < last) & (ends > starts)
    return found


def end_of_text(made: Format) -> int:
    """Returns the token that ends a text.

    Raises:
      ValueError: If the folder names none, or its tokenizer does not have it.
    """
    token = made.special.get("eos_token")
    found = None if token is None else made.tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(
            f"{made.folder} has no eos_token in tokenizer_config.json that its "
            f"tokenizer knows (found {token!r}), so a text has no end."
        )
    return found


def prompt_of(made: Format, record: Record, most: int = 16) -> tuple[str, list[int]]:
    """Returns a record's beginning, as text and tokens, for a model to continue.

    Of a chat it is everything before the assistant's last turn, of a text its first
    `most` tokens.
    """
    if record.messages:
        text = Template(made).render(record.messages[:-1], record.where, prompt=True)
        return text, made.tokenizer.encode(text, add_special_tokens=False).ids
    ids = made.tokenizer.encode(record.text).ids[:most]
    return made.tokenizer.decode(ids, skip_special_tokens=False), ids


# Tokens in rows.


def pack(examples: Sequence[Example], length: int) -> Packed:
    """Packs examples into as few rows as best-fit does, the longest first.

    An example takes one token less than it has: its last one is only a label.

    Args:
      examples: From `encode`.
      length: The number of tokens in a row. Longer examples are cut.
    """
    cut = sum(len(x.ids) > length + 1 for x in examples)
    whole = [Example(*(part[: length + 1] for part in x)) for x in examples]
    kept = [x for x in whole if x.trained[1:].any()]
    dropped = len(whole) - len(kept)
    kept.sort(key=lambda x: -len(x.ids))  # stable, so rows depend on the data alone
    bins: list[list[Example]] = []
    free: list[tuple[int, int]] = []  # free tokens of each row, and its number; sorted
    for example in kept:
        need = len(example.ids) - 1
        at = bisect.bisect_left(free, (need, -1))
        if at == len(free):
            bins.append([])
            room, row = length, len(bins) - 1
        else:
            room, row = free.pop(at)
        bins[row].append(example)
        if room > need:
            bisect.insort(free, (room - need, row))
    return Packed(as_rows(bins, length), cut, dropped)


def as_rows(bins: Sequence[Sequence[Example]], length: int) -> Rows:
    """Writes the examples of each row one after another."""
    made = Rows(*(np.zeros((len(bins), length), np.int32) for _ in Rows._fields))
    made.labels[:] = IGNORED
    for row, examples in enumerate(bins):
        start = 0
        for number, (ids, trained) in enumerate(examples, 1):
            end = start + len(ids) - 1
            made.ids[row, start:end] = ids[:-1]
            made.segments[row, start:end] = number
            made.positions[row, start:end] = np.arange(end - start)
            made.labels[row, start:end] = np.where(trained[1:], ids[1:], IGNORED)
            start = end
    return made


def take(rows: Rows, which: np.ndarray) -> Rows:
    """Returns some of the rows."""
    return Rows(*(x[which] for x in rows))


def stream(count: int, seed: int, start: int, size: int) -> np.ndarray:
    """Returns which rows are number `start` to `start + size` of an endless stream.

    Each epoch has its own order, which depends on the seed and the epoch alone. So a
    resumed run goes on with the same rows.
    """
    return np.fromiter(order(count, seed, start), np.int64, size)


def order(count: int, seed: int, start: int) -> Iterator[int]:
    """Yields the rows of the endless stream from number `start` on."""
    epoch, first = divmod(start, count)
    while True:
        yield from np.random.default_rng([seed, epoch]).permutation(count)[first:]
        epoch, first = epoch + 1, 0
