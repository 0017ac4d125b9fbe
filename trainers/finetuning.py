"""Fine-tuning on a labelled task: classification, regression, tagging and extractive question answering, for any
encoder.

The loss is computed here from the model's logits, not by the model: most heads of transformers ignore
`num_items_in_batch`, and the mean they return cannot be put together again from micro-batches. For question answering
it also leaves padding out of the softmax, as our heads do and stock heads do not, since the width of the padding
depends on how a batch is split.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig

from ..modeling.layers.losses import (
    IGNORE,
    LossSum,
    check_labels,
    cross_entropy_sum,
    sequence_classification_sum,
    span_sum,
)
from .arguments import BestiaryTrainingArguments
from .base import Batch, BestiaryTrainer, Sums


LABELS = ("labels", "start_positions", "end_positions")


@dataclass
class FinetuneTrainingArguments(BestiaryTrainingArguments):
    """Training arguments of fine-tuning.

    Changed defaults (BERT, appendix A.3): learning_rate 5e-5, 3 epochs, batch 32, warmup_steps 0.1 (a share),
    weight_decay 0.01.
    """

    learning_rate: float = field(default=5e-5, metadata={"help": "Peak learning rate."})
    num_train_epochs: float = field(default=3.0, metadata={"help": "Passes over the training set."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Batch per device."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Updates of warm-up; below 1, a share of all."})
    weight_decay: float = field(default=0.01, metadata={"help": "Decoupled weight decay."})


class FinetuneTrainer(BestiaryTrainer):
    """Trains any model with a head for sequence classification or regression, token classification or question
    answering.
    """

    def count_items(self, batch: Batch) -> Sums:
        """Entries that carry a loss: ends of spans inside the sequence, scores, or labels that are not -100."""
        if "start_positions" in batch:
            ends = torch.stack([batch["start_positions"], batch["end_positions"]])
            return {"loss": ((ends >= 0) & (ends < batch["input_ids"].shape[1])).sum()}
        labels = batch["labels"]
        return {"loss": torch.tensor(labels.numel()) if labels.is_floating_point() else (labels != IGNORE).sum()}

    def loss_sums(self, model: nn.Module, batch: Batch) -> tuple[Sums, Any]:
        outputs = model(**{name: value for name, value in batch.items() if name not in LABELS})
        total, _ = task_loss_sum(self.accelerator.unwrap_model(self.model).config, outputs, batch)
        return {"loss": total}, outputs


def task_loss_sum(config: PreTrainedConfig, outputs: Any, batch: Batch) -> LossSum:
    """Sum and count of the loss that the labels of a batch ask for.

    `start_positions` and `end_positions` (B,) with `start_logits`, `end_logits` (B, T): span. Logits (B, T, C): one
    class a token. Logits (B, C): by `config.problem_type`.

    Raises:
        ValueError: a label out of range.
    """
    if "start_positions" in batch:
        ends = outputs.start_logits, outputs.end_logits
        if "attention_mask" in batch:
            lowest = torch.finfo(outputs.start_logits.dtype).min
            ends = tuple(logits.masked_fill(batch["attention_mask"] == 0, lowest) for logits in ends)
        return span_sum(*ends, batch["start_positions"], batch["end_positions"])
    if outputs.logits.dim() == 3:
        check_labels(type(config).__name__, batch["labels"], outputs.logits.shape[-1])
        return cross_entropy_sum(outputs.logits, batch["labels"])
    return sequence_classification_sum(config, outputs.logits, batch["labels"])


def classification_metrics(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, macro F1 and Matthews correlation; predictions (N, C) logits, labels (N,)."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    chosen = predictions.argmax(-1)
    return {
        "accuracy": float(accuracy_score(labels, chosen)),
        "macro_f1": float(f1_score(labels, chosen, average="macro", zero_division=0)),
        "matthews": float(matthews_corrcoef(labels, chosen)),
    }


def regression_metrics(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Pearson and Spearman correlation and mean squared error; predictions (N, 1) or (N,), labels (N,)."""
    from scipy.stats import pearsonr, spearmanr

    values = predictions.reshape(-1)
    return {
        "pearson": float(pearsonr(values, labels.reshape(-1))[0]),
        "spearman": float(spearmanr(values, labels.reshape(-1))[0]),
        "mse": float(np.mean((values - labels.reshape(-1)) ** 2)),
    }


def tagging_metrics(predictions: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Accuracy over words and, if the tags mark entities (O, B-x, I-x, ...), precision, recall and F1 of whole
    entities as in the CoNLL tasks; predictions (N, T, C) logits, labels (N, T) with -100.
    """
    chosen, kept = predictions.argmax(-1), labels != IGNORE
    figures = {"accuracy": float((chosen == labels)[kept].mean())}
    if not all(name == "O" or re.match("[BIESLU]-.", name) for name in names):
        return figures
    from seqeval.metrics import f1_score, precision_score, recall_score

    told = [[names[tag] for tag in row[mask]] for row, mask in zip(labels, kept)]
    guessed = [[names[tag] for tag in row[mask]] for row, mask in zip(chosen, kept)]
    for name, score in (("precision", precision_score), ("recall", recall_score), ("f1", f1_score)):
        figures[name] = float(score(told, guessed, zero_division=0))
    return figures
