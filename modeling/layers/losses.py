"""Losses as (sum, count) pairs.

A head divides by the count of its own batch; a trainer divides by the count of the whole optimizer step, over
accumulation steps and processes, so that the way a batch is split never changes the update.
"""

import torch
from torch.nn import functional as F


IGNORE = -100
"""Label of positions that carry no loss."""

LossSum = tuple[torch.Tensor, torch.Tensor]


def mean_loss(loss: LossSum, num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
    """Sum over kept items divided by their number, or by `num_items_in_batch` if a trainer knows the number of the
    whole step.

    With no kept item the result is 0 and still carries a gradient (of zeros), which distributed training needs.
    """
    total, count = loss
    return total / (count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch)


def check_labels(owner: str, labels: torch.Tensor, num_labels: int, field: str = "labels") -> None:
    """`ValueError` unless every label is -100 or in [0, num_labels).

    Only looked at on CPU and outside torch.compile: elsewhere the look would wait for the device.
    """
    if torch.compiler.is_compiling() or labels.device.type != "cpu" or labels.numel() == 0:
        return
    kept = labels[labels != IGNORE]
    if kept.numel() and not (0 <= int(kept.min()) and int(kept.max()) < num_labels):
        raise ValueError(
            f"{owner}: {field} must be in [0, {num_labels}) or {IGNORE} (ignored), got values from "
            f"{int(kept.min())} to "
            f"{int(kept.max())}; check the label column, or set config.num_labels."
        )


def cross_entropy_sum(logits: torch.Tensor, labels: torch.Tensor) -> LossSum:
    """Sum of -log softmax(logits)[label] over labels that are not -100; logits (..., C), labels (...)."""
    flat = labels.flatten()
    total = F.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), flat, ignore_index=IGNORE, reduction="sum")
    return total, (flat != IGNORE).sum()


def problem_type(config, labels: torch.Tensor) -> str:
    """`config.problem_type`, or transformers' rule: one output is regression, integer labels are classes, others
    multi-label.
    """
    if config.problem_type is not None:
        return config.problem_type
    if config.num_labels == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def sequence_classification_sum(config, logits: torch.Tensor, labels: torch.Tensor) -> LossSum:
    """Loss of a sequence-level head by problem type; logits (B, C).

    Regression: squared error over all outputs. Classes: cross-entropy, labels (B,). Multi-label: binary cross-entropy
    over all entries of labels (B, C).

    Raises:
        ValueError: label out of range, or labels whose shape does not fit the problem type.
    """
    kind = problem_type(config, labels)
    if kind == "single_label_classification":
        check_labels(type(config).__name__, labels, config.num_labels)
        return cross_entropy_sum(logits, labels.flatten())
    if labels.numel() != logits.numel():
        raise ValueError(
            f"{kind} with {logits.shape[-1]} outputs needs labels of shape {tuple(logits.shape)}, got "
            f"{tuple(labels.shape)}."
        )
    targets = labels.reshape(logits.shape).float()
    per_entry = F.mse_loss if kind == "regression" else F.binary_cross_entropy_with_logits
    return per_entry(logits.float(), targets, reduction="sum"), torch.tensor(targets.numel(), device=logits.device)


def span_sum(
    start_logits: torch.Tensor, end_logits: torch.Tensor, start_positions: torch.Tensor, end_positions: torch.Tensor
) -> LossSum:
    """Cross-entropy of both ends of a span; logits (B, T), positions (B,). Positions outside the sequence carry no
    loss.

    The count is the number of ends, so the mean is the average of the two, as in BERT's SQuAD code.
    """
    length = start_logits.shape[-1]
    total, count = start_logits.new_zeros((), dtype=torch.float32), 0
    for logits, positions in ((start_logits, start_positions), (end_logits, end_positions)):
        positions = positions.flatten()
        inside = torch.where((positions >= 0) & (positions < length), positions, IGNORE)
        part, kept = cross_entropy_sum(logits, inside)
        total, count = total + part, count + kept
    return total, count
