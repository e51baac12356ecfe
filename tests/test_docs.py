"""The code on the pages is the code of the project."""

import ast
import re
import textwrap

import pytest

from helpers import ROOT

BLOCK = re.compile(r"<!-- ([\w/]+\.py): ([\w.]+) -->\n```python\n(.*?)```", re.DOTALL)
ENTRANCES = ["README.md", "CONTRIBUTING.md", "benchmarks/README.md", "weights/toy/README.md"]
PAGES = [*ENTRANCES, *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
BLOCKS = [(page, *found) for page in PAGES for found in BLOCK.findall((ROOT / page).read_text())]


def source_of(file: str, name: str) -> str:
    """The text of a function or class, `outer.inner` for one inside another, at no indentation."""
    text = (ROOT / file).read_text()
    node = ast.parse(text)
    for part in name.split("."):
        node = next(child for child in ast.walk(node) if getattr(child, "name", None) == part)
    return textwrap.dedent("\n".join(text.splitlines()[node.lineno - 1 : node.end_lineno])) + "\n"


@pytest.mark.parametrize(("page", "file", "name", "shown"), BLOCKS, ids=[f"{b[0]}-{b[2]}" for b in BLOCKS])
def test_a_page_shows_what_the_file_says(page, file, name, shown):
    assert shown == source_of(file, name), f"{page}: copy {name} of {file} again"


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_somewhere(page):
    text, folder = (ROOT / page).read_text(), (ROOT / page).parent
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not link.startswith("http"):
            assert (folder / link.replace("\\", "")).exists(), link
