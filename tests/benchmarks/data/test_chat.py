"""Chats are rendered, masked and packed as an independent reading of them says."""

import json
import re

import numpy as np
import pytest
from data import chat


def record(*turns):
    """Returns a record of (role, content) pairs."""
    found = {"messages": [dict(role=r, content=c) for r, c in turns]}
    return chat.record(found, "here")


TURNS = (
    ("system", "be he"),
    ("user", "the the"),
    ("assistant", " no \n the"),
    ("user", "why"),
    ("assistant", "the"),
)


def trained_text(made, example):
    """Returns the trained tokens as a text, with | where they are interrupted."""
    parts = []
    for start in range(len(example.ids)):
        if example.trained[start] and (start == 0 or not example.trained[start - 1]):
            end = start
            while end < len(example.ids) and example.trained[end]:
                end += 1
            ids = example.ids[start:end].tolist()
            parts.append(made.tokenizer.decode(ids, skip_special_tokens=False))
    return parts


@pytest.fixture
def load(tmp_path, tiny_llm):
    def load(template):
        template = getattr(tiny_llm, template, template)
        tiny_llm.write(tmp_path / "model", template)
        return chat.load_format(tmp_path / "model", chats=True)

    return load


@pytest.mark.parametrize("template", ["TEMPLATE", "MARKED"])
def test_encode_trains_the_assistants_turns_alone(load, template):
    made = load(template)
    (example,) = chat.encode(made, [record(*TURNS)])
    text = made.tokenizer.decode(example.ids.tolist(), skip_special_tokens=False)
    # The oracle: the format written by hand, and the answers found by their text.
    answers = [c.strip() if template == "MARKED" else c for _, c in TURNS]
    want = "".join(
        f"<|im_start|>{role}\n{c}<|im_end|>\n"
        for (role, raw), answer in zip(TURNS, answers, strict=True)
        for c in [answer if role == "assistant" else raw]
    )
    assert text == want
    want = re.findall(r"assistant\n(.*?<\|im_end\|>)", text, re.DOTALL)
    assert trained_text(made, example) == want
    assert len(want) == 2


def test_encode_makes_an_example_of_each_turn_if_later_turns_change_it(load):
    made = load("THINKING")
    turns = ("user", "the"), ("assistant", "a</think>b"), ("user", "c")
    turns = (*turns, ("assistant", "d</think>e"))
    one, two = chat.encode(made, [record(*turns)])
    assert trained_text(made, one) == ["<think>a</think>b<|im_end|>"]
    assert trained_text(made, two) == ["<think>d</think>e<|im_end|>"]
    text = made.tokenizer.decode(two.ids.tolist(), skip_special_tokens=False)
    assert "assistant\nb<|im_end|>" in text  # as the model meets it


def test_encode_of_texts_ends_each_and_trains_all(load):
    made = load("TEMPLATE")
    (example,) = chat.encode(made, [chat.record({"text": "the end"}, "here")])
    assert example.trained.all()
    end = made.tokenizer.token_to_id("<|im_end|>")
    assert example.ids.tolist() == [*made.tokenizer.encode("the end").ids, end]


def test_prompt_of_ends_before_the_answer(load):
    made = load("TEMPLATE")
    text, ids = chat.prompt_of(made, record(*TURNS))
    assert text.endswith("why<|im_end|>\n<|im_start|>assistant\n")
    assert made.tokenizer.decode(ids, skip_special_tokens=False) == text


def test_pack_keeps_every_token_once_and_apart():
    rng = np.random.default_rng(0)
    examples = []
    for n in rng.integers(2, 12, size=40):
        ids = rng.integers(1, 99, size=n).astype(np.int32)
        trained = rng.random(n) < 0.5
        examples.append(chat.Example(ids, trained))
    rows, cut, dropped = chat.pack(examples, 8)
    assert cut == sum(len(x.ids) > 9 for x in examples) > 0
    # The oracle reads the rows back, token by token.
    found = []
    for row in range(len(rows.ids)):
        segments = rows.segments[row]
        assert (np.diff(segments[segments > 0]) >= 0).all()
        for number in range(1, segments.max() + 1):
            at = np.flatnonzero(segments == number)
            assert (np.diff(at) == 1).all()
            assert rows.positions[row, at].tolist() == list(range(len(at)))
            found.append((tuple(rows.ids[row, at]), tuple(rows.labels[row, at])))
        padding = segments == 0
        assert (rows.labels[row, padding] == chat.IGNORED).all()
    want = []
    for ids, trained in examples:
        ids, trained = ids[:9], trained[:9]
        labels = [int(i) if t else -1 for i, t in zip(ids, trained, strict=True)][1:]
        if any(label >= 0 for label in labels):
            want.append((tuple(ids[:-1]), tuple(labels)))
    assert sorted(found) == sorted(want)
    assert dropped == len(examples) - len(want)
    assert (rows.segments > 0).mean() > 0.9


def test_stream_goes_through_all_rows_in_each_epoch_and_can_start_anywhere():
    whole = chat.stream(7, 3, 0, 30)
    for epoch in range(4):
        assert sorted(whole[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert whole[:7].tolist() != whole[7:14].tolist()
    parts = [chat.stream(7, 3, start, 3) for start in range(0, 30, 3)]
    assert np.concatenate(parts).tolist() == whole.tolist()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "data.jsonl:2: not JSON"),
        ("[1]", "data.jsonl:2: found .* either"),
        ('{"messages": [], "text": "a"}', "data.jsonl:2: found"),
        ('{"text": "  "}', "data.jsonl:2: the text is"),
        ('{"messages": []}', "data.jsonl:2: the messages are"),
        ('{"messages": [{"role": "user"}]}', "message 0 is"),
        ('{"messages": [{"role": "bot", "content": "a"}]}', 'unknown role "bot"'),
        ('{"messages": [{"role": "user", "content": 3}]}', "content of message 0 is 3"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no message is the"),
    ],
)
def test_read_names_the_line_of_bad_data(tmp_path, line, message):
    path = tmp_path / "data.jsonl"
    path.write_text(f"{json.dumps({'text': 'good'})}\n{line}\n")
    with pytest.raises(ValueError, match=message):
        chat.read(path)


def test_read_refuses_empty_files_and_other_encodings(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\n\n")
    with pytest.raises(ValueError, match="is empty"):
        chat.read(path)
    path.write_bytes(b'{"text": "\xff"}')
    with pytest.raises(ValueError, match="not in UTF-8"):
        chat.read(path)


def test_load_format_refuses_folders_without_tokenizer_or_template(tmp_path, tiny_llm):
    folder = tiny_llm.write(tmp_path / "model", template=None)
    with pytest.raises(ValueError, match="has no chat template"):
        chat.load_format(folder, chats=True)
    made = chat.load_format(folder, chats=False)
    assert made.special == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    config = {"chat_template": [{"name": "default", "template": "x"}]}
    tiny_llm.dump(folder / "tokenizer_config.json", config)
    made = chat.load_format(folder, chats=True)
    assert made.template == "x"
    with pytest.raises(ValueError, match="no eos_token"):
        chat.encode(made, [chat.record({"text": "a"}, "here")])
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        chat.load_format(folder, chats=True)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is not a tokenizer\.json"):
        chat.load_format(folder, chats=True)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        chat.load_format(folder, chats=True)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for", "cannot be read"),
        ("{{ raise_exception('no system role') }}", "refuses the roles .*: no system"),
        ("{{ messages[0].nothing.more }}", "refuses the roles"),
        ("{{ messages | length }}", "renders what comes before an answer"),
        # The sandbox: a template must not reach Python's internals.
        ("{{ messages.__class__.__mro__ }}", "refuses the roles .*unsafe"),
        ("x{% generation %}{% endgeneration %}{% if 0 %}", "cannot be read"),
        ("{% if 0 %}{% generation %}a{% endgeneration %}{% endif %}", "marks no part"),
    ],
)
def test_encode_refuses_templates_that_hide_the_answers(load, template, message):
    with pytest.raises(ValueError, match=message):
        chat.encode(load(template), [record(*TURNS)])
