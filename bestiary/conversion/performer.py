"""Checkpoints of lucidrains/performer-pytorch's PerformerLM. The official code has attention only, and no checkpoints.

The network there has pre-norm layers, a closing LayerNorm, no LayerNorm and no token types on the embeddings, and one
linear layer before the vocabulary. With rotary positions its absolute table is fixed sines, which become the table
here. Biases that a checkpoint lacks are zeros. Copies of the layers under `performer.proj_updater` and its counter are
passed over; so is the table of rotary angles, which is computed here, once it was seen to be the usual one.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch

from ..configuration.configuration_performer import PerformerConfig
from ..modeling.modeling_performer import PerformerForCausalLM, PerformerForMaskedLM
from . import Settings, State, as_dict, expect_layout, load_strictly


LAYOUT = r"^performer\.net\.layers\.\d+\.0\.fn\.(fast_attention\.|to_q\.)"
MODEL_TYPES = ("bestiary-performer",)
PARTS = ()

NAMES = (
    (r"^bert\.embeddings\.word_embeddings\.weight$", "token_emb.weight"),
    (r"^bert\.embeddings\.position_embeddings\.weight$", "pos_emb.emb"),
    (r"^bert\.encoder\.LayerNorm\.", "norm."),
    (r"^bert\.encoder\.layer\.(\d+)\.attention\.LayerNorm\.", r"performer.net.layers.\1.0.norm."),
    (
        r"^bert\.encoder\.layer\.(\d+)\.attention\.self\.projection_matrix$",
        r"performer.net.layers.\1.0.fn.fast_attention.projection_matrix",
    ),
    (r"^bert\.encoder\.layer\.(\d+)\.attention\.self\.(q|k|v)\w+\.", r"performer.net.layers.\1.0.fn.to_\2."),
    (r"^bert\.encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"performer.net.layers.\1.0.fn.to_out."),
    (r"^bert\.encoder\.layer\.(\d+)\.LayerNorm\.", r"performer.net.layers.\1.1.norm."),
    (r"^bert\.encoder\.layer\.(\d+)\.intermediate\.dense\.", r"performer.net.layers.\1.1.fn.fn.w1."),
    (r"^bert\.encoder\.layer\.(\d+)\.output\.dense\.", r"performer.net.layers.\1.1.fn.fn.w2."),
    (r"^cls\.predictions\.bias$", "to_out.bias"),
    (r"^cls\.predictions\.decoder\.", "to_out."),
)
DUPLICATES = r"^performer\.proj_updater\."
TYPES = "bert.embeddings.token_type_embeddings.weight"
ROTARY = "layer_pos_emb.emb"
OTHER_NETWORKS = ("no_projection", "local_attn_heads")
"""Arguments of PerformerLM that change its function and leave no trace among the tensors."""


def official_name(key: str) -> str:
    """PerformerLM's name of a parameter of ours; what it has not keeps our name."""
    for pattern, name in NAMES:
        if re.match(pattern, key):
            return re.sub(pattern, name, key)
    return key


def convert(state: State, config: Settings = None) -> PerformerForCausalLM | PerformerForMaskedLM:
    """The model of a PerformerLM checkpoint, in evaluation mode: a causal language model if `is_decoder`, else a
    masked one.

    Args:
        state: tensors by PerformerLM's names.
        config: a `PerformerConfig`, or a dictionary with `num_attention_heads`, which tensors do not show, and any
            fields of ours, or PerformerLM's `heads`, `causal` and `generalized_attention`. Sizes come from the
            tensors; what is not given is as in that code: its epsilons, its scaling, positions by what the checkpoint
            holds.

    Raises:
        ValueError: another paper's checkpoint, no `num_attention_heads`, an argument of PerformerLM that makes another
            network, a table of rotary angles that is not the usual one, or tensors missing, extra or mis-shaped.
    """
    expect_layout("performer", state, config)
    state = {name: tensor for name, tensor in state.items() if not re.match(DUPLICATES, name)}
    if "pos_emb.emb.weight" in state:
        state["pos_emb.emb"] = state.pop("pos_emb.emb.weight")
    settings = config if isinstance(config, PerformerConfig) else _configuration(as_dict(config), state)
    width = settings.hidden_size // settings.num_attention_heads
    if ROTARY in state:
        _check_rotary(state.pop(ROTARY), width)
    model_class = PerformerForCausalLM if settings.is_decoder else PerformerForMaskedLM
    model = model_class(settings)
    for key, own in model.state_dict().items():
        name = official_name(key)
        if name not in state and (name == TYPES or name.startswith("performer.") and name.endswith(".bias")):
            state[name] = torch.zeros_like(own)
    if settings.tie_word_embeddings or "to_out.bias" not in state:
        state.setdefault("to_out.bias", torch.zeros(settings.vocab_size))
    if not settings.projects:
        state = {name: tensor for name, tensor in state.items() if not name.endswith("projection_matrix")}
    load_strictly(model, state, official_name)
    return model.eval()


def _configuration(given: Mapping[str, Any], state: State) -> PerformerConfig:
    fields = dict(given)
    fields.pop("model_type", None)
    for name in OTHER_NETWORKS:
        if fields.get(name):
            raise ValueError(f"performer: {name}={fields[name]!r} of PerformerLM is a network that is not built here.")
    fields.setdefault("num_attention_heads", fields.pop("heads", None))
    if fields["num_attention_heads"] is None:
        raise ValueError(
            "performer: num_attention_heads (PerformerLM's `heads`) is not given, and tensors do not show it; pass it "
            "in config."
        )
    causal = fields.pop("causal", fields.get("is_decoder", False))
    generalized = fields.pop("generalized_attention", False)
    needed = ("token_emb.weight", "pos_emb.emb", "performer.net.layers.0.1.fn.fn.w1.weight")
    if missing := [name for name in needed if name not in state]:
        raise ValueError(f"performer: the checkpoint lacks {', '.join(missing)}, which show the sizes.")
    words, places, inner = (state[name] for name in needed)
    projections = [tensor for name, tensor in state.items() if name.endswith("projection_matrix")]
    layers = {int(match[1]) for name in state if (match := re.match(r"performer\.net\.layers\.(\d+)\.", name))}
    found: dict[str, Any] = {
        "vocab_size": words.shape[0],
        "hidden_size": words.shape[1],
        "num_hidden_layers": max(layers) + 1,
        "intermediate_size": inner.shape[0],
        "max_position_embeddings": places.shape[0],
        "type_vocab_size": 1,
        "pad_token_id": None,
        "layer_norm_eps": 1e-5,
        "layer_norm_position": "pre",
        "embedding_layer_norm": False,
        "prediction_transform": False,
        "position_embedding_type": "absolute_and_rotary" if ROTARY in state else "absolute",
        "tie_word_embeddings": "to_out.weight" not in state,
        "attention_kernel": "generalized_relu" if generalized else "softmax_positive",
        "num_random_features": projections[0].shape[0] if projections else 1,
        "use_projection": True,
        "normalize_data": True,
        "orthogonal_sign_fix": False,
        "is_decoder": causal,
        "kernel_epsilon": 1e-3 if generalized else 1e-4,
        "key_stabilizer": "sequence",
        "key_sum_epsilon": 1e-6 if causal else 0.0,
    }
    names = set(PerformerConfig.__dataclass_fields__)
    return PerformerConfig(**found | {name: value for name, value in fields.items() if name in names})


def _check_rotary(table: torch.Tensor, width: int) -> None:
    angles = torch.arange(len(table))[:, None] * 10000.0 ** -(torch.arange(0, width, 2) / width)
    usual = torch.cat((angles.sin(), angles.cos()), 1)
    if table.shape != usual.shape or (table - usual).abs().max() > 1e-3:
        raise ValueError(
            f"performer: {ROTARY} is not the table of rotary angles for heads of width {width}; the number of heads "
            "is another one, or the checkpoint was made by other code."
        )
