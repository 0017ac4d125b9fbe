"""Rows for HyPe: a fine-tuning step with noise in every layer against the step without, in one model each of the same
weights.
"""

import torch
from transformers import BertConfig, BertForSequenceClassification

from bestiary.configuration.configuration_hype import HypeConfig
from bestiary.modeling.modeling_hype import HypeForSequenceClassification

from .harness import compare, row, with_target
from .models import NO_DROPOUT, WIDTH, agree, training_step


VARIANTS: dict[str, dict] = {
    "normal": {"noise": "normal"},
    "uniform": {"noise": "uniform"},
    "normal, input and mid": {"noise": "normal", "noise_position": "both"},
}


@row("hype_step_384")
def hype_step_384(pairs: int) -> dict:
    return hype_step(pairs, layers=6, hidden=384, heads=12, target=1.02)


@row("hype_step_128")
def hype_step_128(pairs: int) -> dict:
    return hype_step(pairs, layers=2, hidden=128, heads=2, target=1.05)


def hype_step(pairs: int, layers: int, hidden: int, heads: int, target: float, batch: int = 16) -> dict:
    size = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
    }
    draw = torch.Generator().manual_seed(0)
    inputs = {
        "input_ids": torch.randint(1000, BertConfig().vocab_size, (batch, WIDTH), generator=draw),
        "attention_mask": torch.ones(batch, WIDTH, dtype=torch.long),
        "labels": torch.randint(0, 2, (batch,), generator=draw),
    }
    seeds = torch.randint(1 << 62, (batch,), generator=draw)

    def stock(**dropout: float) -> BertForSequenceClassification:
        torch.manual_seed(0)
        return BertForSequenceClassification(BertConfig(**size, **dropout))

    peer = stock(**NO_DROPOUT)
    models = {"peer": peer}
    for name, settings in VARIANTS.items():
        plain = stock(**NO_DROPOUT)
        models[name] = HypeForSequenceClassification(HypeConfig.from_encoder(plain.config, **settings), plain)
    with torch.no_grad():
        agree("hype_step", {name: model.eval()(**inputs).loss for name, model in models.items()})
    steps = {name: training_step(model.train(), inputs, fused=True) for name, model in models.items()}
    for name in VARIANTS:
        steps[f"{name}, by example"] = training_step(models[name], {**inputs, "noise_seeds": seeds}, fused=True)
    metrics = {}
    for name in list(steps)[1:]:
        times = compare({"peer": steps["peer"], name: steps[name]}, pairs)
        once = "mid" not in name
        metrics[f"time, {name}"] = times | {name: with_target(times[name], target)} if once else times
    dropout = stock(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.0).train()
    name = "normal, by example"
    metrics["time against dropout 0.1 of hidden states"] = compare(
        {"peer": training_step(dropout, inputs, fused=True), name: steps[name]}, pairs
    )
    return {
        "description": f"classification step, {layers} layers of {hidden}, batch {batch} x {WIDTH}, fused AdamW",
        "peer": "the same model without noise, transformers BertForSequenceClassification, sdpa, no dropout",
        "metrics": metrics,
    }
