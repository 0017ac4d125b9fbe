"""Command line: `bestiary list | info | convert | export | compare`. Errors are one line on stderr, exit code 2."""

import argparse
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence

from huggingface_hub.errors import StrictDataclassError

from .registry import get_paper, list_papers


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 2 for a user's mistake, 130 when interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["compare"]:  # it has a parser of its own
            from .compare import main as compare

            return compare(argv[1:]) or 0
        arguments = _parser().parse_args(argv)
        arguments.command(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # `bestiary list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, ModuleNotFoundError, StrictDataclassError) as error:
        print(f"bestiary: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bestiary: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bestiary", description="Published Transformer papers as models, trainers, recipes."
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser("list", help="papers, one a line")
    command.add_argument(
        "pattern", nargs="?", default="*", help='shell pattern on slug or title, such as "*attention*"'
    )
    command.set_defaults(command=_list)

    command = commands.add_parser("info", help="everything that is registered for a paper")
    command.add_argument("slug")
    command.set_defaults(command=_info)

    command = commands.add_parser("convert", help="turn an official checkpoint into a bestiary folder")
    command.add_argument("slug")
    command.add_argument("checkpoint", help="file or folder with the official weights")
    command.add_argument("out", help="folder to write")
    command.add_argument("--config", help="the checkpoint's configuration, if it does not lie beside it")
    command.set_defaults(command=_convert)

    command = commands.add_parser("export", help="add the code files that load a checkpoint without bestiary")
    command.add_argument("checkpoint", help="folder written by save_pretrained")
    command.add_argument("--output", help="write to this folder instead of adding to the checkpoint")
    command.set_defaults(command=_export)

    commands.add_parser(
        "compare", help="train several recipes at equal compute: table, CSV, plot (see compare --help)"
    )
    return parser


def _list(arguments: argparse.Namespace) -> None:
    slugs = list_papers(arguments.pattern)
    if not slugs:
        raise ValueError(f"no paper matches {arguments.pattern!r}; `bestiary list` shows all.")
    width = max(map(len, slugs))
    for slug in slugs:
        paper = get_paper(slug)
        print(f"{slug:{width}}  {paper.year}  {paper.arxiv or '-':10}  {paper.kind:20}  {paper.title}")


def _info(arguments: argparse.Namespace) -> None:
    from .cards import prose_path
    from .index import recipes

    paper = get_paper(arguments.slug)
    prose = prose_path(paper.slug)
    facts = [
        ("authors", f"{paper.authors}, {paper.year}"),
        ("paper", paper.url),
        ("kind", paper.kind),
        ("official code", " ".join(filter(None, (paper.official_code, paper.official_licence)))),
        ("config", f"{_full_name(paper.config)} (model_type {paper.config.model_type})"),
        *((auto_name, _full_name(model)) for auto_name, model in paper.models.items()),
        ("trainer", paper.trainer),
        ("arguments", paper.arguments),
        ("collator", paper.collator),
        ("recipes", ", ".join(recipes(paper.slug))),
        ("converter", paper.converter),
        ("card", str(prose) if prose.exists() else None),
    ]
    print(f"{paper.slug}: {paper.title}\n\n{_wrapped(paper.summary)}\n")
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        print(f"  {name:{width}}  {value or '-'}")
    print(f"\n{paper.citation}")


def _convert(arguments: argparse.Namespace) -> None:
    from .conversion import convert_checkpoint

    convert_checkpoint(arguments.slug, arguments.checkpoint, arguments.out, arguments.config)
    print(f"wrote {arguments.out}")


def _export(arguments: argparse.Namespace) -> None:
    from .export import export_checkpoint

    print(f"wrote {export_checkpoint(arguments.checkpoint, arguments.output)}")


def _full_name(thing: type) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, width=min(shutil.get_terminal_size().columns, 100))


if __name__ == "__main__":
    sys.exit(main())
