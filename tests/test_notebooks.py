"""Every notebook runs without warnings, and is stored with the outputs of a run."""

import re
import tomllib
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Tests replace a value by that in a comment, as in "STEPS = 200  # 4 in the tests".
SHORTER = re.compile(r"^(\w+ = ).+  # (.+) in the tests$", re.MULTILINE)

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


def outputs(book):
    return [(cell, output) for cell in code(book) for output in cell.outputs]


def text(output):
    """Returns the text of an output, without its pictures."""
    return output.get("text", "") + output.get("data", {}).get("text/plain", "")


def drawn(book):
    """Returns the number of pictures of each cell."""
    return [
        sum("image/png" in output.get("data", {}) for output in cell.outputs)
        for cell in code(book)
    ]


# Colab has one device, and the notebook on sharding must run there as well.
RUNS = [(path, 8) for path in NOTEBOOKS]
RUNS += [(path, 1) for path in NOTEBOOKS if path.stem == "03_colab_tpu"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # from nbclient, in this process
@pytest.mark.parametrize(("path", "devices"), RUNS, ids=lambda x: getattr(x, "stem", x))
def test_notebook_runs(path, devices, monkeypatch):
    # A kernel starts with this environment. The XLA flags of the tests make compiling
    # fast and programs slow, but notebooks compute more than they compile.
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", str(devices))
    book = nbformat.read(path, as_version=4)
    stored = drawn(book)
    for cell in code(book):
        marks = cell.source.count(" in the tests")
        cell.source, changed = SHORTER.subn(r"\1\2", cell.source)
        assert changed == marks
        if "install" in cell.metadata.get("tags", []):
            cell.source = ""
    options = {"timeout": 300, "kernel_name": "python3"}
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(book, resources=resources, **options).execute()
    printed = "".join(text(output) for _, output in outputs(book))
    assert "Warning" not in printed, printed
    assert drawn(book) == stored
    if path.stem == "03_colab_tpu":
        assert f"{devices} x cpu" in printed


@each
def test_notebook_is_stored_with_the_outputs_of_a_run(path):
    assert path.stat().st_size < 150_000
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    assert all(output.output_type != "error" for _, output in outputs(book))
    assert sum(drawn(book)) > 0
    printed = "".join(text(output) for _, output in outputs(book))
    assert not re.search(r"Warning|(?<![\w.])/(home|root|tmp|work)/", printed)
    # All cells ran, once, from the first to the last.
    counts = [cell.execution_count for cell in code(book)]
    assert counts == list(range(1, len(counts) + 1))


@each
def test_notebook_begins_with_a_badge_and_an_install(path):
    title, install, *rest = nbformat.read(path, as_version=4).cells
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    home = project["urls"]["Repository"]
    colab = home.replace("github.com", "colab.research.google.com/github")
    assert title.source.startswith("# ")
    assert f"]({colab}/blob/main/notebooks/{path.name})" in title.source
    assert f"[lora_jax]({home})" in title.source
    assert install.metadata.tags == ["install"]
    assert f"git clone -q --depth 1 {home}" in install.source
    assert "%pip install" in install.source
    assert not any("install" in cell.metadata.get("tags", []) for cell in rest)


@each
def test_notebook_links_to_another_one_and_to_existing_files(path):
    cells = nbformat.read(path, as_version=4).cells
    prose = "".join(cell.source for cell in cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", prose)
    assert any(link in {other.name for other in NOTEBOOKS} for link in links)
    assert all((path.parent / link).is_file() for link in links)


def test_notebooks_are_listed_in_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [f"notebooks/{path.name}" for path in NOTEBOOKS] == list(
        dict.fromkeys(re.findall(r"notebooks/\w+\.ipynb", readme))
    )
