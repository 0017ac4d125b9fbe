"""From tokenised documents to the training examples of BERT (arXiv 1810.04805) and ELECTRA (arXiv 2003.10555).

A document is a list of sentences, a sentence a list of token ids without special tokens. BERT joins two stretches of
sentences, of which the second really follows the first or comes from another document (next sentence prediction);
ELECTRA fills one stretch and splits it. Both results are spans of the corpus, so the corpus is held once, as one
array, and the tables are filled without a loop over tokens.

Masking belongs to the collators (`trainers/masking.py`), which draw it anew in every epoch.
`replay_pretraining_instances` is the official program instead, pairs and fixed masks from one stream of random
numbers, and equals its output number for number.

Differences from the official code, each with its reason:

* ELECTRA's program may put a short sentence back into the first segment after the second one has begun. Here text
  keeps its order.
* Sentences and documents without tokens are dropped before anything is drawn, as the official readers do.
* What the official code cuts off is cut off here as well: a sentence longer than the sequence loses the rest. Split
  text into sentences.
"""

import os
import random
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .masking import SpecialTokens


MIN_LENGTH = 5
"""[CLS] a [SEP] b [SEP]."""
_ROWS_PER_BATCH = 8192

Documents = Iterable[Sequence[Sequence[int]]]
Span = tuple[int, int, int, int]
"""Start and end of the first and of the second segment among the corpus's tokens."""


@dataclass(frozen=True, eq=False)
class Corpus:
    """Tokenised documents in three flat arrays.

    Args:
        tokens: (T,) int32, all tokens of all documents.
        sentences: offsets of the S sentences in `tokens`, S + 1 numbers.
        documents: offsets of the D documents in `sentences`, D + 1 numbers.
    """

    tokens: np.ndarray
    sentences: Sequence[int]
    documents: Sequence[int]

    def __len__(self) -> int:
        return len(self.documents) - 1

    @classmethod
    def from_documents(cls, documents: "Documents | Dataset | Corpus") -> "Corpus":
        """Read an iterable of documents, or the column `sentences` of a data set made by `tokenize_documents`.

        Raises:
            ValueError: if there is no token at all, or a document is not a list of lists of token ids.
        """
        if isinstance(documents, Corpus):
            return documents
        if isinstance(documents, Dataset):
            if "sentences" not in documents.column_names:
                raise ValueError(
                    f"documents has no column sentences, only {documents.column_names}; make it with "
                    "tokenize_documents(...)."
                )
            documents = documents["sentences"]
        tokens, sentences, ends = array("i"), array("q", [0]), array("q", [0])
        for number, document in enumerate(documents):
            try:
                for sentence in document:
                    tokens.extend(sentence)
                    if len(tokens) > sentences[-1]:
                        sentences.append(len(tokens))
            except TypeError as error:
                raise ValueError(
                    f"documents[{number}] is not a list of sentences, each a list of token ids ({error}); tokenize "
                    "text with tokenize_documents(...) first."
                ) from error
            if len(sentences) - 1 > ends[-1]:
                ends.append(len(sentences) - 1)
        if not tokens:
            raise ValueError("documents holds no token: it is empty or all its documents are.")
        return cls(np.frombuffer(tokens, dtype=np.int32), sentences.tolist(), ends.tolist())


def tokenize_documents(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    column: str = "sentences",
    num_proc: int | None = None,
    batch_size: int = 256,
) -> Dataset:
    """Tokenise a column that holds one list of sentences (strings) per document.

    Returns:
        A data set with the only column `sentences`: per document a list of lists of token ids, without special tokens
        and empty sentences.

    Raises:
        ValueError: if the data set is empty or the column is missing or does not hold lists of strings.
    """
    if column not in dataset.column_names:
        raise ValueError(
            f"dataset has no column {column!r}, only {dataset.column_names}; name the one with the documents' "
            "sentences."
        )
    if len(dataset) == 0:
        raise ValueError("dataset is empty; there is nothing to tokenize.")
    inner = getattr(dataset.features[column], "feature", None)
    if getattr(inner, "dtype", None) not in ("string", "large_string"):
        raise ValueError(
            f"dataset column {column!r} must hold a list of sentences (strings) per document, but is "
            f"{dataset.features[column]}; split the text into sentences first."
        )
    return dataset.map(
        _tokenize_batch,
        batched=True,
        batch_size=batch_size,
        num_proc=num_proc,
        remove_columns=dataset.column_names,
        features=Features({"sentences": List(List(Value("int32")))}),
        fn_kwargs={"tokenizer": tokenizer, "column": column},
        desc="Tokenizing documents",
    )


def _tokenize_batch(batch: dict[str, list], tokenizer: PreTrainedTokenizerBase, column: str) -> dict[str, list]:
    flat = [sentence for document in batch[column] for sentence in document]
    encoded: dict[str, list] = {"input_ids": []}
    if flat:
        encoded = tokenizer(
            flat, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
    ids = iter(encoded["input_ids"])
    return {"sentences": [[tokens for _ in document if (tokens := next(ids))] for document in batch[column]]}


def sentence_pairs(
    corpus: Corpus,
    rng: random.Random,
    max_length: int,
    order: Sequence[int],
    short_seq_prob: float = 0.1,
    nsp_probability: float = 0.5,
) -> Iterator[tuple[Span, int]]:
    """BERT's pairs of one pass over the documents, lazily: the caller may draw from `rng` between two pairs.

    A chunk of sentences is collected until it has the target length (`max_length` - 3, or, once per document with
    probability `short_seq_prob`, uniform in [2, max_length - 3]). A random number of its sentences, at least one, is
    A. With `nsp_probability`, and always if the chunk has one sentence, B starts at a random sentence of another
    document and the rest of the chunk is used again; otherwise B is that rest. Then the longer of the two loses tokens
    at random ends until both fit.

    Args:
        order: the documents' numbers in the order of the pass; it matters, because other documents are drawn by their
        place in it.

    Yields:
        The spans and the label: 0 if B follows A in the text, 1 if B is random.
    """
    sentences, documents = corpus.sentences, corpus.documents
    uniform, integer = rng.random, rng.randint
    room = max_length - 3
    for place, document in enumerate(order):
        target = integer(2, room) if uniform() < short_seq_prob else room
        first, last = documents[document], documents[document + 1]
        while first < last:
            end = bisect_left(sentences, sentences[first] + target, first + 1, last)
            middle = first + (integer(1, end - first - 1) if end - first >= 2 else 1)
            a_start, a_end = sentences[first], sentences[middle]
            random_next = end - first == 1 or uniform() < nsp_probability
            if random_next:
                for _ in range(10):
                    other = integer(0, len(order) - 1)
                    if other != place:
                        break
                other_first, other_last = documents[order[other]], documents[order[other] + 1]
                other_first += integer(0, other_last - other_first - 1)
                wanted = sentences[other_first] + target - (a_end - a_start)
                b_start = sentences[other_first]
                b_end = sentences[bisect_left(sentences, wanted, other_first + 1, other_last)]
                first = middle
            else:
                b_start, b_end = a_end, sentences[end]
                first = end
            while (a_end - a_start) + (b_end - b_start) > room:
                front = uniform() < 0.5
                if a_end - a_start > b_end - b_start:
                    if front:
                        a_start += 1
                    else:
                        a_end -= 1
                elif front:
                    b_start += 1
                else:
                    b_end -= 1
            yield (a_start, a_end, b_start, b_end), int(random_next)


def create_pretraining_pairs(
    documents: "Documents | Dataset | Corpus",
    tokenizer: PreTrainedTokenizerBase | SpecialTokens,
    max_length: int = 128,
    dupe_factor: int = 10,
    short_seq_prob: float = 0.1,
    nsp_probability: float = 0.5,
    seed: int = 0,
    cache_file: str | os.PathLike | None = None,
    progress: bool = True,
) -> Dataset:
    """BERT's data set for next sentence prediction and masking: [CLS] A [SEP] B [SEP], shuffled, neither padded nor
    masked.

    Args:
        documents: tokenised documents, see `Corpus.from_documents`; at least two.
        max_length: longest row, special tokens included; at least 5.
        dupe_factor: passes over the corpus, each with other pairs. For fresh pairs in each epoch build with 1 and
            another seed.
        short_seq_prob, nsp_probability: see `sentence_pairs`. The share of label 1 is above `nsp_probability` where
            documents are short, because a chunk of one sentence always gets a random B.
        seed: the result depends on the documents, these settings and nothing else.
        cache_file: where the Arrow table goes (written beside it and moved when complete; an existing file is
            replaced). The data set then stays on disk, memory-mapped; with None it is held in memory.
        progress: show progress bars.

    Returns:
        Columns `input_ids` (int32), `token_type_ids` (int8; 0 for [CLS] A [SEP], 1 for B [SEP]) and
        `next_sentence_label` (int8; 1 = B is random).

    Raises:
        ValueError: if an argument is out of range, documents are missing or the tokenizer lacks a special token.
    """
    special = SpecialTokens.from_tokenizer(tokenizer)
    corpus = _pair_corpus(documents, max_length, dupe_factor, short_seq_prob, nsp_probability)
    rng = random.Random(seed)
    order = list(range(len(corpus)))
    rng.shuffle(order)
    numbers = array("q")
    with tqdm(
        total=dupe_factor * len(corpus.tokens),
        desc="Pairing sentences",
        unit="token",
        unit_scale=True,
        disable=not progress,
    ) as bar:
        for number in range(dupe_factor):
            for span, label in sentence_pairs(corpus, rng, max_length, order, short_seq_prob, nsp_probability):
                numbers.extend(span)
                numbers.append(label)
                bar.update(span[1] - span[0] + (0 if label else span[3] - span[2]))
            bar.update((number + 1) * len(corpus.tokens) - bar.n)  # what was cut off
    table = np.frombuffer(numbers, dtype=np.int64).reshape(-1, 5)
    shuffled = list(range(len(table)))
    rng.shuffle(shuffled)
    table = table[shuffled]
    return _write(corpus.tokens, table[:, :4], table[:, 4], special, cache_file, progress)


def replay_pretraining_instances(
    documents: "Documents | Dataset | Corpus",
    tokenizer: PreTrainedTokenizerBase | SpecialTokens,
    max_length: int,
    max_predictions: int,
    mlm_probability: float = 0.15,
    short_seq_prob: float = 0.1,
    dupe_factor: int = 10,
    whole_word: bool = False,
    nsp_probability: float = 0.5,
    seed: int = 12345,
) -> list[dict[str, Any]]:
    """Pairs with fixed masks, drawn from one stream in the order of the official `create_pretraining_data.py`, number
    for number.

    Slow, for checks and for data that must equal the official one; train on `create_pretraining_pairs` with a
    `MaskingCollator`.

    Returns:
        One dict per instance, unpadded: `input_ids` (masked), `token_type_ids`, `masked_lm_positions` (ascending),
        `masked_lm_ids`, `next_sentence_label`.
    """
    special = SpecialTokens.from_tokenizer(tokenizer, whole_word)
    corpus = _pair_corpus(documents, max_length, dupe_factor, short_seq_prob, nsp_probability)
    rng = random.Random(seed)
    order = list(range(len(corpus)))
    rng.shuffle(order)
    instances = []
    for _ in range(dupe_factor):
        for span, label in sentence_pairs(corpus, rng, max_length, order, short_seq_prob, nsp_probability):
            a, b = corpus.tokens[span[0] : span[1]].tolist(), corpus.tokens[span[2] : span[3]].tolist()
            ids = [special.cls_id, *a, special.sep_id, *b, special.sep_id]
            count = min(max_predictions, max(1, round(len(ids) * mlm_probability)))
            positions = _mask_in_official_order(ids, special, whole_word, count, rng)
            instances.append(
                {
                    "input_ids": ids,
                    "token_type_ids": [0] * (len(a) + 2) + [1] * (len(b) + 1),
                    "masked_lm_positions": sorted(positions),
                    "masked_lm_ids": [positions[position] for position in sorted(positions)],
                    "next_sentence_label": label,
                }
            )
    rng.shuffle(instances)
    return instances


def _mask_in_official_order(
    ids: list[int], special: SpecialTokens, whole_word: bool, count: int, rng: random.Random
) -> dict[int, int]:
    """Mask `ids` in place and return the original id by position."""
    words: list[list[int]] = []
    for position, token in enumerate(ids):
        if token in (special.cls_id, special.sep_id):
            continue
        if whole_word and words and special.continuation is not None and special.continuation[token]:
            words[-1].append(position)
        else:
            words.append([position])
    rng.shuffle(words)
    originals: dict[int, int] = {}
    for word in words:
        if len(originals) >= count:
            break
        if len(originals) + len(word) > count:
            continue
        for position in word:
            originals[position] = ids[position]
            if rng.random() < 0.8:
                ids[position] = special.mask_id
            elif rng.random() >= 0.5:
                ids[position] = rng.randint(0, special.vocab_size - 1)
    return originals


def segments(
    corpus: Corpus,
    rng: random.Random,
    max_length: int,
    single_segment_prob: float = 0.1,
    random_length_prob: float = 0.05,
) -> Iterator[Span]:
    """ELECTRA's examples of one pass over the documents in their order.

    Sentences are collected until the target length is reached or the document ends. With `single_segment_prob` they
    form one segment; otherwise A takes sentences while it stays below (target - 3) / 2, and the one that crosses this
    with probability 0.5, and B the rest. B is empty, and the span's last two numbers equal, if nothing is left for it.
    The next target is `max_length`, or uniform in [5, max_length] with `random_length_prob`. What does not fit into
    `max_length` is cut off at the end.
    """
    sentences, documents = corpus.sentences, corpus.documents
    target = max_length
    for document in range(len(corpus)):
        first, last = documents[document], documents[document + 1]
        while first < last:
            end = bisect_left(sentences, sentences[first] + target, first + 1, last)
            start, middle = sentences[first], end
            if rng.random() >= single_segment_prob:
                half = start + (target - 3) // 2
                middle = first + 1
                while middle < end and (
                    sentences[middle + 1] < half or (sentences[middle] < half and rng.random() < 0.5)
                ):
                    middle += 1
            b_start = sentences[middle]
            a_end = min(b_start, start + max_length - 2)
            b_end = min(sentences[end], b_start + max(0, max_length - 3 - (a_end - start)))
            yield start, a_end, b_start, b_end
            first = end
            target = rng.randint(MIN_LENGTH, max_length) if rng.random() < random_length_prob else max_length


def pack_segments(
    documents: "Documents | Dataset | Corpus",
    tokenizer: PreTrainedTokenizerBase | SpecialTokens,
    max_length: int = 128,
    single_segment_prob: float = 0.1,
    random_length_prob: float = 0.05,
    seed: int = 0,
    cache_file: str | os.PathLike | None = None,
    progress: bool = True,
) -> Dataset:
    """ELECTRA's data set: [CLS] A [SEP] or [CLS] A [SEP] B [SEP], neither padded nor masked, in the order of the
    documents.

    Args:
        documents, max_length, seed, cache_file, progress: as in `create_pretraining_pairs`; one document is enough.
        single_segment_prob, random_length_prob: see `segments`.

    Returns:
        Columns `input_ids` (int32) and `token_type_ids` (int8; 0 for [CLS] A [SEP], 1 for B [SEP]).

    Raises:
        ValueError: as in `create_pretraining_pairs`.
    """
    special = SpecialTokens.from_tokenizer(tokenizer)
    _check_length(max_length)
    _check_probabilities(single_segment_prob=single_segment_prob, random_length_prob=random_length_prob)
    corpus = Corpus.from_documents(documents)
    numbers = array("q")
    with tqdm(
        total=len(corpus.tokens), desc="Packing documents", unit="token", unit_scale=True, disable=not progress
    ) as bar:
        for span in segments(corpus, random.Random(seed), max_length, single_segment_prob, random_length_prob):
            numbers.extend(span)
            bar.update(span[1] - span[0] + span[3] - span[2])
        bar.update(len(corpus.tokens) - bar.n)  # what was cut off
    return _write(
        corpus.tokens, np.frombuffer(numbers, dtype=np.int64).reshape(-1, 4), None, special, cache_file, progress
    )


def _pair_corpus(
    documents: "Documents | Dataset | Corpus",
    max_length: int,
    dupe_factor: int,
    short_seq_prob: float,
    nsp_probability: float,
) -> Corpus:
    _check_length(max_length)
    if dupe_factor < 1:
        raise ValueError(f"dupe_factor must be at least 1, got {dupe_factor}; the official code uses 10.")
    _check_probabilities(short_seq_prob=short_seq_prob, nsp_probability=nsp_probability)
    corpus = Corpus.from_documents(documents)
    if len(corpus) < 2:
        raise ValueError(
            "documents holds 1 document with text, but next sentence prediction draws random sentences from another "
            "one: give at least 2."
        )
    return corpus


def _check_length(max_length: int) -> None:
    if max_length < MIN_LENGTH:
        raise ValueError(f"max_length must be at least {MIN_LENGTH} ([CLS] a [SEP] b [SEP]), got {max_length}.")


def _check_probabilities(**probabilities: float) -> None:
    for name, value in probabilities.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value}.")


def _write(
    tokens: np.ndarray,
    spans: np.ndarray,
    labels: np.ndarray | None,
    special: SpecialTokens,
    cache_file: str | os.PathLike | None,
    progress: bool,
) -> Dataset:
    """Lay out rows for the (N, 4) spans, in memory or through a temporary file beside `cache_file`."""
    columns = {"input_ids": List(Value("int32")), "token_type_ids": List(Value("int8"))}
    if labels is not None:
        columns["next_sentence_label"] = Value("int8")
    schema = Features(columns).arrow_schema

    def batches() -> Iterator[pa.RecordBatch]:
        with tqdm(total=len(spans), desc="Writing examples", unit="row", unit_scale=True, disable=not progress) as bar:
            for begin in range(0, len(spans), _ROWS_PER_BATCH):
                rows = slice(begin, begin + _ROWS_PER_BATCH)
                arrays: list[pa.Array] = _rows(tokens, spans[rows], special)
                if labels is not None:
                    arrays.append(pa.array(labels[rows].astype(np.int8)))
                yield pa.RecordBatch.from_arrays(arrays, schema=schema)
                bar.update(len(arrays[0]))

    if cache_file is None:
        return Dataset(pa.Table.from_batches(batches(), schema=schema))
    path = Path(cache_file)
    path.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as staged:
        try:
            with pa.ipc.new_stream(staged, schema) as writer:
                for batch in batches():
                    writer.write_batch(batch)
            staged.close()
            os.replace(staged.name, path)
        except BaseException:
            os.unlink(staged.name)
            raise
    return Dataset.from_file(str(path))


def _rows(tokens: np.ndarray, spans: np.ndarray, special: SpecialTokens) -> list[pa.Array]:
    """Ids and token types of [CLS] A [SEP] B [SEP] for (R, 4) spans; without B there is no second [SEP]."""
    a_start, a_end, b_start, b_end = spans.T
    a_length, b_length = a_end - a_start, b_end - b_start
    lengths = a_length + 2 + np.where(b_length > 0, b_length + 1, 0)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    starts, ends = offsets[:-1], offsets[1:]
    ids = np.full(offsets[-1], special.sep_id, dtype=np.int32)
    ids[starts] = special.cls_id
    ids[_ranges(starts + 1, a_length)] = tokens[_ranges(a_start, a_length)]
    ids[_ranges(starts + 2 + a_length, b_length)] = tokens[_ranges(b_start, b_length)]
    types = np.zeros(offsets[-1], dtype=np.int8)
    types[_ranges(starts + 2 + a_length, ends - starts - 2 - a_length)] = 1
    return [pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values)) for values in (ids, types)]


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The numbers starts[i], ..., starts[i] + lengths[i] - 1 for all i, one after the other."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum())
