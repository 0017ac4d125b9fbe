r"""Pre-train any paper of the zoo by its recipe.

    accelerate launch examples/pretrain.py --config electra_tiny
    accelerate launch --multi_gpu --num_processes 2 examples/pretrain.py --config electra_tiny \
        --per_device_train_batch_size 16
    accelerate launch examples/pretrain.py --config bert_tiny --train_file text.jsonl --learning_rate 3e-4
    accelerate launch examples/pretrain.py --config electra_tiny --resume_from_checkpoint last

`--config` names a packaged recipe or YAML files; every field of the recipe's sections is an option (`--help`). The
checkpoint, its card and the plot of its losses are written to `output_dir`.
"""

import shlex
import sys

from bestiary.recipe import load_recipe
from bestiary.trainers.pretraining import PretrainingTrainer, text_data_arguments, train_on_text


def main(argv: list[str] | None = None) -> PretrainingTrainer:
    """Train, evaluate, save; returns the trainer."""
    argv = sys.argv[1:] if argv is None else argv
    recipe = load_recipe(argv, data=text_data_arguments)
    trainer = train_on_text(recipe, f"accelerate launch examples/pretrain.py {shlex.join(argv)}")
    if trainer.is_world_process_zero():
        print(f"Checkpoint, card and plot of the losses: {recipe.training.output_dir}")
    return trainer


if __name__ == "__main__":
    main()
