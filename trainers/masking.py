"""Masking collators of BERT (Devlin et al. 2018, arXiv 1810.04805) and ELECTRA (Clark et al. 2020, arXiv 2003.10555).

Both papers mask an exact number of positions per sequence, which transformers' `DataCollatorForLanguageModeling` does
not: it flips one coin per token, so short sequences may stay unmasked, and its whole-word mode knows only [MASK].

Differences from the official code, each with its reason:

* ELECTRA draws positions with replacement, so that a position drawn twice counts twice in the generator's loss and
  receives the mean of two token ids. Here positions are drawn without replacement, with the official count.
* With whole words the official code masks nothing when every word is longer than the number of predictions. Here the
  shortest word is then masked, because a sequence without a prediction teaches nothing.
* Masks are drawn anew in every epoch, from a stream that belongs to `(seed, epoch, example)`; the official data files
  hold fixed masks (`trainers/documents.py` can replay them).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from .randomness import EVALUATION_EPOCH, example_rng


IGNORED_LABEL = -100
_SEQUENCE_COLUMNS = {"input_ids", "token_type_ids", "attention_mask", "special_tokens_mask", "example_key"}


@dataclass(frozen=True, eq=False)
class SpecialTokens:
    """What data construction needs to know of a vocabulary.

    Args:
        cls_id, sep_id, pad_id, mask_id: ids of [CLS], [SEP], [PAD] and [MASK].
        vocab_size: ids 0..vocab_size-1 exist; random replacements come from all of them.
        continuation: (V,) bool, true for the pieces that continue a word ("##..."); needed for whole words only.
        has_token_types: whether the model takes `token_type_ids` even when a row carries none.
    """

    cls_id: int
    sep_id: int
    pad_id: int
    mask_id: int
    vocab_size: int
    continuation: np.ndarray | None = None
    has_token_types: bool = True

    @classmethod
    def from_tokenizer(
        cls, tokenizer: "PreTrainedTokenizerBase | SpecialTokens", whole_word: bool = False
    ) -> "SpecialTokens":
        """Read the ids from a tokenizer; `whole_word` asks for the table of continuation pieces as well.

        Raises:
            ValueError: if a special token is missing, or `whole_word` is asked of a vocabulary without "##" pieces.
        """
        if isinstance(tokenizer, SpecialTokens):
            if whole_word and tokenizer.continuation is None:
                raise ValueError(
                    "SpecialTokens.continuation is None, but whole_word=True needs it: pass a (V,) bool array."
                )
            return tokenizer
        ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("cls", "sep", "pad", "mask")}
        missing = [f"{name}_token" for name, value in ids.items() if value is None]
        if missing:
            raise ValueError(
                f"{type(tokenizer).__name__} has no {', '.join(missing)}; masked pre-training needs all of cls_token, "
                "sep_token, pad_token and mask_token. Use a BERT-like tokenizer, or set them with "
                "tokenizer.add_special_tokens({...}) and resize the model's embeddings."
            )
        continuation = None
        if whole_word:
            vocabulary = tokenizer.get_vocab()
            continuation = np.zeros(max(vocabulary.values()) + 1, dtype=bool)
            continuation[[index for piece, index in vocabulary.items() if piece.startswith("##")]] = True
            if not continuation.any():
                raise ValueError(
                    "whole_word=True needs a WordPiece vocabulary, in which pieces that continue a word start with "
                    f"'##'; {type(tokenizer).__name__} has none. Use whole_word=False with this tokenizer."
                )
        return cls(
            cls_id=ids["cls"],
            sep_id=ids["sep"],
            pad_id=ids["pad"],
            mask_id=ids["mask"],
            vocab_size=len(tokenizer),
            continuation=continuation,
            has_token_types="token_type_ids" in tokenizer.model_input_names,
        )

    def save_pretrained(self, folder: str | PathLike) -> None:
        """Write nothing: transformers' Trainer saves the tokenizer of its collator, and bare ids are none."""


def prediction_counts(lengths: np.ndarray, rate: float, max_predictions: int | None = None) -> np.ndarray:
    """n = min(P, max(1, round(rate * length))) per row, (B,); lengths count special tokens, halves round to even."""
    counts = np.maximum(1, np.rint(rate * lengths)).astype(np.int64)
    return counts if max_predictions is None else np.minimum(counts, max_predictions)


def choose_positions(
    keys: np.ndarray, candidates: np.ndarray, counts: np.ndarray, continuation: np.ndarray | None = None
) -> np.ndarray:
    """Choose exactly `counts` candidates per row (fewer where there are fewer), or whole words up to that number.

    Words are visited in the order of the random key of their first piece; a word that would exceed the count is
    skipped. A piece marked as continuation belongs to the previous candidate of its row, even across a [SEP], as in
    the official code. If no word at all fits, the shortest one is chosen. Without `continuation` every candidate is a
    word of its own.

    Args:
        keys: (B, L) random numbers.
        candidates: (B, L) bool, positions that may be chosen.
        counts: (B,) at least 1.
        continuation: (B, L) bool or None.

    Returns:
        (B, L) bool.
    """
    rows, length = keys.shape
    starts = candidates
    if continuation is not None:
        starts = candidates & ~continuation
        with_candidates = np.flatnonzero(candidates.any(axis=1))
        starts[with_candidates, candidates[with_candidates].argmax(axis=1)] = True
    word = np.cumsum(starts, axis=1)  # (B, L); column 0 of the tables below stays empty
    cell = word + np.arange(rows)[:, None] * (length + 1)
    sizes = np.bincount(cell[candidates], minlength=rows * (length + 1)).reshape(rows, length + 1)
    word_keys = np.full(rows * (length + 1), np.inf)
    word_keys[cell[starts]] = keys[starts]
    order = np.argsort(word_keys.reshape(rows, length + 1), axis=1)
    sizes = np.take_along_axis(sizes, order, axis=1)

    # Each round takes the longest run of open words that fits; then the first open word does not fit any more and is
    # dropped with all others that are too long. This equals visiting the words one by one.
    taken = np.zeros_like(sizes, dtype=bool)
    room = counts.copy()
    pending = sizes > 0
    unfit = pending.any(axis=1)
    while True:
        pending &= sizes <= room[:, None]
        if not pending.any():
            break
        run = pending & (np.cumsum(sizes * pending, axis=1) <= room[:, None])
        taken |= run
        room -= (sizes * run).sum(axis=1)
        pending &= ~run
    unfit &= ~taken.any(axis=1)
    shortest = np.where(sizes > 0, sizes, length + 1).argmin(axis=1)
    taken[unfit, shortest[unfit]] = True

    chosen = np.empty_like(taken)
    np.put_along_axis(chosen, order, taken, axis=1)
    return candidates & np.take_along_axis(chosen, word, axis=1)


def mask_tokens(
    input_ids: np.ndarray,
    chosen: np.ndarray,
    uniforms: np.ndarray,
    replace: Sequence[float],
    mask_id: int,
    vocab_size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Replace the chosen positions by [MASK], by a random token, or by themselves; each position draws for itself.

    Args:
        input_ids: (B, L) int.
        chosen: (B, L) bool.
        uniforms: (B, L, 2) in [0, 1): the first decides what happens, the second which random token.
        replace: shares of [MASK], random and kept tokens.

    Returns:
        The corrupted ids and the labels, which are the original ids where `chosen` and -100 elsewhere, both (B, L).
    """
    mask_share, random_share, _ = replace
    action = uniforms[..., 0]
    to_random = chosen & (action >= mask_share) & (action < mask_share + random_share)
    corrupted = np.where(chosen & (action < mask_share), mask_id, input_ids)
    corrupted[to_random] = (uniforms[..., 1][to_random] * vocab_size).astype(corrupted.dtype)
    return corrupted, np.where(chosen, input_ids, IGNORED_LABEL)


@dataclass(eq=False)
class MaskingCollator:
    """Pads rows on the right to the longest one and masks them by BERT's rule: exact counts, 80 % [MASK], 10 % random,
    10 % kept.

    A row is a mapping with `input_ids` (special tokens included), optionally `token_type_ids`, `attention_mask` and
    `example_key`; other columns that hold one number per row, such as `next_sentence_label`, are stacked (int64 or
    float32), the rest is left out. The batch has `input_ids`, `attention_mask`, `labels` (original ids at masked
    positions, -100 elsewhere) and, if the rows or the tokenizer have them, `token_type_ids`, all (B, L) int64.

    Args:
        tokenizer: a tokenizer with [CLS], [SEP], [PAD] and [MASK], or a `SpecialTokens`.
        mlm_probability: share of the tokens, special ones included in the count, that are predicted; in (0, 1].
        max_predictions: largest number of predictions per row, or None. The paper's data has 20 at length 128 and
            77-80 at 512.
        replace: shares of [MASK], random token and kept token among the predicted positions.
        whole_word: mask all pieces of a word or none; what replaces a piece is still drawn per piece.
        max_length: longest row allowed, usually the model's `max_position_embeddings`; None does not check.
        pad_to_multiple_of: round the padded length up to a multiple.
        seed, epoch: with `example_key` they determine all draws for a row. Rows without `example_key` are numbered as
            they come since the last `set_epoch`; give keys if the collator runs in several workers or processes.
    """

    tokenizer: PreTrainedTokenizerBase | SpecialTokens
    mlm_probability: float = 0.15
    max_predictions: int | None = None
    replace: Sequence[float] = (0.8, 0.1, 0.1)
    whole_word: bool = False
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    seed: int = 0
    epoch: int = 0
    special: SpecialTokens = field(init=False, repr=False)
    _next_key: int = field(init=False, repr=False, default=0)

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not 0 < self.mlm_probability <= 1:
            raise ValueError(
                f"{name}.mlm_probability must be in (0, 1], got {self.mlm_probability}; the papers use 0.15 or 0.25."
            )
        self.replace = tuple(self.replace)
        if len(self.replace) != 3 or min(self.replace) < 0 or abs(sum(self.replace) - 1) > 1e-6:
            raise ValueError(
                f"{name}.replace must be three shares, of [MASK], random and kept tokens, that are not negative and "
                f"sum to 1, got {self.replace}; BERT uses (0.8, 0.1, 0.1), ELECTRA (0.85, 0.0, 0.15)."
            )
        for option in ("max_predictions", "max_length", "pad_to_multiple_of"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise ValueError(f"{name}.{option} must be at least 1 or None, got {value}.")
        if self.seed < 0:
            raise ValueError(f"{name}.seed must not be negative, got {self.seed}.")
        self.special = SpecialTokens.from_tokenizer(self.tokenizer, self.whole_word)
        self.set_epoch(self.epoch)

    def set_epoch(self, epoch: int) -> None:
        """Select the masks of an epoch; every evaluation sees those of `EVALUATION_EPOCH`, -1."""
        if epoch < EVALUATION_EPOCH:
            raise ValueError(f"{type(self).__name__}.epoch must be at least {EVALUATION_EPOCH}, got {epoch}.")
        self.epoch = epoch
        self._next_key = 0

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate rows; see the class.

        Raises:
            ValueError: if a row has no `input_ids`, has `labels`, is empty or longer than `max_length`, or if its
                columns do not fit.
        """
        batch = self._pad(features)
        generators = [example_rng(self.seed, self.epoch, self._key(feature)) for feature in features]
        self.corrupt(batch, generators)
        return {name: torch.from_numpy(np.ascontiguousarray(column)) for name, column in batch.items()}

    def candidates(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        """(B, L) bool: positions that may be masked, all real tokens but [CLS], [SEP] and [PAD]."""
        ids, special = batch["input_ids"], self.special
        return (
            batch["attention_mask"].astype(bool)
            & (ids != special.cls_id)
            & (ids != special.sep_id)
            & (ids != special.pad_id)
        )

    def counts(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        """(B,): number of positions to predict in each row."""
        return prediction_counts(batch["attention_mask"].sum(axis=1), self.mlm_probability, self.max_predictions)

    def corrupt(self, batch: dict[str, np.ndarray], generators: Sequence[np.random.Generator]) -> None:
        """Mask `input_ids` and add `labels`, in place; one generator per row, whose draws ignore the padding."""
        rows, width = batch["input_ids"].shape
        uniforms = np.zeros((rows, width, 3))
        lengths = width - batch["attention_mask"][:, ::-1].argmax(axis=1)  # up to the last real token
        for row, (generator, length) in enumerate(zip(generators, lengths.tolist())):
            generator.random(out=uniforms[row, :length])
        table = self.special.continuation if self.whole_word else None
        continuation = None if table is None else table[batch["input_ids"]]
        chosen = choose_positions(uniforms[..., 0], self.candidates(batch), self.counts(batch), continuation)
        batch["input_ids"], batch["labels"] = mask_tokens(
            batch["input_ids"], chosen, uniforms[..., 1:], self.replace, self.special.mask_id, self.special.vocab_size
        )

    def _key(self, feature: Mapping[str, Any]) -> int:
        if "example_key" in feature:
            return int(feature["example_key"])
        self._next_key += 1
        return self._next_key - 1

    def _pad(self, features: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
        name = type(self).__name__
        for row, feature in enumerate(features):
            if "input_ids" not in feature:
                raise ValueError(
                    f"{name}: row {row} has no column input_ids, only {sorted(feature)}; tokenize the data set first."
                )
            if "labels" in feature:
                raise ValueError(
                    f"{name}: row {row} has a column labels, which this collator makes; remove it from the data set."
                )
        ids = [np.asarray(feature["input_ids"], dtype=np.int64) for feature in features]
        lengths = np.array([len(row) for row in ids])
        longest = int(lengths.max())
        if lengths.min() == 0:
            raise ValueError(
                f"{name}: row {lengths.argmin()} has empty input_ids; remove such rows from the data set."
            )
        if self.max_length is not None and longest > self.max_length:
            raise ValueError(
                f"{name}: row {lengths.argmax()} has {longest} tokens, but max_length is {self.max_length}; build the "
                "data set with this max_length or use a model with more positions."
            )
        multiple = self.pad_to_multiple_of or 1
        width = -(-longest // multiple) * multiple
        inside = np.arange(width) < lengths[:, None]

        def padded(rows: Sequence[np.ndarray], column: str, fill: int) -> np.ndarray:
            if any(len(row) != length for row, length in zip(rows, lengths)):
                raise ValueError(
                    f"{name}: in some rows {column} and input_ids differ in length; rebuild the data set."
                )
            table = np.full(inside.shape, fill, dtype=np.int64)
            table[inside] = np.concatenate(rows)
            return table

        def column(key: str) -> list[Any] | None:
            values = [feature[key] for feature in features if key in feature]
            if values and len(values) < len(features):
                raise ValueError(f"{name}: only {len(values)} of {len(features)} rows have the column {key}.")
            return values or None

        batch = {"input_ids": padded(ids, "input_ids", self.special.pad_id)}
        mask = column("attention_mask")
        batch["attention_mask"] = inside.astype(np.int64) if mask is None else padded(mask, "attention_mask", 0)
        types = column("token_type_ids")
        if types is not None:
            batch["token_type_ids"] = padded(types, "token_type_ids", 0)
        elif self.special.has_token_types:
            batch["token_type_ids"] = np.zeros_like(batch["input_ids"])
        for key in dict.fromkeys(key for feature in features for key in feature if key not in _SEQUENCE_COLUMNS):
            first = np.asarray(next(feature[key] for feature in features if key in feature))
            if first.ndim == 0 and first.dtype.kind in "biuf":
                batch[key] = np.array(column(key), dtype=np.float32 if first.dtype.kind == "f" else np.int64)
        return batch


@dataclass(eq=False)
class ElectraMaskingCollator(MaskingCollator):
    """ELECTRA's masking: 85 % [MASK], 15 % kept, never a random token, and never a position that already holds [MASK].

    The batch also has `sampling_seeds` (B,) int64, one number in [0, 2**62) per row, from which the model draws the
    generator's samples. Differs from `MaskingCollator` in the default of `replace`; and if `max_length` L is
    given and `max_predictions` is not, there are at most max(1, int((mlm_probability + 0.005) * L)) predictions, the
    official code's number: 19 for 128, 79 for 512, 130 for 512 at 0.25.
    """

    replace: Sequence[float] = (0.85, 0.0, 0.15)

    def candidates(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        return super().candidates(batch) & (batch["input_ids"] != self.special.mask_id)

    def counts(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        limit = self.max_predictions
        if limit is None and self.max_length is not None:
            limit = max(1, int((self.mlm_probability + 0.005) * self.max_length))
        return prediction_counts(batch["attention_mask"].sum(axis=1), self.mlm_probability, limit)

    def corrupt(self, batch: dict[str, np.ndarray], generators: Sequence[np.random.Generator]) -> None:
        super().corrupt(batch, generators)
        batch["sampling_seeds"] = np.array([generator.integers(1 << 62) for generator in generators], dtype=np.int64)
