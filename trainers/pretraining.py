"""What recipes on running text share: data arguments, the hooks by which one script trains any paper's objective, and
the run itself, which is the body of the scripts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from datasets import Dataset, DatasetDict
from transformers import (
    AutoModelForPreTraining,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from ..demo import demo_tokenizer
from ..recipe import Recipe
from ..registry import get_paper, load_object
from ..text_data import load_text_documents
from .base import BestiaryTrainer
from .documents import pack_segments, tokenize_documents
from .masking import MaskingCollator


@dataclass
class PretrainingDataArguments:
    """Text and masking of a pre-training run.

    Args:
        dataset: `demo`, a data set on the Hub, or a folder; or give `train_file` (.txt, .jsonl, .parquet, .csv).
        tokenizer: folder or Hub name; None takes that of `model.name_or_path`, or the demo's.
        max_length: longest sequence in tokens, special ones included.
        mlm_probability: share of the tokens that are masked.
        max_predictions: largest number of masked tokens in a sequence; None sets no limit.
        max_validation_examples: so many held-out sequences are evaluated, the first ones; None takes all.
        data_seed: of building the examples.
        num_proc: processes that tokenize.
    """

    dataset: str | None = field(
        default=None,
        metadata={"help": "demo, a data set on the Hub, or a folder.", "replaces": ("train_file", "validation_file")},
    )
    train_file: str | None = field(
        default=None, metadata={"help": "Local text: .txt, .jsonl, .parquet or .csv.", "replaces": ("dataset",)}
    )
    validation_file: str | None = field(default=None, metadata={"help": "Local held-out text."})
    text_column: str = field(default="text", metadata={"help": "Column that holds a document."})
    validation_fraction: float = field(
        default=0.02, metadata={"help": "Held-out share if there is no validation split."}
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Folder or Hub name; default: the checkpoint's tokenizer, or the demo's."}
    )
    max_length: int = field(default=128, metadata={"help": "Longest sequence in tokens."})
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of the tokens that are masked."})
    max_predictions: int | None = field(default=None, metadata={"help": "Largest number of masked tokens a sequence."})
    pad_to_multiple_of: int | None = field(default=None, metadata={"help": "Round padded lengths up to a multiple."})
    max_validation_examples: int | None = field(default=None, metadata={"help": "Only so many held-out sequences."})
    data_seed: int = field(default=0, metadata={"help": "Seed of building the examples."})
    num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenize."})


class PretrainingTrainer(BestiaryTrainer):
    """A trainer that can build its own data from documents.

    The default is one stretch of text a sequence, masked anew each epoch.
    """

    data_arguments: ClassVar[type[PretrainingDataArguments]] = PretrainingDataArguments

    @classmethod
    def build_tokenizer(cls, recipe: Recipe) -> PreTrainedTokenizerBase:
        """The tokenizer that the recipe names, that of its checkpoint, or the demo's."""
        name = recipe.data.tokenizer or recipe.model.get("name_or_path")
        return AutoTokenizer.from_pretrained(name) if name else demo_tokenizer()

    @classmethod
    def build_config(cls, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
        """The configuration that the recipe describes, with the tokenizer's vocabulary."""
        return recipe.build_config(vocab_size=len(tokenizer))

    @classmethod
    def build_model(cls, recipe: Recipe, config: PreTrainedConfig) -> PreTrainedModel:
        """The model to train: that of the checkpoint which the recipe names, or a fresh one."""
        name = recipe.model.get("name_or_path")
        if name:
            return AutoModelForPreTraining.from_pretrained(name, config=config)
        return AutoModelForPreTraining.from_config(config)

    @classmethod
    def build_datasets(
        cls,
        documents: DatasetDict,
        tokenizer: PreTrainedTokenizerBase,
        config: PreTrainedConfig,
        data: Any,
        training: TrainingArguments,
    ) -> DatasetDict | dict[str, Any]:
        """Examples for every split of documents (column `sentences`).

        Raises:
            ValueError: sequences longer than the model's positions, or a tokenizer larger than its vocabulary.
        """
        cls.check_sizes(tokenizer, config, data.max_length)
        return {
            split: pack_segments(cls.tokenized(part, tokenizer, data), tokenizer, data.max_length, seed=data.data_seed)
            for split, part in documents.items()
        }

    @classmethod
    def build_collator(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        config: PreTrainedConfig,
        data: Any,
        training: TrainingArguments,
    ) -> MaskingCollator:
        """The collator that masks."""
        return MaskingCollator(
            tokenizer,
            mlm_probability=data.mlm_probability,
            max_predictions=data.max_predictions,
            max_length=config.max_position_embeddings,
            pad_to_multiple_of=data.pad_to_multiple_of,
            seed=training.seed,
        )

    @staticmethod
    def tokenized(documents: Dataset, tokenizer: PreTrainedTokenizerBase, data: PretrainingDataArguments) -> Dataset:
        """Documents as lists of lists of token ids."""
        return tokenize_documents(documents, tokenizer, num_proc=data.num_proc)

    @classmethod
    def check_sizes(cls, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, max_length: int) -> None:
        """`ValueError` if the data would not fit the model, or pads with a token that it does not take for padding."""
        pad = tokenizer.pad_token_id
        if config.pad_token_id not in (None, pad):
            raise ValueError(
                f"{type(config).__name__}.pad_token_id is {config.pad_token_id}, but the tokenizer pads with {pad}, "
                f"so that an ordinary token would not be learned; set it to {pad}."
            )
        if max_length > config.max_position_embeddings:
            raise ValueError(
                f"{cls.data_arguments.__name__}.max_length is {max_length}, but the model has max_position_embeddings="
                f"{config.max_position_embeddings}; lower the one or raise the other."
            )
        if len(tokenizer) > config.vocab_size:
            raise ValueError(
                f"The tokenizer has {len(tokenizer)} entries, but the model's vocab_size is {config.vocab_size}; "
                "leave vocab_size out "
                "of the recipe to take the tokenizer's."
            )


def text_data_arguments(values: Mapping[str, Any]) -> type[PretrainingDataArguments]:
    """Dataclass of a recipe's section `data`, by its paper; `ValueError` if it names none."""
    if values.get("slug") is None:
        raise ValueError("Training on text needs the paper: give --config with a recipe, or --slug.")
    return load_object(str(get_paper(values["slug"]).trainer)).data_arguments


def train_on_text(recipe: Recipe, command: str) -> PretrainingTrainer:
    """Train by a recipe on running text, evaluate, and save the result, its card and the plot to `output_dir`.

    Args:
        recipe: with a paper whose trainer is a `PretrainingTrainer`.
        command: what the card says that was run.
    """
    data, training = recipe.data, recipe.training
    trainer_class = load_object(str(get_paper(str(recipe.slug)).trainer))
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
        tokenizer = trainer_class.build_tokenizer(recipe)
        config = trainer_class.build_config(recipe, tokenizer)
        examples = trainer_class.build_datasets(documents, tokenizer, config, data, training)

    held_out = examples.get("validation")
    if held_out is not None and data.max_validation_examples is not None:
        held_out = held_out.select(range(min(data.max_validation_examples, len(held_out))))
    trainer = trainer_class(
        trainer_class.build_model(recipe, config),
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
        "command": command,
        "base_model": recipe.model.get("name_or_path"),
    }
    resume = training.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if resume == "last" else resume)
    if held_out is not None:
        trainer.evaluate()
    trainer.save_result()
    trainer.save_state()
    return trainer
