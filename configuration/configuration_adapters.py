"""Configuration of bottleneck adapters.

Paper: "Parameter-Efficient Transfer Learning for NLP", Houlsby, Giurgiu, Jastrzebski, Morrone, de Laroussilhe,
Gesmundo, Attariyan, Gelly, 2019, arXiv 1902.00751. Official code: google-research/adapter-bert (Apache-2.0).
"""

import math
from collections.abc import Sequence

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN

from .configuration_core import WrapperConfig


LOCATIONS = ("attention", "output")


def check_adapter_settings(owner: str, size: int, activation: str, init_std: float, locations: Sequence[str]) -> None:
    """Raise `ValueError`, naming the class `owner`, if a setting of an adapter is out of range."""
    rules = {
        "adapter_size": (
            size,
            type(size) is int and size >= 1,
            "at least 1" if type(size) is int else "a whole number",
        ),
        "adapter_act": (
            activation,
            isinstance(activation, str) and activation in ACT2FN,
            f"one of {', '.join(sorted(ACT2FN))}",
        ),
        "adapter_init_std": (
            init_std,
            isinstance(init_std, int | float) and init_std is not True and 0 < init_std < math.inf,
            "a finite number above 0: with both matrices zero nothing would be learned",
        ),
        "adapter_locations": (
            locations,
            isinstance(locations, list | tuple)
            and len(locations) > 0
            and all(each in LOCATIONS for each in locations)
            and len(set(locations)) == len(locations),
            f"one or both of {', '.join(LOCATIONS)}, each once",
        ),
    }
    for name, (value, right, allowed) in rules.items():
        if not right:
            raise ValueError(f"{owner}.{name} must be {allowed}; got {value!r}.")


@strict
class AdaptersConfig(WrapperConfig):
    """An encoder with bottleneck adapters: `x + W2 f(W1 x + b1) + b2` after sub-layers of every layer.

    Args:
        adapter_size: width m of the bottleneck (paper: 8, 64 or 256 on GLUE; 2 to 64 elsewhere). All adapters of an
            encoder with L layers of width d together have 2 L (2 d m + d + m) parameters.
        adapter_act: f, an activation by transformers' name. The official code has GELU in its tanh form.
        adapter_init_std: W1 and W2 start from a normal distribution of this deviation, cut at two deviations, and the
            biases from 0 (paper: 1e-2, section 3.6: all up to 1e-2 work alike; official code: 1e-3).
        adapter_locations: after which sub-layers, "attention" and "output" (of the feed-forward). The output alone is
            the cheaper half of the paper's form.
        train_layer_norm: train gain and bias of every LayerNorm of the encoder too, as the paper.
        new_modules: parts of the encoder that its checkpoint lacked, such as a pooler; trained with the head. What is
            found to be missing when a checkpoint is loaded is added.
        encoder_config: see `WrapperConfig`.

    Raises:
        ValueError: a value out of range.
    """

    model_type = "bestiary-adapters"

    adapter_size: int = 64
    adapter_act: str = "gelu_new"
    adapter_init_std: float | int = 1e-2
    adapter_locations: list[str] | tuple[str, ...] = LOCATIONS
    train_layer_norm: bool = True
    new_modules: list[str] | None = None

    def __post_init__(self, **kwargs):
        if isinstance(self.adapter_locations, tuple | set):
            self.adapter_locations = list(self.adapter_locations)
        super().__post_init__(**kwargs)

    def validate_adapters(self):
        """Size, activation, deviation and places are possible."""
        check_adapter_settings(
            type(self).__name__, self.adapter_size, self.adapter_act, self.adapter_init_std, self.adapter_locations
        )
