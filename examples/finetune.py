r"""Fine-tune any encoder on a labelled task: classification, regression, tagging or extractive question answering.

    accelerate launch examples/finetune.py --config finetune_classification --name_or_path runs/electra_tiny
    accelerate launch examples/finetune.py --config finetune_qa --name_or_path path \
        --train_file train.jsonl --eval_file dev.jsonl
    python examples/finetune.py --config finetune_classification --name_or_path path --seeds 0,1,2

The model may be one of bestiary's or any of transformers' with the head that the task needs. With several seeds the
script trains once per seed and prints mean and standard deviation. Model, card and metrics go to `output_dir`.
"""

import json
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import transformers
from transformers import AutoTokenizer, set_seed

import bestiary  # noqa: F401  registers the auto classes
from bestiary.cards import plot_history
from bestiary.recipe import Recipe, load_recipe
from bestiary.trainers.finetuning import FinetuneTrainer, FinetuneTrainingArguments
from bestiary.trainers.tasks import TASKS, TaskDataArguments, load_labelled


@dataclass
class DataArguments(TaskDataArguments):
    """The task's data, and the seeds to train with."""

    seeds: str | None = field(default=None, metadata={"help": "Comma-separated seeds; default: the one of training."})


def train_once(recipe: Recipe, seed: int, folder: Path, argv: list[str]) -> dict[str, float]:
    """Fine-tune with one seed, save to a folder, and return the evaluation's metrics."""
    training, data = recipe.training, recipe.data
    training.seed = training.data_seed = seed
    training.output_dir = str(folder)
    set_seed(seed)
    name = recipe.model.get("name_or_path")
    if name is None:
        raise ValueError("examples/finetune.py needs a model: give --name_or_path.")
    tokenizer = AutoTokenizer.from_pretrained(name)
    train, held_out = load_labelled(data)
    task = TASKS[data.task](data, tokenizer, train)
    config = recipe.build_config(**task.config_fields())
    model = getattr(transformers, task.auto_class).from_pretrained(name, config=config)
    with training.main_process_first(desc="tokenizing"):
        train_features, eval_features = task.features(train, True), task.features(held_out, False)
    trainer = FinetuneTrainer(
        model,
        training,
        data_collator=task.collator(),
        train_dataset=train_features,
        eval_dataset=eval_features,
        processing_class=tokenizer,
        compute_metrics=task.metrics(held_out, eval_features),
    )
    trainer.run_description = {
        "data": f"{data.dataset or data.train_file}: {len(train):,} training and {len(held_out):,} evaluation rows",
        "command": f"accelerate launch examples/finetune.py {shlex.join(argv)}",
        "base_model": name,
    }
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    metrics = trainer.evaluate()
    trainer.save_model()
    trainer.save_metrics("eval", metrics)
    if trainer.is_world_process_zero():
        plot_history(trainer.state.log_history, folder / "loss.png")
        trainer.create_model_card()
    return {key: value for key, value in metrics.items() if isinstance(value, float)}


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Fine-tune with every seed; returns mean and standard deviation of every metric."""
    argv = sys.argv[1:] if argv is None else argv
    recipe = load_recipe(argv, data=DataArguments, training=FinetuneTrainingArguments)
    seeds = [int(seed) for seed in recipe.data.seeds.split(",")] if recipe.data.seeds else [recipe.training.seed]
    root = Path(recipe.training.output_dir)
    runs = [train_once(recipe, seed, root / f"seed_{seed}" if len(seeds) > 1 else root, argv) for seed in seeds]
    names = [name for name in runs[0] if not name.endswith(("_runtime", "_per_second"))]
    summary = {
        name: {
            "mean": float(np.mean([run[name] for run in runs])),
            "std": float(np.std([run[name] for run in runs], ddof=1)) if len(runs) > 1 else 0.0,
            "values": [run[name] for run in runs],
        }
        for name in names
    }
    if recipe.training.process_index == 0:
        result = {"command": f"examples/finetune.py {shlex.join(argv)}", "seeds": seeds, "metrics": summary}
        (root / "results.json").write_text(json.dumps(result, indent=1))
        for name, figures in summary.items():
            print(f"{name}: {figures['mean']:.4f} ± {figures['std']:.4f} ({len(seeds)} seed{'s' * (len(seeds) > 1)})")
    return summary


if __name__ == "__main__":
    main()
