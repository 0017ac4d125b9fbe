"""T-TA's official checkpoints (joongbo/tta: TensorFlow names and a BERT-like configuration).

The names are BERT's, without token types and without the decision on pairs; a checkpoint with either is refused. The
pooler, which was never trained, is left out.

A configuration may give `special_token_ids`, the ids by token, for a vocabulary other than the released one ([PAD] 0,
[MASK] 4). A `vocab.txt` becomes a tokenizer whose boundary tokens are [SOS] and [EOS].
"""

import re

from transformers import BertConfig
from transformers.utils import logging

from ..configuration.configuration_tta import TtaConfig
from ..modeling.modeling_tta import TtaForMaskedLM
from . import Settings, State, as_dict, encoder_sizes, expect_layout, load_strictly, size_hints, tensorflow_name


logger = logging.get_logger(__name__)

LAYOUT = r"^bert/encoder/layer_\d+/attention/self/"
MODEL_TYPES = ()
PARTS = ()
SPECIAL_TOKENS = {"cls_token": "[SOS]", "sep_token": "[EOS]"}
POOLER = "bert/pooler/"
OF_BERT = r"^bert/embeddings/token_type_embeddings$|^cls/seq_relationship/"


def official_name(key: str) -> str:
    """TensorFlow's name of a parameter of `TtaForMaskedLM`."""
    return "cls/predictions/output_bias" if key == "cls.predictions.bias" else tensorflow_name(key)


def convert(state: State, config: Settings) -> TtaForMaskedLM:
    """The model of a T-TA checkpoint, in evaluation mode.

    Args:
        state: tensors by TensorFlow's names.
        config: the configuration beside the checkpoint, or ours. Sizes that it leaves out, all but
            `num_attention_heads`, are taken from the tensors.

    Raises:
        ValueError: another paper's checkpoint, no `num_attention_heads`, or tensors missing, extra or mis-shaped.
    """
    expect_layout("tta", state, config)
    if theirs := [name for name in state if re.search(OF_BERT, name)]:
        raise ValueError(
            f"This is no official checkpoint of the paper 'tta', but of BERT, since it has {theirs[0]}; its weights "
            "would load into T-TA and be wrong. Use `bestiary convert bert`."
        )
    if any(name.startswith(POOLER) for name in state):
        logger.warning("The pooler of the checkpoint, which was never trained, is left out.")
        state = {name: tensor for name, tensor in state.items() if not name.startswith(POOLER)}
    found = encoder_sizes(state, "bert/", "bert/")
    if found.get("embedding_size") == found.get("hidden_size"):
        found.pop("embedding_size", None)
    model = TtaForMaskedLM(_configuration(config, found))
    load_strictly(model, state, official_name, size_hints("tta", model.config.to_dict(), found))
    return model.eval()


def _configuration(config: Settings, found: dict[str, int]) -> TtaConfig:
    if isinstance(config, TtaConfig):
        return config
    given = dict(as_dict(config))
    ids = given.get("special_token_ids", {})
    given = dict(given.get("config", given))  # files of recorded official numbers wrap it
    if "num_attention_heads" not in given:
        raise ValueError(
            "tta: num_attention_heads is not given, and tensors do not show it (the released model has 8); put the "
            "config.json of the checkpoint beside it, or pass config."
        )
    given.pop("type_vocab_size", None)  # the official code reads it and makes no table
    fields = {**found, **given}
    fields["pad_token_id"] = fields.get("pad_token_id", ids.get("[PAD]", 0))
    query = fields.pop("query_token_id", ids.get("[MASK]", 4))
    return TtaConfig.from_stock(BertConfig(**fields), type_vocab_size=1, query_token_id=query)
