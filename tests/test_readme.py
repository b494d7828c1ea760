"""The README's code runs and prints its output, and its links exist."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_readme_code_prints_its_output(run_page, tmp_path):
    run_page(README)
    assert (tmp_path / "adapter.safetensors").stat().st_size < 40_000
    assert (tmp_path / "merged/model.safetensors").is_file()


def test_readme_training_steps_copy_no_frozen_weight(
    tmp_path, monkeypatch, third_party
):
    monkeypatch.chdir(tmp_path)
    names = {}
    first = lambda params: params["params"]["layers_0"]["kernel"]

    exec(compile(CODE[0], "README.md", "exec"), names)
    step, params, state = (names[name] for name in ("step", "params", "state"))
    memory = step.lower(params, state).compile().memory_analysis()
    # XLA counts a pointer for each result.
    assert memory.output_size_in_bytes > 1_700_000
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 200
    before, buffer = first(params), first(params).unsafe_buffer_pointer()
    new, _ = step(params, state)
    assert first(new).unsafe_buffer_pointer() == buffer
    assert before.is_deleted()


def test_readme_begins_with_a_short_example():
    lines = [line for line in CODE[0].splitlines() if line.strip()]
    assert len(lines) <= 15
    assert len(TEXT.splitlines()) < 200


def test_readme_links_exist():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", TEXT)
    assert links and all((ROOT / link).is_file() for link in links)
