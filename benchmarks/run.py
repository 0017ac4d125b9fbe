"""Run benchmark rows and write their JSON; rewrite the table of README.md from all JSON files.

python -m benchmarks.run                     # all rows
python -m benchmarks.run dropout sampling    # some
python -m benchmarks.run --list
"""

import argparse
import json
import sys
from pathlib import Path


if not __package__:  # run as a file: this folder must not stand on the path, where it hides packages of the same names
    sys.path[0] = str(Path(__file__).parent.parent)

from benchmarks import (  # noqa: F401 (registers the rows)
    adapters,
    distillation,
    encoders,
    generation,
    kernels,
    linear_attention,
    models,
    noise,
    replacing,
    scoring,
    sparse_maps,
    startup,
)
from benchmarks.harness import PEER, RESULTS, ROWS, PeerMissing, run_row


README = Path(__file__).parent / "README.md"
START = "<!-- table: written by benchmarks/run.py -->"


def table(folder: Path = RESULTS) -> str:
    """Markdown table of all results in the folder: one line per row, metric and variant."""
    lines = [
        "| row | measured | against | variant | ours | peer | ratio (min - max) | target | reached |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        if "row" not in record:  # what a script of its own measured
            continue
        for metric, results in record["metrics"].items():
            peer = results[PEER]
            for variant, result in results.items():
                if variant == PEER:
                    continue
                unit = "MB" if "mb" in result else "ms"
                spread = f" ({result['ratio_min']:.2f} - {result['ratio_max']:.2f})" if "ratio_min" in result else ""
                target = f"{result['target_of']} {result['target']:.2f}" if "target" in result else ""
                reached = {True: "yes", False: "no", None: ""}[result.get("passed")]
                lines.append(
                    f"| [{record['row']}](results/{path.name}) | {metric}: {record['description']} | {record['peer']} "
                    f"| {variant} | {result[unit.lower()]:.4g} {unit} | {peer[unit.lower()]:.4g} {unit} "
                    f"| {result['ratio']:.2f}{spread} | {target} | {reached} |"
                )
    return "\n".join(lines)


def write_readme(readme: Path = README, folder: Path = RESULTS) -> None:
    """Replace everything after the marker line of the README by the table."""
    head = readme.read_text().split(START)[0]
    readme.write_text(f"{head}{START}\n\n{table(folder)}\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compare bestiary with what users would take instead.")
    parser.add_argument("rows", nargs="*", metavar="row", help="rows to run; all without one")
    parser.add_argument("--pairs", type=int, default=5, help="interleaved runs of each function")
    parser.add_argument("--list", action="store_true", help="print the names of the rows and stop")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.rows) - set(ROWS))
    if unknown or options.pairs < 1:
        parser.error(f"rows are {', '.join(ROWS)}, pairs at least 1; got {', '.join(unknown) or options.pairs}")
    if options.list:
        print("\n".join(ROWS))
        return
    for name in options.rows or ROWS:
        try:
            record = run_row(name, options.pairs)
        except PeerMissing as missing:
            print(f"{name}: skipped, {missing}", flush=True)
            continue
        for metric, results in record["metrics"].items():
            for variant, result in results.items():
                if variant != PEER:
                    verdict = {True: "reached", False: "MISSED", None: "no target"}[result.get("passed")]
                    print(f"{name}: {metric}: {variant}: ratio {result['ratio']:.3f} ({verdict})", flush=True)
    write_readme()


if __name__ == "__main__":
    main()
