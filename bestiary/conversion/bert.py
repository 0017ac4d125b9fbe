"""BERT's official checkpoints (google-research/bert: TensorFlow names and `bert_config.json`) and transformers'.

The class follows what the checkpoint holds. Both heads, as all released checkpoints have them, give
`BertPretrainingForPreTraining`; the masked-LM head alone `BertPretrainingForMaskedLM`; the next-sentence head alone
`BertPretrainingForNextSentencePrediction`; neither `BertPretrainingModel`. A fine-tuned checkpoint is refused, its
classification layer being named as extra.

`hidden_act="gelu"` stays what it is in the paper and in transformers, the exact form. Under that name the later
official code computes the tanh form (at most 4.7e-4 apart): for its numbers to the last digit give `"gelu_new"`.
"""

import re
from collections.abc import Callable, Mapping

from transformers import BertConfig, PreTrainedModel
from transformers.utils import logging

from ..configuration.configuration_bert import BertPretrainingConfig
from ..modeling import modeling_bert as bert
from . import Settings, State, as_dict, encoder_sizes, expect_layout, load_strictly, size_hints, tensorflow_name


logger = logging.get_logger(__name__)

LAYOUT = r"^(bert[./])?encoder[./]layer[._]\d+[./]attention[./]self[./]"
MODEL_TYPES = ("bert",)
PARTS = ()
HEAD_NAMES = {
    "cls.predictions.bias": "cls/predictions/output_bias",
    "cls.seq_relationship.weight": "cls/seq_relationship/output_weights",  # [2, d] as ours
    "cls.seq_relationship.bias": "cls/seq_relationship/output_bias",
}
POOLER = r"(^|[./])pooler[./]"


def official_name(key: str) -> str:
    """TensorFlow's name of a parameter of `BertPretrainingForPreTraining`."""
    return HEAD_NAMES.get(key) or tensorflow_name(key)


def naming(state: State) -> Callable[[str], str]:
    """How this checkpoint names a parameter: as TensorFlow, or as transformers does with or without `bert.` in front
    and, in old files, with gamma and beta for weight and bias of a LayerNorm."""
    official = any(name.startswith(("bert/", "cls/")) for name in state)
    bare = not official and not any(name.startswith("bert.") for name in state)
    old = any(name.endswith("LayerNorm.gamma") for name in state)

    def name_of(key: str) -> str:
        if not key.startswith(("bert.", "cls.")):  # a parameter of the base model
            key = f"bert.{key}"
        if official:
            return official_name(key)
        if old:
            key = key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        return key.removeprefix("bert.") if bare else key

    return name_of


def convert(state: State, config: Settings) -> PreTrainedModel:
    """The model of a BERT checkpoint, in evaluation mode; the top of this file says of which class.

    Args:
        state: tensors by TensorFlow's or transformers' names.
        config: `bert_config.json` or a configuration of transformers or ours. Sizes that it leaves out, all but
            `num_attention_heads`, are taken from the tensors.

    Raises:
        ValueError: another paper's checkpoint, no `num_attention_heads`, or tensors missing, extra or mis-shaped.
    """
    expect_layout("bert", state, config)
    prefix = next((each for each in ("bert/", "bert.") if any(name.startswith(each) for name in state)), "")
    found = encoder_sizes(state, prefix, prefix)
    found.pop("embedding_size", None)
    settings = _configuration(config, found)
    predicts, pairs, pools = (
        any(re.search(part, name) for name in state)
        for part in (r"^cls[./]predictions[./]", r"^cls[./]seq_relationship[./]", POOLER)
    )
    model: PreTrainedModel
    if predicts and pairs:
        model = bert.BertPretrainingForPreTraining(settings)
    elif predicts:
        model = bert.BertPretrainingForMaskedLM(settings)
        if pools:
            logger.warning("The checkpoint has no next-sentence head, which alone reads the pooler: it is left out.")
            state = {name: tensor for name, tensor in state.items() if not re.search(POOLER, name)}
    elif pairs:
        model = bert.BertPretrainingForNextSentencePrediction(settings)
    else:
        model = bert.BertPretrainingModel(settings, add_pooling_layer=pools)
    load_strictly(model, state, naming(state), size_hints("bert", settings.to_dict(), found))
    return model.eval()


def _configuration(config: Settings, found: Mapping[str, int]) -> BertPretrainingConfig:
    if isinstance(config, BertPretrainingConfig):
        return config
    given = as_dict(config)
    given = given.get("model_config", given)  # files of recorded official numbers wrap it
    if "num_attention_heads" not in given:
        raise ValueError(
            "bert: num_attention_heads is not given, and tensors do not show it; put the bert_config.json or "
            "config.json of the checkpoint beside it, or pass config."
        )
    fields = {**found, **given}
    fields.pop("model_type", None)
    return BertPretrainingConfig.from_stock(BertConfig(**fields))
