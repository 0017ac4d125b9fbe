"""Configuration of HyPe (Yuan et al., ACL 2023, arXiv 2212.08853): which noise goes into which layers."""

import math
from dataclasses import fields
from typing import Any, Literal, Self

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_core import WrapperConfig


HIDDEN_DROPOUT = ("hidden_dropout_prob", "dropout")
"""What configurations call the dropout of hidden states."""


@strict
class HypeConfig(WrapperConfig):
    """Noise on the hidden states of an encoder's layers in training.

    Args:
        noise: distribution of each number of the noise: `"normal"` N(0, noise_scale^2) (HyPe-N), `"uniform"`
            U(-noise_scale, noise_scale) (HyPe-U), or `"none"`, plain fine-tuning.
        noise_scale: sigma. The paper searches 1e-5, 1e-4, 1e-3 and 1e-2; 1e-5 and 1e-4 work best. 0 is no noise.
        noise_layers: numbers of the layers with noise, from 0; negative ones count from the last, so the top three are
            `[-3, -2, -1]`. None is all of them.
        noise_position: `"input"` of the layer (the paper), `"mid"` between attention and feed-forward, or `"both"`.
        official_uniform: `noise="uniform"` of the released code, U[0, noise_scale), which is never negative.

    Raises:
        ValueError: a scale that is negative or not finite, layers that the encoder does not have, none or one twice,
            `official_uniform` with another noise.
    """

    model_type = "bestiary-hype"

    noise: Literal["none", "normal", "uniform"] = "normal"
    noise_scale: float | int = 1e-5
    noise_layers: list[int] | None = None
    noise_position: Literal["input", "mid", "both"] = "input"
    official_uniform: bool = False

    def validate_noise(self):
        """The scale is a finite number, the layers exist."""
        if not 0 <= self.noise_scale < math.inf:
            raise self.reject("noise_scale", "finite and at least 0 (the paper uses 1e-5 to 1e-2)")
        if self.official_uniform and self.noise != "uniform":
            raise self.reject("official_uniform", f"False where noise is {self.noise!r}; it changes 'uniform' only")
        if self.noise_layers is not None:
            depth = self.num_hidden_layers
            if not all(-depth <= number < depth for number in self.noise_layers):
                raise self.reject(
                    "noise_layers", f"None or numbers from {-depth} to {depth - 1} (the encoder has {depth} layers)"
                )
            if not self.noise_layers or len(set(self.perturbed_layers)) < len(self.noise_layers):
                raise self.reject("noise_layers", "None (all) or different layers, at least one")

    @property
    def perturbed_layers(self) -> list[int]:
        """Numbers from 0 of the layers with noise."""
        depth = self.num_hidden_layers
        return [*range(depth)] if self.noise_layers is None else [number % depth for number in self.noise_layers]

    @classmethod
    def from_encoder(cls, config: PreTrainedConfig, **settings: Any) -> Self:
        """The configuration around that of an encoder, whose dropout of hidden states is switched off, as in the
        paper, unless there is no noise or `encoder_config` gives a rate. Dropout of attention stays as it is.

        Raises:
            ValueError: as `WrapperConfig.from_encoder`.
        """
        if settings.get("noise", cls.noise) != "none":
            known = {field.name for field in fields(type(config))}
            off = {name: 0.0 for name in HIDDEN_DROPOUT if name in known}
            settings["encoder_config"] = off | dict(settings.get("encoder_config") or {})
        return super().from_encoder(config, **settings)
