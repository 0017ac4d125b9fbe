"""Model cards that say what was done: metadata, paper, how to load, how it was trained, what was measured.

A card is made from the registry, `model_cards/<slug>.md` (prose of the method) and what a trainer knows of its run. It
ends in a comment with the SHA-256 of the text above it: a card that somebody edited is recognised, and kept.
"""

import dataclasses
import difflib
import hashlib
import json
import logging
import math
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from enum import Enum
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from huggingface_hub import ModelCardData
from transformers import PreTrainedModel

from ._version import __version__
from .registry import Paper, get_paper, paper_of


if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)

PIPELINE_TAGS = {
    "AutoModel": "feature-extraction",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForMultipleChoice": "multiple-choice",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForObjectDetection": "object-detection",
}
"""Hub task per auto class; other auto classes have none."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_STAMP = re.compile(r"\n<!-- bestiary card sha256:([0-9a-f]{64})\b[^>]*-->\s*\Z")

# Arguments that say where or how loudly a run happened, not what was trained; some hold paths or tokens.
_SILENT_ARGUMENTS = frozenset(
    "output_dir run_name project disable_tqdm report_to log_level log_level_replica log_on_each_node logging_dir "
    "logging_steps logging_strategy logging_first_step logging_nan_inf_filter push_to_hub hub_token "
    "hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision save_strategy save_steps "
    "save_total_limit save_on_each_node eval_on_start use_cpu local_rank debug do_train do_eval do_predict "
    "resume_from_checkpoint dataloader_pin_memory accelerator_config trackio_space_id trackio_bucket_id "
    "trackio_static_space_id label_names remove_unused_columns".split()
)
_BOOKKEEPING = re.compile(
    r"step|epoch|learning_rate|grad_norm|total_flos|train_loss|num_input_tokens_seen|\w*(_runtime|_per_second)"
)


class TrainerInfo(TypedDict, total=False):
    """What a trainer tells about its run; every key may be left out.

    Fields:
        arguments: the `TrainingArguments`, or a dict of those worth showing.
        log_history: `trainer.state.log_history`, entries with `step`; final values become the results table.
        results: further rows measured by this run (one dict per row), shown as a table of their own.
        data: what it was trained on, in words.
        datasets: Hub ids of the data sets.
        language: ISO 639 code or codes.
        base_model: Hub id, or path, of the model that training started from.
        origin: where the weights come from if they were not trained here ("Converted from ...").
        command: the command line that reproduces the run.
        loading: how to load the folder, in Markdown, if it is not done as for other checkpoints.
        repo_id: Hub id under which the model will be found.
        slug: paper whose method was used, when the model does not tell (a plain model trained by its objective).
        seed, seconds, hardware, date: of the run; default: from `arguments`, `log_history`, this machine, today.
        license: of the weights, default apache-2.0.
        tags: further Hub tags.
    """

    arguments: "TrainingArguments | dict[str, Any]"
    log_history: list[dict[str, Any]]
    results: list[dict[str, Any]]
    data: str
    datasets: list[str]
    language: str | list[str]
    base_model: str
    origin: str
    command: str
    loading: str
    repo_id: str
    slug: str
    seed: int
    seconds: float
    hardware: str
    date: str
    license: str
    tags: list[str]


def write_model_card(
    folder: str | os.PathLike, *, model: PreTrainedModel | None = None, trainer_info: Mapping[str, Any] | None = None
) -> Path:
    """Write `README.md` into a checkpoint folder, unless a hand-edited one is there.

    Args:
        folder: of the checkpoint; an image `loss.png` in it is shown.
        model: the model of the checkpoint; without it `config.json` tells what it is.
        trainer_info: what is known of the run, see `TrainerInfo`.

    Returns:
        The path of the card. If the card there was edited by hand, a warning is logged and the file stays as it is.

    Raises:
        ValueError: `trainer_info` has an unknown key or a Hub id that is none, or there is neither a model nor a
            `config.json`.
    """
    path = Path(folder) / "README.md"
    text = make_model_card(folder, model=model, trainer_info=trainer_info)
    if path.exists() and not is_generated(path.read_text(encoding="utf-8")):
        logger.warning("%s was edited by hand and is kept; delete it to get a new card.", path)
        return path
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    staged.write_text(text, encoding="utf-8", newline="\n")
    os.replace(staged, path)
    return path


def make_model_card(
    folder: str | os.PathLike, *, model: PreTrainedModel | None = None, trainer_info: Mapping[str, Any] | None = None
) -> str:
    """Text of the card that `write_model_card` writes, with its closing stamp. Same arguments and errors."""
    info = _checked(trainer_info or {})
    class_name, paper = _identify(Path(folder), model, info)
    auto_name = _auto_name(class_name, paper)
    parts = [
        f"---\n{_metadata(auto_name, paper, info).to_yaml()}\n---",
        _introduction(class_name, paper, model, info),
        _loading(class_name, auto_name, paper, info),
        read_prose(paper.slug) if paper else "",
        _training(info),
        _results(Path(folder), info),
        f"## Citation\n\n```bibtex\n{paper.citation}\n```" if paper else "",
    ]
    return _stamped("\n\n".join(part for part in parts if part))


def is_generated(text: str) -> bool:
    """Whether a card is exactly what bestiary wrote: it ends in a stamp that holds the hash of the text above."""
    text = text.replace("\r\n", "\n")
    stamp = _STAMP.search(text)
    return stamp is not None and stamp[1] == _digest(text[: stamp.start()])


def changed_arguments(arguments: Any) -> dict[str, Any]:
    """Training arguments that a reader needs to repeat the run, name -> value.

    Of the fields that transformers has, those that differ from transformers' own default (a paper's changed defaults
    included); of the fields that a subclass adds, all that are set. Paths are shortened to their last part; output and
    logging settings are left out.
    """
    from transformers import TrainingArguments  # here, because loading or saving a model should not pay for it

    stock = {
        field.name: None if field.default is dataclasses.MISSING else _plain(field.default)
        for field in dataclasses.fields(TrainingArguments)
    }
    changed = {}
    for field in dataclasses.fields(arguments):
        if not field.init or field.name in _SILENT_ARGUMENTS:
            continue
        value = _plain(getattr(arguments, field.name))
        if value is None:
            continue
        if field.name in stock and (value == stock[field.name] or (stock[field.name] is None and not value)):
            continue  # the constructor turns None into False or an empty container
        changed[field.name] = _without_folder(value)
    return changed


def final_metrics(log_history: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows `{"quantity", "training", "evaluation"}`: last logged value of the loss, its parts and the metrics."""
    last: dict[str, dict[str, float]] = {}
    for entry in log_history:
        for key, value in entry.items():
            if isinstance(value, int | float) and not _BOOKKEEPING.fullmatch(key):
                name, column = (key[5:], "evaluation") if key.startswith("eval_") else (key, "training")
                last.setdefault(name, {})[column] = value
    order = sorted(last, key=lambda name: (name != "loss", not name.endswith("_loss")))  # stable: metrics as they came
    return [{"quantity": name, "training": None, "evaluation": None} | last[name] for name in order]


def results_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown table of rows (column name -> value).

    Columns stand in order of appearance, floats have four significant digits, a missing value is "–".
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(_cell(column) for column in columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def plot_history(log_history: Iterable[Mapping[str, Any]], path: str | os.PathLike) -> Path:
    """Draw every logged loss over optimizer steps, one panel per part, training and evaluation in one panel, as PNG.

    Args:
        log_history: `trainer.state.log_history`; entries with `step` and `loss`, `<part>_loss` or their `eval_` forms.
        path: of the image.

    Raises:
        ValueError: there is no finite loss in the history.
        ModuleNotFoundError: matplotlib is missing.
    """
    path = Path(path)
    series: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for entry in log_history:
        for key, value in entry.items():
            if re.fullmatch(r"(\w+_)?loss", key) and key != "train_loss" and "step" in entry and math.isfinite(value):
                name, split = (key[5:], "evaluation") if key.startswith("eval_") else (key, "training")
                series.setdefault(name, {}).setdefault(split, []).append((entry["step"], value))
    if not series:
        raise ValueError(
            "plot_history: log_history holds no finite loss; lower logging_steps below the number of steps."
        )
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plot_history needs matplotlib: pip install 'bestiary[examples]'.") from error

    names = sorted(series, key=lambda name: (name != "loss", name))
    columns = min(len(names), 3)
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(5 * columns, 3.6 * rows), layout="constrained")  # no pyplot: no global state, no display
    for index, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, index + 1)
        for split, style, colour in (("training", "-", "tab:blue"), ("evaluation", "o--", "tab:orange")):
            if points := series[name].get(split):
                marker = "o" if len(points) == 1 else style
                axes.plot(*zip(*points), marker, color=colour, label=split, markersize=4, linewidth=1.6)
        axes.set(title=name.replace("_", " "), xlabel="optimizer step", ylabel="loss")
        axes.grid(alpha=0.3)
        axes.legend()
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    figure.savefig(staged, format="png", dpi=120)
    os.replace(staged, path)
    return path


def prose_path(slug: str) -> Path:
    """Where the prose of a paper's card is, whether or not it exists."""
    return Path(__file__).parent / "model_cards" / f"{slug}.md"


def read_prose(slug: str) -> str:
    """Prose of `model_cards/<slug>.md` for the card of a checkpoint: the second-level sections except "## Results".

    The results there belong to the project's own runs and would be wrong beside any other checkpoint.
    """
    path = prose_path(slug)
    if not path.exists():
        return ""
    sections = re.split(r"^(?=## )", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return "\n\n".join(section.strip() for section in sections if not section.startswith("## Results"))


def hardware_summary() -> str:
    """This machine in words: accelerators, if any, and processor."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (name := re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), flags=re.MULTILINE)):
        processor = name[1]
    cpu = f"{os.cpu_count()} CPU cores ({processor.strip()})"
    if not torch.cuda.is_available():
        return cpu
    return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}, {cpu}"


def _checked(info: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without empty entries, after refusing unknown keys and impossible Hub ids."""
    known = TrainerInfo.__annotations__
    for key in info:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise ValueError(f"write_model_card: trainer_info has no key {key!r}{hint} Known: {', '.join(known)}.")
    for key in ("datasets", "repo_id"):
        value = info.get(key) or []
        for name in [value] if isinstance(value, str) else value:
            if not _HUB_ID.fullmatch(name):
                raise ValueError(
                    f"write_model_card: trainer_info[{key!r}] must hold Hub ids such as 'user/name', got {name!r}; "
                    "describe local data in trainer_info['data']."
                )
    return {key: value for key, value in info.items() if value is not None and value != [] and value != ""}


def _identify(folder: Path, model: PreTrainedModel | None, info: Mapping[str, Any]) -> tuple[str, Paper | None]:
    """Class name of the checkpoint and its paper."""
    paper = get_paper(info["slug"]) if "slug" in info else None
    if model is not None:
        return type(model).__name__, paper or paper_of(model)
    config_file = folder / "config.json"
    if not config_file.exists():
        raise ValueError(f"write_model_card: {folder} has no config.json; pass model=, or the folder of a checkpoint.")
    config = json.loads(config_file.read_text(encoding="utf-8"))
    architectures = config.get("architectures") or ["AutoModel"]
    return architectures[0], paper or paper_of(SimpleNamespace(model_type=config.get("model_type")))


def _auto_name(class_name: str, paper: Paper | None) -> str:
    """Auto class that loads a class: as registered, or by the naming rule of transformers."""
    names = [name for name, model in (paper.models if paper else {}).items() if model.__name__ == class_name]
    if names:
        return min(names, key=lambda name: name not in PIPELINE_TAGS)
    head = re.search(r"For[A-Z]\w*$", class_name)
    return "AutoModel" + (head[0] if head else "")


def _metadata(auto_name: str, paper: Paper | None, info: Mapping[str, Any]) -> ModelCardData:
    # ModelCardData stores unknown keywords silently: every key is written out here, none comes from a caller
    base_model = info.get("base_model", "")
    tags = ["bestiary", *((paper.slug, *paper.tags) if paper else ()), *info.get("tags", [])]
    return ModelCardData(
        library_name="transformers",
        license=info.get("license", "apache-2.0"),
        tags=[tag.replace(" ", "-") for tag in tags],
        pipeline_tag=PIPELINE_TAGS.get(auto_name),
        base_model=base_model if _HUB_ID.fullmatch(base_model) and not os.path.exists(base_model) else None,
        datasets=info.get("datasets"),
        language=info.get("language"),
    )


def _introduction(class_name: str, paper: Paper | None, model: PreTrainedModel | None, info: Mapping[str, Any]) -> str:
    size = f" It has {model.num_parameters():,} parameters." if model is not None else ""
    base_model = info.get("base_model", "")
    start = f" Training started from `{_without_folder(base_model)}`." if base_model else ""
    if paper is None:
        return f"# {class_name}\n\nA transformers model trained with the library bestiary.{size}{start}"
    link = f", arXiv [{paper.arxiv}]({paper.url})" if paper.arxiv else ""
    code = f" Official code: {paper.official_code}." if paper.official_code else ""
    return (
        f"# {class_name}\n\nModel of the paper *{paper.title}* ({paper.authors}, {paper.year}{link}), "
        f"`{paper.slug}` in the library bestiary.{size}{start}\n\n{paper.summary}{code}"
    )


def _loading(class_name: str, auto_name: str, paper: Paper | None, info: Mapping[str, Any]) -> str:
    if "loading" in info:
        return f"## Load it\n\n{info['loading']}"
    where = f'"{info.get("repo_id", "path/to/this/folder")}"'
    snippet = f"from transformers import {auto_name}\n\nmodel = {auto_name}.from_pretrained({where}"
    if paper is None or class_name not in {model.__name__ for model in paper.models.values()}:  # a stock class
        return f"## Load it\n\n```python\n{snippet})\n```"
    package = paper.config.__module__.split(".")[0]
    imports = f"import {package}  # registers the classes"
    text = f"## Load it\n\nWith {package} installed:\n\n```python\n{imports}\n{snippet})\n```"
    if package != __package__:  # code of others is not exported into the folder
        return text
    return (
        f"{text}\n\nWithout it, by the code files that lie beside the weights (read them first):\n\n"
        f"```python\n{snippet}, trust_remote_code=True)\n```"
    )


def _training(info: Mapping[str, Any]) -> str:
    lines = [info["origin"]] if "origin" in info else []
    if "data" in info:
        lines.append(f"Data: {info['data']}")
    if "command" in info:
        lines.append(f"```bash\n{info['command']}\n```")
    if not {"arguments", "log_history"} & info.keys():
        lines.append("No record of a training run was kept with these weights.")
        return "## Training\n\n" + "\n\n".join(lines)
    arguments = info.get("arguments", {})
    shown = arguments if isinstance(arguments, dict) else changed_arguments(arguments)
    facts = {name: _plain(value) for name, value in shown.items() if name != "seed"}
    if facts:
        rows = [{"argument": f"`{name}`", "value": f"`{value}`"} for name, value in facts.items()]
        lines.append("Arguments that are new, or differ from transformers' defaults:\n\n" + results_table(rows))
    lines.append(results_table(_run_facts(info, arguments)))
    return "## Training\n\n" + "\n\n".join(lines)


def _run_facts(info: Mapping[str, Any], arguments: Any) -> list[dict[str, Any]]:
    history = info.get("log_history", [])
    runtimes = [entry["train_runtime"] for entry in history if "train_runtime" in entry]
    seconds = info.get("seconds", runtimes[-1] if runtimes else None)
    seed = info.get("seed", arguments.get("seed") if isinstance(arguments, dict) else arguments.seed)
    versions = {"Python": platform.python_version(), "bestiary": __version__}
    versions |= {name: metadata.version(name) for name in ("transformers", "torch", "accelerate")}
    facts = {
        "processes": None if isinstance(arguments, dict) else arguments.world_size,
        "optimizer steps": max((entry["step"] for entry in history if "step" in entry), default=None),
        "wall time": None if seconds is None else f"{int(seconds // 60)} min {seconds % 60:.0f} s",
        "seed": seed,
        "hardware": info.get("hardware", hardware_summary()),
        "date": info.get("date", datetime.now(UTC).date().isoformat()),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    return [{"run": name, "value": value} for name, value in facts.items() if value is not None]


def _results(folder: Path, info: Mapping[str, Any]) -> str:
    parts = []
    if rows := final_metrics(info.get("log_history", [])):
        parts.append("Measured by this run; last logged values.\n\n" + results_table(rows))
    if "results" in info:
        parts.append("Measured by this run.\n\n" + results_table(info["results"]))
    if (folder / "loss.png").exists():
        parts.append("![Loss over optimizer steps](loss.png)")
    return "## Results\n\n" + "\n\n".join(parts) if parts else ""


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def _without_folder(value: Any) -> Any:
    """An absolute path shortened to its last part; a card should not tell where on a machine somebody works."""
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


def _digest(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()


def _stamped(content: str) -> str:
    content = content.rstrip() + "\n"
    return f"{content}\n<!-- bestiary card sha256:{_digest(content)} (an edited card is never overwritten) -->\n"
