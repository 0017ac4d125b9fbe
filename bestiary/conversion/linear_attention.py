"""Checkpoints of idiap/fast-transformers' TransformerEncoder.

It has layers only and takes embedded tokens. The model made here has tables of zeros and no LayerNorm on its
embeddings, so that `inputs_embeds` are what the official encoder is given; put tables of your own into it to read ids.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch

from ..configuration.configuration_linear_attention import LinearAttentionConfig
from ..modeling.modeling_linear_attention import LinearAttentionModel
from . import Settings, State, as_dict, expect_layout, load_strictly


LAYOUT = r"^layers\.\d+\.attention\.query_projection\."
MODEL_TYPES = ("bestiary-linear-attention",)
PARTS = ()

NAMES = (
    (r"^encoder\.LayerNorm\.", "norm."),
    (r"^encoder\.layer\.(\d+)\.attention\.self\.(\w+)\.", r"layers.\1.attention.\2_projection."),
    (r"^encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"layers.\1.attention.out_projection."),
    (r"^encoder\.layer\.(\d+)\.attention\.output\.LayerNorm\.", r"layers.\1.norm1."),
    (r"^encoder\.layer\.(\d+)\.intermediate\.dense\.", r"layers.\1.linear1."),
    (r"^encoder\.layer\.(\d+)\.output\.dense\.", r"layers.\1.linear2."),
    (r"^encoder\.layer\.(\d+)\.output\.LayerNorm\.", r"layers.\1.norm2."),
)

OPTIONS = {"n_heads": "num_attention_heads", "activation": "hidden_act"}
"""fast-transformers' names of options that tensors do not show, and ours."""


def official_name(key: str) -> str:
    """fast-transformers' name of a parameter of ours; the embeddings, which it has not, keep our name."""
    for pattern, name in NAMES:
        if re.match(pattern, key):
            return re.sub(pattern, name, key)
    return key


def convert(state: State, config: Settings = None) -> LinearAttentionModel:
    """The model of a TransformerEncoder checkpoint, in evaluation mode.

    Args:
        state: tensors by fast-transformers' names.
        config: a `LinearAttentionConfig`, or a dictionary with `num_attention_heads`, which tensors do not show, and
            any fields of ours, or fast-transformers' `n_heads` and `activation`. Sizes come from the tensors.

    Raises:
        ValueError: another paper's checkpoint, no `num_attention_heads`, another `attention_type` than "linear" or
            "causal-linear", or tensors missing, extra or mis-shaped.
    """
    expect_layout("linear_attention", state, config)
    settings = config if isinstance(config, LinearAttentionConfig) else _configuration(as_dict(config), state)
    model = LinearAttentionModel(settings, add_pooling_layer=False)
    tables = {key: torch.zeros_like(own) for key, own in model.state_dict().items() if key.startswith("embeddings.")}
    load_strictly(model, {**state, **tables}, official_name)
    return model.eval()


def _configuration(given: Mapping[str, Any], state: State) -> LinearAttentionConfig:
    given = {OPTIONS.get(name, name): value for name, value in given.items()}
    kind = given.get("attention_type", "linear")
    if kind not in ("linear", "causal-linear"):
        raise ValueError(
            f"linear_attention: attention_type {kind!r} is none that is built here (linear, causal-linear)."
        )
    if "num_attention_heads" not in given:
        raise ValueError(
            "linear_attention: num_attention_heads is not given, and tensors do not show it; pass it in config."
        )
    if "layers.0.linear1.weight" not in state:
        raise ValueError("linear_attention: the checkpoint lacks layers.0.linear1.weight, which shows the sizes.")
    inner = state["layers.0.linear1.weight"]
    layers = {int(match[1]) for name in state if (match := re.match(r"layers\.(\d+)\.", name))}
    found: dict[str, Any] = {
        "hidden_size": inner.shape[1],
        "intermediate_size": inner.shape[0],
        "num_hidden_layers": max(layers) + 1,
        "vocab_size": 1,
        "type_vocab_size": 1,
        "pad_token_id": None,
        "embedding_layer_norm": False,
        "final_layer_norm": "norm.weight" in state,
        "is_decoder": kind == "causal-linear",
    }
    names = set(LinearAttentionConfig.__dataclass_fields__)
    return LinearAttentionConfig(**found | {name: value for name, value in given.items() if name in names})
