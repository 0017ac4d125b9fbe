"""Rows for training with replaced modules (BERT-of-Theseus) against plain fine-tuning of the predecessor."""

import copy
from collections.abc import Callable, Sequence

import torch
from transformers import BertConfig, BertForSequenceClassification

from bestiary.configuration.configuration_theseus import TheseusConfig
from bestiary.modeling.modeling_theseus import TheseusForSequenceClassification

from .harness import compare, compare_memory, row, with_target
from .models import NO_DROPOUT, agree


HALF = ((1, 0, 1, 0, 1, 0), (0, 1, 0, 1, 0, 1), (1, 1, 1, 0, 0, 0), (0, 0, 0, 1, 1, 1))
"""Patterns that stand for the rate 0.5: every module is replaced in half of them."""


@row("theseus_step")
def theseus_step(pairs: int, hidden: int = 256, batch: int = 8, length: int = 128) -> dict:
    """12 layers to 6, forward and backward; a call of every function is four steps, one for each pattern."""
    torch.manual_seed(0)
    size = {"hidden_size": hidden, "num_attention_heads": hidden // 64, "intermediate_size": 4 * hidden}
    peer = BertForSequenceClassification(BertConfig(**size, **NO_DROPOUT)).train()
    config = TheseusConfig.from_encoder(peer.config)
    model = TheseusForSequenceClassification.from_encoder(copy.deepcopy(peer), config)
    everything = TheseusForSequenceClassification.from_encoder(copy.deepcopy(peer), copy.deepcopy(config))
    everything.requires_grad_(True)
    inputs = {
        "input_ids": torch.randint(1000, peer.config.vocab_size, (batch, length)),
        "attention_mask": torch.ones(batch, length, dtype=torch.long),
        "labels": torch.arange(batch) % 2,
    }

    def steps(trained: torch.nn.Module, patterns: Sequence[Sequence[int]] | None) -> Callable[[], None]:
        def run() -> None:
            for number in range(len(HALF)):
                if patterns is not None:
                    trained.set_pattern(patterns[number])
                trained(**inputs).loss.backward()
                trained.zero_grad()

        return run

    none, every = ((0,) * 6,) * len(HALF), ((1,) * 6,) * len(HALF)
    with torch.no_grad():
        model.set_pattern(none[0])
        agree("theseus_step", {"peer": peer(**inputs).loss, "rate 0": model(**inputs).loss})
    functions = {
        "peer": steps(peer, None),
        "rate 0": steps(model, none),
        "rate 0.5": steps(model, HALF),
        "rate 1": steps(model, every),
        "rate 0.5, nothing frozen": steps(everything, HALF),
    }
    times, peaks = compare(functions, pairs), compare_memory(functions)
    times["rate 0.5"] = with_target(times["rate 0.5"], 0.60)

    small, large = model.to_base().eval(), peer.eval()
    inputs.pop("labels")

    @torch.no_grad()
    def infer(result: torch.nn.Module) -> None:
        for _ in HALF:
            result(**inputs)

    inference = compare({"peer": lambda: infer(large), "successor": lambda: infer(small)}, pairs)
    return {
        "description": f"four steps, 12 layers of {hidden} to 6, batch {batch} x {length}, forward and backward",
        "peer": "BertForSequenceClassification, all 12 layers",
        "metrics": {"time": times, "peak memory": peaks, "inference": inference},
    }
