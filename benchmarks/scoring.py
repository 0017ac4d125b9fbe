"""Rows for scoring and comparing sentences without labels: T-TA in one pass against a BERT of the same size that needs
a row for every token.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch.nn import functional as F
from transformers import BertTokenizer

from bestiary.configuration.configuration_bert import BertPretrainingConfig
from bestiary.configuration.configuration_tta import TtaConfig
from bestiary.modeling.modeling_bert import BertPretrainingForMaskedLM
from bestiary.modeling.modeling_tta import TtaForMaskedLM
from bestiary.scores import encode_sentences, masked_rows
from bestiary.scoring import sentence_log_likelihoods, sentence_vectors

from .harness import compare, row


SENTENCES = 4
LENGTHS = (8, 16, 32)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SIZE = TtaConfig.SIZES["released"]


@contextmanager
def last_layer_at(model: BertPretrainingForMaskedLM, at: torch.Tensor) -> Iterator[None]:
    """Within, the last layer of BERT has one query a row, at positions `at` (B,); the head gets these states only."""
    layer, each = model.bert.encoder.layer[-1], torch.arange(len(at))
    attention, output = layer.attention.self, layer.attention.output

    def forward(hidden: torch.Tensor, mask: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        rows = hidden[each, at].unsqueeze(1)  # (B, 1, D)
        parts = (attention.query(rows), attention.key(hidden), attention.value(hidden))
        query, key, value = (attention.split_heads(part) for part in parts)
        one = None if mask is None else mask[each, :, at].unsqueeze(2)  # (B, 1, 1, T)
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=one)  # (B, H, 1, d)
        states = output(context.transpose(1, 2).flatten(2), rows)
        return layer.output(layer.intermediate(states), states)

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward


@torch.no_grad()
def best_pll(model: BertPretrainingForMaskedLM, tokenizer: BertTokenizer, sentences: list[str]) -> np.ndarray:
    """Pseudo-log-likelihoods (N,) by the least work that we know: last layer and head at the masked positions only."""
    sums = np.zeros(len(sentences))
    for rows in masked_rows(tokenizer, *encode_sentences(tokenizer, sentences, 128), model.device):
        with last_layer_at(model, rows.at):
            logits = model(input_ids=rows.input_ids, attention_mask=rows.attention_mask).logits[:, 0]
        np.add.at(sums, rows.owners, -F.cross_entropy(logits, rows.originals, reduction="none").numpy())
    return sums


@torch.no_grad()
def best_masked_vectors(model: BertPretrainingForMaskedLM, tokenizer: BertTokenizer, sentences: list[str]):
    """Mean states (N, D) of masked tokens, with the last layer at the masked positions only."""
    encoded, places = encode_sentences(tokenizer, sentences, 128)
    vectors = torch.zeros(len(sentences), model.config.hidden_size)
    for rows in masked_rows(tokenizer, encoded, places, model.device):
        with last_layer_at(model, rows.at):
            states = model.bert(input_ids=rows.input_ids, attention_mask=rows.attention_mask).last_hidden_state[:, 0]
        vectors.index_add_(0, torch.tensor(rows.owners), states)
    return vectors / torch.tensor([len(tokens) for tokens in places])[:, None]


@torch.no_grad()
def plain_pll(model: BertPretrainingForMaskedLM, tokenizer: BertTokenizer, sentences: list[str]) -> np.ndarray:
    """Pseudo-log-likelihoods (N,) as usually written: logits of all positions of all rows."""
    sums = np.zeros(len(sentences))
    for rows in masked_rows(tokenizer, *encode_sentences(tokenizer, sentences, 128), model.device):
        logits = model(input_ids=rows.input_ids, attention_mask=rows.attention_mask).logits
        chosen = logits[torch.arange(len(rows.at)), rows.at]
        np.add.at(sums, rows.owners, -F.cross_entropy(chosen, rows.originals, reduction="none").numpy())
    return sums


def sentences_of(length: int) -> list[str]:
    """Made-up sentences of so many tokens, [CLS] and [SEP] not counted."""
    draw = np.random.default_rng(length)
    return [" ".join(f"w{number}" for number in draw.integers(0, 29000, length)) for _ in range(SENTENCES)]


def models_and_tokenizer() -> tuple[TtaForMaskedLM, BertPretrainingForMaskedLM, BertTokenizer]:
    """Both models with random weights, and a tokenizer whose words are single tokens."""
    torch.manual_seed(0)
    words = SPECIAL + [f"w{number}" for number in range(SIZE["vocab_size"] - len(SPECIAL))]
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
    return (
        TtaForMaskedLM(TtaConfig(**SIZE)).eval(),
        BertPretrainingForMaskedLM(BertPretrainingConfig(**SIZE)).eval(),
        tokenizer,
    )


@row("tta_rescoring")
def tta_rescoring(pairs: int) -> dict:
    ours, bert, tokenizer = models_and_tokenizer()
    metrics = {}
    for length in LENGTHS:
        texts = sentences_of(length)
        functions: dict[str, Callable[[], object]] = {
            "peer": lambda texts=texts: best_pll(bert, tokenizer, texts),
            "T-TA": lambda texts=texts: sentence_log_likelihoods(ours, tokenizer, texts, special_tokens=False),
            "BERT, head at masked rows": lambda texts=texts: sentence_log_likelihoods(bert, tokenizer, texts).sums,
            "BERT, all logits": lambda texts=texts: plain_pll(bert, tokenizer, texts),
        }
        expected, *others = (functions[name]() for name in functions if name != "T-TA")
        if not all(np.allclose(expected, found, rtol=1e-4) for found in others):
            raise RuntimeError(f"benchmark tta_rescoring: the pseudo-log-likelihoods differ: {expected}, {others}")
        metrics[f"time, {length} tokens"] = compare(functions, pairs)
    return {
        "description": f"log-likelihood of {SENTENCES} sentences, 3 layers of 512, vocabulary {SIZE['vocab_size']}",
        "peer": "PLL of a BERT of the same size, last layer and head at the masked rows only",
        "metrics": metrics,
    }


@row("tta_similarity")
def tta_similarity(pairs: int) -> dict:
    ours, bert, tokenizer = models_and_tokenizer()
    metrics = {}
    for length in LENGTHS:
        texts = sentences_of(length)
        functions: dict[str, Callable[[], object]] = {
            "peer": lambda texts=texts: best_masked_vectors(bert, tokenizer, texts),
            "T-TA": lambda texts=texts: sentence_vectors(ours, tokenizer, texts),
            "BERT, all states": lambda texts=texts: sentence_vectors(bert, tokenizer, texts, mask_each_token=True),
            "BERT, nothing masked": lambda texts=texts: sentence_vectors(bert, tokenizer, texts),
        }
        if not torch.allclose(functions["peer"](), functions["BERT, all states"](), atol=1e-4):
            raise RuntimeError("benchmark tta_similarity: the vectors of masked tokens differ.")
        metrics[f"time, {length} tokens"] = compare(functions, pairs)
    return {
        "description": f"vectors of {SENTENCES} sentences, 3 layers of 512",
        "peer": "states of masked tokens by a BERT of the same size, last layer at the masked rows only",
        "metrics": metrics,
    }
