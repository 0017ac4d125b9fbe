"""Checkpoints of deep-spin/OpenNMT-entmax: LSTM models with global attention.

The official file holds a dictionary with `model`, `generator`, `vocab`, `opt` and `optim`, of which the last three are
pickled objects and are refused here. Save the tensors alone before:
`torch.save({**c["model"], **{"generator." + name: t for name, t in c["generator"].items()}}, ...)`. Its generator is
stored apart from the model, as `0.weight` and `0.bias` in the file and as `generator.0...` in recorded numbers; both
work.
"""

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig

from ..configuration.configuration_sparse_seq2seq import SparseSeq2seqConfig
from ..modeling.modeling_sparse_seq2seq import SparseSeq2seqForConditionalGeneration
from . import Settings, State, as_dict, expect_layout, load_strictly, size_hints


LAYOUT = r"^(encoder|decoder)\.embeddings\.make_embedding\.emb_luts\.\d+\.weight$"
MODEL_TYPES = ()
PARTS = ()

ALPHAS = {"softmax": 1.0, "tsallis15": 1.5, "entmax15": 1.5, "sparsemax": 2.0}
"""The official names of maps ("tsallis15" is 1.5-entmax)."""
TABLE = "embeddings.make_embedding.emb_luts.0.weight"


def official_name(key: str, input_feed: bool = True) -> str:
    """OpenNMT's name of a parameter of `SparseSeq2seqForConditionalGeneration`."""
    if key.startswith("lm_head."):
        return key.replace("lm_head.", "generator.0.")
    name = key.removeprefix("model.").replace("embed_tokens.weight", TABLE)
    name = name.replace("encoder.lstm.", "encoder.rnn.").replace("decoder.attention.", "decoder.attn.")
    if input_feed:
        return name.replace("decoder.layers.", "decoder.rnn.layers.")
    return re.sub(r"^decoder\.layers\.(\d+)\.(\w+)$", r"decoder.rnn.\2_l\1", name)


def convert(state: State, config: Settings) -> SparseSeq2seqForConditionalGeneration:
    """The model of an OpenNMT checkpoint, in evaluation mode.

    Args:
        state: tensors by OpenNMT's names, those of the generator as `generator.0.weight` and `.bias`, or as
            `0.weight` and `0.bias`.
        config: ours, or a dictionary with what tensors do not show: `attention_function` and `generator_function` (or
            `attention_alpha` and `output_alpha`), `special_ids`. The rest is taken from the tensors where it is
            missing. None takes 1.5-entmax for both.

    Raises:
        ValueError: another paper's checkpoint; a bridge; an unknown function; tensors missing, extra or mis-shaped.
    """
    expect_layout("sparse_seq2seq", state, config)
    state = {re.sub(r"^0\.(weight|bias)$", r"generator.0.\1", name): tensor for name, tensor in state.items()}
    found = _found(state)
    model = SparseSeq2seqForConditionalGeneration(_configuration(config, found))
    input_feed = model.config.input_feed
    load_strictly(
        model,
        state,
        lambda key: official_name(key, input_feed),
        size_hints("sparse_seq2seq", model.config.to_dict(), found),
    )
    return model.eval()


def _configuration(config: Settings, found: Mapping[str, Any]) -> SparseSeq2seqConfig:
    if isinstance(config, SparseSeq2seqConfig):
        return config
    given = dict(as_dict(config))
    if given.pop("bridge", False):
        raise ValueError("sparse_seq2seq: the checkpoint has a bridge from encoder to decoder, which is not built.")
    special = given.pop("special_ids", {})
    for ours, theirs in (("attention_alpha", "attention_function"), ("output_alpha", "generator_function")):
        function = given.pop(theirs, None)
        if function is None:
            continue
        if function not in ALPHAS:
            raise ValueError(f"sparse_seq2seq: {theirs} must be one of {', '.join(ALPHAS)}, got {function!r}.")
        given.setdefault(ours, ALPHAS[function])
    own = {each.name for each in fields(SparseSeq2seqConfig)} - {each.name for each in fields(PreTrainedConfig)}
    values = {name: value for name, value in {**found, **given}.items() if name in own}
    return SparseSeq2seqConfig(**{f"{name}_token_id": number for name, number in special.items()} | values)


def _found(state: State) -> dict[str, Any]:
    """What the tensors show of the configuration."""
    found: dict[str, Any] = {}
    for field, side, axis in (
        ("src_vocab_size", "encoder", 0),
        ("tgt_vocab_size", "decoder", 0),
        ("embedding_size", "encoder", 1),
    ):
        if (table := state.get(f"{side}.{TABLE}")) is not None and table.dim() == 2:
            found[field] = table.shape[axis]
    found["bidirectional_encoder"] = any(name.endswith("_reverse") for name in state)
    found["input_feed"] = any(name.startswith("decoder.rnn.layers.") for name in state)
    layers = {"num_encoder_layers": r"^encoder\.rnn\.weight_hh_l(\d+)$"}
    layers["num_decoder_layers"] = r"^decoder\.rnn\.(?:layers\.(\d+)\.weight_hh|weight_hh_l(\d+))$"
    for field, pattern in layers.items():
        numbers = [int(match[match.lastindex or 1]) for name in state if (match := re.match(pattern, name))]
        if numbers:
            found[field] = max(numbers) + 1
    out = state.get("decoder.attn.linear_out.weight")
    if out is not None and out.dim() == 2:
        found["hidden_size"] = out.shape[0]
    scores = {"linear_in": "general", "linear_context": "mlp"}
    kinds = [kind for layer, kind in scores.items() if f"decoder.attn.{layer}.weight" in state]
    found["attention_score"] = kinds[0] if kinds else "dot"
    return found
