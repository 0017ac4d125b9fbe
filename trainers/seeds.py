"""One labelled task trained once per seed, with what the runs have in common summed up: the body of the scripts."""

import json
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from transformers import set_seed

from ..recipe import Recipe
from ..registry import get_paper, load_object
from .base import BestiaryTrainer, last_complete_checkpoint
from .finetuning import FinetuneTrainingArguments
from .tasks import PreparedTask, TaskDataArguments


@dataclass
class SeededTaskArguments(TaskDataArguments):
    """The task's data, the seeds to train with, and a PEFT method to train by.

    Args:
        seeds: numbers joined by commas; None takes the seed of training.
        peft: configuration of a method of peft, a dict or JSON with its `peft_type` (`{"peft_type": "LORA", "r": 8}`);
            None trains the whole model, or by the method of the recipe's paper.
    """

    seeds: str | None = field(default=None, metadata={"help": "Comma-separated seeds; default: the one of training."})
    peft: dict | str | None = field(default=None, metadata={"help": "Method of peft, as JSON with its peft_type."})

    def __post_init__(self):
        super().__post_init__()
        check_seeds(self)


def check_seeds(data: Any) -> None:
    """`ValueError` if `seeds` or `peft` of data arguments are not of their form."""
    owner = type(data).__name__
    if data.seeds is not None and not re.fullmatch(r"\d+(,\d+)*", data.seeds):
        raise ValueError(f"{owner}.seeds must be numbers joined by commas, as 0,1,2; got {data.seeds!r}.")
    if isinstance(data.peft, str):
        raise ValueError(f"{owner}.peft must be a dict or a JSON object, got {data.peft!r}.")


class Prepared(Protocol):
    """Data that is ready, and what makes a trainer for it."""

    train: Any
    held_out: Any

    def build_trainer(self, recipe: Recipe, peft: dict[str, Any] | None = None) -> BestiaryTrainer:
        """Trainer of a new model by the recipe's `training`."""


def task_training_arguments(values: Mapping[str, Any]) -> type[FinetuneTrainingArguments]:
    """Training arguments of a recipe for a labelled task: the paper's, if it is a method of fine-tuning."""
    arguments = get_paper(values["slug"]).arguments if values.get("slug") else None
    found = load_object(arguments) if arguments else FinetuneTrainingArguments
    return found if issubclass(found, FinetuneTrainingArguments) else FinetuneTrainingArguments


def train_once(recipe: Recipe, prepared: Prepared, command: str, resume: str | bool | None = None) -> dict[str, float]:
    """Train with `training.seed`, save the result to `training.output_dir`, and return the metrics of the
    evaluation. `resume` is `resume_from_checkpoint` of the trainer.
    """
    training = recipe.training
    set_seed(training.seed)
    trainer = prepared.build_trainer(recipe, recipe.data.peft)
    data = recipe.data.dataset or f"{recipe.data.train_file}, {recipe.data.eval_file}"
    trainer.run_description = {
        "data": f"{data}: {len(prepared.train):,} inputs to train on, {len(prepared.held_out):,} to evaluate.",
        "command": command,
        "base_model": recipe.model.get("name_or_path"),
    }
    trainer.train(resume_from_checkpoint=resume)
    metrics = trainer.evaluate()
    trainer.save_result()
    trainer.save_metrics("eval", metrics)
    timings = ("_runtime", "_per_second", "_time")
    return {key: value for key, value in metrics.items() if key.startswith("eval_") and not key.endswith(timings)}


def train_with_seeds(recipe: Recipe, command: str, prepared: Prepared | None = None) -> dict[str, dict[str, Any]]:
    """Train once per seed, into `output_dir/seed_<seed>` if there are several; returns mean, standard deviation and
    values of every metric, which are also written to `output_dir/results.json`.

    Without `prepared` the recipe's labelled task is loaded.

    Raises:
        ValueError: several seeds, and a checkpoint by its path to resume from. `last` goes on with the seeds that have
            one and starts the others.
    """
    training, root = recipe.training, Path(str(recipe.training.output_dir))
    seeds = [int(seed) for seed in recipe.data.seeds.split(",")] if recipe.data.seeds else [training.seed]
    resume: str | bool | None = training.resume_from_checkpoint
    if len(seeds) > 1 and resume not in (None, "last"):
        raise ValueError(
            f"{type(training).__name__}.resume_from_checkpoint={resume!r} is of one run, but the seeds are "
            f"{recipe.data.seeds}; resume all of them by 'last', or give that run's seed alone."
        )
    prepared = PreparedTask.load(recipe) if prepared is None else prepared
    runs = []
    for seed in seeds:
        if recipe.data.seeds:
            training.seed = training.data_seed = seed
        if len(seeds) > 1:
            training.output_dir = str(root / f"seed_{seed}")
        if training.resume_from_checkpoint == "last":
            resume = len(seeds) == 1 or last_complete_checkpoint(str(training.output_dir)) is not None
        runs.append(train_once(recipe, prepared, command, resume))

    summary = {}
    for name in runs[0]:
        values = [run[name] for run in runs]
        spread = statistics.stdev(values) if len(values) > 1 else None
        summary[name] = {"mean": statistics.fmean(values), "std": spread, "values": values}
    if training.process_index == 0:
        results = {"command": command, "seeds": seeds, "metrics": summary}
        (root / "results.json").write_text(json.dumps(results, indent=1))
    return summary


def print_summary(summary: Mapping[str, Mapping[str, Any]], seeds: str | None) -> None:
    """One line a metric: mean, and the standard deviation over the seeds."""
    for name, found in summary.items():
        spread = "" if found["std"] is None else f" ± {found['std']:.4f} over seeds {seeds}"
        print(f"{name}: {found['mean']:.4f}{spread}")  # noqa: T201  the script's output
