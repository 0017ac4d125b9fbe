"""Rows for a step of adapter training against full fine-tuning of the same model, and LoRA of PEFT at as many trained
parameters.
"""

from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from bestiary import BottleneckAdapterConfig
from bestiary.modeling.modeling_adapters import AdaptersForSequenceClassification

from .harness import compare, compare_memory, row


def classification_batch(batch: int, length: int) -> dict[str, torch.Tensor]:
    """Random full rows with two classes."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (batch, length), generator=draw)
    labels = torch.randint(0, 2, (batch,), generator=draw)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def fine_tuning_step(model: nn.Module, batch: dict) -> Callable[[], None]:
    """Forward, backward, fused AdamW over what is trained, release of the gradients."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6, fused=True)
    model.train()

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@row("adapters_step_small")
def adapters_step_small(pairs: int) -> dict:
    return adapters_step(pairs, layers=6, width=384, heads=12, batch=16, length=64)


@row("adapters_step_base")
def adapters_step_base(pairs: int) -> dict:
    return adapters_step(pairs, layers=12, width=768, heads=12, batch=4, length=128)


def adapters_step(pairs: int, layers: int, width: int, heads: int, batch: int, length: int, size: int = 64) -> dict:
    config = BertConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width
    )

    def stock() -> BertForSequenceClassification:
        torch.manual_seed(0)
        return BertForSequenceClassification(config)

    # query, key, value and output of attention: 4 (d + d) r per layer, against 2 (2 d m + d + m) + 4 d in LayerNorms
    rank = round((2 * (2 * width * size + width + size) + 4 * width) / (8 * width))
    lora = LoraConfig(
        task_type="SEQ_CLS",
        r=rank,
        target_modules=["query", "key", "value", "attention.output.dense"],
        lora_dropout=0.1,
    )
    settings = {"adapter_size": size}
    models: dict[str, nn.Module] = {
        "peer": stock(),
        "adapters": AdaptersForSequenceClassification.from_encoder(stock(), **settings),
        "adapters in PEFT": get_peft_model(stock(), BottleneckAdapterConfig(task_type="SEQ_CLS", **settings)),
        f"LoRA of PEFT, rank {rank}": get_peft_model(stock(), lora),
    }
    trained = {name: sum(p.numel() for p in model.parameters() if p.requires_grad) for name, model in models.items()}
    counts = list(trained.values())[1:]
    if max(counts) > 1.02 * min(counts):
        raise RuntimeError(f"benchmark adapters_step: unequal numbers of trained parameters: {trained}")
    inputs = classification_batch(batch, length)
    steps = {name: fine_tuning_step(model, inputs) for name, model in models.items()}
    return {
        "description": f"fine-tuning step, {layers} layers of {width}, adapters of {size}, batch {batch} x {length}",
        "peer": "full fine-tuning of BertForSequenceClassification",
        "trained_parameters": trained,
        "metrics": {"time": compare(steps, pairs), "peak memory": compare_memory(steps)},
    }
