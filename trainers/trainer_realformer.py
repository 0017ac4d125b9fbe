"""Pre-training of RealFormer (He et al., 2020, arXiv 2012.11747): BERT's, with two diagnostics of attention.

Optimizer, schedule and data are those of BERT, as the paper says ("standard BERT setup").
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from .base import Batch, Sums
from .trainer_bert import BertPretrainingTrainer, BertPretrainingTrainingArguments


@dataclass
class RealformerTrainingArguments(BertPretrainingTrainingArguments):
    """Training arguments of RealFormer pre-training, those of BERT.

    Added:
        attention_statistics: evaluations also log, for each layer, the mean entropy of its heads' attention in nats
            (`attention_entropy_<layer>`), and the mean Jensen-Shannon divergence from the same heads of the layer
            below (`attention_divergence_<layer>`), the two diagnostics of the paper. Rows are then not packed. The
            figures of every head are left in `RealformerTrainer.attention_table`.
    """

    attention_statistics: bool = field(
        default=False, metadata={"help": "Evaluations log entropy and divergence of attention, layer by layer."}
    )


def attention_sums(attentions: tuple[torch.Tensor, ...], mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Entropies, and Jensen-Shannon divergences of a layer from the one below, in nats, summed over real queries.

    Args:
        attentions: of N layers, probabilities (B, H, T, T).
        mask: (B, T), non-zero at real tokens.

    Returns:
        (N, H) and (N - 1, H), float64.
    """
    real = (mask != 0)[:, None, :]  # (B, 1, T)

    def entropy(shares: torch.Tensor) -> torch.Tensor:
        return torch.special.entr(shares).sum(-1)  # (B, H, T)

    def over_queries(values: torch.Tensor) -> torch.Tensor:
        return torch.where(real, values, 0.0).double().sum((0, 2))  # (H,)

    shares = [each.float() for each in attentions]
    own = [entropy(each) for each in shares]
    divergences = [
        over_queries(entropy((below + above) / 2) - (low + high) / 2)
        for below, above, low, high in zip(shares, shares[1:], own, own[1:])
    ]
    heads = shares[0].shape[1]
    empty = torch.zeros(0, heads, dtype=torch.float64, device=mask.device)
    return torch.stack([over_queries(each) for each in own]), torch.stack(divergences) if divergences else empty


class RealformerTrainer(BertPretrainingTrainer):
    """Trains `RealformerForPreTraining`.

    `attention_table` holds, after an evaluation with `attention_statistics`, the mean `entropy` (N, H) and
    `divergence` (N - 1, H) of every head.
    """

    args: RealformerTrainingArguments
    attention_table: dict[str, torch.Tensor] | None = None

    def loss_sums(self, model: torch.nn.Module, batch: Batch) -> tuple[Sums, Any]:
        if model.training or not self.args.attention_statistics:
            return super().loss_sums(model, batch)
        return super().loss_sums(model, {**batch, "output_attentions": True})

    def metric_sums(self, outputs: Any, batch: Batch) -> Sums:
        sums = super().metric_sums(outputs, batch)
        if not outputs.attentions:
            return sums
        entropy, divergence = attention_sums(outputs.attentions, batch["attention_mask"])
        tokens = batch["attention_mask"].sum()
        return sums | {"entropy": entropy, "divergence": divergence, "queries": tokens}

    def metrics_from_sums(self, sums: Sums) -> dict[str, float]:
        figures = super().metrics_from_sums(sums) if "sentence_all" in sums else {}
        if "entropy" not in sums:
            return figures
        queries = max(1, int(sums["queries"]))
        self.attention_table = {name: sums[name] / queries for name in ("entropy", "divergence")}
        for name, first in (("entropy", 0), ("divergence", 1)):
            for layer, heads in enumerate(self.attention_table[name], first):
                figures[f"attention_{name}_{layer}"] = heads.mean().item()
        return figures
