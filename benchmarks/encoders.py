"""Rows for encoders of architecture papers against our plain BERT of the same size: a step, forward and backward, and
inference, without heads.

`flops_ratio` is the ratio of operations as performed (`bestiary.flops`): what a step would cost if time followed it.
"""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from bestiary.configuration.configuration_bert import BertPretrainingConfig
from bestiary.configuration.configuration_realformer import RealformerConfig
from bestiary.configuration.configuration_tupe import TupeConfig
from bestiary.flops import count_flops
from bestiary.modeling.modeling_bert import BertPretrainingModel
from bestiary.modeling.modeling_realformer import RealformerModel
from bestiary.modeling.modeling_tupe import TupeModel

from .harness import PEER, compare, compare_memory, row, with_target


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TARGET = 1.15
"""Most that a step may cost: 1.0 to 1.2 for the attention core, of which a step at 128 is a part, and the slack of a
ratio."""


@row("encoder_step_small")
def encoder_step_small(pairs: int) -> dict:
    return encoder_step(pairs, batch=8, length=128, hidden=256, heads=4, layers=12)


@row("encoder_step_base")
def encoder_step_base(pairs: int) -> dict:
    return encoder_step(pairs, batch=4, length=128, hidden=768, heads=12, layers=4)


def encoder_step(pairs: int, batch: int, length: int, hidden: int, heads: int, layers: int) -> dict:
    sizes = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "vocab_size": 30522,
        "hidden_act": "gelu",
    }
    kinds = {
        PEER: (BertPretrainingModel, BertPretrainingConfig, {}),
        "tupe_a": (TupeModel, TupeConfig, {"use_relative_bias": False}),
        "tupe_r": (TupeModel, TupeConfig, {}),
        "realformer": (RealformerModel, RealformerConfig, {}),
        "realformer, mean": (RealformerModel, RealformerConfig, {"use_running_mean": True}),
    }
    ids = torch.randint(1000, 30522, (batch, length), generator=torch.Generator().manual_seed(0))

    def models(**dropout: float) -> dict[str, PreTrainedModel]:
        built = {}
        for name, (model_class, config_class, fields) in kinds.items():
            torch.manual_seed(0)
            built[name] = model_class(config_class(**sizes | fields | dropout), add_pooling_layer=False).train()
        return built

    def step(model: PreTrainedModel) -> Callable[[], None]:
        def run() -> None:
            model(ids).last_hidden_state.square().mean().backward()
            model.zero_grad()

        return run

    plain = models(**NO_DROPOUT)
    steps = {name: step(model) for name, model in plain.items()}
    flops = {name: count_flops(run) for name, run in steps.items()}
    metrics = {"time, forward and backward": compare(steps, pairs), "peak memory": compare_memory(steps)}
    for model in plain.values():
        model.eval()

    def inference(model: PreTrainedModel) -> Callable[[], None]:
        @torch.no_grad()
        def run() -> None:
            model(ids)

        return run

    metrics["time, inference"] = compare({name: inference(model) for name, model in plain.items()}, pairs)
    dropping = {name: step(model) for name, model in models().items()}
    metrics["time, forward and backward, dropout 0.1"] = compare(dropping, pairs)
    for name in kinds:
        if name != PEER:
            ratio = flops[name] / flops[PEER]
            timed = metrics["time, forward and backward"]
            timed[name] = with_target(timed[name] | {"flops_ratio": ratio}, TARGET)
    return {
        "description": f"encoder, {layers} layers of {hidden}, batch {batch} x {length}",
        "peer": "our BERT, sdpa",
        "metrics": metrics,
    }
