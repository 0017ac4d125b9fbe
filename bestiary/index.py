"""The table of papers in README.md, from the registry: `python -m bestiary.index [README.md]`, or `make index`."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from .cards import prose_path, results_table
from .registry import get_paper, list_papers


BEGIN = "<!-- papers:begin (made by `make index`) -->"
END = "<!-- papers:end -->"


def recipes(slug: str) -> list[str]:
    """File names of a paper's recipes, `<slug>.yaml` and `<slug>_<setting>.yaml`, in alphabetical order.

    A recipe belongs to the longest slug that begins its name: `bert_of_theseus_tiny.yaml` is none of `bert`.
    """
    names = sorted(path.name for path in (Path(__file__).parent / "recipes").glob(f"{slug}*.yaml"))
    return [name for name in names if _owner(name.removesuffix(".yaml")) == slug]


def paper_table(root: Path) -> str:
    """Markdown table of all papers: link, what it is, recipes, parity with official code, measured results.

    Args:
        root: of the checkout; parity is claimed where `tests/fixtures/<slug>` holds official outputs, results where
            `model_cards/<slug>.md` has a section "## Results".
    """
    rows = []
    for slug in list_papers():
        paper = get_paper(slug)
        link = f"[{paper.arxiv}]({paper.url})" if paper.arxiv else "–"
        fixture = f"tests/fixtures/{slug}"
        prose = prose_path(slug)
        measured = prose.exists() and re.search(r"^## Results", prose.read_text(encoding="utf-8"), flags=re.MULTILINE)
        rows.append(
            {
                "slug": f"`{slug}`",
                "paper": f"{paper.title} ({paper.year})",
                "arXiv": link,
                "what": paper.summary,
                "recipes": ", ".join(f"[{name[:-5]}](examples/recipes/{name})" for name in recipes(slug)) or "–",
                "parity": f"[official outputs]({fixture})" if (root / fixture / "config.json").exists() else "–",
                "measured": f"[results](model_cards/{slug}.md#results)" if measured else "–",
            }
        )
    return results_table(rows)


def with_table(text: str, table: str) -> str:
    """`text` with the table between its markers replaced.

    Raises:
        ValueError: a marker is missing or stands twice.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(
            f"The paper index goes between the lines {BEGIN!r} and {END!r}; write both once, in this order."
        )
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    return f"{head}{BEGIN}\n{table}\n{END}{tail}"


def main(argv: Sequence[str] | None = None) -> None:
    """Bring the table in a README up to date."""
    arguments = sys.argv[1:] if argv is None else argv
    path = Path(arguments[0] if arguments else "README.md")
    path.write_text(with_table(path.read_text(encoding="utf-8"), paper_table(path.parent)), encoding="utf-8")


def _owner(name: str) -> str | None:
    """The longest registered slug that is the name or begins it before an underscore."""
    return max((slug for slug in list_papers() if name == slug or name.startswith(f"{slug}_")), key=len, default=None)


if __name__ == "__main__":
    main()
