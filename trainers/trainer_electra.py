"""Joint pre-training of ELECTRA's generator and discriminator (Clark et al., 2020, arXiv 2003.10555).

Both losses are normalised by their own counts over the whole optimizer step: masked tokens for the generator, real
tokens ([CLS] and [SEP] included) for the discriminator. What the generator samples for an example depends on `(seed,
epoch, example)` alone.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, TrainingArguments

from ..modeling.layers.losses import IGNORE
from .arguments import BestiaryTrainingArguments
from .base import Batch, Sums
from .masking import ElectraMaskingCollator, MaskingCollator
from .pretraining import PretrainingDataArguments, PretrainingTrainer


BINS = 1000
"""Resolution of the discriminator's AUC: scores are counted in so many equal intervals of the probability."""


@dataclass
class ElectraTrainingArguments(BestiaryTrainingArguments):
    """Training arguments of ELECTRA pre-training.

    Changed defaults (official code; paper, table 6):
        optimizer: bert_adam; schedule: electra; learning_rate: 2e-4 (base, large; small 5e-4); warmup_steps: 10,000;
        weight_decay: 0.01; max_grad_norm: 1.0 over both networks; adam_beta2: 0.999; adam_epsilon: 1e-6.
    """

    optimizer: str | None = field(default="bert_adam", metadata={"help": "Adam without bias correction."})
    schedule: str | None = field(
        default="electra", metadata={"help": "Decay from the first step on, times the warm-up."}
    )
    learning_rate: float = field(default=2e-4, metadata={"help": "Peak learning rate."})
    warmup_steps: float = field(default=10_000, metadata={"help": "Updates of warm-up; below 1, a share of all."})
    weight_decay: float = field(default=0.01, metadata={"help": "Decoupled weight decay."})


class ElectraTrainer(PretrainingTrainer):
    """Trains `ElectraJointForPreTraining`.

    Logged besides the losses: `generator_accuracy` (most probable token is the original), `sampled_accuracy` (sampled
    token is), `replaced_share` (of the real tokens), and of the discriminator on real tokens `accuracy`, `precision`,
    `recall` (of replaced tokens, threshold 0.5) and `auc` (by counting scores in 1,000 bins).
    """

    data_arguments = PretrainingDataArguments

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.label_names = ["labels"]

    def loss_weights(self) -> dict[str, float]:
        return self.accelerator.unwrap_model(self.model).loss_weights()

    def count_items(self, batch: Batch) -> Sums:
        """Masked tokens, and real tokens."""
        return {"mlm": (batch["labels"] != IGNORE).sum(), "discriminator": batch["attention_mask"].sum()}

    def metric_sums(self, outputs: Any, batch: Batch) -> Sums:
        labels = batch["labels"]
        masked = labels != IGNORE
        sums = {"masked": masked.sum(), "generator_right": (outputs.generator_predictions == labels)[masked].sum()}
        if outputs.is_fake is None:
            return sums
        real = batch["attention_mask"].bool()
        fake = outputs.is_fake[real]  # (N,)
        probability = outputs.logits[real].float().sigmoid().nan_to_num()  # a nan belongs in the loss, not in a bin
        bins = (probability * BINS).long().clamp(max=BINS - 1) + BINS * fake.long()
        return sums | {
            "sampled_right": (masked & ~outputs.is_fake).sum(),
            "scores": torch.bincount(bins, minlength=2 * BINS).view(2, BINS),
        }

    def metrics_from_sums(self, sums: Sums) -> dict[str, float]:
        masked = sums["masked"].item()
        figures = {"generator_accuracy": sums["generator_right"].item() / max(1, masked)}
        if "scores" not in sums:
            return figures
        real, fake = sums["scores"].double()  # (BINS,) each, by rising probability of "replaced"
        called_fake = slice(BINS // 2, None)
        hits, alarms = fake[called_fake].sum().item(), real[called_fake].sum().item()
        tokens, replaced = real.sum().item() + fake.sum().item(), fake.sum().item()
        below = real.cumsum(0) - real / 2  # real tokens with a lower score, half of those in the same bin
        pairs = max(1.0, real.sum().item() * replaced)
        return figures | {
            "sampled_accuracy": sums["sampled_right"].item() / max(1, masked),
            "replaced_share": replaced / max(1.0, tokens),
            "discriminator_accuracy": (hits + real.sum().item() - alarms) / max(1.0, tokens),
            "discriminator_precision": hits / max(1.0, hits + alarms),
            "discriminator_recall": hits / max(1.0, replaced),
            "discriminator_auc": (fake * below).sum().item() / pairs,
        }

    @classmethod
    def build_collator(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        config: PreTrainedConfig,
        data: PretrainingDataArguments,
        training: TrainingArguments,
    ) -> MaskingCollator:
        """ELECTRA's masking; the collator derives the official limit on predictions unless the recipe sets one."""
        return ElectraMaskingCollator(
            tokenizer,
            mlm_probability=data.mlm_probability,
            max_predictions=data.max_predictions,
            max_length=data.max_length,
            pad_to_multiple_of=data.pad_to_multiple_of,
            seed=training.seed,
        )
