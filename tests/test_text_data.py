"""`load_text_documents`: every form of input, and what it says when something is wrong with it."""

import json
from pathlib import Path

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from bestiary import demo
from bestiary.text_data import load_text_documents


DOCUMENTS = [["A cat sat.", "It ran."], ["Mr. Dog barked!", "Why?"], ["One line."]]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def _write(path: Path, texts: list, column: str = "text") -> Path:
    """Write one row per text in the form that the suffix asks for."""
    if path.suffix == ".txt":
        path.write_text("\n\n \n".join(texts) + "\n", encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": n, column: text}) + "\n" for n, text in enumerate(texts)))
    elif path.suffix == ".csv":
        path.write_text(f"id,{column}\n" + "".join(f'{n},"{text}"\n' for n, text in enumerate(texts)))
    else:
        parquet.write_table(pyarrow.table({"id": list(range(len(texts))), column: texts}), path)
    return path


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet"])
def test_every_form_of_file_gives_the_same_documents(tmp_path, suffix):
    texts = ["A cat sat. It ran.", "Mr. Dog barked!\nWhy?", "One line."]
    if suffix != ".txt":
        texts.append("  ")  # no text: dropped
    train = _write(tmp_path / f"train{suffix}", texts)
    validation = _write(tmp_path / f"held_out{suffix}", texts[:1])
    loaded = load_text_documents(train_file=train, validation_file=str(validation))
    assert loaded["train"].column_names == ["sentences"]
    assert list(loaded["train"]["sentences"]) == DOCUMENTS
    assert list(loaded["validation"]["sentences"]) == DOCUMENTS[:1]


def test_list_column_is_taken_as_sentences(tmp_path):
    train = _write(tmp_path / "train.parquet", [["one two. Three", " "], ["four"], None], column="lines")
    loaded = load_text_documents(train_file=train, text_column="lines", validation_fraction=0)
    assert list(loaded["train"]["sentences"]) == [["one two. Three"], ["four"]]
    assert list(loaded) == ["train"]


def test_held_out_documents_depend_on_the_seed_only(tmp_path):
    train = _write(tmp_path / "train.txt", [f"Document {n}." for n in range(100)])

    def held_out(seed: int) -> set[str]:
        loaded = load_text_documents(train_file=train, validation_fraction=0.1, seed=seed)
        names = [{sentences[0] for sentences in loaded[split]["sentences"]} for split in ("train", "validation")]
        assert len(names[0]) == 90 and len(names[1]) == 10 and not names[0] & names[1]
        return names[1]

    assert held_out(0) == held_out(0) != held_out(1)


def test_demo_is_the_demo(monkeypatch):
    monkeypatch.setattr(demo, "load_demo", lambda part: f"the demo's {part}")
    assert load_text_documents("demo") == "the demo's text"


def test_hub_name_configuration_and_own_validation_split(monkeypatch):
    asked = []

    def load_dataset(name, configuration):
        asked.append((name, configuration))
        rows = {"train": ["A cat sat. It ran.", ""], "validation": ["One line."], "test": ["No."]}
        return datasets.DatasetDict({split: datasets.Dataset.from_dict({"text": rows[split]}) for split in rows})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = load_text_documents("someone/texts:raw")
    assert asked == [("someone/texts", "raw")]
    assert {split: list(rows["sentences"]) for split, rows in loaded.items()} == {
        "train": DOCUMENTS[:1],
        "validation": DOCUMENTS[2:],
    }
    load_text_documents("someone/texts")
    assert asked[1] == ("someone/texts", None)


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (ConnectionError("Couldn't reach"), "dataset='a/b' was not found or cannot be reached: Couldn't reach"),
        (datasets.exceptions.DatasetNotFoundError("no a/b"), "work without the Hub: dataset='demo' or train_file"),
        (ValueError("Config name is missing."), "Config name is missing. Name a configuration as 'name:config"),
    ],
)
def test_hub_failures_say_what_to_do(monkeypatch, raised, message):
    def load_dataset(*_):
        raise raised

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError) as error:
        load_text_documents("a/b")
    assert message in str(error.value)


def test_hub_data_without_train_split_names_the_splits(monkeypatch):
    splits = datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": ["a"]})})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: splits)
    with pytest.raises(ValueError, match="'a/b' has no split 'train', only test"):
        load_text_documents("a/b")


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_file_without_text_is_named(tmp_path, suffix, content):
    train = tmp_path / f"train{suffix}"
    train.write_bytes(content)
    with pytest.raises(ValueError, match=rf"train\{suffix} (is empty|holds no text|cannot be read as \{suffix})"):
        load_text_documents(train_file=train)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_missing_column_names_those_there_are(tmp_path, suffix):
    train = _write(tmp_path / f"train{suffix}", ["a"], column="body")
    with pytest.raises(ValueError, match="no column 'text'; it has id, body. Choose one by text_column"):
        load_text_documents(train_file=train)


def test_broken_files_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{oops\n')
    with pytest.raises(ValueError, match="a.jsonl cannot be read as .jsonl: .*JSON parse error"):
        load_text_documents(train_file=tmp_path / "a.jsonl")
    (tmp_path / "a.txt").write_bytes("Größe".encode("latin-1"))
    with pytest.raises(ValueError, match="a.txt is not UTF-8 text"):
        load_text_documents(train_file=tmp_path / "a.txt")
    numbers = _write(tmp_path / "n.parquet", [1, 2])
    with pytest.raises(ValueError, match="column 'text' of .*n.parquet holds a int"):
        load_text_documents(train_file=numbers)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either dataset or train_file"),
        ({"dataset": "demo", "train_file": "a.txt"}, "either dataset or train_file"),
        ({"dataset": "demo", "validation_file": "b.txt"}, "validation_file='b.txt' belongs to a train_file"),
        ({"train_file": "a.txt", "validation_fraction": 1.0}, "validation_fraction=1.0 must be in"),
        ({"train_file": "a.docx"}, "a.docx has the suffix '.docx'; readable are .txt, .jsonl, .parquet, .csv"),
        ({"train_file": "nowhere.txt"}, "there is no file nowhere.txt"),
    ],
)
def test_wrong_arguments_are_explained(arguments, message):
    with pytest.raises(ValueError) as error:
        load_text_documents(**arguments)
    assert message in str(error.value)


def test_one_document_cannot_be_split(tmp_path):
    train = _write(tmp_path / "train.txt", ["A cat sat.\nIt ran."])
    with pytest.raises(ValueError, match="holds one document.*blank line"):
        load_text_documents(train_file=train)
    assert list(load_text_documents(train_file=train, validation_fraction=0)["train"]["sentences"]) == DOCUMENTS[:1]
