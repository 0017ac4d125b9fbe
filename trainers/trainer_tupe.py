"""Pre-training of TUPE (Ke et al., 2020, arXiv 2006.15595): BERT's masked language model without sentence pairs.

Decisions where the official program and this package differ:
* masks are counted and drawn as everywhere here, over tokens that are not special; the official collator takes
  floor(0.15 n + u) positions, u uniform, special tokens included;
* a sequence is a stretch of text that ends with a sentence (`pack_segments`), as for BERT without sentence pairs.
"""

from dataclasses import dataclass, field

from torch import nn

from .arguments import BestiaryTrainingArguments
from .trainer_bert import BertPretrainingTrainer


@dataclass
class TupeTrainingArguments(BestiaryTrainingArguments):
    """Training arguments of TUPE pre-training.

    Added:
        decay_all_parameters: biases and LayerNorms decay too, as by the official optimizer. It acts on the optimizers
            that `optim` names; those that `optimizer` names keep BERT's rule.

    Changed defaults (paper; official commands):
        schedule: linear; learning_rate: 1e-4; warmup_steps: 10,000; weight_decay: 0.01; adam_epsilon: 1e-6. The
        optimizer is transformers' AdamW.
    """

    decay_all_parameters: bool = field(default=True, metadata={"help": "Biases and LayerNorms decay too."})
    schedule: str | None = field(default="linear", metadata={"help": "Linear warm-up, then linear decay to 0."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate."})
    warmup_steps: float = field(default=10_000, metadata={"help": "Updates until the peak; below 1, a share of all."})
    weight_decay: float = field(default=0.01, metadata={"help": "Decoupled weight decay."})


class TupeTrainer(BertPretrainingTrainer):
    """Trains `TupeForPreTraining`."""

    args: TupeTrainingArguments

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters that decay."""
        if self.args.decay_all_parameters:
            return [name for name, _ in model.named_parameters()]
        return super().get_decay_parameter_names(model)
