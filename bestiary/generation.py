"""Texts from any sequence-to-sequence model, and scores of generated texts against references.

BLEU and chrF come from sacrebleu, ROUGE from rouge-score (`pip install "bestiary[generation]"`); exact match and edit
distance are here. Texts are compared without white space at their ends.
"""

import copy
import importlib
import importlib.util
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch


if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

Scores = dict[str, float]


def edit_distance(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Smallest number of insertions, deletions and replacements that turn one sequence into the other
    (Levenshtein).
    """
    if len(first) < len(second):
        first, second = second, first
    codes: dict[Any, int] = {}
    short = np.array([codes.setdefault(item, len(codes)) for item in second], dtype=np.int64)
    steps = np.arange(len(second) + 1)
    row = steps.copy()
    for number, item in enumerate(first, 1):
        best = np.empty_like(row)
        best[0] = number
        best[1:] = np.minimum(row[1:] + 1, row[:-1] + (short != codes.get(item, -1)))
        row = np.minimum.accumulate(best - steps) + steps  # insertions
    return int(row[-1])


def exact_match_scores(predictions: Sequence[str], references: Sequence[str]) -> Scores:
    """Share of the texts that equal their reference."""
    return {"exact_match": statistics.fmean(ours == theirs for ours, theirs in zip(predictions, references))}


def edit_distance_scores(predictions: Sequence[str], references: Sequence[str]) -> Scores:
    """Mean edit distance in characters, and the sum of distances by the number of characters of all references."""
    distances = [edit_distance(ours, theirs) for ours, theirs in zip(predictions, references)]
    characters = sum(map(len, references))
    return {"edit_distance": statistics.fmean(distances), "character_error_rate": sum(distances) / max(1, characters)}


def bleu_scores(predictions: Sequence[str], references: Sequence[str]) -> Scores:
    """BLEU of the corpus by sacrebleu's defaults (13a tokens, cased), 0 to 100."""
    sacrebleu = _load("sacrebleu")
    return {"bleu": float(sacrebleu.corpus_bleu(list(predictions), [list(references)]).score)}


def chrf_scores(predictions: Sequence[str], references: Sequence[str]) -> Scores:
    """chrF2 of the corpus by sacrebleu, 0 to 100."""
    sacrebleu = _load("sacrebleu")
    return {"chrf": float(sacrebleu.corpus_chrf(list(predictions), [list(references)]).score)}


def rouge_scores(predictions: Sequence[str], references: Sequence[str]) -> Scores:
    """Mean F1 of ROUGE-1, -2, -L and -Lsum (a line is a sentence) with stemming, 0 to 1.

    rouge-score sees words of a-z and digits only, so that texts in other scripts have 0.
    """
    kinds = ("rouge1", "rouge2", "rougeL", "rougeLsum")
    scorer = _load("rouge_score.rouge_scorer").RougeScorer(list(kinds), use_stemmer=True)
    found = [scorer.score(theirs, ours) for ours, theirs in zip(predictions, references)]
    return {kind: statistics.fmean(each[kind].fmeasure for each in found) for kind in kinds}


METRICS: dict[str, Callable[[Sequence[str], Sequence[str]], Scores]] = {
    "exact_match": exact_match_scores,
    "edit_distance": edit_distance_scores,
    "bleu": bleu_scores,
    "chrf": chrf_scores,
    "rouge": rouge_scores,
}
"""Scores by name."""

_PACKAGES = {"bleu": "sacrebleu", "chrf": "sacrebleu", "rouge": "rouge_score"}


def _load(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(_missing(module.split(".")[0]), name=error.name) from error


def _missing(package: str) -> str:
    name = package.replace("_", "-")
    return f'This score needs the package {name}, which is not installed: pip install "bestiary[generation]".'


def check_metrics(owner: str, names: Iterable[str]) -> None:
    """Refuse, before any work is done, names that are no scores and scores whose package is missing.

    Raises:
        ValueError: an unknown name.
        ModuleNotFoundError: sacrebleu or rouge-score is not installed.
    """
    for name in names:
        if name not in METRICS:
            raise ValueError(f"{owner}.metrics: {name!r} is no score; there are {', '.join(METRICS)}.")
        package = _PACKAGES.get(name)
        if package is not None and importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(_missing(package), name=package)


def score_texts(
    names: Iterable[str], predictions: Sequence[str], references: Sequence[str], lowercase: bool = False
) -> Scores:
    """The scores that `names` choose out of `METRICS`.

    Args:
        names: keys of `METRICS`.
        predictions, references: one text each, in the same order.
        lowercase: compare in lower case, for models whose vocabulary has no capitals.

    Raises:
        ValueError: an unknown name, no texts, or other numbers of predictions than of references.
    """
    names = list(names)
    check_metrics("score_texts", names)
    if len(predictions) != len(references) or not references:
        raise ValueError(
            f"score_texts: {len(predictions)} predictions and {len(references)} references; every prediction needs "
            "one reference."
        )
    ours, theirs = (
        [(text.lower() if lowercase else text).strip() for text in texts] for texts in (predictions, references)
    )
    return {name: value for key in names for name, value in METRICS[key](ours, theirs).items()}


def check_one_text(owner: str, settings: "GenerationConfig") -> None:
    """`ValueError` unless `generate()` gives one row of tokens for each source by these settings."""
    for name, wanted in (("num_return_sequences", 1), ("return_dict_in_generate", False)):
        value = getattr(settings, name)
        if value not in (None, wanted):
            raise ValueError(f"{owner}.{name} must be {wanted}, for one text for each source; got {value!r}.")


@torch.no_grad()
def generate_texts(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str],
    batch_size: int = 16,
    max_source_length: int | None = None,
    progress: bool = False,
    **options: Any,
) -> list[str]:
    """One text for each source, in their order, by `model.generate`.

    Sources are put into batches by length, so that little is padded; sampling therefore depends on the batch size.

    Args:
        model: any model that generates from a source, in evaluation mode.
        tokenizer: the model's.
        texts: sources.
        batch_size: sources at a time.
        max_source_length: longest source in tokens, cut off behind that; None takes the tokenizer's.
        progress: show a progress bar.
        options: of `model.generate` (`num_beams`, `max_new_tokens`, ...).

    Raises:
        ValueError: `batch_size` below 1, or several texts for a source.
    """
    from tqdm.auto import tqdm

    if batch_size < 1:
        raise ValueError(f"generate_texts: batch_size must be at least 1, got {batch_size}.")
    settings = copy.deepcopy(cast(Any, model).generation_config)
    settings.update(**options)
    check_one_text("generate_texts", settings)
    if max_source_length is None and tokenizer.model_max_length < 10**9:  # else the tokenizer knows no limit
        max_source_length = tokenizer.model_max_length
    encoded = [
        tokenizer(text, truncation=max_source_length is not None, max_length=max_source_length) for text in texts
    ]
    order = sorted(range(len(texts)), key=lambda place: len(encoded[place]["input_ids"]))
    found = [""] * len(texts)
    bar = tqdm(total=len(texts), desc="Generating", unit="text", disable=not progress)
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        names = [name for name in ("input_ids", "attention_mask") if name in encoded[places[0]]]
        rows = [{name: encoded[place][name] for name in names} for place in places]
        batch = tokenizer.pad(rows, return_tensors="pt").to(model.device)
        produced = cast(Any, model).generate(**batch, **options)
        for place, text in zip(places, tokenizer.batch_decode(produced, skip_special_tokens=True)):
            found[place] = text.strip()
        bar.update(len(places))
    bar.close()
    return found
