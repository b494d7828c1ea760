"""The documentation: its code runs, its links exist, and it lists the entire API."""

import pathlib
import re

import pytest

import lora_jax as lj

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted((DOCS / "pages").rglob("*.md"))
WITH_CODE = [path for path in PAGES if "```python" in path.read_text(encoding="utf-8")]


# Warnings of other packages, but not that of a weight which is materialized.
warnings = pytest.mark.filterwarnings("ignore", "error:'.*' meets")


@warnings
@pytest.mark.parametrize("path", WITH_CODE, ids=lambda path: path.stem)
def test_docs_code_prints_its_output(path, run_page):
    run_page(path)


@warnings
def test_docs_training_of_a_split_tree_copies_no_frozen_weight(run_page):
    path = DOCS / "pages/guides/training.md"
    names = run_page(path)
    blocks = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    (block,) = (x for x in blocks if "frozen = lj.split(params)" in x)
    exec(compile(block, path.name, "exec"), names)
    step, adapters, state, frozen = (
        names[name] for name in ("step", "adapters", "state", "frozen")
    )
    memory = step.lower(adapters, state, frozen).compile().memory_analysis()
    # XLA counts a pointer for each result.
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 200
    kernel = names["base"]["up"]["kernel"]
    assert names["params"]["up"]["kernel"] is kernel and not kernel.is_deleted()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_docs_links_exist(path):
    """MkDocs checks them too; this also works without it."""
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text(encoding="utf-8"))
    made = {"notebooks", "changelog.md"}  # by docs/hooks.py
    for link in links:
        if not made & {*pathlib.PurePath(link).parts}:
            assert (path.parent / link).is_file(), link


def test_docs_reference_lists_the_entire_api():
    text = (DOCS / "pages/api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^::: lora_jax\.(\w+)$", text, re.MULTILINE)
    public = {name for name in vars(lj) if name[0] != "_"}
    assert sorted(listed) == sorted(public)


def test_docs_list_every_page_and_notebook():
    config = (DOCS / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {path.relative_to(DOCS / "pages").as_posix() for path in PAGES}
    pages |= {f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")}
    listed = set(re.findall(r"[\w/]+\.(?:md|ipynb)", config))
    assert pages <= listed


def test_contributing_lists_every_file():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = re.findall(r"^ {6,8}(\w+\.py)", text, re.MULTILINE)
    files = (ROOT / "lora_jax").rglob("*.py")
    assert sorted(listed) == sorted(x.name for x in files if x.stem != "__init__")
