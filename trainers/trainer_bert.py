"""Pre-training of BERT (Devlin et al., 2018, arXiv 1810.04805): sentence pairs, exact-count masking, two lengths, one
schedule.

Decisions where the paper and practice differ:
* masks are drawn anew whenever an example is seen; the official program draws them `dupe_factor` times and stores
  them;
* the change to long sequences keeps the batch (in sequences), the optimizer state and the one learning-rate curve, as
  the official README describes; NVIDIA's recipe restarts the optimizer and changes the batch;
* NSP label 1 means that the second segment is random, as in the official code.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from datasets import DatasetDict
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, TrainingArguments

from ..modeling.layers.losses import IGNORE
from .arguments import BestiaryTrainingArguments
from .base import Batch, Sums
from .documents import create_pretraining_pairs, pack_segments
from .masking import MaskingCollator
from .phases import PhasedDataset
from .pretraining import PretrainingDataArguments, PretrainingTrainer


@dataclass
class BertPretrainingDataArguments(PretrainingDataArguments):
    """Data of BERT pre-training.

    Args:
        dupe_factor: passes over the corpus when pairs are built (official code: 10).
        short_seq_prob: share of documents whose pairs are made short (0.1).
        nsp_probability: chance that the second segment is random (0.5).
        whole_word: mask all pieces of a word or none (the later "whole word masking" models).
        long_max_length: length of the last part of the run (512); None keeps one length.
        long_fraction: share of the updates at that length (0.1).
    """

    dupe_factor: int = field(default=10, metadata={"help": "Passes over the corpus when pairs are built."})
    short_seq_prob: float = field(default=0.1, metadata={"help": "Share of documents whose pairs are made short."})
    nsp_probability: float = field(default=0.5, metadata={"help": "Chance that the second segment is random."})
    whole_word: bool = field(default=False, metadata={"help": "Mask all pieces of a word or none."})
    long_max_length: int | None = field(default=None, metadata={"help": "Length of the last part of the run."})
    long_fraction: float = field(default=0.1, metadata={"help": "Share of the updates at that length."})


@dataclass
class BertPretrainingTrainingArguments(BestiaryTrainingArguments):
    """Training arguments of BERT pre-training.

    Changed defaults (official code and paper, appendix A.2):
        optimizer: bert_adam; schedule: bert; learning_rate: 1e-4; warmup_steps: 10,000; weight_decay: 0.01;
        max_grad_norm: 1.0; adam_beta2: 0.999; adam_epsilon: 1e-6.
    """

    optimizer: str | None = field(default="bert_adam", metadata={"help": "Adam without bias correction."})
    schedule: str | None = field(default="bert", metadata={"help": "Linear warm-up, then 1 - s/T of the peak."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate."})
    warmup_steps: float = field(default=10_000, metadata={"help": "Updates until the peak; below 1, a share of all."})
    weight_decay: float = field(default=0.01, metadata={"help": "Decoupled weight decay."})


class BertPretrainingTrainer(PretrainingTrainer):
    """Trains `BertPretrainingForPreTraining`; also logs accuracies of the sentence-pair decision."""

    data_arguments = BertPretrainingDataArguments
    collator_columns = ("next_sentence_label",)

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.label_names = ["labels"]

    def loss_weights(self) -> dict[str, float]:
        return self.accelerator.unwrap_model(self.model).loss_weights()

    def count_items(self, batch: Batch) -> Sums:
        """Masked tokens, and pairs with a label."""
        counts = {"mlm": (batch["labels"] != IGNORE).sum()}
        if "next_sentence_label" in batch:
            counts["sentence"] = (batch["next_sentence_label"] != IGNORE).sum()
        return counts

    def metric_sums(self, outputs: Any, batch: Batch) -> Sums:
        if outputs.sentence_loss is None:
            return {}
        labels = batch["next_sentence_label"]
        right = outputs.seq_relationship_logits.argmax(-1) == labels  # never where there is no label
        return {"sentence_right": right.sum(), "sentence_all": (labels != IGNORE).sum()}

    def metrics_from_sums(self, sums: Sums) -> dict[str, float]:
        return {"sentence_accuracy": sums["sentence_right"].item() / max(1, sums["sentence_all"].item())}

    @classmethod
    def build_datasets(
        cls,
        documents: DatasetDict,
        tokenizer: PreTrainedTokenizerBase,
        config: PreTrainedConfig,
        data: BertPretrainingDataArguments,
        training: TrainingArguments,
    ) -> dict[str, Any]:
        """Sentence pairs (or, without next-sentence prediction, stretches of text) of one length or of two."""
        cls.check_sizes(tokenizer, config, max(data.max_length, data.long_max_length or 0))
        tokenized = {split: cls.tokenized(part, tokenizer, data) for split, part in documents.items()}

        def examples(split: str, max_length: int) -> Any:
            if not config.next_sentence_prediction:
                return pack_segments(tokenized[split], tokenizer, max_length, seed=data.data_seed)
            return create_pretraining_pairs(
                tokenized[split],
                tokenizer,
                max_length,
                data.dupe_factor if split == "train" else 1,
                data.short_seq_prob,
                data.nsp_probability,
                seed=data.data_seed,
            )

        built = {split: examples(split, data.max_length) for split in tokenized}
        if data.long_max_length is not None:
            built["train"] = cls._two_lengths(built["train"], examples("train", data.long_max_length), data, training)
        return built

    @staticmethod
    def _two_lengths(
        short: Any, long: Any, data: BertPretrainingDataArguments, training: TrainingArguments
    ) -> PhasedDataset:
        """Short sequences, then long ones, for exactly `max_steps` updates; sets the sampling of `training` to
        sequential.
        """
        if training.max_steps <= 0:
            raise ValueError(
                "long_max_length needs training.max_steps, since the change of length comes at a share of all updates."
            )
        if not 0 < data.long_fraction < 1:
            raise ValueError(f"long_fraction must be in (0, 1), got {data.long_fraction}; the paper uses 0.1.")
        batch = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
        long_steps = round(training.max_steps * data.long_fraction)
        training.train_sampling_strategy = "sequential"
        return PhasedDataset(
            [(short, (training.max_steps - long_steps) * batch), (long, long_steps * batch)], seed=training.seed
        )

    @classmethod
    def build_collator(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        config: PreTrainedConfig,
        data: BertPretrainingDataArguments,
        training: TrainingArguments,
    ) -> MaskingCollator:
        return dataclasses.replace(
            super().build_collator(tokenizer, config, data, training), whole_word=data.whole_word
        )
