"""Fine-tune any encoder on a labelled task: classification, regression, tagging or extractive question answering.

    accelerate launch examples/finetune.py --config finetune_classification --name_or_path runs/electra_tiny
    accelerate launch examples/finetune.py --config electra_finetune --name_or_path runs/electra_base --seeds 0,1,2
    accelerate launch examples/finetune.py --config finetune_qa --name_or_path path --train_file a.jsonl \
        --eval_file b.jsonl

The model may be one of bestiary's or any of transformers' with the head that the task needs. With several seeds the
script trains once per seed, into `output_dir/seed_<seed>`. Model, card, plot and metrics are written to `output_dir`,
mean and standard deviation over the seeds to `results.json` in it.
"""

import json
import re
import shlex
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import set_seed

import bestiary  # noqa: F401  registers the auto classes
from bestiary.recipe import Recipe, load_recipe
from bestiary.trainers.finetuning import FinetuneTrainingArguments
from bestiary.trainers.tasks import PreparedTask, TaskDataArguments


@dataclass
class DataArguments(TaskDataArguments):
    """The task's data, and the seeds to train with."""

    seeds: str | None = field(default=None, metadata={"help": "Comma-separated seeds; default: the one of training."})

    def __post_init__(self):
        super().__post_init__()
        if self.seeds is not None and not re.fullmatch(r"\d+(,\d+)*", self.seeds):
            raise ValueError(f"DataArguments.seeds must be numbers joined by commas, as 0,1,2; got {self.seeds!r}.")


def train_once(recipe: Recipe, prepared: PreparedTask, command: str) -> dict[str, float]:
    """Fine-tune with `training.seed`, save to `training.output_dir`, and return the metrics of the evaluation."""
    training = recipe.training
    set_seed(training.seed)
    trainer = prepared.build_trainer(recipe)
    data = recipe.data.dataset or f"{recipe.data.train_file}, {recipe.data.eval_file}"
    trainer.run_description = {
        "data": f"{data}: {len(prepared.train):,} inputs to train on, {len(prepared.held_out):,} to evaluate.",
        "command": command,
        "base_model": recipe.model["name_or_path"],
    }
    resume = training.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if resume == "last" else resume)
    metrics = trainer.evaluate()
    trainer.save_model()
    trainer.save_metrics("eval", metrics)
    if trainer.is_world_process_zero():
        trainer.create_model_card()
    timings = ("_runtime", "_per_second", "_time")
    return {key: value for key, value in metrics.items() if key.startswith("eval_") and not key.endswith(timings)}


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """Fine-tune with every seed; returns mean, standard deviation and values of every metric."""
    argv = sys.argv[1:] if argv is None else argv
    command = f"accelerate launch examples/finetune.py {shlex.join(argv)}"
    recipe = load_recipe(argv, data=DataArguments, training=FinetuneTrainingArguments)
    training, root = recipe.training, Path(recipe.training.output_dir)
    seeds = [int(seed) for seed in recipe.data.seeds.split(",")] if recipe.data.seeds else [training.seed]
    prepared = PreparedTask.load(recipe)
    runs = []
    for seed in seeds:
        if recipe.data.seeds:
            training.seed = training.data_seed = seed
        if len(seeds) > 1:
            training.output_dir = str(root / f"seed_{seed}")
        runs.append(train_once(recipe, prepared, command))

    summary = {}
    for name in runs[0]:
        values = [run[name] for run in runs]
        spread = statistics.stdev(values) if len(values) > 1 else None
        summary[name] = {"mean": statistics.fmean(values), "std": spread, "values": values}
    if training.process_index == 0:
        results = {"command": command, "seeds": seeds, "metrics": summary}
        (root / "results.json").write_text(json.dumps(results, indent=1))
        for name, found in summary.items():
            spread = "" if found["std"] is None else f" ± {found['std']:.4f} over seeds {recipe.data.seeds}"
            print(f"{name}: {found['mean']:.4f}{spread}")
    return summary


if __name__ == "__main__":
    main()
