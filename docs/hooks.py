"""Copies files from outside of `pages` into it, before MkDocs builds the site.

MkDocs reads one folder. The notebooks and the changelog stay where users of the
repository look for them; the copies are ignored by git. Links from them to other files
of the repository become links to GitHub.
"""

import json
import posixpath
import re
import shutil
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PAGES = DOCS / "pages"
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")


def on_config(config):
    """Copies the notebooks and the changelog."""
    home = f"{config.repo_url}/blob/main"
    folder = PAGES / "notebooks"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        book = json.loads(path.read_text(encoding="utf-8"))
        for cell in book["cells"]:
            if cell["cell_type"] == "markdown":
                text = "".join(cell["source"])
                cell["source"] = linked(text, "notebooks", home)
        (folder / path.name).write_text(json.dumps(book), encoding="utf-8")
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    (PAGES / "changelog.md").write_text(linked(text, "", home), encoding="utf-8")
    return config


def linked(text, folder, home):
    """Returns Markdown of a folder with its links to other folders made absolute."""

    def replace(match):
        path = posixpath.normpath(posixpath.join(folder, match[1]))
        inside = posixpath.dirname(path) == folder and path.endswith(".ipynb")
        return match[0] if inside else f"]({home}/{path}"

    return LINK.sub(replace, text)
