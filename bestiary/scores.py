"""Scores of a pre-trained checkpoint on held-out data, by what it can do.

What a checkpoint can do is found out from the auto classes of its configuration and from the shapes of its outputs:

* a masked language model (vocabulary logits for every token) has a pseudo-log-likelihood: each token is masked once
  and the log-probabilities of the originals are added up (Salazar et al., 2020, arXiv 1910.14659, equation 2); one
  whose logits at a place leave the token there out has the same sum in one pass;
* a detector of replaced tokens (one logit a token, high for "replaced") gives the sum of log P(token is original), in
  one pass;
* anything with a task head can be fine-tuned.

A checkpoint whose weights fill a class only in part cannot do what that class does.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.utils import ModelOutput

from .recipe import Recipe, load_recipe


TOKENS_PER_BATCH = 8192
"""Tokens, padding included, that are scored in one pass."""


# Networks in a checkpoint


def load_masked_lm(folder: str | Path) -> tuple[PreTrainedModel | None, str]:
    """The masked language model of a checkpoint or None; and what that network is, or why there is none."""
    return _load("AutoModelForMaskedLM", folder, 3, "logits of the vocabulary")


def load_detector(folder: str | Path) -> tuple[PreTrainedModel | None, str]:
    """The detector of replaced tokens of a checkpoint or None; and what that network is, or why there is none."""
    return _load("AutoModelForPreTraining", folder, 2, "score of being replaced")


def _load(auto_name: str, folder: str | Path, dimensions: int, wanted: str) -> tuple[PreTrainedModel | None, str]:
    """Load the class if the checkpoint has all its weights and its logits, (B, T) or (B, T, V), are per token."""
    auto_class = getattr(transformers, auto_name)
    config_class = type(AutoConfig.from_pretrained(folder))
    if config_class not in auto_class._model_mapping:
        return None, f"{config_class.__name__} has no {auto_name}"
    try:
        model, report = auto_class.from_pretrained(folder, output_loading_info=True)
    except ValueError as error:
        return None, str(error)
    lacking = [*report["missing_keys"], *report["mismatched_keys"]]
    if lacking:
        return None, f"the checkpoint has no weights for {len(lacking)} parameters of {type(model).__name__}"
    probe = torch.ones(3, 7, dtype=torch.long)  # (B, T)
    try:
        with torch.no_grad():
            logits = model.eval()(input_ids=probe, attention_mask=torch.ones_like(probe)).get("logits")
    except (ValueError, TypeError) as error:
        return None, str(error)
    if logits is None or logits.dim() != dimensions or logits.shape[:2] != probe.shape:
        return None, f"{type(model).__name__} gives tokens no {wanted}"
    summary = (type(model).__doc__ or "").strip().split("\n\n")[0]
    return model, f"{type(model).__name__}, {model.num_parameters():,} parameters. {' '.join(summary.split())}"


# Sentences


@dataclass(frozen=True)
class SentenceScores:
    """Log-probabilities of N sentences.

    sums: (N,) float64, over the sentence's tokens without the special ones. counts: (N,) number of these tokens.
    """

    sums: np.ndarray
    counts: np.ndarray

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability of a token."""
        return float(np.exp(-self.sums.sum() / self.counts.sum()))


def masked_lm_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str],
    max_length: int,
    special_tokens: bool = False,
) -> SentenceScores:
    """Log-likelihood of sentences, cut at `max_length` tokens: the sum over their tokens of log P(token | all others).

    A model that leaves a token out of the logits at its place (`sees_own_token` is False, as of T-TA) gives it in one
    pass. For any other this is the pseudo-log-likelihood, with one forward row for every token, in which it is masked;
    what comes after the base model, or where that cannot be cut the output layer, runs at the masked positions only.

    Args:
        special_tokens: whether the sum is also over the tokens that the tokenizer puts around a sentence.
    """
    encoded, places = encode_sentences(tokenizer, sentences, max_length, special_tokens)
    sums, counts = np.zeros(len(sentences)), np.array([len(tokens) for tokens in places])
    if not getattr(model, "sees_own_token", True):  # models of others have no such attribute
        own: Any = model
        for batch in batches_by_length(list(range(len(sentences))), [len(ids) for ids in encoded]):
            ids, real = padded_batch([encoded[owner] for owner in batch], tokenizer, model.device)
            scored = torch.zeros_like(ids)
            for row, owner in enumerate(batch):
                scored[row, places[owner]] = 1
            with torch.no_grad():
                found = own.token_log_likelihoods(ids, real, scored)  # (B, T)
            sums[batch] = found.double().sum(1).cpu().numpy()
        return SentenceScores(sums, counts)

    for rows in masked_rows(tokenizer, encoded, places, model.device):
        with torch.no_grad(), at_masked_positions(model, rows.at):
            logits = model(input_ids=rows.input_ids, attention_mask=rows.attention_mask).logits  # (B, 1 or T, V)
        logits = logits[:, 0] if logits.shape[1] == 1 else logits[torch.arange(len(logits)), rows.at]
        chosen = -F.cross_entropy(logits.float(), rows.originals, reduction="none")
        np.add.at(sums, rows.owners, chosen.cpu().numpy())
    return SentenceScores(sums, counts)


@dataclass(frozen=True)
class MaskedRows:
    """A batch of B rows in each of which one token is masked.

    owners: which sentence each row is of. at, originals: (B,) position and id of the masked token. input_ids,
    attention_mask: (B, T).
    """

    owners: list[int]
    at: torch.Tensor
    originals: torch.Tensor
    input_ids: torch.Tensor
    attention_mask: torch.Tensor


def masked_rows(
    tokenizer: PreTrainedTokenizerBase, encoded: list[list[int]], places: list[list[int]], device: torch.device
) -> Iterator[MaskedRows]:
    """Rows for all tokens at `places` of the encoded sentences, those of similar length together."""
    todo = [(owner, place) for owner, tokens in enumerate(places) for place in tokens]
    for batch in batches_by_length(todo, [len(encoded[owner]) for owner, _ in todo]):
        owners = [owner for owner, _ in batch]
        at = torch.tensor([place for _, place in batch], device=device)
        ids, real = padded_batch([encoded[owner] for owner in owners], tokenizer, device)
        each = torch.arange(len(batch), device=device)
        originals = ids[each, at]
        ids[each, at] = tokenizer.mask_token_id
        yield MaskedRows(owners, at, originals, ids, real)


@contextmanager
def at_masked_positions(model: PreTrainedModel, at: torch.Tensor) -> Iterator[None]:
    """Within, what follows the base model gets its states at positions `at` (B,) only, (B, 1, D) instead of (B, T, D).

    Of a model whose base is not a part of it, the same is done to the input of the output layer.
    """
    each = torch.arange(len(at), device=at.device)
    base, output = getattr(model, "base_model", model), model.get_output_embeddings()

    def cut_states(module: nn.Module, inputs: tuple, outputs: Any) -> Any:
        if isinstance(outputs, ModelOutput) and "last_hidden_state" in outputs:
            outputs["last_hidden_state"] = outputs["last_hidden_state"][each, at].unsqueeze(1)
        return outputs

    def cut_inputs(module: nn.Module, inputs: tuple) -> Any:
        hidden = inputs[0]
        return (hidden[each, at].unsqueeze(1),) if hidden.dim() == 3 and hidden.shape[1] > 1 else None

    hooks = [] if base is model else [base.register_forward_hook(cut_states)]
    hooks += [] if output is None else [output.register_forward_pre_hook(cut_inputs)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def detector_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str], max_length: int
) -> SentenceScores:
    """Sum of log P(token is original) over the tokens of sentences, cut at `max_length` tokens."""
    encoded, places = encode_sentences(tokenizer, sentences, max_length)
    sums, counts = np.zeros(len(sentences)), np.array([len(tokens) for tokens in places])
    for batch in batches_by_length(list(range(len(sentences))), [len(ids) for ids in encoded]):
        ids, real = padded_batch([encoded[owner] for owner in batch], tokenizer, model.device)
        with torch.no_grad():
            original = F.logsigmoid(-model(input_ids=ids, attention_mask=real).logits.double()).cpu().numpy()  # (B, T)
        for owner, row in zip(batch, original):
            sums[owner] = row[places[owner]].sum()
    return SentenceScores(sums, counts)


def encode_sentences(
    tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str], max_length: int, special_tokens: bool = False
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of each sentence, and the positions of its tokens, of the special ones only if they are wanted."""
    if not sentences:  # which tokenizers do not take
        return [], []
    encoded = tokenizer(list(sentences), truncation=True, max_length=max_length, return_special_tokens_mask=True)
    places = [
        [place for place, special in enumerate(mask) if special_tokens or not special]
        for mask in encoded["special_tokens_mask"]
    ]
    return encoded["input_ids"], places


def batches_by_length(items: Sequence[Any], lengths: Sequence[int]) -> Iterator[list[Any]]:
    """Items of similar length together, at most `TOKENS_PER_BATCH` tokens at a time."""
    batch: list[Any] = []
    for number in sorted(range(len(items)), key=lambda number: lengths[number]):
        if batch and (len(batch) + 1) * lengths[number] > TOKENS_PER_BATCH:
            yield batch
            batch = []
        batch.append(items[number])
    if batch:
        yield batch


def padded_batch(
    rows: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, T) and attention mask (B, T)."""
    ids = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id)
    real = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        real[number, : len(row)] = 1
    return ids.to(device), real.to(device)


# Held-out data


def held_out_texts(documents: Sequence[list[str]], count: int, seed: int) -> list[str]:
    """`count` stretches of text (fewer if there is less), each from a sentence chosen at random to its document's end
    or 50 sentences on.

    Args:
        documents: sentences of each document.
    """
    starts = [(number, place) for number, document in enumerate(documents) for place in range(len(document))]
    chosen = np.random.default_rng(seed).choice(len(starts), min(count, len(starts)), replace=False)
    return [" ".join(documents[number][place : place + 50]) for number, place in (starts[index] for index in chosen)]


@dataclass(frozen=True)
class MinimalPair:
    """A sentence that is right and one that is wrong by a minimal change; `paradigm` names the kind of change."""

    good: str
    bad: str
    paradigm: str = ""


def load_minimal_pairs(file: str | Path, per_paradigm: int | None = None, seed: int = 0) -> list[MinimalPair]:
    """Read minimal pairs in BLiMP's form (Warstadt et al., 2020): columns `sentence_good`, `sentence_bad` and, if the
    pairs are of several kinds, `uid` (also written `UID`).

    Args:
        file: .parquet or .jsonl.
        per_paradigm: only so many pairs of each kind, chosen by `seed`; None takes all.

    Raises:
        ValueError: no such file, another suffix, no rows or a missing column.
    """
    path = Path(file)
    if path.suffix not in (".parquet", ".jsonl") or not path.is_file():
        raise ValueError(f"Minimal pairs: {path} must be a .parquet or .jsonl file that exists.")
    if path.suffix == ".parquet":
        from pyarrow import parquet

        rows = parquet.read_table(path).to_pylist()
    else:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not rows or not {"sentence_good", "sentence_bad"} <= rows[0].keys():
        raise ValueError(
            f"Minimal pairs: {path} must have rows with sentence_good and sentence_bad; "
            f"it has {', '.join(rows[0]) if rows else 'no rows'}."
        )
    kinds: dict[str, list[MinimalPair]] = {}
    for row in rows:
        kind = str(row.get("uid", row.get("UID", "")))
        kinds.setdefault(kind, []).append(MinimalPair(row["sentence_good"], row["sentence_bad"], kind))
    rng = np.random.default_rng(seed)
    pairs = []
    for _, kind_pairs in sorted(kinds.items()):
        count = len(kind_pairs) if per_paradigm is None else min(per_paradigm, len(kind_pairs))
        pairs += [kind_pairs[index] for index in sorted(rng.choice(len(kind_pairs), count, replace=False))]
    return pairs


def minimal_pair_accuracy(pairs: Sequence[MinimalPair], good: np.ndarray, bad: np.ndarray) -> float:
    """Share of pairs whose right sentence has the higher score (a tie is half right), averaged over the paradigms.

    Args:
        good, bad: (N,) scores of the right and the wrong sentences.
    """
    kinds: dict[str, list[float]] = {}
    for pair, right, wrong in zip(pairs, good, bad):
        kinds.setdefault(pair.paradigm, []).append(0.5 * (1 + np.sign(right - wrong)))
    return float(np.mean([np.mean(values) for values in kinds.values()]))


# Fine-tuning


def finetune_recipe(name: str, overrides: Sequence[str], checkpoint: str | Path | None = None) -> Recipe:
    """The fine-tuning recipe with its overrides, for a checkpoint."""
    from .trainers.finetuning import FinetuneTrainingArguments
    from .trainers.tasks import TaskDataArguments

    model = [] if checkpoint is None else ["--name_or_path", str(checkpoint)]
    return load_recipe(
        ["--config", name, *model, *overrides], data=TaskDataArguments, training=FinetuneTrainingArguments
    )


def finetuned_scores(checkpoint: str | Path, name: str, overrides: Sequence[str], seed: int) -> dict[str, float]:
    """Fine-tune a checkpoint by a recipe and evaluate it once, at the end; nothing is kept.

    Returns:
        The metrics of the recipe's task.

    Raises:
        ValueError: of the recipe, or the checkpoint's paper has no head for the task.
    """
    from .trainers.finetuning import FinetuneTrainer, FinetuneTrainingArguments
    from .trainers.tasks import TASKS, load_labelled

    recipe = finetune_recipe(name, overrides, checkpoint)
    data, training = recipe.data, cast(FinetuneTrainingArguments, recipe.training)
    training.seed = training.data_seed = seed
    training.eval_strategy, training.save_strategy = IntervalStrategy.NO, SaveStrategy.NO
    training.report_to, training.disable_tqdm, training.load_best_model_at_end = [], True, False
    set_seed(seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    train, held_out = load_labelled(data)
    task = TASKS[data.task](data, tokenizer, train)
    model = getattr(transformers, task.auto_class).from_pretrained(
        checkpoint, config=recipe.build_config(**task.config_fields())
    )
    features = task.features(held_out, False)
    metrics = task.metrics(held_out, features)
    with TemporaryDirectory() as folder:
        training.output_dir = folder
        trainer = FinetuneTrainer(
            model,
            training,
            data_collator=task.collator(),
            train_dataset=task.features(train, True),
            eval_dataset=features,
            processing_class=tokenizer,
            compute_metrics=metrics,
        )
        silence(trainer)
        trainer.train()
        found = trainer.evaluate()
    skipped = re.compile(r"epoch|eval_(\w*loss|runtime|\w+_per_second)")
    return {name.removeprefix("eval_"): value for name, value in found.items() if not skipped.fullmatch(name)}


def silence(trainer: Any) -> None:
    """Take away the callbacks that write log lines to the terminal."""
    for callback in (transformers.ProgressCallback, transformers.PrinterCallback):
        trainer.remove_callback(callback)
