"""Relation distillation on running text (MiniLMv2; Wang et al., 2021, arXiv 2012.15828).

An item of every relation's loss is a sequence, as in the third-party code, so that the way a batch is split never
changes the update. Text is not masked and has no labels. The teacher is frozen, in evaluation mode, no module of the
student, and has no part in checkpoints; its tokenizer is the student's.
"""

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import DatasetDict
from torch import nn
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from ..configuration.configuration_minilmv2 import MiniLMv2Config, longest_input
from ..modeling.layers.wrapping import WrapperPreTrainedModel
from ..modeling.modeling_minilmv2 import MiniLMv2ForPreTraining, RelationTeacher
from ..recipe import Recipe
from .arguments import BestiaryTrainingArguments
from .base import Batch, Sums
from .documents import pack_segments
from .pretraining import PretrainingDataArguments, PretrainingTrainer


@dataclass
class MiniLMv2TrainingArguments(BestiaryTrainingArguments):
    """Training arguments of relation distillation.

    Added:
        teacher_dtype: precision of the teacher, `float32`, `bfloat16` or `float16`; None keeps the checkpoint's.

    Changed defaults (those of the third-party reproductions; the paper's own rates were not checked):
        learning_rate: 6e-4; warmup_steps: 4,000; linear decay; weight_decay: 0.01; adam_epsilon: 1e-6.
    """

    teacher_dtype: str | None = field(
        default=None, metadata={"help": "Precision of the teacher: float32, bfloat16, float16."}
    )
    learning_rate: float = field(default=6e-4, metadata={"help": "Peak learning rate."})
    warmup_steps: float = field(default=4_000, metadata={"help": "Updates of warm-up; below 1, a share of all."})
    weight_decay: float = field(default=0.01, metadata={"help": "Decoupled weight decay."})

    def __post_init__(self):
        super().__post_init__()
        if self.teacher_dtype not in (None, "float32", "bfloat16", "float16"):
            raise ValueError(
                f"{type(self).__name__}.teacher_dtype must be float32, bfloat16, float16 or nothing, got "
                f"{self.teacher_dtype!r}."
            )


class MiniLMv2Trainer(PretrainingTrainer):
    """Trains `MiniLMv2ForPreTraining`; logs the loss of every relation. The result is the plain student.

    Args:
        model: the student. What the loss does not reach is frozen while it trains.
        args: of type `MiniLMv2TrainingArguments`.
        teacher: folder, Hub name or model; by default the one that is attached to the student, or else
            `model.config.teacher`. The tokenizer is compared with that of the one that is used, if it is known where
            it came from.
        rest, kwargs: as for `BestiaryTrainer`.

    Raises:
        ValueError: no teacher, one that does not fit the student, or a tokenizer that is not the teacher's.
    """

    predicted = "sequence_losses"
    args: MiniLMv2TrainingArguments

    def __init__(
        self,
        model: MiniLMv2ForPreTraining,
        args: MiniLMv2TrainingArguments | None = None,
        *rest: Any,
        teacher: str | os.PathLike | PreTrainedModel | RelationTeacher | None = None,
        **kwargs: Any,
    ):
        args = MiniLMv2TrainingArguments(output_dir="runs") if args is None else args
        teacher = teacher or model.teacher or model.config.teacher
        if teacher is None:
            raise ValueError(
                f"{type(self).__name__} needs a teacher: pass teacher=, attach one to the model, or set "
                "MiniLMv2Config.teacher."
            )
        tokenizer = kwargs.get("processing_class")
        name = tokenizer_of(teacher)
        if name and tokenizer is not None:
            check_vocabulary(tokenizer, name)
        super().__init__(model, args, *rest, **kwargs)
        self.label_names = ["input_ids"]  # there is a loss wherever there is text
        model.attach_teacher(teacher, dtype=getattr(torch, args.teacher_dtype) if args.teacher_dtype else None)
        attached = model.teacher
        if attached is not None:
            attached.to(self.args.device)  # the student may get there later

    def loss_weights(self) -> dict[str, float]:
        return self.accelerator.unwrap_model(self.model).loss_weights()

    def count_items(self, batch: Batch) -> Sums:
        """Sequences, for every relation."""
        return dict.fromkeys(self.loss_weights(), torch.tensor(batch["input_ids"].shape[0]))

    def loss_sums(self, model: nn.Module, batch: Batch) -> tuple[Sums, Any]:
        names = self.loss_weights()
        outputs = model(**batch, num_items_in_batch=dict.fromkeys(names, 1))
        return {name: getattr(outputs, f"{name}_loss") for name in names}, outputs

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in the base; what the loss does not reach is frozen before the optimizer is made."""
        self.accelerator.unwrap_model(self.model).freeze_unused()
        return super().train(*args, **kwargs)

    # The run by a recipe

    @classmethod
    def build_tokenizer(cls, recipe: Recipe) -> PreTrainedTokenizerBase:
        """The teacher's.

        Raises:
            ValueError: the recipe names no teacher, one without a tokenizer, or another tokenizer.
        """
        teacher = recipe.model.get("teacher")
        if not teacher:
            raise ValueError(
                "MiniLMv2 needs a teacher: --model.teacher with a folder or the Hub name of any encoder, or "
                "model.teacher in the recipe."
            )
        tokenizer = load_tokenizer(teacher)
        for other in (recipe.data.tokenizer, recipe.model.get("name_or_path")):
            if other:
                check_vocabulary(load_tokenizer(other), teacher)
        return tokenizer

    @classmethod
    def build_config(cls, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
        """The student that `model.encoder_config` describes for the teacher, or that of the checkpoint to go on
        from.
        """
        if recipe.model.get("name_or_path"):
            return recipe.build_config()
        return MiniLMv2Config.from_teacher(**recipe.model)

    @classmethod
    def build_model(cls, recipe: Recipe, config: Any) -> MiniLMv2ForPreTraining:
        """The student, with its teacher."""
        start = recipe.model.get("name_or_path")
        if not start:
            return MiniLMv2ForPreTraining.from_teacher(recipe.model["teacher"], config)
        return MiniLMv2ForPreTraining.from_encoder(start, config=config)

    @classmethod
    def build_datasets(
        cls,
        documents: DatasetDict,
        tokenizer: PreTrainedTokenizerBase,
        config: PreTrainedConfig,
        data: PretrainingDataArguments,
        training: TrainingArguments,
    ) -> DatasetDict | dict[str, Any]:
        """Stretches of text of one segment, as long as they may be and the document lasts."""
        cls.check_sizes(tokenizer, config, data.max_length)
        built = {}
        for split, part in documents.items():
            packed = pack_segments(
                cls.tokenized(part, tokenizer, data),
                tokenizer,
                data.max_length,
                single_segment_prob=1.0,
                random_length_prob=0.0,
                seed=data.data_seed,
            )
            built[split] = packed.remove_columns("token_type_ids")  # all 0, and unknown to some types
        return built

    @classmethod
    def check_sizes(cls, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, max_length: int) -> None:
        """As in the base, for types whose positions begin behind the padding id too."""
        super().check_sizes(tokenizer, config, max_length)
        longest = longest_input(config.encoder_config)
        if max_length > longest:
            raise ValueError(
                f"{cls.data_arguments.__name__}.max_length is {max_length}, but the student's position table serves "
                f"{longest} tokens; lower max_length."
            )

    @classmethod
    def build_collator(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        config: PreTrainedConfig,
        data: PretrainingDataArguments,
        training: TrainingArguments,
    ) -> Any:
        """`DataCollatorWithPadding`; nothing is masked."""
        return DataCollatorWithPadding(tokenizer, pad_to_multiple_of=data.pad_to_multiple_of)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint; `ValueError` if there is none."""
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"There is no tokenizer at {name!r}, a folder or Hub name whose tokenizer distillation needs: {error}"
        ) from error


def tokenizer_of(teacher: str | os.PathLike | PreTrainedModel | RelationTeacher) -> str | None:
    """Where a teacher's tokenizer is: with its checkpoint. None for a model that has none there."""
    if isinstance(teacher, (str, os.PathLike)):
        return str(teacher)
    if isinstance(teacher, RelationTeacher):
        teacher = teacher.encoder
    elif isinstance(teacher, WrapperPreTrainedModel):
        teacher = teacher.to_base()
    name = teacher.name_or_path
    try:
        return name if name and load_tokenizer(name) else None
    except ValueError:
        return None


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, teacher: str) -> None:
    """`ValueError` unless a tokenizer has the teacher's entries under the teacher's numbers."""
    theirs = load_tokenizer(teacher).get_vocab()
    ours = tokenizer.get_vocab()
    if ours != theirs:
        differing = sum(theirs.get(token) != number for token, number in ours.items())
        raise ValueError(
            f"The tokenizer is not that of the teacher {teacher!r}: {differing} of its {len(ours)} entries are not "
            f"among the teacher's {len(theirs)} or have other numbers. Teacher and student must read the same tokens; "
            "use the teacher's tokenizer."
        )
