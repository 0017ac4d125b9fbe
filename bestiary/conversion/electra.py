"""ELECTRA's official checkpoints (google-research/electra: TensorFlow names, no configuration), transformers' pairs.

A pair is a folder with two sub-folders, `discriminator` and `generator`, such as google/electra-small-discriminator
and google/electra-small-generator. Both give `ElectraJointForPreTraining`, whose `to_discriminator()` and
`to_generator()` give the stock models back.

What the configuration leaves out is taken from the tensors and from the official code: the number of heads is
max(1, width // 64), the activation the exact GELU, LayerNorm's epsilon 1e-12. Which weights the two networks share
shows in the tensors.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
from transformers import ElectraConfig

from ..configuration.configuration_core import refuse_near_misses
from ..configuration.configuration_electra import ElectraJointConfig
from ..modeling.modeling_electra import ElectraJointForPreTraining
from . import Settings, State, as_dict, encoder_sizes, expect_layout, load_strictly, size_hints, tensorflow_name


LAYOUT = (
    r"^((electra|generator)/encoder/layer_\d+/attention/self/"
    r"|((discriminator|generator)/)?electra\.encoder\.layer\.\d+\.attention\.self\.)"
)
MODEL_TYPES = ("electra",)
PARTS = ("discriminator", "generator")
HEAD_NAMES = {
    "generator_lm_head.bias": "generator_predictions/output_bias",
    "discriminator_predictions.dense_prediction.weight": "discriminator_predictions/dense_1/kernel",
    "discriminator_predictions.dense_prediction.bias": "discriminator_predictions/dense_1/bias",
}
OPTIONS = {
    "gen_weight": "generator_loss_weight",
    "disc_weight": "discriminator_loss_weight",
    "temperature": "sampling_temperature",
}
"""Official pre-training options that have another name here."""
OF_ONE_NETWORK = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def official_name(key: str) -> str:
    """TensorFlow's name of a parameter of `ElectraJointForPreTraining`."""
    return HEAD_NAMES.get(key) or tensorflow_name(key)


def pair_name(key: str) -> str:
    """Name of a parameter of `ElectraJointForPreTraining` in a pair that was read as parts."""
    if key.startswith("generator."):
        return f"generator/electra.{key.removeprefix('generator.')}"
    return f"{'generator' if key.startswith('generator_') else 'discriminator'}/{key}"


def convert(state: State, config: Settings = None) -> ElectraJointForPreTraining:
    """The joint model of an ELECTRA checkpoint, in evaluation mode.

    Args:
        state: tensors by TensorFlow's names, or those of a pair with `discriminator/` and `generator/` in front.
        config: None, an `ElectraJointConfig`, or a dictionary: fields of the discriminator's configuration, or of both
            networks' under `discriminator` and `generator`; options by their official names (`gen_weight`,
            `disc_weight`, `temperature`, `disallow_correct`, `uniform_generator`, `untied_generator`,
            `untied_generator_embeddings`, `electra_objective`) or by ours.

    Raises:
        ValueError: another paper's checkpoint, half a pair, or tensors missing, extra or mis-shaped.
    """
    expect_layout("electra", state, config)
    if any(name.startswith("electra.") for name in state):
        is_generator = any(name.startswith("generator_") for name in state)
        raise ValueError(
            f"electra: this is a {'generator' if is_generator else 'discriminator'} alone. Put both networks into one "
            "folder, as its sub-folders discriminator and generator, and convert that; transformers loads either of "
            "them as it is."
        )
    pair = any(name.startswith(("discriminator/", "generator/electra.")) for name in state)
    ours, theirs = ("discriminator/electra.", "generator/electra.") if pair else ("electra/", "generator/")
    own_tables = any(name.startswith(f"{theirs}embeddings{theirs[-1]}") for name in state)
    found = {
        "discriminator": encoder_sizes(state, ours, ours),
        "generator": encoder_sizes(state, theirs, theirs if own_tables else ours),
    }
    if isinstance(config, ElectraJointConfig):
        settings = config
    else:
        ties = {
            "untied_generator": any(name.startswith(f"{theirs}encoder") for name in state),
            "tie_generator_embeddings": not own_tables or (pair and _same_tables(state, ours, theirs)),
        }
        settings = _configuration(as_dict(config), found, ties)
    model = ElectraJointForPreTraining(settings)
    hints = size_hints("discriminator", as_dict(settings.discriminator_config), found["discriminator"])
    if model.has_generator:
        hints += size_hints("generator", as_dict(settings.generator_config), found["generator"])
    name_of: Callable[[str], str] = pair_name if pair else official_name
    load_strictly(model, state, name_of, hints)
    return model.eval()


def _same_tables(state: State, ours: str, theirs: str) -> bool:
    """Whether two embedding blocks are equal in every tensor."""
    block = {name: tensor for name, tensor in state.items() if name.startswith(f"{theirs}embeddings.")}
    others = [state.get(ours + name.removeprefix(theirs)) for name in block]
    return all(other is not None and torch.equal(tensor, other) for tensor, other in zip(block.values(), others))


def _configuration(
    given: Mapping[str, Any], found: Mapping[str, dict[str, int]], ties: Mapping[str, bool]
) -> ElectraJointConfig:
    stock = {field.name for field in fields(ElectraConfig)}
    own = {field.name for field in fields(ElectraJointConfig)} - stock
    options = {**ties, **{OPTIONS.get(name, name): value for name, value in given.items()}}
    if "untied_generator_embeddings" in given:
        options["tie_generator_embeddings"] = not given["untied_generator_embeddings"]
    if given.get("electra_objective") is False:
        options["objective"] = "mlm"
    options = {name: value for name, value in options.items() if name in own}

    not_shared = {
        "discriminator": (),
        "generator": OF_ONE_NETWORK + (() if options["tie_generator_embeddings"] else ("embedding_size",)),
    }
    networks = {}
    for part in PARTS:
        refuse_near_misses(ElectraConfig, given.get(part, {}))
        both = {name: value for name, value in given.items() if name not in not_shared[part]}
        network = found[part] | both | dict(given.get(part, {}))
        network.setdefault("num_attention_heads", max(1, network.get("hidden_size", 0) // 64))
        networks[part] = {name: network[name] for name in network.keys() & stock - {"model_type", "architectures"}}
    alone = not options["untied_generator"] or options.get("uniform_generator") or options.get("objective") == "mlm"
    return ElectraJointConfig(
        discriminator_config=networks["discriminator"],
        generator_config=networks["discriminator" if alone else "generator"],
        **options,
    )
