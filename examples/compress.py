r"""Make a large encoder into a small one by a paper's recipe, and save the small one as a plain model.

    accelerate launch examples/compress.py --config theseus_tiny --name_or_path runs/finetune_classification
    accelerate launch examples/compress.py --config minilmv2_tiny --model.teacher path/to/teacher
    accelerate launch examples/compress.py --config minilmv2_base --model.teacher bert-base-uncased \
        --train_file text.jsonl
    accelerate launch examples/compress.py --config minilmv2_tiny --model.teacher path/to/teacher \
        --resume_from_checkpoint last

A paper that compresses for one labelled task (a fine-tuned model comes in, a smaller fine-tuned one comes out) takes
the task's data, as examples/finetune.py does, `--seeds 0,1,2` included. A paper that distils on plain text takes what
examples/pretrain.py takes, and gives an encoder that is fine-tuned afterwards:

    accelerate launch examples/finetune.py --config finetune_classification --name_or_path runs/minilmv2_tiny

Model, tokenizer, card and plot are written to `output_dir`.
"""

import shlex
import sys
from collections.abc import Mapping
from typing import Any

from bestiary.recipe import load_recipe
from bestiary.registry import get_paper, load_object
from bestiary.trainers.finetuning import FinetuneTrainer
from bestiary.trainers.pretraining import text_data_arguments, train_on_text
from bestiary.trainers.seeds import SeededTaskArguments, print_summary, train_with_seeds


def is_for_a_task(values: Mapping[str, Any]) -> bool:
    """Whether the recipe's paper compresses for a labelled task; `ValueError` if the recipe names no paper."""
    if values.get("slug") is None:
        raise ValueError("examples/compress.py needs the paper: give --config with a recipe, or --slug.")
    paper = get_paper(values["slug"])
    if paper.kind != "compression":
        raise ValueError(
            f"The paper {paper.slug!r} is no method of compression but {paper.kind}; use examples/pretrain.py or "
            "examples/finetune.py."
        )
    return issubclass(load_object(str(paper.trainer)), FinetuneTrainer)


def data_arguments(values: Mapping[str, Any]) -> type:
    """Dataclass of the recipe's section `data`."""
    return SeededTaskArguments if is_for_a_task(values) else text_data_arguments(values)


def main(argv: list[str] | None = None) -> None:
    """Compress, evaluate, save."""
    argv = sys.argv[1:] if argv is None else argv
    recipe = load_recipe(argv, data=data_arguments)
    command = f"accelerate launch examples/compress.py {shlex.join(argv)}"
    if is_for_a_task({"slug": recipe.slug}):
        summary = train_with_seeds(recipe, command)
        if recipe.training.process_index == 0:
            print_summary(summary, recipe.data.seeds)
    else:
        train_on_text(recipe, command)
    if recipe.training.process_index == 0:
        print(f"Plain model, tokenizer, card and plot of the losses: {recipe.training.output_dir}")


if __name__ == "__main__":
    main()
