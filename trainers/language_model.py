"""Pre-training of networks that are masked language models, or with `is_decoder` next-token ones."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from ..modeling.layers.losses import IGNORE
from ..recipe import Recipe
from ..registry import get_paper
from .base import Batch, Sums
from .masking import SpecialTokens
from .pretraining import PretrainingDataArguments, PretrainingTrainer


@dataclass(eq=False)
class NextTokenCollator:
    """Pads rows with `input_ids` on the right; labels are the ids themselves, which the model shifts.

    The batch has `input_ids`, `attention_mask` and `labels`, -100 at padding, all (B, L) int64. Other columns are left
    out, token types too.

    Args:
        tokenizer: a tokenizer with [CLS], [SEP], [PAD] and [MASK], or a `SpecialTokens`.
        max_length: longest row allowed; None does not check.
        pad_to_multiple_of: round the padded length up to a multiple.
    """

    tokenizer: PreTrainedTokenizerBase | SpecialTokens
    max_length: int | None = None
    pad_to_multiple_of: int | None = None

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate rows.

        Raises:
            ValueError: a row that is empty or longer than `max_length`.
        """
        rows = [np.asarray(feature["input_ids"], dtype=np.int64) for feature in features]
        lengths = np.array([len(row) for row in rows])
        if lengths.min() == 0 or (self.max_length is not None and lengths.max() > self.max_length):
            wrong = lengths.argmin() if lengths.min() == 0 else lengths.argmax()
            raise ValueError(
                f"{type(self).__name__}: row {wrong} has {lengths[wrong]} tokens; rows must have 1 to "
                f"{self.max_length or 'any number of'}. Build the data set with the model's length."
            )
        multiple = self.pad_to_multiple_of or 1
        inside = np.arange(-(-lengths.max() // multiple) * multiple) < lengths[:, None]
        pad_id = SpecialTokens.from_tokenizer(self.tokenizer).pad_id
        ids, labels = np.full(inside.shape, pad_id), np.full(inside.shape, IGNORE)
        ids[inside] = labels[inside] = np.concatenate(rows)
        columns = {"input_ids": ids, "attention_mask": inside.astype(np.int64), "labels": labels}
        return {name: torch.from_numpy(column) for name, column in columns.items()}


class LanguageModelTrainer(PretrainingTrainer):
    """Trains a paper's class for pre-training on masked tokens, or if its configuration has `is_decoder` on the next
    token. Logs the loss as `mlm_loss` or `lm_loss`, and `perplexity`, its exponential over all predicted tokens.
    `predict` gives the sum of the losses of every sequence.
    """

    predicted = "sequence_losses"

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.label_names = ["labels"]

    @property
    def is_causal(self) -> bool:
        """Whether the model predicts the next token."""
        return self.accelerator.unwrap_model(self.model).config.is_decoder

    def loss_weights(self) -> dict[str, float]:
        return {"lm" if self.is_causal else "mlm": 1.0}

    def count_items(self, batch: Batch) -> Sums:
        """Predicted tokens: the masked ones, or all but the first."""
        labels = batch["labels"][:, 1:] if self.is_causal else batch["labels"]
        return {"lm" if self.is_causal else "mlm": (labels != IGNORE).sum()}

    def loss_sums(self, model: torch.nn.Module, batch: Batch) -> tuple[Sums, Any]:
        outputs = model(**batch, num_items_in_batch=1)
        return dict.fromkeys(self.loss_weights(), outputs.loss), outputs

    def metric_sums(self, outputs: Any, batch: Batch) -> Sums:
        (count,) = self.count_items(batch).values()
        return {"surprise": outputs.loss.double(), "predicted": count}

    def metrics_from_sums(self, sums: Sums) -> dict[str, float]:
        return {"perplexity": math.exp(min(sums["surprise"].item() / max(1, sums["predicted"].item()), 700.0))}

    @classmethod
    def build_config(cls, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
        """As in `PretrainingTrainer`; `name_or_path` may be a stock BERT, whose weights the paper's class starts
        from.
        """
        name = recipe.model.get("name_or_path")
        if name is None or recipe.slug is None:
            return super().build_config(recipe, tokenizer)
        found = AutoConfig.from_pretrained(name)
        if found.model_type != "bert":
            return super().build_config(recipe, tokenizer)
        changes = {key: value for key, value in recipe.model.items() if key not in ("name_or_path", "model_type")}
        return get_paper(recipe.slug).config.from_stock(found, **changes)  # type: ignore[attr-defined]

    @classmethod
    def build_model(cls, recipe: Recipe, config: PreTrainedConfig) -> PreTrainedModel:
        """The paper's class for pre-training, from the checkpoint that the recipe names or fresh."""
        name = recipe.model.get("name_or_path")
        if name is None or recipe.slug is None:
            return super().build_model(recipe, config)
        return get_paper(recipe.slug).models["AutoModelForPreTraining"].from_pretrained(name, config=config)

    @classmethod
    def build_collator(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        config: PreTrainedConfig,
        data: PretrainingDataArguments,
        training: TrainingArguments,
    ) -> Any:
        """The collator that masks, or that of the next token."""
        if config.is_decoder:
            return NextTokenCollator(tokenizer, config.max_position_embeddings, data.pad_to_multiple_of)
        return super().build_collator(tokenizer, config, data, training)
