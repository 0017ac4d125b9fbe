"""Extractive question answering in the form of SQuAD 1.1 (Rajpurkar et al., 2016, arXiv 1606.05250): pieces, spans,
scores.

As in the official BERT code, a context that is too long is cut into overlapping pieces, and a piece without the answer
learns to point at [CLS], so that the scores of pieces can be compared. An answer that is not in its context carries no
loss; the official code leaves such questions out.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase


OUTSIDE = -1
"""Position that carries no loss, and characters of a token outside the context."""

MAX_QUESTION = 64
"""Longest question in tokens (official BERT code); the rest is cut off."""


def qa_features(
    batch: dict[str, list],
    numbers: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    doc_stride: int,
    with_offsets: bool,
) -> dict[str, list]:
    """Question and context as model inputs, one row a piece, with `start_positions` and `end_positions`.

    The labels are the tokens of the first answer, [CLS] twice where the piece does not hold all of it, -1 twice if it
    is not in the context. An `answer_start` that does not point at the answer is corrected by searching the context.

    Args:
        batch: columns question, context, answers (`{"text": [...], "answer_start": [...]}`).
        numbers: of the rows.
        tokenizer: a fast one.
        max_length: of a piece, question and special tokens included.
        doc_stride: tokens of the context that two neighbouring pieces share.
        with_offsets: also give `row`, the row of each piece, and `offsets`, the characters (begin, end) of each
            token, (-1, -1) outside the context.

    Raises:
        ValueError: `max_length` leaves no room for question and overlap, or a row without an answer.
    """
    encoded = tokenizer(
        _short_questions(batch["question"], tokenizer, max_length, doc_stride),
        batch["context"],
        truncation="only_second",
        max_length=max_length,
        stride=doc_stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    owners = encoded["overflow_to_sample_mapping"]
    answers = [
        _characters(context, given, number)
        for context, given, number in zip(batch["context"], batch["answers"], numbers)
    ]
    inputs = {name: encoded[name] for name in tokenizer.model_input_names if name in encoded}
    offsets, starts, ends = [], [], []
    for piece, owner in enumerate(owners):
        in_context = np.array(encoded.sequence_ids(piece)) == 1  # None is not 1
        spans = np.where(in_context[:, None], encoded["offset_mapping"][piece], OUTSIDE)  # (T, 2)
        start, end = _tokens(spans, answers[owner], encoded["input_ids"][piece], tokenizer.cls_token_id)
        starts.append(start)
        ends.append(end)
        if with_offsets:
            offsets.append(spans.tolist())
    labels = {"start_positions": starts, "end_positions": ends}
    return (
        inputs | labels | ({"row": [numbers[owner] for owner in owners], "offsets": offsets} if with_offsets else {})
    )


def _short_questions(
    questions: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int, doc_stride: int
) -> list[str]:
    """Questions without what is too much; the tokenizer itself would stop with an error."""
    room = min(MAX_QUESTION, max_length - doc_stride - tokenizer.num_special_tokens_to_add(pair=True) - 1)
    if room < 1:
        raise ValueError(
            f"TaskDataArguments.max_length={max_length} leaves no room for a question beside doc_stride={doc_stride} "
            "tokens of overlap; raise the one or lower the other (BERT: 384 and 128)."
        )
    questions = [question.strip() for question in questions]
    tokens = tokenizer(
        questions, add_special_tokens=False, truncation=True, max_length=room, return_offsets_mapping=True
    )
    return [text[: spans[-1][1]] if spans else text for text, spans in zip(questions, tokens["offset_mapping"])]


def _characters(context: str, answers: Any, number: int) -> tuple[int, int] | None:
    """Characters (begin, end) of the first answer, without blanks around it; None if the context does not hold it."""
    if not isinstance(answers, dict) or not answers.get("text") or not answers.get("answer_start"):
        raise ValueError(
            "The task qa needs an answer in every row, as {'text': [...], 'answer_start': [...]}; the answers of row "
            f"{number} are {answers!r}. Leave out questions without an answer (SQuAD 2.0)."
        )
    text, begin = answers["text"][0], answers["answer_start"][0]
    if begin < 0 or not context.startswith(text, begin):
        begin = context.find(text)
    shown = text.strip()
    if begin < 0 or not shown:
        return None
    begin += text.index(shown)
    return begin, begin + len(shown)


def _tokens(
    spans: np.ndarray, answer: tuple[int, int] | None, input_ids: Sequence[int], cls_token_id: int | None
) -> tuple[int, int]:
    """First and last token of an answer in a piece; spans (T, 2)."""
    if answer is None:
        return OUTSIDE, OUTSIDE
    low, high = spans.T
    first = np.flatnonzero((low <= answer[0]) & (answer[0] < high))
    last = np.flatnonzero((low < answer[1]) & (answer[1] <= high))
    if first.size and last.size:
        return int(first[0]), int(last[-1])
    position = input_ids.index(cls_token_id) if cls_token_id in input_ids else OUTSIDE
    return position, position


def best_answers(
    predictions: Sequence[np.ndarray],
    offsets: Sequence[Sequence[Sequence[int]]],
    owners: Sequence[int],
    contexts: Sequence[str],
    max_answer_length: int = 30,
    candidates: int = 20,
) -> list[str]:
    """The span with the largest sum of start and end logit of every row, over all its pieces; "" if there is none.

    Args:
        predictions: start and end logits, (N, T) each, of N pieces; padding at the end is ignored.
        offsets: characters (begin, end) of every token of every piece, (-1, -1) outside the context.
        owners: row of every piece.
        contexts: context of every row.
        max_answer_length: longest span, in tokens.
        candidates: so many best starts and ends are combined.
    """
    best: dict[int, tuple[float, str]] = {}
    for owner, piece, start_logits, end_logits in zip(owners, offsets, *predictions):
        spans = np.asarray(piece)
        inside = np.flatnonzero(spans[:, 0] != OUTSIDE)
        if inside.size == 0:
            continue
        first = inside[np.argsort(-start_logits[inside], kind="stable")[:candidates], None]  # (K, 1)
        last = inside[np.argsort(-end_logits[inside], kind="stable")[:candidates]]  # (K,)
        allowed = (first <= last) & (last < first + max_answer_length)
        scores = np.where(allowed, start_logits[first] + end_logits[last], -np.inf)
        row, column = np.unravel_index(scores.argmax(), scores.shape)
        score = scores[row, column]
        if score > best.get(owner, (-np.inf, ""))[0]:
            best[owner] = score, contexts[owner][spans[first[row, 0], 0] : spans[last[column], 1]]
    return [best.get(row, (-np.inf, ""))[1] for row in range(len(contexts))]


def squad_scores(guesses: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Exact match and token F1 in percent, the better of all answers per question, after SQuAD's normalisation."""
    pairs = [(_normalised(guess), [_normalised(answer) for answer in told]) for guess, told in zip(guesses, answers)]
    return {
        "exact_match": 100 * float(np.mean([guess in told for guess, told in pairs])),
        "f1": 100 * float(np.mean([max(_token_f1(guess, answer) for answer in told) for guess, told in pairs])),
    }


def _normalised(text: str) -> list[str]:
    """Words in lower case, without punctuation and articles."""
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _token_f1(guess: list[str], answer: list[str]) -> float:
    if not guess or not answer:
        return float(guess == answer)
    common = sum((Counter(guess) & Counter(answer)).values())
    return 2 * common / (len(guess) + len(answer))
