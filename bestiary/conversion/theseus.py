"""Checkpoints of BERT-of-Theseus from the middle of a run (JetRunner/BERT-of-Theseus, on transformers 2.4).

They hold a predecessor (`bert.encoder.layer.*`), a successor (`bert.encoder.scc_layer.*`) and a classifier, beside
BERT's own configuration, and give `TheseusForSequenceClassification`. The small model that is the aim of it all is

    AutoModelForSequenceClassification.from_pretrained(out).to_base().save_pretrained(small)

The published canwenxu/BERT-of-Theseus-MNLI is such a small model already, which transformers loads as it is.

What the configuration leaves out is taken from the tensors, except for the number of heads.
"""

import re
from dataclasses import fields

from transformers import BertConfig

from ..configuration.configuration_theseus import TheseusConfig
from ..modeling.modeling_theseus import SUCCESSOR, TheseusForSequenceClassification
from . import Settings, State, as_dict, encoder_sizes, expect_layout, load_strictly, size_hints


LAYOUT = rf"^bert\.encoder\.{SUCCESSOR}\.\d+\."
MODEL_TYPES = ("bert",)
PARTS = ()
METHOD_FIELDS = {each.name for each in fields(TheseusConfig)} - {each.name for each in fields(BertConfig)}


def official_name(key: str) -> str:
    """Official name of a parameter of `TheseusForSequenceClassification`."""
    return key.removeprefix("model.")


def convert(state: State, config: Settings = None) -> TheseusForSequenceClassification:
    """The pair of a checkpoint, in evaluation mode.

    Args:
        state: tensors by official names.
        config: BERT's configuration; fields of `TheseusConfig` (the schedule) may stand in it.

    Raises:
        ValueError: another paper's checkpoint, no `num_attention_heads`, or tensors missing, extra or mis-shaped.
    """
    expect_layout("theseus", state, config)
    found = encoder_sizes(state, "bert.", "bert.")
    found.pop("embedding_size", None)
    kept = 1 + max(int(match[1]) for name in state if (match := re.match(rf".*\.{SUCCESSOR}\.(\d+)\.", name)))
    hints = []
    if isinstance(config, TheseusConfig):
        settings = config
    else:
        given = dict(as_dict(config))
        if "num_attention_heads" not in given:
            raise ValueError(
                "theseus: num_attention_heads is not given, and tensors do not show it; put the config.json of the "
                "checkpoint beside it, or pass config."
            )
        own = {name: given.pop(name) for name in METHOD_FIELDS & given.keys()}
        labels = len(state["classifier.bias"]) if "classifier.bias" in state else 2
        hints = size_hints("bert", given, found)
        encoder = BertConfig(**({"num_labels": labels} | found | given | {"model_type": "bert"}))
        settings = TheseusConfig(encoder_config=encoder, **({"successor_num_hidden_layers": kept} | own))
    model = TheseusForSequenceClassification(settings)
    load_strictly(model, state, official_name, hints)
    return model.eval()
