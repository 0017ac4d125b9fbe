"""Fine-tune any encoder on a labelled task: classification, regression, tagging or extractive question answering.

    accelerate launch examples/finetune.py --config finetune_classification --name_or_path runs/electra_tiny
    accelerate launch examples/finetune.py --config electra_finetune --name_or_path runs/electra_base --seeds 0,1,2
    accelerate launch examples/finetune.py --config adapters_tiny --name_or_path path
    accelerate launch examples/finetune.py --config finetune_qa --name_or_path path --train_file a.jsonl \
        --eval_file b.jsonl

The model may be one of bestiary's or any of transformers' with the head that the task needs. A recipe of a method of
fine-tuning (adapters, hype) trains by that method and saves the plain model, or the adapter. With several seeds the
script trains once per seed, into `output_dir/seed_<seed>`. Model, card, plot and metrics are written to `output_dir`,
mean and standard deviation over the seeds to `results.json` in it.
"""

import shlex
import sys

import bestiary  # noqa: F401  registers the auto classes
from bestiary.recipe import load_recipe
from bestiary.trainers.seeds import SeededTaskArguments, print_summary, task_training_arguments, train_with_seeds


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """Fine-tune with every seed; returns mean, standard deviation and values of every metric."""
    argv = sys.argv[1:] if argv is None else argv
    recipe = load_recipe(argv, data=SeededTaskArguments, training=task_training_arguments)
    summary = train_with_seeds(recipe, f"accelerate launch examples/finetune.py {shlex.join(argv)}")
    if recipe.training.process_index == 0:
        print_summary(summary, recipe.data.seeds)
    return summary


if __name__ == "__main__":
    main()
