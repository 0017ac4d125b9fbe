"""Running text from any source as documents of sentences, the form that every pre-training recipe reads."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .sentences import split_sentences


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


_BUILDERS = {".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def load_text_documents(
    dataset: str | None = None,
    train_file: str | Path | None = None,
    validation_file: str | Path | None = None,
    text_column: str = "text",
    validation_fraction: float = 0.02,
    seed: int = 0,
) -> "DatasetDict":
    """Load text as documents, one row each, with the column `sentences` (list of strings).

    Args:
        dataset: `demo` (see `bestiary.demo`), the name of a data set on the Hub, `name:configuration` where it has
            several, or a local folder that `datasets.load_dataset` understands. Its split `validation` is kept.
        train_file: `.txt` (a blank line ends a document, a line holds one or several sentences), `.jsonl`, `.parquet`
            or `.csv` (one row a document). Exactly one of `dataset` and `train_file` must be given.
        validation_file: held-out documents in one of these forms; only together with `train_file`.
        text_column: the column that holds a document: a string, split into sentences here, or a list of strings,
            taken as sentences. `.txt` files and the demo do not use it.
        validation_fraction: share of the training documents (at least one) held out if there is no validation split;
            0 leaves it away.
        seed: of the choice of these documents.

    Returns:
        Splits `train` and, unless `validation_fraction` is 0 and none exists, `validation`. Documents without text
        are dropped. Columns other than the text's are dropped too, except for the demo.

    Raises:
        ValueError: for arguments that exclude each other, an unknown suffix, a missing, unreadable or empty file, a
            missing column, a data set that cannot be reached or found.
    """
    if (dataset is None) == (train_file is None):
        raise ValueError(
            f"load_text_documents: give either dataset or train_file, not both or none (dataset={dataset!r}, "
            f"train_file={train_file!r}). Try dataset='demo' for a first run."
        )
    if validation_file is not None and train_file is None:
        raise ValueError(
            f"load_text_documents: validation_file={str(validation_file)!r} belongs to a train_file; "
            f"dataset={dataset!r} brings its own validation split, or one is cut by validation_fraction."
        )
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"load_text_documents: validation_fraction={validation_fraction} must be in [0, 1).")

    from datasets import DatasetDict

    if dataset == "demo":
        from .demo import load_demo

        return load_demo("text")
    if train_file is not None:
        splits = {"train": _read_file(train_file, text_column)}
        if validation_file is not None:
            splits["validation"] = _read_file(validation_file, text_column)
    else:
        splits = _read_hub(str(dataset), text_column)
    if "validation" not in splits and validation_fraction > 0:
        if len(splits["train"]) < 2:
            raise ValueError(
                f"load_text_documents: {train_file or dataset} holds one document, so none can be held out. Give a "
                "validation_file, set validation_fraction=0, or separate documents (in .txt files by a blank line)."
            )
        held_out = max(1, round(validation_fraction * len(splits["train"])))
        parts = splits["train"].train_test_split(test_size=held_out, seed=seed)
        splits = {"train": parts["train"], "validation": parts["test"]}
    return DatasetDict(splits)


def _read_file(file: str | Path, text_column: str) -> "Dataset":
    """One local file as documents."""
    path = Path(file)
    suffix = path.suffix.lower()
    if suffix != ".txt" and suffix not in _BUILDERS:
        raise ValueError(
            f"load_text_documents: {path} has the suffix {path.suffix!r}; readable are .txt, {', '.join(_BUILDERS)}."
        )
    if not path.is_file():
        raise ValueError(f"load_text_documents: there is no file {path} (looked in {Path.cwd()}).")
    if path.stat().st_size == 0:
        raise ValueError(f"load_text_documents: {path} is empty.")

    from datasets import Dataset, load_dataset
    from datasets.exceptions import DatasetGenerationError

    if suffix == ".txt":
        try:
            blocks = _blocks(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"load_text_documents: {path} is not UTF-8 text ({error}); convert it first.") from error
        return _documents(Dataset.from_dict({"text": blocks}), "text", str(path))
    try:
        rows = load_dataset(_BUILDERS[suffix], data_files=str(path), split="train")
    except (DatasetGenerationError, StopIteration, ValueError) as error:  # what datasets 5.2 raises, by kind of damage
        reason = error.__cause__ or error
        raise ValueError(f"load_text_documents: {path} cannot be read as {suffix}: {reason!r}.") from error
    return _documents(rows, text_column, str(path))


def _read_hub(dataset: str, text_column: str) -> "dict[str, Dataset]":
    """The splits `train` and, if there is one, `validation` of a data set of the Hub or a local folder."""
    from datasets import load_dataset

    name, _, configuration = dataset.partition(":")
    try:
        loaded = load_dataset(name, configuration or None)
    except OSError as error:  # datasets' and huggingface_hub's errors of this kind all are OSErrors
        raise ValueError(
            f"load_text_documents: dataset={dataset!r} was not found or cannot be reached: {error}. Check the name "
            "and the connection (HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN for a private one), or work without the Hub: "
            "dataset='demo' or train_file='my.txt'."
        ) from error
    except ValueError as error:
        raise ValueError(
            f"load_text_documents: dataset={dataset!r} cannot be loaded: {error} Name a configuration as "
            "'name:configuration'."
        ) from error
    if "train" not in loaded:
        raise ValueError(f"load_text_documents: dataset={dataset!r} has no split 'train', only {', '.join(loaded)}.")
    return {
        split: _documents(loaded[split], text_column, f"{dataset} ({split})")
        for split in ("train", "validation")
        if split in loaded
    }


def _documents(rows: "Dataset", text_column: str, origin: str) -> "Dataset":
    """Replace all columns by `sentences` and drop the documents that have none."""
    from datasets import Features, List, Value

    if text_column not in rows.column_names:
        raise ValueError(
            f"load_text_documents: {origin} has no column {text_column!r}; it has {', '.join(rows.column_names)}. "
            "Choose one by text_column."
        )
    documents = rows.map(
        _to_sentences,
        batched=True,
        fn_kwargs={"text_column": text_column, "origin": origin},
        remove_columns=rows.column_names,
        features=Features({"sentences": List(Value("string"))}),
        desc="splitting into sentences",
    )
    if len(documents) == 0:
        raise ValueError(f"load_text_documents: {origin} holds no text.")
    return documents


def _to_sentences(batch: dict[str, list[Any]], text_column: str, origin: str) -> dict[str, list[list[str]]]:
    """One list of sentences for every document of a batch that has text; a line break always ends a sentence."""
    documents = []
    for value in batch[text_column]:
        if isinstance(value, str):
            sentences = [sentence for line in value.splitlines() for sentence in split_sentences(line)]
        elif isinstance(value, list) and all(isinstance(item, str) for item in value):
            sentences = [sentence for item in value if (sentence := " ".join(item.split()))]
        elif value is None:
            continue
        else:
            raise ValueError(
                f"load_text_documents: column {text_column!r} of {origin} holds a {type(value).__name__}; a document "
                "is a string or a list of strings."
            )
        if sentences:
            documents.append(sentences)
    return {"sentences": documents}


def _blocks(text: str) -> list[str]:
    """The parts of a text between blank lines, without empty ones."""
    blocks: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.strip():
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    return ["\n".join(block) for block in blocks if block]
