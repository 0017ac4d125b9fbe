"""What readers rely on: docstrings of everything public, and a paper table in README.md that is current."""

import ast
from pathlib import Path

import pytest

from bestiary import get_paper, index, list_papers


ROOT = Path(__file__).parents[1]
FILES = [
    path for folder in ("bestiary", "configuration", "modeling", "trainers") for path in (ROOT / folder).rglob("*.py")
]


@pytest.mark.parametrize("path", sorted(FILES), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_everything_public_has_a_docstring(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    missing = [] if ast.get_docstring(tree) or path.name in ("__init__.py", "_version.py") else ["the file"]
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            missing += [] if ast.get_docstring(node) else [f"{node.name} (line {node.lineno})"]
    assert not missing, "no docstring: " + ", ".join(missing)


def test_paper_table_in_the_readme_is_current():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert index.with_table(text, index.paper_table(ROOT)) == text, "run `make index`"


def test_paper_table_has_a_row_per_paper_with_links_that_exist():
    rows = index.paper_table(ROOT).splitlines()[2:]
    assert len(rows) == len(list_papers())
    for slug, row in zip(list_papers(), rows, strict=True):
        assert row.startswith(f"| `{slug}` | {get_paper(slug).title}") and get_paper(slug).url in row
        links = [part.split(")")[0].split("#")[0] for part in row.split("](")[1:]]
        assert all((ROOT / link).exists() for link in links if not link.startswith("https:"))


def test_table_is_put_between_the_markers_and_nowhere_else():
    text = f"# Title\n\n{index.BEGIN}\nold\n{index.END}\n\nend\n"
    assert index.with_table(text, "new") == f"# Title\n\n{index.BEGIN}\nnew\n{index.END}\n\nend\n"
    for broken in (text.replace(index.END, ""), text + index.BEGIN, f"{index.END}\n{index.BEGIN}"):
        with pytest.raises(ValueError, match="goes between the lines"):
            index.with_table(broken, "new")
