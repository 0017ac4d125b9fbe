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

from transformers import AutoModelForPreTraining, AutoTokenizer, set_seed

from bestiary.demo import demo_tokenizer
from bestiary.recipe import load_recipe
from bestiary.registry import get_paper, load_object
from bestiary.text_data import load_text_documents


def data_arguments(values: dict) -> type:
    """Dataclass of the section `data`, by the recipe's paper."""
    if values.get("slug") is None:
        raise ValueError("examples/pretrain.py needs the paper: give --config with a recipe, or --slug.")
    return load_object(get_paper(values["slug"]).trainer).data_arguments


def main(argv: list[str] | None = None):
    """Train, evaluate, save; returns the trainer."""
    recipe = load_recipe(argv, data=data_arguments)
    data, training = recipe.data, recipe.training
    trainer_class = load_object(get_paper(recipe.slug).trainer)
    set_seed(training.seed)

    with training.main_process_first(desc="preparing the data"):
        documents = load_text_documents(
            data.dataset,
            data.train_file,
            data.validation_file,
            data.text_column,
            data.validation_fraction,
            seed=data.data_seed,
        )
        tokenizer = AutoTokenizer.from_pretrained(data.tokenizer) if data.tokenizer else demo_tokenizer()
        config = recipe.build_config(vocab_size=len(tokenizer))
        examples = trainer_class.build_datasets(documents, tokenizer, config, data, training)

    held_out = examples.get("validation")
    if held_out is not None and data.max_validation_examples is not None:
        held_out = held_out.select(range(min(data.max_validation_examples, len(held_out))))
    name = recipe.model.get("name_or_path")
    model = (
        AutoModelForPreTraining.from_pretrained(name, config=config)
        if name
        else AutoModelForPreTraining.from_config(config)
    )
    trainer = trainer_class(
        model,
        training,
        data_collator=trainer_class.build_collator(tokenizer, config, data, training),
        train_dataset=examples["train"],
        eval_dataset=held_out,
        processing_class=tokenizer,
    )
    trainer.run_description = {
        "data": (
            f"{data.dataset or data.train_file}: {len(examples['train']):,} sequences of at most "
            f"{data.max_length} tokens"
        ),
        "command": f"accelerate launch examples/pretrain.py {shlex.join(sys.argv[1:] if argv is None else argv)}",
        "base_model": name,
    }
    resume = training.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if resume == "last" else resume)
    if held_out is not None:
        trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        trainer.create_model_card()
        print(f"Checkpoint, card and plot of the losses: {training.output_dir}")
    return trainer


if __name__ == "__main__":
    main()
