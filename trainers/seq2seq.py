"""Training of sequence-to-sequence models: pairs of texts as examples, exact losses for any encoder-decoder, and
evaluation by generating.

The loss of a model of transformers is computed here from its logits, since most of its heads ignore
`num_items_in_batch`; a model of this package computes its own. Differences from `transformers.Seq2SeqTrainer`, besides
those of `BestiaryTrainer`:

* the loss of an evaluation is a mean over tokens, not over batches, and the model runs once for it;
* rows that distributed samplers repeat to fill the last round are not among the predictions;
* the options of `generate()` that a recipe gives are those of the model, so that they are saved with it.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    EncoderDecoderConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)
from transformers.trainer_utils import EvalLoopOutput

from ..generation import check_metrics, check_one_text, score_texts
from ..modeling.layers.losses import IGNORE, check_labels
from ..modeling.layers.pretrained import BestiaryPreTrainedModel
from ..registry import get_paper, load_object
from .arguments import BestiaryTrainingArguments
from .base import Batch, BestiaryTrainer, Sums
from .seeds import check_seeds
from .tasks import Metrics, load_rows, peft_model


if TYPE_CHECKING:
    from ..recipe import Recipe

TARGETS = ("labels", "decoder_input_ids", "decoder_attention_mask")
CHARACTERS = "characters"


# --------------------------------------------------------------------------------------------------------------- data


@dataclass
class Seq2SeqDataArguments:
    """Pairs of texts, and how generated texts are scored.

    Args:
        dataset: a data set on the Hub (`name` or `name:configuration`), or a folder.
        train_file, eval_file: local parquet, jsonl or csv files instead.
        source_column, target_column: the text to read, and the text to write.
        source_prefix: written before every source ("summarize: ").
        tokenizer: folder or Hub name; `characters` makes one of the characters of the training texts, in which a part
            in angle brackets (`<PLURAL>`) is one symbol; None takes that of `model.name_or_path`.
        eval_split: split that is evaluated; None takes test, else validation.
        max_source_length, max_target_length: longest texts in tokens, special ones included; what is longer is cut.
        max_train_examples: only so many training rows, chosen by `data_seed`; None takes all.
        max_eval_examples: only the first rows that are evaluated; None takes all.
        metrics: scores of generated texts, by name, joined by commas: exact_match, edit_distance, bleu, chrf, rouge.
        lowercase: compare in lower case, for vocabularies without capitals.
        generation: options of `generate()`, as JSON: '{"num_beams": 5, "no_repeat_ngram_size": 3}'.
        data_seed: of the choice of training rows.
        seeds: numbers joined by commas; None takes the seed of training.
        peft: configuration of a method of peft, with its `peft_type`; None trains the whole model.
    """

    dataset: str | None = field(
        default=None,
        metadata={"help": "A data set on the Hub, or a folder.", "replaces": ("train_file", "eval_file")},
    )
    train_file: str | None = field(
        default=None, metadata={"help": "Local .parquet, .jsonl or .csv.", "replaces": ("dataset",)}
    )
    eval_file: str | None = field(default=None, metadata={"help": "Local .parquet, .jsonl or .csv."})
    source_column: str = field(default="source", metadata={"help": "Column of the text to read."})
    target_column: str = field(default="target", metadata={"help": "Column of the text to write."})
    source_prefix: str = field(default="", metadata={"help": "Written before every source."})
    tokenizer: str | None = field(default=None, metadata={"help": "Folder, Hub name, or `characters`."})
    eval_split: str | None = field(default=None, metadata={"help": "Split that is evaluated."})
    max_source_length: int = field(default=128, metadata={"help": "Longest source in tokens."})
    max_target_length: int = field(default=64, metadata={"help": "Longest target in tokens."})
    max_train_examples: int | None = field(default=None, metadata={"help": "Only so many training rows."})
    max_eval_examples: int | None = field(default=None, metadata={"help": "Only so many rows are evaluated."})
    metrics: str = field(default="exact_match", metadata={"help": "Comma-separated scores of generated texts."})
    lowercase: bool = field(default=False, metadata={"help": "Score in lower case."})
    generation: dict | str | None = field(default=None, metadata={"help": "Options of generate(), as JSON."})
    data_seed: int = field(default=0, metadata={"help": "Seed of the choice of training rows."})
    seeds: str | None = field(default=None, metadata={"help": "Comma-separated seeds; default: the one of training."})
    peft: dict | str | None = field(default=None, metadata={"help": "Method of peft, as JSON with its peft_type."})

    def __post_init__(self):
        owner = type(self).__name__
        check_seeds(self)
        check_metrics(owner, self.metric_names)
        for name in ("max_source_length", "max_target_length"):
            if getattr(self, name) < 2:
                raise ValueError(f"{owner}.{name} must be at least 2, got {getattr(self, name)}.")
        for name in ("max_train_examples", "max_eval_examples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{owner}.{name} must be at least 1 or None, got {getattr(self, name)}.")
        if isinstance(self.generation, str):
            raise ValueError(f"{owner}.generation must be a dict or a JSON object, got {self.generation!r}.")

    @property
    def metric_names(self) -> list[str]:
        """The chosen scores."""
        return [name.strip() for name in self.metrics.split(",") if name.strip()]


def load_pairs(data: Seq2SeqDataArguments) -> tuple[Dataset, Dataset]:
    """Rows to train on and to evaluate, as many as are wanted, with at least the columns of source and target.

    Raises:
        ValueError: as in `load_rows`; or a text that is none, or empty.
    """
    columns = (data.source_column, data.target_column)
    if data.dataset == "demo":
        raise ValueError(f"{type(data).__name__}.dataset: the demo has no pairs of texts; give a data set or files.")
    train, held_out = load_rows(data, columns, "the training of pairs", "source_column and target_column")
    if data.max_train_examples is not None:
        kept = min(data.max_train_examples, len(train))
        train = train.shuffle(seed=data.data_seed).select(range(kept))
    if data.max_eval_examples is not None:
        held_out = held_out.select(range(min(data.max_eval_examples, len(held_out))))
    for rows in (train, held_out):
        check_texts(rows, columns)
    return train, held_out


def check_texts(rows: Dataset, columns: Iterable[str]) -> None:
    """`ValueError` if a row has no text in one of the columns."""
    for column in columns:
        for number, value in enumerate(rows[column]):
            if not isinstance(value, str) or not value.strip():
                raise ValueError(
                    f"The column {column!r} must hold text in every row, but row {number} has {value!r}; remove it."
                )


def character_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose symbols are the characters of some texts, and the parts in angle brackets (`<PLURAL>`).

    It writes [CLS] ... [SEP] around a text, knows [PAD], [UNK] and [MASK] too, and joins symbols without spaces.
    """
    symbols = r"<[^<>\s]+>|[\s\S]"
    split = pre_tokenizers.Split(Regex(symbols), "isolated")
    found = {piece for text in texts for piece, _ in split.pre_tokenize_str(text)}
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    special["mask_token"] = "[MASK]"
    pieces = [*special.values(), *sorted(found - set(special.values()))]
    numbers = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Fuse()
    ends = [(name, numbers[name]) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **special,
    )


def pair_features(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    data: Seq2SeqDataArguments,
    config: PreTrainedConfig,
) -> Dataset:
    """Model inputs of pairs: `input_ids` and `attention_mask` of the source, `labels` of the target.

    A target keeps the ending that the tokenizer writes. Its beginning is left out if it is the token that the decoder
    starts from, as with BERT's [CLS], which is given and not to be learnt.
    """
    written = tokenizer(text_target=["a"])["input_ids"][0]
    first = int(len(written) > 1 and written[0] == start_token(config))

    def encode(batch: dict[str, list]) -> dict[str, list]:
        sources = [f"{data.source_prefix}{text}" for text in batch[data.source_column]]
        encoded = tokenizer(sources, truncation=True, max_length=data.max_source_length)
        longest = data.max_target_length + first
        targets = tokenizer(text_target=batch[data.target_column], truncation=True, max_length=longest)["input_ids"]
        columns = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        return columns | {"labels": [ids[first:] for ids in targets]}

    return rows.map(encode, batched=True, remove_columns=rows.column_names, desc="Tokenizing")


def start_token(config: PreTrainedConfig) -> int | None:
    """The token that the decoder of this configuration starts from, None if it does not say."""
    start = getattr(config, "decoder_start_token_id", None)  # not a field of every configuration
    return start if start is not None else getattr(getattr(config, "decoder", None), "decoder_start_token_id", None)


@dataclass(eq=False)
class Seq2SeqCollator:
    """Pads pairs.

    A row has `input_ids` (source), `labels` (target), and perhaps `attention_mask`. The batch has `input_ids`,
    `attention_mask` (B, S), `labels` (B, T; -100 at padding) and, with `decoder_inputs`, `decoder_input_ids` (B, T);
    all int64.

    Args:
        tokenizer: gives the padding token and its side, which holds for the source; targets are padded on the right.
        decoder_inputs: makes decoder inputs of labels, usually `model.prepare_decoder_input_ids_from_labels`; None
            leaves that to the model.
        pad_to_multiple_of: round padded lengths up to a multiple.
    """

    tokenizer: PreTrainedTokenizerBase
    decoder_inputs: Callable[..., torch.Tensor] | None = None
    pad_to_multiple_of: int | None = None

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate rows; `ValueError` for an empty source or target."""
        for row, feature in enumerate(features):
            for name in ("input_ids", "labels"):
                if not len(feature[name]):
                    raise ValueError(f"{type(self).__name__}: row {row} has no tokens in {name}.")
        sources = [{"input_ids": list(feature["input_ids"])} for feature in features]
        for source, feature in zip(sources, features):
            if "attention_mask" in feature:
                source["attention_mask"] = list(feature["attention_mask"])
        padded = self.tokenizer.pad(
            sources, pad_to_multiple_of=self.pad_to_multiple_of, return_attention_mask=True, return_tensors="pt"
        )
        batch = {name: padded[name] for name in ("input_ids", "attention_mask")}
        batch["labels"] = pad_rows([feature["labels"] for feature in features], IGNORE, self.pad_to_multiple_of)
        if self.decoder_inputs is not None:
            batch["decoder_input_ids"] = self.decoder_inputs(labels=batch["labels"])
        return batch


def pad_rows(rows: Sequence[Sequence[int]], value: int, multiple: int | None = None) -> torch.Tensor:
    """Rows of numbers as (B, T) int64, filled up on the right with `value`."""
    multiple = multiple or 1
    width = -(-max(map(len, rows)) // multiple) * multiple
    table = np.full((len(rows), width), value, dtype=np.int64)
    for row, numbers in enumerate(rows):
        table[row, : len(numbers)] = numbers
    return torch.from_numpy(table)


# ----------------------------------------------------------------------------------------------------------- training


@dataclass
class Seq2SeqBestiaryTrainingArguments(BestiaryTrainingArguments, Seq2SeqTrainingArguments):
    """Training arguments of sequence-to-sequence models: those of transformers with those of this package.

    Changed defaults:
        predict_with_generate: True, evaluations generate and score (transformers: False).
    """

    predict_with_generate: bool = field(
        default=True, metadata={"help": "Evaluations generate, so that texts can be scored."}
    )


class Seq2SeqBestiaryTrainer(BestiaryTrainer, Seq2SeqTrainer):
    """Trains any encoder-decoder on pairs; arguments as `transformers.Seq2SeqTrainer`.

    A paper overrides the `build_...` methods where its data, model or collator are other ones, and `loss_weights`,
    `count_items`, `loss_sums` and `metric_sums` as for every `BestiaryTrainer`.
    """

    args: Seq2SeqBestiaryTrainingArguments
    smooths_labels = True
    data_arguments: ClassVar[type[Seq2SeqDataArguments]] = Seq2SeqDataArguments
    training_arguments: ClassVar[type[Seq2SeqBestiaryTrainingArguments]] = Seq2SeqBestiaryTrainingArguments
    generation_columns: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask")
    """Columns of a batch that `generate()` gets."""

    def __init__(
        self,
        model: nn.Module | None = None,
        args: Seq2SeqBestiaryTrainingArguments | None = None,
        *rest: Any,
        **kwargs: Any,
    ):
        args = self.training_arguments(output_dir="runs") if args is None else args
        super().__init__(model, args, *rest, **kwargs)
        self.label_names = ["labels"]
        if self.args.label_smoothing_factor and self.computes_its_loss:
            raise ValueError(
                f"{type(self).__name__}: {type(self.plain_model).__name__} computes its own loss, which "
                "label_smoothing_factor does not reach; leave it at 0, and set what its configuration has for it."
            )

    @property
    def plain_model(self) -> PreTrainedModel:
        """The model without what training wraps around it."""
        model = self.accelerator.unwrap_model(self.model)
        return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)

    @property
    def computes_its_loss(self) -> bool:
        """Whether the model's `loss` is a sum divided by `num_items_in_batch`, as that of all models here."""
        return isinstance(self.plain_model, BestiaryPreTrainedModel)

    def loss_sums(self, model: nn.Module, batch: Batch) -> tuple[Sums, Any]:
        """Sum of the losses of all target tokens; for a model of transformers from its logits."""
        if self.computes_its_loss:
            return super().loss_sums(model, batch)
        labels = batch["labels"]
        inputs = {name: value for name, value in batch.items() if name != "labels" or "decoder_input_ids" not in batch}
        outputs = model(**inputs)
        check_labels(type(self.plain_model).__name__, labels, outputs.logits.shape[-1])
        smoothing = float(self.args.label_smoothing_factor) if model.training else 0.0
        return {"loss": smoothed_cross_entropy_sum(outputs.logits, labels, smoothing)}, outputs

    # Evaluation

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Batch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> tuple[Any, Any, Any]:
        """Loss, generated tokens and labels of one batch; without `args.predict_with_generate` logits in place of
        tokens.
        """
        if not self.args.predict_with_generate or prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        loss = labels = None
        if inputs.get("labels") is not None:
            labels = self._prepare_inputs({"labels": inputs["labels"]})["labels"]
            loss, _, _ = super().prediction_step(model, inputs, True, ignore_keys)
        sources = {name: inputs[name] for name in self.generation_columns if name in inputs}
        _, tokens, _ = Seq2SeqTrainer.prediction_step(self, model, sources, False, ignore_keys, **gen_kwargs)
        return loss, tokens, labels

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As in `BestiaryTrainer`; predictions are one a row, while transformers keeps repeated rows here."""
        self.gather_function = self.accelerator.gather_for_metrics
        return super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)

    # What a recipe builds

    @classmethod
    def build_tokenizer(cls, recipe: "Recipe", train: Dataset) -> PreTrainedTokenizerBase:
        """The tokenizer that `data.tokenizer` names, or that of the recipe's checkpoint.

        Raises:
            ValueError: the recipe names neither.
        """
        name = recipe.data.tokenizer or recipe.model.get("name_or_path")
        if name is None:
            raise ValueError(
                f"{type(recipe.data).__name__}.tokenizer: a model that starts from nothing needs a tokenizer; give a "
                f"folder, a name on the Hub, or {CHARACTERS!r}."
            )
        if name == CHARACTERS:
            columns = (recipe.data.source_column, recipe.data.target_column)
            texts = [recipe.data.source_prefix, *(text for column in columns for text in train[column])]
            return character_tokenizer(texts)
        return AutoTokenizer.from_pretrained(name)

    @classmethod
    def build_config(cls, recipe: "Recipe", tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
        """The configuration that the recipe describes; that of a new model has the tokenizer's vocabulary and special
        tokens.
        """
        if recipe.model.get("name_or_path") is not None:
            return recipe.build_config()
        end = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        start = tokenizer.cls_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        pad = tokenizer.pad_token_id
        special = {
            "pad_token_id": pad,
            "eos_token_id": end,
            "decoder_start_token_id": pad if start is None else start,
        }
        return recipe.build_config(vocab_size=len(tokenizer), **special)

    @classmethod
    def build_model(cls, recipe: "Recipe", config: PreTrainedConfig) -> PreTrainedModel:
        """The model to train: that of the checkpoint which the recipe names, or a new one."""
        name = recipe.model.get("name_or_path")
        if name is not None:
            return AutoModelForSeq2SeqLM.from_pretrained(name, config=config)
        return AutoModelForSeq2SeqLM.from_config(config)

    @classmethod
    def build_features(
        cls, rows: Dataset, tokenizer: PreTrainedTokenizerBase, data: Seq2SeqDataArguments, config: PreTrainedConfig
    ) -> Dataset:
        """Model inputs with labels."""
        return pair_features(rows, tokenizer, data, config)

    @classmethod
    def build_collator(cls, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, recipe: "Recipe") -> Any:
        """What pads; a model of this package makes its decoder inputs itself."""
        own = isinstance(model, BestiaryPreTrainedModel)
        return Seq2SeqCollator(tokenizer, None if own else decoder_inputs(model))

    @classmethod
    def check_sizes(cls, data: Seq2SeqDataArguments, tokenizer: PreTrainedTokenizerBase, config: Any) -> None:
        """`ValueError` if the data would not fit the model."""
        pair = isinstance(config, EncoderDecoderConfig)  # of two configurations, one for each side
        sides = zip(
            ("max_source_length", "max_target_length"), (config.encoder, config.decoder) if pair else [config] * 2
        )
        for name, side in sides:
            positions = getattr(side, "max_position_embeddings", None)  # not every model has them
            if positions is not None and 0 < positions < getattr(data, name):
                raise ValueError(
                    f"{type(data).__name__}.{name} is {getattr(data, name)}, but the model has "
                    f"max_position_embeddings={positions}; lower the one or raise the other."
                )
            if len(tokenizer) > side.vocab_size:
                raise ValueError(
                    f"The tokenizer has {len(tokenizer)} entries, but the model's vocab_size is {side.vocab_size}; "
                    "take the model's own tokenizer."
                )


def decoder_inputs(model: PreTrainedModel) -> Callable[..., torch.Tensor] | None:
    """How this model makes decoder inputs of labels; None if it does not say."""
    return getattr(model, "prepare_decoder_input_ids_from_labels", None)  # not every model of transformers has it


def smoothed_cross_entropy_sum(logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Sum over labels that are not -100 of (1 - s) * -log p(label) + s * mean over the vocabulary of -log p.

    logits (B, T, V), labels (B, T); s = `smoothing` in [0, 1).
    """
    flat = logits.reshape(-1, logits.shape[-1]).float()
    return F.cross_entropy(flat, labels.flatten(), ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing)


def text_metrics(data: Seq2SeqDataArguments, tokenizer: PreTrainedTokenizerBase, references: Sequence[str]) -> Metrics:
    """Scores of generated token ids against the references, which are in the order of the evaluated rows."""

    def scores(result: Any) -> dict[str, float]:
        tokens = result.predictions[0] if isinstance(result.predictions, tuple) else result.predictions
        tokens = np.where(tokens == IGNORE, tokenizer.pad_token_id, tokens)
        return score_texts(data.metric_names, decoded(tokenizer, tokens), references, data.lowercase)

    return scores


def decoded(tokenizer: PreTrainedTokenizerBase, tokens: Any) -> list[str]:
    """Texts of rows of token ids, without special tokens."""
    return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]


# ------------------------------------------------------------------------------------------------------------ recipes


def seq2seq_trainer(slug: str | None) -> type[Seq2SeqBestiaryTrainer]:
    """The trainer of pairs of a paper; the one for any encoder-decoder without a paper.

    Raises:
        ValueError: the paper has none.
    """
    if slug is None:
        return Seq2SeqBestiaryTrainer
    paper = get_paper(slug)
    for name in (paper.seq2seq_trainer, paper.trainer):
        found = load_object(name) if name else None
        if found is not None and issubclass(found, Seq2SeqBestiaryTrainer):
            return found
    raise ValueError(f"The paper {slug!r} has no sequence-to-sequence model; leave the slug out, or take another one.")


def seq2seq_data_arguments(values: Mapping[str, Any]) -> type[Seq2SeqDataArguments]:
    """Dataclass of a recipe's section `data`, by its paper."""
    return seq2seq_trainer(values.get("slug")).data_arguments


def seq2seq_training_arguments(values: Mapping[str, Any]) -> type[Seq2SeqBestiaryTrainingArguments]:
    """Dataclass of a recipe's section `training`, by its paper."""
    return seq2seq_trainer(values.get("slug")).training_arguments


@dataclass
class PreparedPairs:
    """Tokenized pairs, the same for every seed, and what makes trainers for them; see `seeds.py`."""

    tokenizer: PreTrainedTokenizerBase
    config: PreTrainedConfig
    train: Dataset
    held_out: Dataset
    references: list[str]

    @classmethod
    def load(cls, recipe: "Recipe") -> "PreparedPairs":
        """Read and tokenize what `recipe.data` names, once per machine.

        Raises:
            ValueError: the recipe names no model or no tokenizer, or the data does not fit the model.
        """
        data, trainer_class = recipe.data, seq2seq_trainer(recipe.slug)
        with recipe.training.main_process_first(desc="preparing the data"):
            train, held_out = load_pairs(data)
            tokenizer = trainer_class.build_tokenizer(recipe, train)
            config = trainer_class.build_config(recipe, tokenizer)
            trainer_class.check_sizes(data, tokenizer, config)
            features, held_out_features = (
                trainer_class.build_features(rows, tokenizer, data, config) for rows in (train, held_out)
            )
        return cls(tokenizer, config, features, held_out_features, list(held_out[data.target_column]))

    def build_trainer(self, recipe: "Recipe", peft: dict[str, Any] | None = None) -> Seq2SeqBestiaryTrainer:
        """Trainer of the model that the recipe names, or of a new one from the global generator; seed it before.

        The options of `data.generation` become the model's. Without a length among them it generates at most
        `data.max_target_length` tokens.

        Raises:
            ValueError: options of `generate()` that it lacks, or `peft` on a model that is no checkpoint.
        """
        data, trainer_class = recipe.data, seq2seq_trainer(recipe.slug)
        training = cast(Seq2SeqBestiaryTrainingArguments, recipe.training)
        model = trainer_class.build_model(recipe, copy.deepcopy(self.config))
        collator = trainer_class.build_collator(self.tokenizer, model, recipe)
        if peft is not None:
            if not model.name_or_path:
                raise ValueError(
                    f"{type(data).__name__}.peft: an adapter is saved without the model that it belongs to, and this "
                    "one is no checkpoint yet; give model.name_or_path of one, or train the whole model."
                )
            model = peft_model(model, "SEQ_2_SEQ_LM", peft)  # type: ignore[assignment]
        trainer = trainer_class(
            model,
            training,
            data_collator=collator,
            train_dataset=self.train,
            eval_dataset=self.held_out,
            processing_class=self.tokenizer,
            compute_metrics=(
                text_metrics(data, self.tokenizer, self.references) if training.predict_with_generate else None
            ),
        )
        set_generation_options(model, data)  # after what the trainer takes from `training.generation_config`
        return trainer


def set_generation_options(model: PreTrainedModel, data: Seq2SeqDataArguments) -> None:
    """Make `data.generation` the model's own options of `generate()`.

    Raises:
        ValueError: an option that `generate()` does not know, or that does not fit the others; several texts for a
            source.
    """
    options = dict(cast(dict, data.generation) or {})
    if not {"max_length", "max_new_tokens"} & options.keys():
        options["max_length"] = data.max_target_length + 1  # the token that the decoder starts from counts
    settings = model.generation_config
    owner = f"{type(data).__name__}.generation"
    try:
        unknown = settings.update(**options)
        settings.validate(strict=True)
    except ValueError as error:
        raise ValueError(f"{owner} does not fit together: {error}") from error
    if unknown:
        raise ValueError(f"{owner} has options that generate() lacks: {', '.join(unknown)}.")
    check_one_text(owner, settings)
