"""RealFormer's official checkpoints (google-research, folder realformer): names and format of BERT's, in TensorFlow.

A checkpoint of RealFormer does not differ from one of BERT in any name, so one of BERT is converted as well. The class
follows what it holds: both heads give `RealformerForPreTraining`, the masked-LM head alone `RealformerForMaskedLM`,
neither `RealformerModel`.

The official code computes the tanh form of the GELU whatever the configuration calls it: `"gelu"` beside TensorFlow's
names becomes `"gelu_new"`. It takes the mean of the scores by a switch of the program, `use_running_mean`, that is in
no file: a checkpoint of the xlarge size was trained with it and gets it, others do not. The key in the configuration
overrides that.
"""

import re
from collections.abc import Mapping
from dataclasses import fields

from transformers import PreTrainedModel

from ..configuration.configuration_realformer import RealformerConfig
from ..modeling import modeling_realformer as realformer
from . import Settings, State, as_dict, encoder_sizes, expect_layout, load_strictly, size_hints
from .bert import POOLER, naming


LAYOUT = r"^(bert[./])?encoder[./]layer[._]\d+[./]attention[./]self[./](query|key|value)[./]"
"""BERT's as well; messages name the paper whose pattern comes first, and that is BERT's."""
MODEL_TYPES = ("bert", "realformer")
PARTS = ()


def convert(state: State, config: Settings) -> PreTrainedModel:
    """The model of a RealFormer checkpoint, in evaluation mode; the top of this file says of which class.

    Args:
        state: tensors by TensorFlow's or transformers' names.
        config: `bert_config.json` or a configuration of transformers or ours. Sizes that it leaves out, all but
            `num_attention_heads`, are taken from the tensors.

    Raises:
        ValueError: another paper's checkpoint, no `num_attention_heads`, or tensors missing, extra or mis-shaped.
    """
    expect_layout("realformer", state, config)
    official = any(name.startswith(("bert/", "cls/")) for name in state)
    prefix = next((each for each in ("bert/", "bert.") if any(name.startswith(each) for name in state)), "")
    found = encoder_sizes(state, prefix, prefix)
    found.pop("embedding_size", None)
    settings = _configuration(config, found, official)
    predicts, pairs, pools = (
        any(re.search(part, name) for name in state)
        for part in (r"^cls[./]predictions[./]", r"^cls[./]seq_relationship[./]", POOLER)
    )
    model: PreTrainedModel
    if predicts:
        settings.next_sentence_prediction = pairs
        model = realformer.RealformerForPreTraining(settings) if pairs else realformer.RealformerForMaskedLM(settings)
        if pools and not pairs:  # the pooler alone reads nothing that a masked language model has
            state = {name: tensor for name, tensor in state.items() if not re.search(POOLER, name)}
    else:
        model = realformer.RealformerModel(settings, add_pooling_layer=pools)
    load_strictly(model, state, naming(state), size_hints("realformer", settings.to_dict(), found))
    return model.eval()


def _configuration(config: Settings, found: Mapping[str, int], official: bool) -> RealformerConfig:
    if isinstance(config, RealformerConfig):
        return config
    given = {**found, **as_dict(config)}
    if "num_attention_heads" not in given:
        raise ValueError(
            "realformer: num_attention_heads is not given, and tensors do not show it; put the bert_config.json or "
            "config.json of the checkpoint beside it, or pass config."
        )
    if official and given.get("hidden_act") == "gelu":
        given["hidden_act"] = "gelu_new"
    xlarge = {name: size for name, size in RealformerConfig.SIZES["xlarge"].items() if name != "use_running_mean"}
    if official and all(given.get(name) == size for name, size in xlarge.items()):
        given.setdefault("use_running_mean", True)
    known = {field.name for field in fields(RealformerConfig)} - {"model_type", "transformers_version"}
    return RealformerConfig(**{name: value for name, value in given.items() if name in known})
