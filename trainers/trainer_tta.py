"""Language autoencoding of T-TA (Shin et al., 2020, arXiv 2004.08097): every token is predicted from all the others.

Nothing is masked: labels are the tokens themselves, boundary tokens included, and the model's attention keeps each
token from its own prediction.

Decisions where the official code and practice differ:
* the loss is a mean over real tokens. The official mean is over all 128 positions of every sequence, padding included,
  so that its gradient depends on how full the sequences are; `normalize_by="positions"` gives it;
* sequences are padded to the longest one of a batch, not to 128: the loss does not notice;
* a sentence that is too long loses tokens at random ends, one by one, drawn anew in every epoch; in evaluation it
  loses the last ones.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict, Features, List, Value
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, TrainingArguments
from transformers.utils import logging

from ..modeling.layers.losses import IGNORE
from .arguments import BestiaryTrainingArguments
from .base import Batch, Sums
from .masking import SpecialTokens
from .pretraining import PretrainingDataArguments, PretrainingTrainer
from .randomness import EVALUATION_EPOCH, example_rng


logger = logging.get_logger(__name__)

NORMALIZATIONS = ("tokens", "positions")
UNITS = ("sentence", "segment")


@dataclass
class TtaDataArguments(PretrainingDataArguments):
    """Data of language autoencoding; `mlm_probability` and `max_predictions` have no meaning here.

    Args:
        unit: `sentence`, one sentence an example, as in the official code; or `segment`, the stretches of text that
            masked language models of this package are trained on, for comparisons on equal rows.
    """

    unit: str = field(default="sentence", metadata={"help": "An example is a sentence or a segment."})

    def __post_init__(self):
        if self.unit not in UNITS:
            raise ValueError(f"TtaDataArguments.unit must be one of {', '.join(UNITS)}, got {self.unit!r}.")


@dataclass
class TtaTrainingArguments(BestiaryTrainingArguments):
    """Training arguments of T-TA.

    Added:
        normalize_by: `tokens` divides the loss by the real tokens; `positions` by sequences times
            `max_position_embeddings`, as the official code does.

    Changed defaults (official script):
        optimizer: bert_adam; schedule: bert; learning_rate: 1e-4; warmup_steps: 10,000; weight_decay: 0.01;
        max_grad_norm: 1.0; adam_beta2: 0.999; adam_epsilon: 1e-6.
    """

    normalize_by: str = field(default="tokens", metadata={"help": "Divide the loss by tokens or by positions."})
    optimizer: str | None = field(default="bert_adam", metadata={"help": "Adam without bias correction."})
    schedule: str | None = field(default="bert", metadata={"help": "Linear warm-up, then 1 - s/T of the peak."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate."})
    warmup_steps: float = field(default=10_000, metadata={"help": "Updates until the peak; below 1, a share of all."})
    weight_decay: float = field(default=0.01, metadata={"help": "Decoupled weight decay."})

    def __post_init__(self):
        super().__post_init__()
        if self.normalize_by not in NORMALIZATIONS:
            raise ValueError(
                f"TtaTrainingArguments.normalize_by must be one of {', '.join(NORMALIZATIONS)}, got "
                f"{self.normalize_by!r}."
            )


@dataclass(eq=False)
class TtaCollator:
    """Pads rows on the right and labels every token with itself.

    A row is a mapping with `input_ids`, first and last of which are boundary tokens ([CLS] and [SEP], which the paper
    calls [SOS] and [EOS]); other columns are left out. The batch has `input_ids`, `attention_mask` and `labels` (-100
    at padding), all (B, L) int64.

    Args:
        tokenizer: a tokenizer with [CLS], [SEP], [PAD] and [MASK], or a `SpecialTokens`.
        max_length: longest row; of a longer one tokens between the boundaries are cut from its ends, each from the
            front or the back by even chance, or all from the back in evaluation. None cuts nothing.
        pad_to_multiple_of: round the padded length up to a multiple.
        seed, epoch: with `example_key` they determine what is cut from a row. Rows without `example_key` are numbered
            as they come since the last `set_epoch`.
    """

    tokenizer: PreTrainedTokenizerBase | SpecialTokens
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    seed: int = 0
    epoch: int = 0
    _next_key: int = field(init=False, repr=False, default=0)

    def __post_init__(self) -> None:
        for option, least in (("max_length", 3), ("pad_to_multiple_of", 1)):
            value = getattr(self, option)
            if value is not None and value < least:
                raise ValueError(f"{type(self).__name__}.{option} must be at least {least} or None, got {value}.")
        if self.seed < 0:
            raise ValueError(f"{type(self).__name__}.seed must not be negative, got {self.seed}.")
        self._padding = SpecialTokens.from_tokenizer(self.tokenizer).pad_id
        self.set_epoch(self.epoch)

    def set_epoch(self, epoch: int) -> None:
        """Select the cuts of an epoch; evaluation, -1, keeps the first tokens."""
        if epoch < EVALUATION_EPOCH:
            raise ValueError(f"{type(self).__name__}.epoch must be at least {EVALUATION_EPOCH}, got {epoch}.")
        self.epoch = epoch
        self._next_key = 0

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate rows; see the class.

        Raises:
            ValueError: a row has no `input_ids`, or they are empty.
        """
        for number, feature in enumerate(features):
            if not len(feature.get("input_ids", ())):
                raise ValueError(
                    f"{type(self).__name__}: row {number} has no input_ids, only {sorted(feature)}, or they are "
                    "empty; tokenize the data set and drop empty rows."
                )
        rows = [self._cut(feature) for feature in features]
        multiple = self.pad_to_multiple_of or 1
        width = -(-max(map(len, rows)) // multiple) * multiple
        ids = np.full((len(rows), width), self._padding, dtype=np.int64)
        real = np.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = row
            real[number, : len(row)] = 1
        columns = {"input_ids": ids, "attention_mask": real, "labels": np.where(real, ids, IGNORE)}
        return {name: torch.from_numpy(column) for name, column in columns.items()}

    def _cut(self, feature: Mapping[str, Any]) -> np.ndarray:
        self._next_key += 1
        row = np.asarray(feature["input_ids"], dtype=np.int64)
        surplus = len(row) - (self.max_length or len(row))
        if surplus <= 0:
            return row
        front = 0
        if self.epoch != EVALUATION_EPOCH:
            key = int(feature.get("example_key", self._next_key - 1))
            front = int(example_rng(self.seed, self.epoch, key).binomial(surplus, 0.5))
        return np.concatenate([row[:1], row[1 + front : len(row) - 1 - (surplus - front)], row[-1:]])


class TtaTrainer(PretrainingTrainer):
    """Trains `TtaForMaskedLM`; also logs `pseudo_perplexity`, the exponential of the mean over real tokens."""

    args: TtaTrainingArguments
    data_arguments = TtaDataArguments

    def loss_weights(self) -> dict[str, float]:
        return {"autoencoding": 1.0}

    def count_items(self, batch: Batch) -> Sums:
        """Real tokens, or all positions that the official code gives to so many sequences."""
        labels = batch["labels"]
        if self.args.normalize_by == "positions":
            positions = self.accelerator.unwrap_model(self.model).config.max_position_embeddings
            return {"autoencoding": torch.tensor(len(labels) * positions, device=labels.device)}
        return {"autoencoding": (labels != IGNORE).sum()}

    def loss_sums(self, model: torch.nn.Module, batch: Batch) -> tuple[Sums, Any]:
        outputs = model(**batch, num_items_in_batch=1)
        return {"autoencoding": outputs.loss}, outputs

    def metric_sums(self, outputs: Any, batch: Batch) -> Sums:
        return {"surprise": outputs.loss.double(), "tokens": (batch["labels"] != IGNORE).sum()}

    def metrics_from_sums(self, sums: Sums) -> dict[str, float]:
        mean = sums["surprise"].item() / max(1, sums["tokens"].item())
        return {"pseudo_perplexity": math.exp(min(mean, 700.0))}

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """Loss, log-likelihoods (B, T) of the tokens given all others (0 at padding), and labels of one batch."""
        loss, outputs, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if labels is None:
            return loss, outputs, labels
        inputs = self._prepare_inputs({name: value for name, value in inputs.items() if name != "labels"})
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**inputs).logits.float().flatten(0, 1)  # (B * T, V)
            likelihoods = -F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="none")
        return loss, likelihoods.view(labels.shape), labels

    @classmethod
    def build_datasets(
        cls,
        documents: DatasetDict,
        tokenizer: PreTrainedTokenizerBase,
        config: PreTrainedConfig,
        data: TtaDataArguments,
        training: TrainingArguments,
    ) -> DatasetDict | dict[str, Any]:
        """One sentence an example, whole (the collator cuts what is too long); or segments of `max_length`."""
        cls.check_sizes(tokenizer, config, data.max_length)
        if config.query_token_id not in (None, tokenizer.mask_token_id):
            logger.warning(
                f"{type(config).__name__}.query_token_id is {config.query_token_id}, but [MASK] of the tokenizer is "
                f"{tokenizer.mask_token_id}: the queries start from another token."
            )
        if data.unit == "segment":
            return super().build_datasets(documents, tokenizer, config, data, training)
        special = SpecialTokens.from_tokenizer(tokenizer)
        return {
            split: _sentences(cls.tokenized(part, tokenizer, data), special, data.num_proc)
            for split, part in documents.items()
        }

    @classmethod
    def build_collator(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        config: PreTrainedConfig,
        data: TtaDataArguments,
        training: TrainingArguments,
    ) -> Any:
        """The `TtaCollator`, which labels every token with itself."""
        return TtaCollator(
            tokenizer, max_length=data.max_length, pad_to_multiple_of=data.pad_to_multiple_of, seed=training.seed
        )


def _sentences(documents: Dataset, special: SpecialTokens, num_proc: int | None) -> Dataset:
    """Rows `input_ids`, [CLS] sentence [SEP], of tokenised documents in their order."""
    return documents.map(
        _with_boundaries,
        batched=True,
        remove_columns=documents.column_names,
        features=Features({"input_ids": List(Value("int32"))}),
        fn_kwargs={"first": special.cls_id, "last": special.sep_id},
        num_proc=num_proc,
        desc="Laying out sentences",
    )


def _with_boundaries(batch: dict[str, list], first: int, last: int) -> dict[str, list]:
    return {"input_ids": [[first, *sentence, last] for document in batch["sentences"] for sentence in document]}
