"""The README's code runs and prints its output, and its tables list the entire API."""

import pathlib
import re

import lora_jax as lj

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
OUTPUT = re.findall(r"```text\n(.*?)```", TEXT, re.DOTALL)


def test_readme_code_prints_its_output(tmp_path, monkeypatch, capsys, third_party):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in CODE:
        exec(compile(block, "README.md", "exec"), names)
    assert capsys.readouterr().out == "".join(OUTPUT)
    assert (tmp_path / "adapter.safetensors").stat().st_size < 40_000


def test_readme_training_steps_copy_no_frozen_weight(
    tmp_path, monkeypatch, third_party
):
    monkeypatch.chdir(tmp_path)
    names = {}
    first = lambda params: params["params"]["layers_0"]["kernel"]
    new = lambda memory: memory.output_size_in_bytes - memory.alias_size_in_bytes

    exec(compile(CODE[0], "README.md", "exec"), names)
    step, params, state = (names[name] for name in ("step", "params", "state"))
    step = step.lower(params, state).compile()
    memory = step.memory_analysis()
    # XLA counts a pointer for each result.
    assert memory.output_size_in_bytes > 1_700_000 and new(memory) < 200
    before, buffer = first(params), first(params).unsafe_buffer_pointer()
    names["params"], _ = step(params, state)
    assert first(names["params"]).unsafe_buffer_pointer() == buffer
    assert before.is_deleted()

    (block,) = (block for block in CODE if "lj.split(params)" in block)
    exec(compile(block, "README.md", "exec"), names)
    step, adapters, state, base = (
        names[name] for name in ("step", "adapters", "state", "base")
    )
    memory = step.lower(adapters, state, base).compile().memory_analysis()
    assert memory.output_size_in_bytes < 100_000 and new(memory) < 200
    assert first(names["params"]) is first(base)
    assert first(base).unsafe_buffer_pointer() == buffer


def test_readme_begins_with_a_short_example():
    lines = [line for line in CODE[0].splitlines() if line.strip()]
    assert len(lines) <= 15
    assert TEXT.index("```python") < 200


def test_readme_table_lists_the_entire_api():
    table = TEXT[TEXT.index("## The API") : TEXT.index("## The equation")]
    named = set(re.findall(r"`(?:lj\.)?([A-Za-z]\w*)", table))
    public = {name for name in vars(lj) if name[0] != "_"}
    assert public <= named


def test_readme_lists_every_file():
    listed = set(re.findall(r"^ {6}(\w+\.py)", TEXT, re.MULTILINE))
    files = {path.name for path in (ROOT / "lora_jax").glob("_[a-z]*.py")}
    assert listed == files
