"""Labelled tasks by name: which head they need, how rows become model inputs, how predictions become scores.

`TASKS` holds `classification`, `regression`, `tagging` and `qa` (extractive, in the form of SQuAD 1.1); `PreparedTask`
joins one with its data and gives trainers.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, cast

import transformers
from datasets import ClassLabel, Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from peft import PeftModel, get_peft_config, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import (
    AutoConfig,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..configuration.configuration_core import WrapperConfig
from ..modeling.layers.losses import IGNORE
from ..modeling.layers.wrapping import WrapperPreTrainedModel
from ..registry import Paper, get_paper, load_object
from .finetuning import FinetuneTrainer, classification_metrics, regression_metrics, tagging_metrics
from .squad import best_answers, qa_features, squad_scores


if TYPE_CHECKING:
    from ..recipe import Recipe

Metrics: TypeAlias = Callable[[Any], dict[str, float]]
"""Scores of a `transformers.EvalPrediction`, by name."""

_BUILDERS = {".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass
class TaskDataArguments:
    """A labelled data set.

    Args:
        task: classification, regression, tagging or qa.
        dataset: `demo` (20 Newsgroups, science), a data set on the Hub (`name` or `name:configuration`), or a folder.
        train_file, eval_file: local parquet, jsonl or csv files instead.
        text_column, pair_column: text, and the second text of a pair. qa reads question, context and answers.
        token_column: words of a sentence, for tagging.
        label_column: class name or number, score, or list of tags.
        eval_split: split that is evaluated; None takes test, else validation.
        max_length: longest input in tokens.
        doc_stride: overlap of the pieces of a long context, in tokens (qa).
        max_answer_length: longest answer in tokens (qa).
        max_train_examples: only so many training rows, chosen by `data_seed`; None takes all.
    """

    task: str = field(default="classification", metadata={"help": "classification, regression, tagging or qa."})
    dataset: str | None = field(
        default=None,
        metadata={"help": "demo, a data set on the Hub, or a folder.", "replaces": ("train_file", "eval_file")},
    )
    train_file: str | None = field(
        default=None, metadata={"help": "Local .parquet, .jsonl or .csv.", "replaces": ("dataset",)}
    )
    eval_file: str | None = field(default=None, metadata={"help": "Local .parquet, .jsonl or .csv."})
    text_column: str = field(default="text", metadata={"help": "Column of the text."})
    pair_column: str | None = field(default=None, metadata={"help": "Column of the second text of a pair."})
    token_column: str = field(default="tokens", metadata={"help": "Column of the words, for tagging."})
    label_column: str = field(default="label", metadata={"help": "Column of the label, score or tags."})
    eval_split: str | None = field(default=None, metadata={"help": "Split that is evaluated."})
    max_length: int = field(default=128, metadata={"help": "Longest input in tokens."})
    doc_stride: int = field(default=64, metadata={"help": "Overlap of the pieces of a long context (qa)."})
    max_answer_length: int = field(default=30, metadata={"help": "Longest answer in tokens (qa)."})
    max_train_examples: int | None = field(default=None, metadata={"help": "Only so many training rows."})
    data_seed: int = field(default=0, metadata={"help": "Seed of the choice of training rows."})

    def __post_init__(self):
        if self.task not in TASKS:
            raise ValueError(f"TaskDataArguments.task must be one of {', '.join(TASKS)}; got {self.task!r}.")


def load_labelled(data: TaskDataArguments) -> tuple[Dataset, Dataset]:
    """Training and evaluation rows of a labelled task; errors as in `load_rows`."""
    hint = "text_column, pair_column, token_column and label_column"
    return load_rows(data, TASKS[data.task].columns(data), f"the task {data.task}", hint)


def load_rows(data: Any, columns: Iterable[str], use: str, hint: str) -> tuple[Dataset, Dataset]:
    """Training and evaluation rows that hold certain columns.

    Args:
        data: arguments with `dataset`, or `train_file` and `eval_file`, and `eval_split`.
        columns: those that must be there.
        use: what needs them, for messages.
        hint: the arguments that choose columns, for messages.

    Raises:
        ValueError: no source or two, a source that cannot be read, an unknown file type, a missing or empty split, a
            missing column.
    """
    owner = type(data).__name__
    if (data.dataset is None) == (data.train_file is None) or (data.train_file is None) != (data.eval_file is None):
        raise ValueError(
            f"{owner}: give either dataset, or train_file and eval_file; got "
            f"dataset={data.dataset!r}, train_file={data.train_file!r}, eval_file={data.eval_file!r}."
        )
    if data.train_file is not None:
        splits = {
            "train": read_file(owner, "train_file", data.train_file),
            "test": read_file(owner, "eval_file", data.eval_file),
        }
    elif data.dataset == "demo":
        from ..demo import load_demo

        splits = load_demo("labelled")
    else:
        name = str(data.dataset)
        splits = _load(owner, "dataset", name, *name.split(":", 1))
    held_out = data.eval_split or ("test" if "test" in splits else "validation")
    for split in ("train", held_out):
        if split not in splits or len(splits[split]) == 0:
            raise ValueError(
                f"The data set has no rows in the split {split!r}; it has {', '.join(splits)}. Choose what is "
                f"evaluated by {owner}.eval_split."
            )
        for column in columns:
            if column not in splits[split].column_names:
                raise ValueError(
                    f"The split {split!r} has no column {column!r}, which {use} needs; it has "
                    f"{', '.join(splits[split].column_names)}. Choose columns by {hint} of {owner}."
                )
    return splits["train"], splits[held_out]


def read_file(owner: str, name: str, path: str) -> Dataset:
    """Rows of a local parquet, jsonl or csv file; `ValueError`, which names the field, for any other and for a broken
    one.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in _BUILDERS:
        raise ValueError(f"{owner}.{name} must end in {', '.join(_BUILDERS)}; got {path!r}.")
    return _load(owner, name, path, _BUILDERS[suffix], data_files=path, split="train")


def _load(owner: str, name: str, source: str, *args: str, **kwargs: str) -> Any:
    try:
        return load_dataset(*args, **kwargs)
    except (OSError, DatasetGenerationError, StopIteration, ValueError) as error:  # by kind of damage, and no network
        raise ValueError(
            f"{owner}.{name}={source!r} cannot be loaded, or has no rows: {error.__cause__ or error!r}."
        ) from error


class Labels:
    """The classes of a column: those of its `ClassLabel`, or the different values of the training rows, in order.

    Args:
        column: name, for messages.
        feature: type of a label.
        values: labels of the training rows.

    Raises:
        ValueError: fewer than two classes.
    """

    def __init__(self, column: str, feature: Any, values: Iterable[Any]):
        if isinstance(feature, ClassLabel):
            self.names = list(feature.names)
            self.numbers: dict[Any, int] = {number: number for number in range(len(self.names))}
        else:
            found = sorted({value for value in values if value is not None})
            self.names = [str(value) for value in found]
            self.numbers = {value: number for number, value in enumerate(found)}
        self.column = column
        if len(self.names) < 2:
            raise ValueError(
                f"TaskDataArguments.label_column={column!r} must hold at least two classes, got {self.names}."
            )

    def number(self, value: Any) -> int:
        """Number of the class of one row; `ValueError` if no training row has that class."""
        if value not in self.numbers:
            raise ValueError(
                f"TaskDataArguments.label_column={self.column!r}: a row has the label {value!r}, the training rows "
                f"have {', '.join(map(repr, self.numbers))}. (None or -1 marks a split whose labels are kept secret; "
                "choose another eval_split.)"
            )
        return self.numbers[value]


class Task:
    """One kind of task, with its data arguments and a tokenizer; the training rows may say more of it."""

    auto_class: ClassVar[str]
    peft_task: ClassVar[str]
    problem_type: ClassVar[str | None] = None
    tokenizer_options: ClassVar[dict[str, Any]] = {}
    needs_fast_tokenizer: ClassVar[bool] = False

    def __init__(self, data: TaskDataArguments, tokenizer: PreTrainedTokenizerBase, train: Dataset):
        if self.needs_fast_tokenizer and not tokenizer.is_fast:
            raise ValueError(
                f"The task {data.task} needs a fast tokenizer, which knows the place of each token in the text; "
                f"{type(tokenizer).__name__} is none."
            )
        self.data, self.tokenizer = data, tokenizer

    @staticmethod
    def columns(data: TaskDataArguments) -> list[str]:
        """Columns that must be there."""
        return [data.text_column, data.label_column, *([data.pair_column] if data.pair_column else [])]

    def output_names(self) -> list[str]:
        """Names of what the head gives for a text or a token."""
        return ["LABEL_0"]

    def config_fields(self) -> dict[str, Any]:
        """Fields of the model's configuration that the task determines."""
        names = dict(enumerate(self.output_names()))
        return {
            "id2label": names,
            "label2id": {name: number for number, name in names.items()},
            "problem_type": self.problem_type,
        }

    def check_sizes(self, config: PreTrainedConfig) -> None:
        """`ValueError` if inputs can be longer than the model's positions."""
        positions = getattr(config, "max_position_embeddings", None)  # not every model has them
        if positions is not None and 0 < positions < self.data.max_length:
            raise ValueError(
                f"TaskDataArguments.max_length is {self.data.max_length}, but the model has max_position_embeddings="
                f"{positions}; lower max_length."
            )

    def features(self, rows: Dataset, training: bool) -> Dataset:
        """Model inputs with labels, of at most `max_train_examples` rows if they are for training."""
        if training and self.data.max_train_examples is not None:
            kept = min(self.data.max_train_examples, len(rows))
            rows = rows.shuffle(seed=self.data.data_seed).select(range(kept))
        return rows.map(
            self.encode,
            batched=True,
            with_indices=True,
            fn_kwargs={"training": training},
            remove_columns=rows.column_names,
            desc="Tokenizing",
        )

    def encode(self, batch: dict[str, list], numbers: list[int], training: bool) -> dict[str, list]:
        """Tokenize the rows with these numbers and add their labels."""
        texts = [self.texts(batch, self.data.text_column)]
        if self.data.pair_column:
            texts.append(self.texts(batch, self.data.pair_column))
        encoded = dict(self.tokenizer(*texts, truncation=True, max_length=self.data.max_length))
        encoded["labels"] = [self.to_label(value) for value in batch[self.data.label_column]]
        return encoded

    def texts(self, batch: dict[str, list], column: str) -> list[str]:
        """A column of texts; `ValueError` if a row has none."""
        for value in batch[column]:
            if not isinstance(value, str):
                raise ValueError(f"The column {column!r} must hold text in every row, got {value!r}.")
        return batch[column]

    def to_label(self, value: Any) -> int | float:
        """Label of one row as the model takes it."""
        raise NotImplementedError

    def collator(self) -> Callable:
        """What pads."""
        return DataCollatorWithPadding(self.tokenizer)

    def metrics(self, rows: Dataset, features: Dataset) -> Metrics:
        """Scores of the predictions on `features`, which were made of `rows`."""
        raise NotImplementedError


class LabelledTask(Task):
    """A task with classes, which the training rows name."""

    def __init__(self, data: TaskDataArguments, tokenizer: PreTrainedTokenizerBase, train: Dataset):
        super().__init__(data, tokenizer, train)
        self.labels = self.find_labels(train)

    def find_labels(self, train: Dataset) -> Labels:
        """The classes."""
        raise NotImplementedError

    def output_names(self) -> list[str]:
        return self.labels.names


class Classification(LabelledTask):
    """One class for a text or a pair of texts."""

    auto_class = "AutoModelForSequenceClassification"
    peft_task = "SEQ_CLS"
    problem_type = "single_label_classification"

    def find_labels(self, train: Dataset) -> Labels:
        column = self.data.label_column
        return Labels(column, train.features[column], train[column])

    def to_label(self, value: Any) -> int:
        return self.labels.number(value)

    def metrics(self, rows: Dataset, features: Dataset) -> Metrics:
        return lambda result: classification_metrics(result.predictions, result.label_ids)


class Regression(Task):
    """A number for a text or a pair of texts."""

    auto_class = "AutoModelForSequenceClassification"
    peft_task = "SEQ_CLS"
    problem_type = "regression"

    def to_label(self, value: Any) -> float:
        if not isinstance(value, int | float):
            raise ValueError(
                f"TaskDataArguments.label_column={self.data.label_column!r} must hold numbers, got {value!r}."
            )
        return float(value)

    def metrics(self, rows: Dataset, features: Dataset) -> Metrics:
        return lambda result: regression_metrics(result.predictions, result.label_ids)


class Tagging(LabelledTask):
    """A tag for every word; the first piece of a word carries it (Devlin et al., 2018, section 5.3)."""

    auto_class = "AutoModelForTokenClassification"
    peft_task = "TOKEN_CLS"
    tokenizer_options = {"add_prefix_space": True}  # byte-level tokenizers: a first word is a word like others
    needs_fast_tokenizer = True

    @staticmethod
    def columns(data: TaskDataArguments) -> list[str]:
        return [data.token_column, data.label_column]

    def find_labels(self, train: Dataset) -> Labels:
        column = self.data.label_column
        feature = getattr(train.features[column], "feature", None)
        return Labels(column, feature, (tag for row in train[column] for tag in row))

    def encode(self, batch: dict[str, list], numbers: list[int], training: bool) -> dict[str, list]:
        rows, tag_rows = batch[self.data.token_column], batch[self.data.label_column]
        encoded = self.tokenizer(rows, is_split_into_words=True, truncation=True, max_length=self.data.max_length)
        labels = []
        for index, (words, tags) in enumerate(zip(rows, tag_rows)):
            if len(words) != len(tags):
                raise ValueError(
                    f"Row {numbers[index]} has {len(words)} words in {self.data.token_column!r}, but {len(tags)} tags "
                    f"in {self.data.label_column!r}; every word needs one."
                )
            owners = encoded.word_ids(index)  # word of every piece, None for special tokens
            firsts = [owner is not None and owner != before for owner, before in zip(owners, [None, *owners])]
            labels.append(
                [self.labels.number(tags[owner]) if first else IGNORE for owner, first in zip(owners, firsts)]
            )
        return {**encoded, "labels": labels}

    def collator(self) -> Callable:
        return DataCollatorForTokenClassification(self.tokenizer)

    def metrics(self, rows: Dataset, features: Dataset) -> Metrics:
        return lambda result: tagging_metrics(result.predictions, result.label_ids, self.labels.names)


class QuestionAnswering(Task):
    """The span of a context that answers a question (SQuAD 1.1: every question has an answer)."""

    auto_class = "AutoModelForQuestionAnswering"
    peft_task = "QUESTION_ANS"
    needs_fast_tokenizer = True

    @staticmethod
    def columns(data: TaskDataArguments) -> list[str]:
        return ["question", "context", "answers"]

    def output_names(self) -> list[str]:
        return ["start", "end"]

    def encode(self, batch: dict[str, list], numbers: list[int], training: bool) -> dict[str, list]:
        columns = {name: self.texts(batch, name) for name in ("question", "context")}
        return qa_features(
            columns | {"answers": batch["answers"]},
            numbers,
            self.tokenizer,
            self.data.max_length,
            self.data.doc_stride,
            with_offsets=not training,
        )

    def metrics(self, rows: Dataset, features: Dataset) -> Metrics:
        def scores(result: Any) -> dict[str, float]:
            guesses = best_answers(
                result.predictions,
                features["offsets"],
                features["row"],
                rows["context"],
                self.data.max_answer_length,
            )
            return squad_scores(guesses, [answers["text"] for answers in rows["answers"]])

        return scores


TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "regression": Regression,
    "tagging": Tagging,
    "qa": QuestionAnswering,
}
"""Tasks by name."""


@dataclass
class PreparedTask:
    """A task with its tokenized rows, the same for every model that shares the tokenizer."""

    task: Task
    train: Dataset
    held_out: Dataset
    held_out_rows: Dataset

    @classmethod
    def load(cls, recipe: "Recipe") -> "PreparedTask":
        """Read and tokenize what `recipe.data` (`TaskDataArguments`) names, once per machine.

        Raises:
            ValueError: the recipe names no model, its method has none for the task or does not fine-tune, or the data
                does not fit the task.
        """
        name = _checkpoint(recipe)
        task_class = TASKS[recipe.data.task]
        _method(recipe)
        tokenizer = AutoTokenizer.from_pretrained(name, **task_class.tokenizer_options)
        with recipe.training.main_process_first(desc="preparing the data"):
            train, held_out = load_labelled(recipe.data)
            task = task_class(recipe.data, tokenizer, train)
            return cls(task, task.features(train, True), task.features(held_out, False), held_out)

    def build_trainer(self, recipe: "Recipe", peft: dict[str, Any] | None = None) -> FinetuneTrainer:
        """Trainer of the model that `recipe.model` names, with a new head, by `recipe.training`.

        `peft` holds the fields of a configuration of peft (`peft_type`, ...), by which the model is then trained. What
        is new in the model starts from the global generator; seed it before.

        A checkpoint of the recipe's own method is trained on, with the settings of the recipe; if the recipe has no
        method, the plain model of such a checkpoint is trained.

        Raises:
            ValueError: inputs are longer than the model's positions, it has no head for the task, or it is a
                checkpoint of another method.
        """
        name = _checkpoint(recipe)
        config = recipe.build_config(**self.task.config_fields())
        self.task.check_sizes(config)
        paper = _method(recipe)
        trainer_class = FinetuneTrainer
        if paper is not None:
            trainer_class = load_object(str(paper.trainer))
            kind = cast(type[WrapperPreTrainedModel], paper.models[self.task.auto_class])
            again = isinstance(AutoConfig.from_pretrained(name), paper.config)
            model = kind.from_pretrained(name, config=config) if again else kind.from_encoder(name, config=config)
        else:
            model = getattr(transformers, self.task.auto_class).from_pretrained(name, config=config)
            if isinstance(model, WrapperPreTrainedModel):
                model = model.to_base()
        if peft is not None:
            model = peft_model(model, self.task.peft_task, peft)
        return trainer_class(
            model,
            recipe.training,
            data_collator=self.task.collator(),
            train_dataset=self.train,
            eval_dataset=self.held_out,
            processing_class=self.task.tokenizer,
            compute_metrics=self.task.metrics(self.held_out_rows, self.held_out),
        )


def peft_model(model: PreTrainedModel, task_type: str, settings: dict[str, Any]) -> PeftModel:
    """`model` with the method of peft that `settings` name by `peft_type`, for training with a new head.

    Raises:
        ValueError: no `peft_type`, an unknown one, or settings that its configuration does not take.
    """
    name = settings.get("peft_type")
    if name not in PEFT_TYPE_TO_CONFIG_MAPPING:
        known = ", ".join(sorted(str(getattr(kind, "value", kind)) for kind in PEFT_TYPE_TO_CONFIG_MAPPING))
        raise ValueError(f"peft needs a peft_type out of {known}; got {name!r}.")
    try:
        config = get_peft_config({"task_type": task_type} | settings)
    except TypeError as error:
        raise ValueError(f"peft: the configuration of {name} does not take these settings: {error}.") from error
    return cast(PeftModel, get_peft_model(model, config))


def _method(recipe: "Recipe") -> Paper | None:
    """The recipe's paper if it is a method of fine-tuning any encoder, else None.

    Raises:
        ValueError: it is such a method, but not one of fine-tuning, or without a model for the task.
    """
    paper = get_paper(recipe.slug) if recipe.slug else None
    if paper is None or not issubclass(paper.config, WrapperConfig):
        return None
    if paper.trainer is None or not issubclass(load_object(paper.trainer), FinetuneTrainer):
        raise ValueError(
            f"The paper {paper.slug!r} is no method of fine-tuning. Run its own script first, and fine-tune what it "
            "leaves by a recipe without a slug, as finetune_classification."
        )
    auto_class = TASKS[recipe.data.task].auto_class
    if auto_class not in paper.models:
        raise ValueError(
            f"The paper {paper.slug!r} has no model for the task {recipe.data.task} ({auto_class}); it has "
            f"{', '.join(sorted(paper.models))}."
        )
    return paper


def _checkpoint(recipe: "Recipe") -> str:
    name = recipe.model.get("name_or_path")
    if name is None:
        raise ValueError("Fine-tuning needs a model: give --name_or_path, a folder or a name on the Hub.")
    return name
