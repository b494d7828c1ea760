"""The README's code runs as it stands, prints what it says, and names what there is."""

import pathlib
import re

import lora_jax as lj

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
OUTPUT = re.findall(r"```text\n(.*?)```", TEXT, re.DOTALL)


def test_code_prints_its_output(tmp_path, monkeypatch, capsys, third_party):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in CODE:
        exec(compile(block, "README.md", "exec"), names)
    assert capsys.readouterr().out == "".join(OUTPUT)
    assert (tmp_path / "adapter.safetensors").stat().st_size < 40_000


def test_it_is_short():
    lines = [line for line in CODE[0].splitlines() if line.strip()]
    assert len(lines) <= 15
    assert TEXT.index("```python") < 200


def test_the_table_names_the_whole_api():
    table = TEXT[TEXT.index("## The API") : TEXT.index("## The equation")]
    named = set(re.findall(r"`(?:lj\.)?([A-Za-z]\w*)", table))
    public = {name for name in vars(lj) if name[0] != "_"}
    assert public <= named


def test_the_map_names_every_file():
    listed = set(re.findall(r"^ {6}(\w+\.py)", TEXT, re.MULTILINE))
    files = {path.name for path in (ROOT / "lora_jax").glob("_[a-z]*.py")}
    assert listed == files
