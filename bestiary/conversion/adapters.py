"""Fine-tuned checkpoints of google-research/adapter-bert (TensorFlow names) and of AdapterHub's library.

The official checkpoint holds BERT, its adapters and the head; so must the other, a state dict of the whole model.
`output_weights` or `classifier` gives `AdaptersForSequenceClassification`, `cls/squad/output_weights` or `qa_outputs`
`AdaptersForQuestionAnswering`, no head `AdaptersModel`. Size and locations of the adapters are taken from their
tensors.

`adapter_act` is the tanh GELU, `gelu_new`, if the configuration does not say otherwise; `hidden_act="gelu"` is the
exact form here, although the official code computes the tanh form under that name too (at most 4.7e-4 apart): for its
numbers to the last digit give `"gelu_new"`.

Names do not tell AdapterHub's placements apart: they are read as those of the paper, behind the dropout and before the
residual. Its `SeqBnConfig` (Pfeiffer et al., adapters behind the output alone and around the LayerNorm) has the names
of an output-only checkpoint and is another model.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import BertConfig

from ..configuration.configuration_adapters import AdaptersConfig
from ..modeling import modeling_adapters as adapters
from . import Settings, State, as_dict, encoder_sizes, expect_layout, load_strictly, size_hints, tensorflow_name


LAYOUT = r"/adapters/(weights|biases)[12]$|\.adapters\.[^.]+\.adapter_(down|up)\."
MODEL_TYPES = ("bert",)
PARTS = ()
HEADS = (
    (r"^(cls/squad/output_weights|qa_outputs\.weight)$", adapters.AdaptersForQuestionAnswering),
    (r"^(output_weights|classifier\.weight)$", adapters.AdaptersForSequenceClassification),
)
"""Names of heads, and the class for each."""
TF_HEADS = {
    "classifier.weight": "output_weights",  # [labels, d] as ours
    "classifier.bias": "output_bias",
    "qa_outputs.weight": "cls/squad/output_weights",
    "qa_outputs.bias": "cls/squad/output_bias",
}
TF_PARTS = {"down.weight": "weights1", "down.bias": "biases1", "up.weight": "weights2", "up.bias": "biases2"}
PLACES = {
    "attention": r"[./]attention[./]output[./]adapters[./]",
    "output": r"[./]layer[._]\d+[./]output[./]adapters[./]",
}
"""Where adapters are, in the names of both layouts, by our location."""
HUB_PARTS = {"down": "adapter_down.0", "up": "adapter_up"}
ADAPTER = re.compile(r"\.dropout\.adapter\.((down|up)\.(weight|bias))$")


def official_name(key: str) -> str:
    """TensorFlow's name of a parameter of our models (matrices of adapters are transposed there, biases are rows)."""
    key = key.removeprefix("model.")
    if found := ADAPTER.search(key):
        return f"{tensorflow_name(key[: found.start()])}/adapters/{TF_PARTS[found[1]]}"
    return TF_HEADS.get(key) or tensorflow_name(key)


def hub_name(key: str, adapter: str) -> str:
    """AdapterHub's name of a parameter of our models, for its adapter `adapter`."""
    key = key.removeprefix("model.")
    return ADAPTER.sub(lambda found: f".adapters.{adapter}.{HUB_PARTS[found[2]]}.{found[3]}", key)


def convert(state: State, config: Settings) -> adapters.AdaptersPreTrainedModel:
    """The model of a checkpoint, in evaluation mode; the top of this file says of which class.

    Args:
        state: tensors by TensorFlow's or AdapterHub's names.
        config: an `AdaptersConfig`, or fields of BERT's configuration, with `adapter_act` (or `adapter_activation`)
            among them if it is not the tanh GELU. Sizes, all but `num_attention_heads`, are taken from the tensors.

    Raises:
        ValueError: another checkpoint, several adapters in one, no `num_attention_heads`, or tensors missing, extra or
            mis-shaped.
    """
    expect_layout("adapters", state, config)
    official = any("/adapters/" in name for name in state)
    prefix = "bert/" if official else "bert."
    found = encoder_sizes(state, prefix, prefix)
    found.pop("embedding_size", None)
    model_class = next(
        (model for pattern, model in HEADS if any(re.search(pattern, name) for name in state)), adapters.AdaptersModel
    )
    locations = [name for name, pattern in PLACES.items() if any(re.search(pattern, key) for key in state)]
    if official:
        state = {name: _as_ours(name, tensor) for name, tensor in state.items()}
        biases = [tensor.shape[-1] for name, tensor in state.items() if name.endswith("/adapters/biases1")]
        name_of = official_name
    else:
        names = sorted({match[1] for name in state if (match := re.search(r"\.adapters\.([^.]+)\.", name))})
        if len(names) > 1:
            raise ValueError(
                f"adapters: the checkpoint holds several adapters, {', '.join(names)}; leave one of them."
            )
        biases = [tensor.shape[-1] for name, tensor in state.items() if name.endswith(".adapter_down.0.bias")]
        name_of = lambda key: hub_name(key, names[0])  # noqa: E731
    labels = next((len(state[name]) for name in ("output_bias", "classifier.bias") if name in state), 2)
    settings = (
        config
        if isinstance(config, AdaptersConfig)
        else _configuration(as_dict(config), found, biases, locations, labels)
    )
    model = model_class(settings)
    load_strictly(model, state, name_of, size_hints("bert", settings.encoder_config.to_dict(), found))
    return model.eval()


def _as_ours(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if re.search(r"/adapters/weights[12]$", name):
        return tensor.T
    return tensor.reshape(-1) if re.search(r"/adapters/biases[12]$", name) else tensor


def _configuration(
    given: Mapping[str, Any], found: Mapping[str, int], biases: list[int], locations: list[str], labels: int
) -> AdaptersConfig:
    if "num_attention_heads" not in given:
        raise ValueError(
            "adapters: num_attention_heads is not given, and tensors do not show it; put the bert_config.json of the "
            "encoder beside the checkpoint, or pass config."
        )
    known = BertConfig().to_dict().keys() - {"model_type", "architectures", "transformers_version", "dtype"}
    fields = {**found, "num_labels": labels, **{name: value for name, value in given.items() if name in known}}
    act = given.get("adapter_act", given.get("adapter_activation", "gelu_new"))
    if "num_labels" in given:
        fields["num_labels"] = given["num_labels"]
    return AdaptersConfig.from_encoder(
        BertConfig(**fields),
        adapter_act=act,
        adapter_locations=locations,
        **({"adapter_size": biases[0]} if biases else {}),
        **({"adapter_init_std": given["adapter_init_std"]} if "adapter_init_std" in given else {}),
    )
