"""TUPE's official checkpoints (guolinke/TUPE): a fairseq file with `args`, `model` and the optimizer's state.

The file also holds the program's arguments, an object that reading without running code refuses. Save the tensors
alone first:

    with torch.serialization.safe_globals([argparse.Namespace]):
        torch.save(torch.load("checkpoint.pt", weights_only=True)["model"], "tupe.pt")

and put a `config.json` with at least `num_attention_heads` beside them, which they do not show; other sizes are read
from the tensors.

The class follows what the checkpoint holds. A classification head, as fine-tuning leaves it, gives
`TupeForSequenceClassification`, and the masked-LM head is then left out; the masked-LM head alone `TupeForMaskedLM`;
neither `TupeModel`. With a table of relative biases it is TUPE-R, else TUPE-A.
"""

import re
from collections.abc import Mapping
from dataclasses import fields

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..configuration.configuration_tupe import TupeConfig
from ..modeling import modeling_tupe as tupe
from . import Settings, State, as_dict, expect_layout, load_strictly, size_hints


logger = logging.get_logger(__name__)

ENCODER = "decoder.sentence_encoder."
LAYOUT = r"^decoder\.sentence_encoder\.pos_q_linear\."
MODEL_TYPES = ("tupe",)
PARTS = ()
CLASSIFIER = r"^classification_heads\.([^.]+)\."
LM_HEAD = r"^decoder\.lm_head\."
VERSION = "decoder.sentence_encoder.version"
FIELDS = {
    "rel_pos_bins": "relative_attention_num_buckets",
    "max_rel_pos": "relative_attention_max_distance",
    "pooler_dropout": "classifier_dropout",
    "rel_pos": "use_relative_bias",
}
"""Names of the official program for fields of `TupeConfig`."""
NAMES = (
    ("embeddings.word_embeddings.", "embed_tokens."),
    ("embeddings.LayerNorm.", "emb_layer_norm."),
    ("positions.table.", "pos."),
    ("positions.LayerNorm.", "pos_ln."),
    ("positions.query.", "pos_q_linear."),
    ("positions.key.", "pos_k_linear."),
    ("positions.relative.", "relative_attention_bias."),
    ("encoder.LayerNorm.", "emb_out_layer_norm."),
)
LAYER_NAMES = {
    False: (
        ("attention.output.LayerNorm.", "self_attn_layer_norm."),
        ("output.LayerNorm.", "final_layer_norm."),
    ),
    True: (("attention.LayerNorm.", "self_attn_layer_norm."), ("LayerNorm.", "final_layer_norm.")),
}
"""The LayerNorms of a layer, post-norm and pre-norm."""
LAYER_PARTS = (
    ("attention.self.query.", "self_attn.q_proj."),
    ("attention.self.key.", "self_attn.k_proj."),
    ("attention.self.value.", "self_attn.v_proj."),
    ("attention.output.dense.", "self_attn.out_proj."),
    ("intermediate.dense.", "fc1."),
    ("output.dense.", "fc2."),
)


def official_name(key: str, normalize_before: bool = False, classifier: str = "sentence_classification_head") -> str:
    """The official name of a parameter; queries, keys and values by the names that `split_projections` gives them."""
    key = key.removeprefix("tupe.")
    heads = (
        ("cls.predictions.transform.dense.", "decoder.lm_head.dense."),
        ("cls.predictions.transform.LayerNorm.", "decoder.lm_head.layer_norm."),
        ("cls.predictions.decoder.weight", "decoder.lm_head.weight"),
        ("cls.predictions.bias", "decoder.lm_head.bias"),
        ("cls.predictions.decoder.bias", "decoder.lm_head.bias"),
        ("pooler.dense.", f"classification_heads.{classifier}.dense."),
        ("classifier.", f"classification_heads.{classifier}.out_proj."),
    )
    for ours, theirs in heads:
        if key.startswith(ours):
            return theirs + key.removeprefix(ours)
    layer = re.match(r"encoder\.layer\.(\d+)\.(.*)", key)
    rules, start, rest = NAMES, ENCODER, key
    if layer is not None:
        rules, start, rest = LAYER_PARTS + LAYER_NAMES[normalize_before], f"{ENCODER}layers.{layer[1]}.", layer[2]
    for ours, theirs in rules:
        if rest.startswith(ours):
            return start + theirs + rest.removeprefix(ours)
    return key


def split_projections(state: State) -> dict[str, torch.Tensor]:
    """The checkpoint with the stacked `in_proj` of each layer as `q_proj`, `k_proj` and `v_proj`."""
    split: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        found = re.fullmatch(r"(.*\.self_attn\.)in_proj_(weight|bias)", name)
        if found is None or tensor.shape[0] % 3:
            split[name] = tensor
        else:
            for letter, part in zip("qkv", tensor.chunk(3)):
                split[f"{found[1]}{letter}_proj.{found[2]}"] = part
    return split


def convert(state: State, config: Settings) -> PreTrainedModel:
    """The model of a TUPE checkpoint, in evaluation mode; the top of this file says of which class.

    Args:
        state: tensors by official names.
        config: fields of `TupeConfig`, or the official program's names for them; sizes that are left out, all but
            `num_attention_heads`, are taken from the tensors.

    Raises:
        ValueError: another paper's checkpoint, no `num_attention_heads`, several classification heads, or tensors
            missing, extra or mis-shaped.
    """
    expect_layout("tupe", state, config)
    state = {name: tensor for name, tensor in split_projections(state).items() if name != VERSION}
    found = _sizes(state)
    settings = _configuration(config, state, found)
    classifiers = sorted({match[1] for name in state if (match := re.match(CLASSIFIER, name))})
    if len(classifiers) > 1:
        raise ValueError(f"tupe: there are {len(classifiers)} classification heads, {classifiers}; leave one of them.")
    predicts = any(re.match(LM_HEAD, name) for name in state)
    classifier = classifiers[0] if classifiers else ""
    model: PreTrainedModel
    if classifiers:
        weight = state.get(f"classification_heads.{classifier}.out_proj.weight")
        if weight is not None and weight.dim() == 2 and weight.shape[0] != settings.num_labels:
            settings.num_labels = weight.shape[0]
        model = tupe.TupeForSequenceClassification(settings)
        if predicts:
            logger.warning("The checkpoint has a classification head too: the masked-LM head is left out.")
            state = {name: tensor for name, tensor in state.items() if not re.match(LM_HEAD, name)}
    elif predicts:
        model = tupe.TupeForMaskedLM(settings)
    else:
        model = tupe.TupeModel(settings, add_pooling_layer=False)

    def name_of(key: str) -> str:
        return official_name(key, settings.normalize_before, classifier)

    load_strictly(model, state, name_of, size_hints("tupe", settings.to_dict(), found))
    return model.eval()


def _sizes(state: State) -> dict[str, int]:
    def size(name: str, axis: int) -> int | None:
        tensor = state.get(ENCODER + name)
        return None if tensor is None or tensor.dim() <= axis else tensor.shape[axis]

    layers = [int(match[1]) for name in state if (match := re.match(rf"{re.escape(ENCODER)}layers\.(\d+)\.", name))]
    rows = size("pos.weight", 0)
    buckets = size("relative_attention_bias.weight", 0)
    sizes = {
        "vocab_size": size("embed_tokens.weight", 0),
        "hidden_size": size("pos_q_linear.weight", 0),
        "intermediate_size": size("layers.0.fc1.weight", 0),
        "num_hidden_layers": max(layers) + 1 if layers else None,
        "max_position_embeddings": None if rows is None else rows - 1,
        "relative_attention_num_buckets": None if buckets is None else buckets - 1,
    }
    return {name: value for name, value in sizes.items() if value is not None}


def _configuration(config: Settings, state: State, found: Mapping[str, int]) -> TupeConfig:
    if isinstance(config, TupeConfig):
        return config
    given = as_dict(config)
    given = given.get("config", given)  # files of recorded official numbers wrap it
    given = {FIELDS.get(name, name): value for name, value in given.items()}
    if "num_attention_heads" not in given:
        raise ValueError(
            "tupe: num_attention_heads is not given, and tensors do not show it; put a config.json with it beside the "
            "checkpoint, or pass config."
        )
    shown = {
        "use_relative_bias": f"{ENCODER}relative_attention_bias.weight" in state,
        "embedding_layer_norm": f"{ENCODER}emb_layer_norm.weight" in state,
        "normalize_before": f"{ENCODER}emb_out_layer_norm.weight" in state,
    }
    known = {field.name for field in fields(TupeConfig)} - {"model_type", "transformers_version"} | {"num_labels"}
    return TupeConfig(**{name: value for name, value in {**shown, **found, **given}.items() if name in known})
