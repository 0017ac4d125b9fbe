"""Pre-training with linear attention (Katharopoulos et al., 2020, arXiv 2006.16236): masked or next-token language
model. The papers have no objective of their own, and no text; the defaults are those of their copy task.
"""

from dataclasses import dataclass, field

from .arguments import BestiaryTrainingArguments
from .language_model import LanguageModelTrainer


@dataclass
class LinearAttentionTrainingArguments(BestiaryTrainingArguments):
    """Training arguments of linear attention.

    Changed defaults (Katharopoulos et al., section 4.1):
        optimizer: radam; learning_rate: 1e-3 (there 1e-4 after 3,000 updates); schedule: constant.
    """

    optimizer: str | None = field(default="radam", metadata={"help": "Adam with a rectified rate."})
    schedule: str | None = field(default="constant", metadata={"help": "The papers lower the rate by hand."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate."})


class LinearAttentionTrainer(LanguageModelTrainer):
    """Trains `LinearAttentionForPreTraining`."""
