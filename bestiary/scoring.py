"""Uses of a bidirectional language model without labels: likelihood of sentences, rescoring of n-best lists,
similarity of sentences (Shin et al., 2020, arXiv 2004.08097; with masked models Salazar et al., 2020, arXiv
1910.14659).

    model = AutoModelForMaskedLM.from_pretrained("runs/tta_tiny")
    sentence_log_likelihoods(model, tokenizer, ["the cat sat", "the cat sad"]).sums
    rescore_nbest(model, tokenizer, [["the cat sat", "the cat sad"]], [[-12.1, -11.9]], weight=0.3)[0].best
    sentence_similarity(model, tokenizer, ["the cat sat"], ["a cat was sitting"])

T-TA needs one pass of a sentence; any other masked language model works too, with one row for every token.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .scores import (
    SentenceScores,
    batches_by_length,
    encode_sentences,
    masked_lm_scores,
    masked_rows,
    padded_batch,
)


def sentence_log_likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str],
    max_length: int | None = None,
    special_tokens: bool | None = None,
) -> SentenceScores:
    """Sum over the tokens of each sentence of log P(token | all others), in nats; it is not divided by the length.

    Args:
        model: a masked language model, T-TA or any other. Dropout is off while it scores.
        sentences: N sentences; an empty one has the sum 0 (over its special tokens, if they count).
        max_length: in tokens, special ones included; what is longer loses its end. None takes the model's.
        special_tokens: whether [CLS] and [SEP] count too. None counts them where the model was trained to predict
            them, which is T-TA.

    Raises:
        ValueError: a single string in place of a list, or a tokenizer without the mask that the model needs.
    """
    _refuse_string("sentences", sentences)
    sees_own_token = getattr(model, "sees_own_token", True)  # models of others have no such attribute
    if sees_own_token and tokenizer.mask_token_id is None:
        raise ValueError(
            f"sentence_log_likelihoods: {type(model).__name__} scores by masking tokens, but "
            f"{type(tokenizer).__name__} has no mask_token; use the tokenizer of the model."
        )
    special_tokens = not sees_own_token if special_tokens is None else special_tokens
    with _Evaluating(model):
        return masked_lm_scores(model, tokenizer, sentences, _longest(model, tokenizer, max_length), special_tokens)


# n-best lists


@dataclass(frozen=True)
class Rescored:
    """An n-best list of H hypotheses after rescoring.

    best: index of the hypothesis with the highest combined score; of equal ones the first.
    combined, likelihoods: (H,) combined scores, and log-likelihoods by the language model.
    """

    best: int
    combined: np.ndarray
    likelihoods: np.ndarray


def rescore_nbest(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    hypotheses: Sequence[Sequence[str]],
    scores: Sequence[Sequence[float]],
    weight: float,
    max_length: int | None = None,
) -> list[Rescored]:
    """Combine the scores of a recogniser (or translator) with a language model's: (1 - weight) * score + weight *
    log-likelihood.

    Args:
        hypotheses: for each utterance its hypotheses, any number of them.
        scores: of the hypotheses, higher is better.
        weight: in [0, 1]; 0 keeps the recogniser's order, 1 is the language model alone. See `choose_weight`.
        max_length: as in `sentence_log_likelihoods`.

    Raises:
        ValueError: a weight out of range, an utterance without hypotheses, as many scores as it has not, or one that
            is not finite.
    """
    _refuse_string("hypotheses", hypotheses)
    _check_weight(weight)
    _check_lists("scores", hypotheses, scores)
    flat = [text for texts in hypotheses for text in texts]  # all utterances together: batches of equal length
    sums = sentence_log_likelihoods(model, tokenizer, flat, max_length).sums
    ends = np.cumsum([len(texts) for texts in hypotheses])
    return [
        _combine(np.asarray(given, dtype=float), likelihoods, weight)
        for given, likelihoods in zip(scores, np.split(sums, ends[:-1]))
    ]


def _combine(scores: np.ndarray, likelihoods: np.ndarray, weight: float) -> Rescored:
    for name, values in (("scores", scores), ("likelihoods", likelihoods)):
        if not np.isfinite(values).all():  # 0 * inf would be no number, and win
            raise ValueError(f"n-best lists: {name} must be finite, got {values.tolist()}; use -1e9 for impossible.")
    combined = (1 - weight) * scores + weight * likelihoods
    return Rescored(int(combined.argmax()), combined, likelihoods)


def choose_weight(
    scores: Sequence[Sequence[float]],
    likelihoods: Sequence[Sequence[float]],
    errors: Sequence[Sequence[float]],
    weights: Iterable[float] = tuple(np.arange(101) / 100),
) -> tuple[float, float]:
    """The weight of `rescore_nbest` with the fewest errors on development data, the smallest of equal ones, and their
    number.

    Args:
        scores, likelihoods, errors: of every hypothesis of every utterance; `errors` for instance by `word_errors`.
        weights: what is tried.

    Raises:
        ValueError: as in `rescore_nbest`.
    """
    _check_lists("likelihoods", scores, likelihoods)
    _check_lists("errors", scores, errors)
    lists = [tuple(np.asarray(part, dtype=float) for part in parts) for parts in zip(scores, likelihoods, errors)]
    found = []
    for weight in weights:
        _check_weight(weight)
        total = sum(wrong[_combine(given, likely, weight).best] for given, likely, wrong in lists)
        found.append((float(total), float(weight)))
    total, weight = min(found)
    return weight, total


def word_errors(reference: str, hypothesis: str) -> int:
    """Fewest words to insert, delete and replace that make the hypothesis the reference (divided by the words of all
    references: the word error rate).
    """
    wanted, given = reference.split(), hypothesis.split()
    before = list(range(len(given) + 1))
    for row, word in enumerate(wanted, 1):
        now = [row]
        for column, other in enumerate(given, 1):
            now.append(min(before[column] + 1, now[-1] + 1, before[column - 1] + (word != other)))
        before = now
    return before[-1]


# Similarity


def sentence_vectors(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str],
    max_length: int | None = None,
    mask_each_token: bool = False,
) -> torch.Tensor:
    """Mean of the last layer's states over the tokens of each sentence, special tokens left out: (N, D) on the CPU.

    Args:
        model: any encoder, with or without a head. Dropout is off.
        max_length: as in `sentence_log_likelihoods`.
        mask_each_token: take the state of a token from a row in which it is masked, as the paper does with BERT: a
            state that leaves the token out, as T-TA's does by itself. One row for every token.

    Raises:
        ValueError: a single string in place of a list, or a sentence without tokens.
    """
    _refuse_string("sentences", sentences)
    longest = _longest(model, tokenizer, max_length)
    encoded, places = encode_sentences(tokenizer, sentences, longest)
    if empty := [number for number, tokens in enumerate(places) if not tokens]:
        raise ValueError(
            f"sentence_vectors: sentence {empty[0]}, {sentences[empty[0]]!r}, has no tokens and so no vector; drop it."
        )
    vectors = torch.zeros(len(sentences), model.config.hidden_size)
    with _Evaluating(model), torch.no_grad():
        if mask_each_token:
            for rows in masked_rows(tokenizer, encoded, places, model.device):
                states = model.base_model(input_ids=rows.input_ids, attention_mask=rows.attention_mask)
                each = torch.arange(len(rows.owners), device=model.device)
                states = states.last_hidden_state[each, rows.at]  # (B, D)
                vectors.index_add_(0, torch.tensor(rows.owners), states.float().cpu())
            return vectors / torch.tensor([len(tokens) for tokens in places])[:, None]
        for batch in batches_by_length(list(range(len(sentences))), [len(ids) for ids in encoded]):
            ids, real = padded_batch([encoded[owner] for owner in batch], tokenizer, model.device)
            kept = torch.zeros_like(ids)
            for row, owner in enumerate(batch):
                kept[row, places[owner]] = 1
            states = model.base_model(input_ids=ids, attention_mask=real).last_hidden_state
            vectors[batch] = mean_states(states.float(), kept).cpu()
    return vectors


def mean_states(states: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Mean of states (B, T, D) over the places where `kept` (B, T) is not 0, at least one in each row: (B, D)."""
    weights = (kept != 0).to(states.dtype)
    return (weights.unsqueeze(1) @ states).squeeze(1) / weights.sum(1, keepdim=True)


def sentence_similarity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    first: Sequence[str],
    second: Sequence[str],
    max_length: int | None = None,
    mask_each_token: bool = False,
) -> np.ndarray:
    """Cosine of the vectors of `first[i]` and `second[i]`: (N,) in [-1, 1]. Arguments as of `sentence_vectors`.

    Raises:
        ValueError: lists of different length, or as in `sentence_vectors`.
    """
    _refuse_string("first", first)
    _refuse_string("second", second)
    if len(first) != len(second):
        raise ValueError(f"sentence_similarity: first has {len(first)} sentences, second {len(second)}; give pairs.")
    if not first:
        return np.zeros(0)
    vectors = sentence_vectors(model, tokenizer, [*first, *second], max_length, mask_each_token).double()
    return torch.cosine_similarity(vectors[: len(first)], vectors[len(first) :], dim=1).numpy()


# Common


def read_rows(file: str | Path, *columns: str) -> list[dict[str, Any]]:
    """Rows of a JSONL file.

    Raises:
        ValueError: there are none, or one lacks a column.
    """
    rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not rows:
        raise ValueError(f"{file} has no rows; it must have one JSON object a line, with {', '.join(columns)}.")
    for number, row in enumerate(rows, 1):
        if missing := [name for name in columns if name not in row]:
            raise ValueError(f"{file}: row {number} has no {missing[0]}, only {', '.join(row)}; add it.")
    return rows


class _Evaluating:
    """Within, the model is in evaluation mode."""

    def __init__(self, model: torch.nn.Module):
        self.model, self.before = model, model.training

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *_: object) -> None:
        self.model.train(self.before)


def _longest(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> int:
    limit = min(tokenizer.model_max_length, model.config.max_position_embeddings)
    return limit if max_length is None else max_length


def _refuse_string(name: str, value: object) -> None:
    if isinstance(value, str):
        raise ValueError(f"{name} must be a list, got the single string {value!r}; put it in a list.")


def _check_weight(weight: float) -> None:
    if not 0 <= weight <= 1:
        raise ValueError(f"rescore_nbest: weight must be in [0, 1], got {weight}; 0 is the recogniser alone.")


def _check_lists(name: str, hypotheses: Sequence[Sequence], others: Sequence[Sequence]) -> None:
    numbers, given = [len(texts) for texts in hypotheses], [len(values) for values in others]
    if numbers != given:
        raise ValueError(f"n-best lists have {numbers} hypotheses, but there are {given} {name}; give one for each.")
    if 0 in numbers:
        raise ValueError(f"n-best list {numbers.index(0)} is empty; leave utterances without hypotheses out.")
