"""UniLM's official checkpoints: `unilm1-*` of unilm-v1, `unilm1.2-*`, what s2s-ft leaves, and BERTs to start from.

All have BERT's names and so one layout; a checkpoint with both heads gives `UniLMForPreTraining`, with the cloze head
alone (s2s-ft) `UniLMForConditionalGeneration`, without heads `UniLMModel`. Old files have gamma and beta for weight
and bias of a LayerNorm. The decoder's weight, `decoder_weight` in s2s-ft, is the word table: if a file holds both,
they must be equal. What was fine-tuned with smoothed labels holds the table of that loss, which is left out.

Public configurations call epsilon `layer_norm_epsilon`; s2s-ft itself reads `layer_norm_eps` only, so that it ran
those models with 1e-12. A configuration without either gets 1e-5, that of the v1 code. A table of two segments
(unilm1.2, and any BERT) is kept by `convert`, with source 0 and target 1. `extended` gives it six, and more positions.
"""

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from transformers import PreTrainedModel

from ..configuration.configuration_unilm import UniLMConfig
from ..modeling import modeling_unilm as unilm
from . import Settings, State, as_dict, encoder_sizes, expect_layout, load_strictly, size_hints
from .bert import POOLER, naming


LAYOUT = r"^(bert\.)?encoder\.layer\.\d+\.attention\.self\.(query|key|value)\."
"""BERT's as well; messages name the paper whose pattern comes first, and that is BERT's."""
MODEL_TYPES = ("bert", "unilm", "unilm-base-cased")
PARTS = ()
S2S_FT_DECODER = "cls.predictions.decoder_weight"
SMOOTHING = "crit_mask_lm_smoothed.one_hot"
"""A buffer of the official loss."""
SEGMENT_OF = (0, 1, 0, 0, 0, 1, 1)
"""Row of BERT's table that each segment starts as."""


def convert(state: State, config: Settings) -> PreTrainedModel:
    """The model of a UniLM checkpoint, in evaluation mode; the top of this file says of which class.

    Args:
        state: tensors by the official names.
        config: `config.json` of the checkpoint, or a configuration of transformers or ours. Sizes that it leaves out,
            all but `num_attention_heads`, are taken from the tensors.

    Raises:
        ValueError: another paper's checkpoint, no `num_attention_heads`, or tensors missing, extra or mis-shaped.
    """
    expect_layout("unilm", state, config)
    state = {
        "cls.predictions.decoder.weight" if name == S2S_FT_DECODER else name: tensor
        for name, tensor in state.items()
        if name != SMOOTHING
    }
    prefix = "bert." if any(name.startswith("bert.") for name in state) else ""
    found = encoder_sizes(state, prefix, prefix)
    found.pop("embedding_size", None)
    settings = _configuration(config, found)
    predicts, pairs, pools = (
        any(re.search(part, name) for name in state)
        for part in (r"^cls\.predictions\.", r"^cls\.seq_relationship\.", POOLER)
    )
    model: PreTrainedModel
    if predicts and pairs:
        model = unilm.UniLMForPreTraining(settings)
    elif predicts:
        model = unilm.UniLMForConditionalGeneration(settings)
        state = {name: tensor for name, tensor in state.items() if not re.search(POOLER, name)}
    else:
        model = unilm.UniLMModel(settings, add_pooling_layer=pools)
    load_strictly(model, state, naming(state), size_hints("unilm", settings.to_dict(), found))
    return model.eval()


def _configuration(config: Settings, found: Mapping[str, int]) -> UniLMConfig:
    if isinstance(config, UniLMConfig):
        return config
    given: dict[str, Any] = {**found, **as_dict(config)}
    if "num_attention_heads" not in given:
        raise ValueError(
            "unilm: num_attention_heads is not given, and tensors do not show it; put the config.json of the "
            "checkpoint beside it, or pass config."
        )
    if "layer_norm_epsilon" in given:
        given["layer_norm_eps"] = given["layer_norm_epsilon"]
    if given.get("type_vocab_size", 6) < 6:
        given = {"source_type_id": 0, "target_type_id": 1} | given
    known = {field.name for field in fields(UniLMConfig)} - {
        "model_type",
        "transformers_version",
        "is_encoder_decoder",
    }
    return UniLMConfig(**{name: value for name, value in given.items() if name in known and value is not None})


def extended(state: State, config: UniLMConfig) -> dict[str, torch.Tensor]:
    """Tensors of a BERT with the tables of segments and positions that `config` has.

    Segments 2, 3 and 4 start as copies of segment 0, 5 and 6 as copies of 1; more positions repeat the table from its
    beginning.

    Raises:
        ValueError: `config` has fewer segments or positions than the tensors, or more than seven segments.
    """
    grown = dict(state)
    for name, tensor in state.items():
        if name.endswith("token_type_embeddings.weight"):
            wanted, rows = config.type_vocab_size, torch.tensor(SEGMENT_OF)
            field = "type_vocab_size"
        elif name.endswith("position_embeddings.weight"):
            wanted, field = config.max_position_embeddings, "max_position_embeddings"
            rows = torch.arange(max(wanted, len(tensor))) % len(tensor)
        else:
            continue
        if not len(tensor) <= wanted <= len(rows):
            raise ValueError(
                f"UniLMConfig.{field} must be from {len(tensor)}, which the checkpoint has, to {len(rows)}; got "
                f"{wanted}."
            )
        if wanted > len(tensor):
            grown[name] = tensor[rows[:wanted]]
    return grown
