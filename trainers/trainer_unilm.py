"""Training of UniLM (Dong et al., 2019, arXiv 1905.03197): one cloze loss under four masks, and fine-tuning to write.

Pre-training draws a task for every example: bidirectional 1/3 (with next-sentence prediction), sequence to sequence
1/3, left-to-right and right-to-left 1/6 each; tokens are masked one by one or in bigrams and trigrams. Fine-tuning
masks tokens of the target, its end among them, so that the model learns when to stop.

Decisions where the paper and practice differ:
* the paper gives the mixture "within one training batch", the official model takes a task for each example; examples
  draw for themselves here. `task_per="batch"` gives a batch of the collator one task, drawn by the key of its first
  row, so that how a batch is split then changes what is learnt;
* text B of an example follows A. For the bidirectional task it is replaced, with probability 0.5, by the B of another
  row, which is chosen once by `data_seed`;
* an evaluation of fine-tuning measures the loss of every target token under a [MASK] of its own given the ones before
  it, without smoothing: what decoding goes by, and comparable with any encoder-decoder;
* random replacements come from the whole vocabulary, special tokens included, as in the official code;
* gradients are cut at a norm of 1.0 over all parameters; the official BertAdam cuts each tensor by itself.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from datasets import DatasetDict, concatenate_datasets
from transformers import (
    AutoConfig,
    BertForPreTraining,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from ..configuration.configuration_unilm import UniLMConfig
from ..conversion.unilm import extended
from ..modeling.layers.losses import IGNORE
from ..modeling.modeling_unilm import (
    BIDIRECTIONAL,
    LEFT_TO_RIGHT,
    RIGHT_TO_LEFT,
    SEQ2SEQ,
    TASKS,
    UniLMForConditionalGeneration,
    UniLMForPreTraining,
)
from .arguments import BestiaryTrainingArguments
from .base import Batch, Sums
from .documents import pack_segments
from .masking import SpecialTokens, choose_positions, mask_tokens, prediction_counts
from .pretraining import PretrainingDataArguments, PretrainingTrainer
from .randomness import EVALUATION_EPOCH, example_rng
from .seq2seq import (
    Seq2SeqBestiaryTrainer,
    Seq2SeqBestiaryTrainingArguments,
    Seq2SeqCollator,
    Seq2SeqDataArguments,
    pad_rows,
)


if TYPE_CHECKING:
    from ..recipe import Recipe

WEIGHT_ORDER = (BIDIRECTIONAL, SEQ2SEQ, LEFT_TO_RIGHT, RIGHT_TO_LEFT)
REPLACE = (0.8, 0.1, 0.1)
"""Shares of [MASK], random and kept tokens among the predicted ones."""
OTHER = ("other_input_ids", "other_token_type_ids")
"""Columns of the row whose B may take the place of a row's own."""


# -------------------------------------------------------------------------------------------------------- pre-training


@dataclass
class UniLMDataArguments(PretrainingDataArguments):
    """Data of UniLM pre-training.

    Args:
        objective_weights: shares of the tasks bidirectional, seq2seq, left_to_right and right_to_left, in this order.
        task_per: `example` or `batch` draws a task.
        ngram_mask_prob: chance that a draw masks a bigram or longer (0.2).
        max_ngram: longest run of tokens that one draw masks (3).
        nsp_probability: chance that B of a bidirectional example is another row's (0.5).
    """

    objective_weights: list[float] = field(
        default_factory=lambda: [1 / 3, 1 / 3, 1 / 6, 1 / 6],
        metadata={"help": "Shares of bidirectional, seq2seq, left_to_right, right_to_left."},
    )
    task_per: str = field(default="example", metadata={"help": "Draw a task for an example or for a batch."})
    ngram_mask_prob: float = field(default=0.2, metadata={"help": "Chance that a draw masks several tokens."})
    max_ngram: int = field(default=3, metadata={"help": "Most tokens that one draw masks."})
    nsp_probability: float = field(default=0.5, metadata={"help": "Chance that B is another row's."})


@dataclass
class UniLMTrainingArguments(BestiaryTrainingArguments):
    """Training arguments of UniLM pre-training.

    Changed defaults (paper, section 3.1):
        learning_rate: 3e-5; warmup_steps: 40,000, then linear to 0; weight_decay: 0.01. Adam has beta 0.9 and 0.999.
    """

    learning_rate: float = field(default=3e-5, metadata={"help": "Peak learning rate."})
    warmup_steps: float = field(default=40_000, metadata={"help": "Updates until the peak; below 1, a share of all."})
    weight_decay: float = field(default=0.01, metadata={"help": "Decoupled weight decay."})


@dataclass(eq=False)
class UniLMCollator:
    """Draws a task for every row, masks it, and pads on the right.

    A row has `input_ids` [CLS] A [SEP] B [SEP], `token_type_ids` (1 at B), perhaps `example_key`, and perhaps the same
    columns of another row as `other_input_ids` and `other_token_type_ids`, whose B may replace its own. The batch has
    `input_ids`, `attention_mask`, `labels` (B, T), `task_ids`, `num_tokens_a` and `next_sentence_label` (B,; 1 = B is
    of another row, -100 outside the bidirectional task); all int64.

    Args:
        tokenizer: a tokenizer with [CLS], [SEP], [PAD] and [MASK], or a `SpecialTokens`.
        mlm_probability: share of the tokens, special ones included in the count, that are predicted.
        max_predictions: most predictions in a row; None sets no limit.
        objective_weights, task_per, ngram_mask_prob, max_ngram, nsp_probability: see `UniLMDataArguments`.
        max_length: longest row; what another row's B has beyond it is cut off. None takes the row's own length.
        pad_to_multiple_of: round the padded length up to a multiple.
        seed, epoch: with `example_key` they determine all draws for a row.

    Raises:
        ValueError: a share, probability or length out of range.
    """

    tokenizer: PreTrainedTokenizerBase | SpecialTokens
    mlm_probability: float = 0.15
    max_predictions: int | None = None
    objective_weights: Sequence[float] = (1 / 3, 1 / 3, 1 / 6, 1 / 6)
    task_per: str = "example"
    ngram_mask_prob: float = 0.2
    max_ngram: int = 3
    nsp_probability: float = 0.5
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    seed: int = 0
    epoch: int = 0
    special: SpecialTokens = field(init=False, repr=False)
    _next_key: int = field(init=False, repr=False, default=0)

    def __post_init__(self) -> None:
        name = type(self).__name__
        weights = tuple(float(weight) for weight in self.objective_weights)
        if len(weights) != len(TASKS) or min(weights) < 0 or abs(sum(weights) - 1) > 1e-3:
            raise ValueError(
                f"{name}.objective_weights must be four shares, of {', '.join(TASKS[task] for task in WEIGHT_ORDER)}, "
                f"that are not negative and sum to 1; got {list(weights)}. The paper has 1/3, 1/3, 1/6, 1/6."
            )
        self.objective_weights = weights
        if self.task_per not in ("example", "batch"):
            raise ValueError(f"{name}.task_per must be example or batch, got {self.task_per!r}.")
        if not 0 < self.mlm_probability <= 1:
            raise ValueError(f"{name}.mlm_probability must be in (0, 1], got {self.mlm_probability}; the paper: 0.15.")
        for option in ("ngram_mask_prob", "nsp_probability"):
            if not 0 <= getattr(self, option) <= 1:
                raise ValueError(f"{name}.{option} must be in [0, 1], got {getattr(self, option)}.")
        if self.max_ngram < 2:
            raise ValueError(f"{name}.max_ngram must be at least 2, got {self.max_ngram}; the paper has 3.")
        if self.max_predictions is not None and self.max_predictions < 1:
            raise ValueError(f"{name}.max_predictions must be at least 1 or None, got {self.max_predictions}.")
        self.special = SpecialTokens.from_tokenizer(self.tokenizer)

    def set_epoch(self, epoch: int) -> None:
        """Select the draws of an epoch."""
        self.epoch, self._next_key = epoch, 0

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate rows; see the class. `ValueError` for a row without B."""
        made, shared = [], None
        for number, feature in enumerate(features):
            rng = example_rng(self.seed, self.epoch, self._key(feature))
            task = self._draw_task(rng)  # drawn in any case, so that all other draws stay the same
            shared = task if shared is None else shared
            made.append(self._row(feature, number, shared if self.task_per == "batch" else task, rng))
        columns = {name: [row[name] for row in made] for name in made[0]}
        lengths = [len(ids) for ids in columns["input_ids"]]
        batch = {"input_ids": pad_rows(columns["input_ids"], self.special.pad_id, self.pad_to_multiple_of)}
        batch["attention_mask"] = pad_rows([[1] * length for length in lengths], 0, self.pad_to_multiple_of)
        batch["labels"] = pad_rows(columns["labels"], IGNORE, self.pad_to_multiple_of)
        for name in ("task_ids", "num_tokens_a", "next_sentence_label"):
            batch[name] = torch.tensor(columns[name])
        return batch

    def _draw_task(self, rng: np.random.Generator) -> int:
        return WEIGHT_ORDER[int(np.searchsorted(np.cumsum(self.objective_weights)[:-1], rng.random(), side="right"))]

    def _row(self, feature: Mapping[str, Any], number: int, task: int, rng: np.random.Generator) -> dict[str, Any]:
        ids, first = _split(feature["input_ids"], feature["token_type_ids"])
        if len(ids) == first:
            raise ValueError(f"{type(self).__name__}: row {number} has no second text; leave such rows out.")
        replaced = rng.random() < self.nsp_probability
        label = IGNORE
        if task == BIDIRECTIONAL and OTHER[0] in feature:
            label = int(replaced)
            if replaced:
                other, begin = _split(*(feature[name] for name in OTHER))
                room = (len(ids) if self.max_length is None else self.max_length) - first
                text = other[begin:-1][: max(1, room - 1)]
                ids = np.concatenate((ids[:first], text, ids[-1:]))
        chosen = self.choose(ids, rng)
        corrupted, labels = mask_tokens(
            ids[None],
            chosen[None],
            rng.random((1, len(ids), 2)),
            REPLACE,
            self.special.mask_id,
            self.special.vocab_size,
        )
        return {
            "input_ids": corrupted[0],
            "labels": labels[0],
            "task_ids": task,
            "num_tokens_a": first,
            "next_sentence_label": label,
        }

    def choose(self, ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Places to predict, (T,) bool: tokens in random order, each with the one or two after it where a draw says
        so, as long as these are no special tokens; exactly min(P, max(1, round(p * T))) if there are so many.
        """
        special = np.isin(ids, (self.special.cls_id, self.special.sep_id, self.special.pad_id))
        wanted = int(prediction_counts(np.array([len(ids)]), self.mlm_probability, self.max_predictions)[0])
        chosen: list[int] = []
        for place in rng.permutation(np.flatnonzero(~special)).tolist():
            if len(chosen) >= wanted:
                break
            if place in chosen:
                continue
            several = rng.random() < self.ngram_mask_prob
            size = int(rng.integers(2, self.max_ngram + 1)) if several else 1
            for near in range(place, min(place + size, len(ids))):
                if special[near]:
                    break
                if near not in chosen:
                    chosen.append(near)
        if len(chosen) > wanted:
            chosen = rng.permutation(chosen)[:wanted].tolist()
        found = np.zeros(len(ids), dtype=bool)
        found[chosen] = True
        return found

    def _key(self, feature: Mapping[str, Any]) -> int:
        if "example_key" in feature:
            return int(feature["example_key"])
        self._next_key += 1
        return self._next_key - 1


def _split(input_ids: Sequence[int], token_type_ids: Sequence[int]) -> tuple[np.ndarray, int]:
    """Ids of a row, and how many of them [CLS] A [SEP] has."""
    ids = np.asarray(input_ids, dtype=np.int64)
    return ids, len(ids) - int(np.count_nonzero(token_type_ids))


class UniLMTrainer(PretrainingTrainer):
    """Trains `UniLMForPreTraining`. Logs the cloze loss of each task that occurred as `<task>_cloze_loss`, and the
    accuracy of the sentence-pair decision.
    """

    data_arguments = UniLMDataArguments
    collator_columns = OTHER

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.label_names = ["labels"]

    def loss_weights(self) -> dict[str, float]:
        return self.accelerator.unwrap_model(self.model).loss_weights()

    def count_items(self, batch: Batch) -> Sums:
        """Masked tokens, and pairs with a label."""
        return {
            "mlm": (batch["labels"] != IGNORE).sum(),
            "sentence": (batch["next_sentence_label"] != IGNORE).sum(),
        }

    def metric_sums(self, outputs: Any, batch: Batch) -> Sums:
        labels = batch["next_sentence_label"]
        right = outputs.seq_relationship_logits.argmax(-1) == labels  # never where there is no label
        sums = {"sentence_right": right.sum(), "sentence_all": (labels != IGNORE).sum()}
        if outputs.task_losses is not None:
            sums |= {"task_losses": outputs.task_losses.double(), "task_counts": outputs.task_counts}
        return sums

    def metrics_from_sums(self, sums: Sums) -> dict[str, float]:
        figures = {"sentence_accuracy": sums["sentence_right"].item() / max(1, sums["sentence_all"].item())}
        if "task_losses" not in sums:
            return figures
        for name, loss, count in zip(TASKS, sums["task_losses"].tolist(), sums["task_counts"].tolist()):
            if count:
                figures[f"{name}_cloze_loss"] = loss / count
        return figures

    @classmethod
    def build_config(cls, recipe: "Recipe", tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
        """As in `PretrainingTrainer`; `name_or_path` may be a stock BERT, whose weights UniLM starts from."""
        return unilm_config(recipe, tokenizer)

    @classmethod
    def build_model(cls, recipe: "Recipe", config: PreTrainedConfig) -> PreTrainedModel:
        """The class for pre-training, from the checkpoint that the recipe names or fresh."""
        return unilm_model(UniLMForPreTraining, recipe, config)

    @classmethod
    def build_datasets(
        cls,
        documents: DatasetDict,
        tokenizer: PreTrainedTokenizerBase,
        config: PreTrainedConfig,
        data: Any,
        training: TrainingArguments,
    ) -> DatasetDict | dict[str, Any]:
        """Rows of two texts that follow each other, each with another row beside it.

        Raises:
            ValueError: as in `PretrainingTrainer`, or no document has two sentences.
        """
        cls.check_sizes(tokenizer, config, data.max_length)
        made = {}
        for split, part in documents.items():
            rows = pack_segments(
                cls.tokenized(part, tokenizer, data), tokenizer, data.max_length, 0.0, seed=data.data_seed
            )
            rows = rows.filter(
                lambda types: [row[-1] == 1 for row in types], input_columns="token_type_ids", batched=True
            )
            if len(rows) == 0:
                raise ValueError(
                    f"{cls.data_arguments.__name__}: no document of the split {split!r} has two sentences, one for "
                    "each text of an example; give longer documents."
                )
            order = np.random.default_rng(data.data_seed).permutation(len(rows))
            following = np.empty_like(order)
            following[order] = np.roll(order, -1)  # one cycle, so that no row stands beside itself
            others = rows.select(following).flatten_indices()
            others = others.rename_columns(dict(zip(("input_ids", "token_type_ids"), OTHER)))
            made[split] = concatenate_datasets([rows.flatten_indices(), others], axis=1)
        return made

    @classmethod
    def build_collator(  # type: ignore[override]
        cls,
        tokenizer: PreTrainedTokenizerBase,
        config: PreTrainedConfig,
        data: Any,
        training: TrainingArguments,
    ) -> UniLMCollator:
        """The collator that draws tasks and masks."""
        return UniLMCollator(
            tokenizer,
            mlm_probability=data.mlm_probability,
            max_predictions=data.max_predictions,
            objective_weights=data.objective_weights,
            task_per=data.task_per,
            ngram_mask_prob=data.ngram_mask_prob,
            max_ngram=data.max_ngram,
            nsp_probability=data.nsp_probability,
            max_length=data.max_length,
            pad_to_multiple_of=data.pad_to_multiple_of,
            seed=training.seed,
        )


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Fields of the configuration that the tokenizer's special tokens determine."""
    special = SpecialTokens.from_tokenizer(tokenizer)
    return {
        "pad_token_id": special.pad_id,
        "mask_token_id": special.mask_id,
        "eos_token_id": special.sep_id,
        "decoder_start_token_id": special.cls_id,
    }


def unilm_config(recipe: "Recipe", tokenizer: PreTrainedTokenizerBase) -> UniLMConfig:
    """The configuration that a recipe describes, with the tokenizer's special tokens; `name_or_path` may be a BERT.

    Raises:
        ValueError: a checkpoint, or a `model_type`, of another model.
    """
    name, special = recipe.model.get("name_or_path"), special_ids(tokenizer)
    found = (
        recipe.build_config(**{"vocab_size": len(tokenizer)} | special)
        if name is None
        else AutoConfig.from_pretrained(name)
    )
    if name is not None and found.model_type == "bert":
        changes = {key: value for key, value in recipe.model.items() if key not in ("name_or_path", "model_type")}
        segments = {"type_vocab_size": 6}
        return UniLMConfig.from_stock(found, **segments | special | changes)
    if not isinstance(found, UniLMConfig):
        raise ValueError(
            f"UniLM starts from a BERT or a UniLM, or from nothing without model.model_type; {name or 'this'} is a "
            f"{type(found).__name__}. Convert an official checkpoint by `bestiary convert unilm`."
        )
    return found if name is None else cast(UniLMConfig, recipe.build_config(**special))


def unilm_model(kind: type[PreTrainedModel], recipe: "Recipe", config: PreTrainedConfig) -> PreTrainedModel:
    """A model of class `kind`: new, or of a UniLM or BERT, whose tables of segments and positions grow if need be."""
    name = recipe.model.get("name_or_path")
    if name is None:
        return kind(config)
    theirs = AutoConfig.from_pretrained(name)
    tables = ("type_vocab_size", "max_position_embeddings")
    if isinstance(theirs, UniLMConfig) and all(getattr(theirs, size) == getattr(config, size) for size in tables):
        return kind.from_pretrained(name, config=config)
    loader = BertForPreTraining if theirs.model_type == "bert" else kind
    loaded = cast(tuple[PreTrainedModel, dict[str, Any]], loader.from_pretrained(name, output_loading_info=True))
    found, report = loaded
    state = {key: value for key, value in found.state_dict().items() if key not in report["missing_keys"]}
    return kind.from_pretrained(None, config=config, state_dict=extended(state, cast(UniLMConfig, config)))


# --------------------------------------------------------------------------------------------------------- fine-tuning


@dataclass
class UniLMSeq2SeqDataArguments(Seq2SeqDataArguments):
    """Data of fine-tuning to write.

    Args:
        target_mask_prob: share of the target tokens, the end not counted, that are predicted (0.7).
        max_target_predictions: most predictions in a target; None sets no limit (48 to 140 in the official commands).
    """

    target_mask_prob: float = field(default=0.7, metadata={"help": "Share of the target tokens that are predicted."})
    max_target_predictions: int | None = field(default=None, metadata={"help": "Most predictions in a target."})


@dataclass
class UniLMSeq2SeqTrainingArguments(Seq2SeqBestiaryTrainingArguments):
    """Training arguments of fine-tuning to write.

    Changed defaults (official commands):
        optimizer: bert_adam; learning_rate: 3e-5; num_train_epochs: 30; warmup_steps: 0.1 (a share), then linear to 0;
        weight_decay: 0.01; max_grad_norm: 1.0.
    """

    optimizer: str | None = field(default="bert_adam", metadata={"help": "Adam without bias correction."})
    learning_rate: float = field(default=3e-5, metadata={"help": "Peak learning rate."})
    num_train_epochs: float = field(default=30.0, metadata={"help": "Passes over the training set."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Updates of warm-up; below 1, a share of all."})
    weight_decay: float = field(default=0.01, metadata={"help": "Decoupled weight decay."})


@dataclass(eq=False)
class UniLMSeq2SeqCollator(Seq2SeqCollator):
    """Pads pairs and masks targets.

    In training the batch has `input_ids`, `attention_mask` (B, S), `cloze_input_ids`, `decoder_attention_mask` and
    `labels` (B, T; -100 where nothing was masked). In evaluation it has no cloze, and all target tokens as labels.

    Args:
        target_mask_prob, max_target_predictions: see `UniLMSeq2SeqDataArguments`.
        seed, epoch: with `example_key` they determine all draws for a row.

    Raises:
        ValueError: a share that is not in (0, 1], or a limit below 1.
    """

    target_mask_prob: float = 0.7
    max_target_predictions: int | None = None
    seed: int = 0
    epoch: int = 0
    _next_key: int = field(init=False, repr=False, default=0)

    def __post_init__(self) -> None:
        if not 0 < self.target_mask_prob <= 1:
            raise ValueError(
                f"{type(self).__name__}.target_mask_prob must be in (0, 1], got {self.target_mask_prob}; the official "
                "commands have 0.5 to 0.7."
            )
        if self.max_target_predictions is not None and self.max_target_predictions < 1:
            raise ValueError(
                f"{type(self).__name__}.max_target_predictions must be at least 1 or None, got "
                f"{self.max_target_predictions}."
            )
        self.special = SpecialTokens.from_tokenizer(self.tokenizer)

    def set_epoch(self, epoch: int) -> None:
        """Select the draws of an epoch."""
        self.epoch, self._next_key = epoch, 0

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        batch = super().__call__(features)
        if self.epoch == EVALUATION_EPOCH:
            return batch
        targets = batch["labels"].numpy()
        uniforms = np.zeros((*targets.shape, 3))
        lengths = np.array([len(feature["labels"]) for feature in features])
        for row, (feature, length) in enumerate(zip(features, lengths)):
            uniforms[row, :length] = example_rng(self.seed, self.epoch, self._key(feature)).random((length, 3))
        real = np.arange(targets.shape[1]) < lengths[:, None]
        counts = prediction_counts(lengths - 1, self.target_mask_prob, self.max_target_predictions)
        chosen = choose_positions(uniforms[..., 0], real, counts)
        ids = np.where(real, targets, self.special.pad_id)
        cloze, labels = mask_tokens(
            ids, chosen, uniforms[..., 1:], REPLACE, self.special.mask_id, self.special.vocab_size
        )
        batch |= {
            "cloze_input_ids": torch.from_numpy(cloze),
            "decoder_attention_mask": torch.from_numpy(real.astype(np.int64)),
            "labels": torch.from_numpy(labels),
        }
        return batch

    def _key(self, feature: Mapping[str, Any]) -> int:
        if "example_key" in feature:
            return int(feature["example_key"])
        self._next_key += 1
        return self._next_key - 1


class UniLMSeq2SeqTrainer(Seq2SeqBestiaryTrainer):
    """Trains `UniLMForConditionalGeneration` on targets with masked tokens.

    Evaluations log `perplexity`, the exponential of the loss of all target tokens.
    """

    data_arguments = UniLMSeq2SeqDataArguments
    training_arguments = UniLMSeq2SeqTrainingArguments

    def metric_sums(self, outputs: Any, batch: Batch) -> Sums:
        if "cloze_input_ids" in batch:
            return {}
        return {"surprise": outputs.loss.double(), "predicted": (batch["labels"] != IGNORE).sum()}

    def metrics_from_sums(self, sums: Sums) -> dict[str, float]:
        return {"perplexity": math.exp(min(sums["surprise"].item() / max(1, sums["predicted"].item()), 700.0))}

    @classmethod
    def build_config(cls, recipe: "Recipe", tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
        """As in `Seq2SeqBestiaryTrainer`; `name_or_path` may be a stock BERT."""
        return unilm_config(recipe, tokenizer)

    @classmethod
    def build_model(cls, recipe: "Recipe", config: PreTrainedConfig) -> PreTrainedModel:
        """The model that writes, from the checkpoint that the recipe names or fresh."""
        return unilm_model(UniLMForConditionalGeneration, recipe, config)

    @classmethod
    def build_collator(
        cls, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, recipe: "Recipe"
    ) -> UniLMSeq2SeqCollator:
        """The collator that masks targets."""
        return UniLMSeq2SeqCollator(
            tokenizer,
            target_mask_prob=recipe.data.target_mask_prob,
            max_target_predictions=recipe.data.max_target_predictions,
            seed=recipe.training.seed,
        )

    @classmethod
    def check_sizes(cls, data: Seq2SeqDataArguments, tokenizer: PreTrainedTokenizerBase, config: Any) -> None:
        """`ValueError` if source and target do not fit into the positions together."""
        super().check_sizes(data, tokenizer, config)
        longest = data.max_source_length + data.max_target_length
        if longest > config.max_position_embeddings:
            raise ValueError(
                f"{type(data).__name__}: max_source_length + max_target_length is {longest}, but source and target "
                f"share max_position_embeddings={config.max_position_embeddings}; lower the one or raise the other."
            )
