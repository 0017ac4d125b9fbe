"""What `bestiary compare` writes: `results.json`, `results.csv`, `table.md` and `comparison.png`."""

import csv
import io
import itertools
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .cards import results_table


TITLES = {
    "pseudo_perplexity": "pseudo-perplexity (lower is better)",
    "minimal_pairs_masked_lm": "minimal pairs, pseudo-log-likelihood",
    "minimal_pairs_detector": "minimal pairs, replaced-token detector",
}
"""Titles of scores in the table and in the plot; others are shown by name."""
_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:gray")
_STYLES = ("o-", "s--", "^:", "d-.")

Run = dict[str, Any]
Curve = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Means of x, means of y and standard deviations of y over seeds, (P,) each."""


def write_report(results: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Add `summary` and `table` to results and write everything; returns the results with both."""
    runs = results["runs"]
    results = results | {"summary": summarise(runs), "table": make_table(runs)}
    replace_text(folder / "results.json", json.dumps(results, indent=1))
    replace_text(folder / "results.csv", make_csv(runs))
    replace_text(folder / "table.md", f"{results['table']}\n\n{explain(results)}\n")
    plot_comparison(runs, folder / "comparison.png")
    return results


def replace_text(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    staged = file.with_name(f".{file.name}.{os.getpid()}")
    staged.write_text(text, encoding="utf-8")
    os.replace(staged, file)


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value)."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def summarise(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Recipe -> quantity -> mean, standard deviation and values by run."""
    summary: dict[str, dict[str, Any]] = {}
    for recipe, own in _by_recipe(runs).items():
        columns: dict[str, list[float]] = {}
        for run in own:
            final = {key: run[key] for key in ("step", "tokens", "flops", "seconds", "parameters")} | run["scores"]
            final |= {f"held_out_{name}": value for name, value in run["held_out"][-1]["held_out"].items()}
            for name, value in final.items():
                columns.setdefault(name, []).append(value)
        summary[recipe] = {}
        for name, values in columns.items():
            mean, deviation = mean_and_deviation(values)
            summary[recipe][name] = {"mean": mean, "std": deviation, "values": values}
    return summary


def make_table(runs: Sequence[Run]) -> str:
    """Markdown: one row a recipe, mean ± standard deviation over its seeds."""
    summary = summarise(runs)
    found = list(dict.fromkeys(name for figures in summary.values() for name in figures))
    tuned = [name for name in found if name.startswith("finetuned_")][:1]  # the task's first metric
    losses = [f"held_out_{name}" for name in _losses(runs)]
    shown = [*(name for name in TITLES if name in found), *tuned, *losses]
    rows = []
    for recipe, figures in summary.items():
        row: dict[str, Any] = {
            "recipe": recipe,
            "seeds": len(figures["step"]["values"]),
            "parameters": f"{figures['parameters']['mean']:,.0f}",
            "updates": f"{figures['step']['mean']:,.0f}",
            "tokens": f"{figures['tokens']['mean']:,.0f}",
            "operations": f"{figures['flops']['mean']:.3e}",
            "seconds": _cell(figures["seconds"], 1),
        }
        for name in shown:
            row[_title(name)] = (
                _cell(figures[name], 1 if name == "pseudo_perplexity" else 3) if name in figures else None
            )
        rows.append(row)
    return results_table(rows)


def explain(results: dict[str, Any]) -> str:
    """What stands below the table: what was made equal, which networks were scored, command, machine, date."""
    plan, last = results["plan"], {run["recipe"]: run for run in results["runs"]}
    budget, settings = plan["budget"], plan["settings"]
    lines = [
        f"Equal {budget['unit']}: {budget['amount']:.4g} for each run. Mean ± standard deviation over seeds "
        f"{', '.join(dict.fromkeys(str(run['seed']) for run in results['runs']))}. Operations: matrix products and "
        "attention, forward and backward, measured. Seconds: of training, without evaluations.",
        f"Pseudo-perplexity per token on {settings['held_out_sequences']} held-out sequences of at most "
        f"{settings['data']['max_length']} tokens.",
    ]
    if settings["minimal_pairs"]:
        lines.append(
            f"Minimal pairs: accuracy on {Path(settings['minimal_pairs']).name}, at most "
            f"{settings['pairs_per_paradigm']} pairs of each kind, mean over kinds."
        )
    for recipe, run in last.items():
        for kind, network in run["networks"].items():
            lines.append(f"* {recipe}, {kind.replace('_', ' ')}: {network}")
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines += [f"Command: `{results['command']}`", f"{results['hardware']}; {versions}; {results['date']}."]
    return "\n".join(lines)


def make_csv(runs: Sequence[Run]) -> str:
    """One line for every evaluation of every run; columns `held_out_*` and the scores, empty where there is none."""
    rows = []
    for run in runs:
        for point in run["held_out"]:
            row = {"recipe": run["recipe"], "seed": run["seed"]}
            row |= {key: point[key] for key in ("step", "tokens", "flops", "seconds")}
            row |= {f"held_out_{name}": value for name, value in point["held_out"].items()}
            rows.append(row | point["scores"])
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def plot_comparison(runs: Sequence[Run], path: Path) -> None:
    """The common score against tokens and against seconds, and every part of the losses against tokens, as PNG; lines
    are means over seeds, bands one standard deviation.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("bestiary compare needs matplotlib: pip install 'bestiary[examples]'.") from error

    recipes = _by_recipe(runs)
    scores = [name for name in TITLES if any(name in run["held_out"][0]["scores"] for run in runs)]
    if any(name.startswith("minimal_pairs") for name in scores):
        scores = [name for name in scores if name.startswith("minimal_pairs")]
    panels = ["tokens", "seconds"] * bool(scores) + _losses(runs)
    rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(12.8, 4.4 * rows), layout="constrained")
    for number, panel in enumerate(panels, 1):
        axes = figure.add_subplot(rows, 2, number)
        axes.grid(alpha=0.3)
        if panel in ("tokens", "seconds"):
            _draw_scores(axes, recipes, scores, panel)
        else:
            _draw_losses(axes, recipes, panel)
        if axes.lines:
            axes.legend(fontsize=9)
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    figure.savefig(staged, format="png", dpi=120)
    os.replace(staged, path)


def _draw_scores(axes: Any, recipes: dict[str, list[Run]], names: Sequence[str], x: str) -> None:
    for (recipe, own), colour in zip(recipes.items(), itertools.cycle(_COLOURS)):
        for name, style in zip(names, _STYLES):
            label = recipe if len(names) == 1 else f"{recipe}: {_title(name).removeprefix('minimal pairs, ')}"
            curve = _curve([[(p[x], p["scores"].get(name)) for p in run["held_out"]] for run in own])
            _draw(axes, curve, style, colour, label)
    pairs = names[0].startswith("minimal_pairs")
    axes.set(title="accuracy on minimal pairs" if pairs else _title(names[0]), yscale="linear" if pairs else "log")
    axes.set(xlabel="tokens" if x == "tokens" else "seconds of training", ylabel="accuracy" if pairs else "perplexity")


def _draw_losses(axes: Any, recipes: dict[str, list[Run]], name: str) -> None:
    for (recipe, own), colour in zip(recipes.items(), itertools.cycle(_COLOURS)):
        training = _curve([[(p["tokens"], p["losses"].get(name)) for p in run["training"]] for run in own])
        held_out = _curve([[(p["tokens"], p["held_out"].get(name)) for p in run["held_out"]] for run in own])
        _draw(axes, training, "-", colour, None)
        _draw(axes, held_out, "o-", colour, recipe)
    axes.set(title=f"{name.replace('_', ' ')} (dots: held-out, pale: training)", xlabel="tokens", ylabel="loss")


def _draw(axes: Any, curve: Curve | None, style: str, colour: str, label: str | None) -> None:
    if curve is None:
        return
    x, y, deviation = curve
    axes.plot(x, y, style, color=colour, label=label, alpha=0.4 if label is None else 1, linewidth=1.6, markersize=5)
    if label is not None and deviation.any():
        axes.fill_between(x, y - deviation, y + deviation, color=colour, alpha=0.15, linewidth=0)


def _curve(runs: Sequence[Sequence[tuple[float, float | None]]]) -> Curve | None:
    """Mean over runs, which were looked at after the same updates; None if a run lacks the quantity."""
    values = [[point for point in run if point[1] is not None] for run in runs]
    length = min(map(len, values))
    if length == 0:
        return None
    array = np.array([run[:length] for run in values], dtype=float)  # (seeds, P, 2)
    deviation = array[..., 1].std(0, ddof=1) if len(array) > 1 else np.zeros(length)
    return array[..., 0].mean(0), array[..., 1].mean(0), deviation


def _losses(runs: Sequence[Run]) -> list[str]:
    """Parts of all objectives, and the `loss` of those that have none."""
    found = [[name for name in run["held_out"][-1]["held_out"] if name.endswith("_loss")] or ["loss"] for run in runs]
    return list(dict.fromkeys(itertools.chain(*found)))


def _by_recipe(runs: Sequence[Run]) -> dict[str, list[Run]]:
    return {name: [run for run in runs if run["recipe"] == name] for name in dict.fromkeys(r["recipe"] for r in runs)}


def _title(name: str) -> str:
    plain = name.replace("finetuned_", "fine-tuned ").replace("held_out_", "held-out ").replace("_", " ")
    return TITLES.get(name, plain)


def _cell(figure: dict[str, Any], digits: int) -> str:
    text = f"{figure['mean']:,.{digits}f}"
    return f"{text} ± {figure['std']:.{digits}f}" if len(figure["values"]) > 1 else text
