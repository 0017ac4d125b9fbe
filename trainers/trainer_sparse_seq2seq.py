"""Training of sparse sequence-to-sequence models (Peters et al., 2019, arXiv 1905.05702) by the entmax loss.

Decisions:
* the loss is summed over target tokens and divided by sentences, as the official code does by default, or by tokens;
  gradients are cut at a norm of 5 either way;
* perplexity is not logged, since a gold token may have probability 0: the share of such tokens is, with that of tokens
  whose loss is exactly 0, and the mean sizes of the supports of attention and output;
* Adam with 1e-3 stands for the paper's optimizer (from memory; the code's default is SGD with 1.0).
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..modeling.layers.losses import IGNORE
from .base import Batch, Sums
from .seq2seq import Seq2SeqBestiaryTrainer, Seq2SeqBestiaryTrainingArguments


if TYPE_CHECKING:
    from ..recipe import Recipe

NORMALISATIONS = ("sentences", "tokens")


@dataclass
class SparseSeq2seqTrainingArguments(Seq2SeqBestiaryTrainingArguments):
    """Training arguments of sparse sequence-to-sequence models.

    Added:
        loss_normalization: "sentences" or "tokens" that the sum of losses is divided by.

    Changed defaults:
        learning_rate: 1e-3 with Adam, schedule: constant, per_device_train_batch_size: 64 sentences (the paper, from
            memory);
        max_grad_norm: 5 (official code); adam_epsilon: 1e-8 (torch).

    Raises:
        ValueError: another normalisation.
    """

    loss_normalization: str = field(default="sentences", metadata={"help": "sentences (official code) or tokens."})
    schedule: str | None = field(default="constant", metadata={"help": "Only validation lowers the rate."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Sentences in a batch."})
    max_grad_norm: float = field(default=5.0, metadata={"help": "Largest norm of the gradient."})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "Epsilon of Adam."})

    def __post_init__(self):
        if self.loss_normalization not in NORMALISATIONS:
            raise ValueError(
                f"{type(self).__name__}.loss_normalization must be one of {', '.join(NORMALISATIONS)}, got "
                f"{self.loss_normalization!r}."
            )
        super().__post_init__()


class SparseSeq2seqTrainer(Seq2SeqBestiaryTrainer):
    """Trains `SparseSeq2seqForConditionalGeneration`.

    Logs `token_loss` (the entmax loss of a token), `attention_support` and `output_support` (mean numbers of source
    positions and symbols with a probability), `zero_loss` and `zero_gold` (shares of tokens whose loss is exactly 0,
    and whose probability is 0). Without generation `predict` gives the sum of the losses of every target.
    """

    args: SparseSeq2seqTrainingArguments
    training_arguments = SparseSeq2seqTrainingArguments
    predicted = "sequence_losses"
    smooths_labels = False

    def count_items(self, batch: Batch) -> Sums:
        """Sentences with a label, or labels."""
        kept = batch["labels"] != IGNORE
        return {"loss": kept.any(1).sum() if self.args.loss_normalization == "sentences" else kept.sum()}

    def metric_sums(self, outputs: Any, batch: Batch) -> Sums:
        names = ("attention_support", "output_support", "zero_loss", "zero_gold")
        sums = {name: getattr(outputs, name) for name in names}
        return sums | {"token_loss": outputs.loss.double(), "tokens": (batch["labels"] != IGNORE).sum()}

    def metrics_from_sums(self, sums: Sums) -> dict[str, float]:
        count = max(1, sums["tokens"].item())
        return {name: value.item() / count for name, value in sums.items() if name != "tokens"}

    @classmethod
    def build_config(cls, recipe: "Recipe", tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
        """The configuration that the recipe describes; a new model reads and writes the tokenizer's vocabulary."""
        if recipe.model.get("name_or_path") is not None:
            return recipe.build_config()
        end = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        start = tokenizer.cls_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        return recipe.build_config(
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.pad_token_id if start is None else start,
            eos_token_id=end,
            unk_token_id=tokenizer.unk_token_id,
        )
