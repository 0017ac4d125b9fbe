"""HyPe: Better Pre-trained Language Model Fine-tuning with Hidden Representation Perturbation.

Yuan, Yuan, Tan, Huang, Huang, ACL 2023, arXiv 2212.08853. Official code: Yuanhy1997/HyPe (MIT, PyTorch). In training
the input h of every layer g becomes h + e, so that the layer computes g(h + e) with e also on its residual; e is drawn
anew for each layer, position, unit and step, and there is none at inference. The loss is the task's.

The noise is put in by hooks on the layers of any encoder with a layer list, so a model's parameters and saved weights
are those of the plain one. Checked layouts: BERT, RoBERTa, XLM-R, ELECTRA (after its embedding projection), DeBERTa,
DeBERTa-v2, DistilBERT and bestiary's own; for noise between attention and feed-forward these only.

Decisions:
* `noise="uniform"` is U(-s, s), as the paper says; the released code draws s * U[0, 1): `official_uniform=True`.
* An unknown noise is refused; the released code builds the exception and does not raise it.
* The noise is added in float32 at least. Under autocast the result stays float32, and with it the residual stream.
  A layer with 16-bit weights cannot take a float32 stream, not even under autocast (its LayerNorm wants one type):
  there the sum is rounded, and a scale below the spacing of its numbers, which would vanish, is refused.
* No gradient goes into the noise, no scaling by length or width; padding gets noise like any position.
* `output_hidden_states` shows the states before the noise, as the released BERT file does (its XLNet file: after).
* Draws come from `noise_seeds`, one per example, if they are given (then the split of a batch changes nothing), else
  from the global generator. Both survive activation checkpointing: a hook on a layer is called once, outside the part
  that is computed twice, a hook on its attention is called again with the generator's state restored.
* XLNet is refused: its layers take two streams in permutation language modelling, and (T, B, D), where noise by row
  does not fit.

torch.compile(fullgraph=True) works, with and without seeds; the noise is then part of the graph.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import (
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from ..configuration.configuration_hype import HypeConfig
from .layers.keyed_noise import keyed_normal, keyed_uniform
from .layers.wrapping import WrapperPreTrainedModel, layer_list


HALF = (torch.bfloat16, torch.float16)


class Perturbation:
    """The noise of one model: where it goes in, and how it is drawn.

    Args:
        model: a plain model; its layers get hooks by `attach` and lose them by `detach`.
        config: the settings.

    Attributes:
        seeds: (B,) int64, one per example of the batch, or None for the global generator. They must stay until the
            backward pass if activation checkpointing is on and there is noise inside layers.

    Raises:
        ValueError: the model has no layer list, or no place between attention and feed-forward where one is needed.
    """

    def __init__(self, model: PreTrainedModel, config: HypeConfig):
        self.noise, self.scale, self.official_uniform = config.noise, config.noise_scale, config.official_uniform
        self.seeds: torch.Tensor | None = None
        self.attached = False
        self.handles: list[RemovableHandle] = []
        self.layers: dict[int, nn.Module] = {}
        self.inputs: dict[int, nn.Module] = {}
        self.middles: dict[int, nn.Module] = {}
        if self.noise == "none" or self.scale == 0:
            return
        if model.config.model_type == "xlnet":
            raise ValueError("HyPe is not built for XLNet, whose layers have two streams; take another encoder.")
        layers = layer_list(model)
        for number in config.perturbed_layers:
            self.layers[number] = layers[number]
            if config.noise_position != "mid":
                self.inputs[number] = layers[number]
            if config.noise_position != "input":
                self.middles[number] = feed_forward_input(layers[number])

    def attach(self) -> None:
        """Put the hooks on, if they are off."""
        if self.attached:  # a flag: torch.compile cannot look at the handles
            return
        for number, layer in self.inputs.items():
            hook = partial(self.perturb_input, 2 * number)
            self.handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        for number, part in self.middles.items():
            self.handles.append(part.register_forward_hook(partial(self.perturb_output, 2 * number + 1)))
        self.attached = True

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()
        self.handles, self.attached, self.seeds = [], False, None

    def perturb_input(self, stream: int, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Hook: g(h + e)."""
        if not layer.training:
            return None
        if args:
            return (self.add(args[0], stream), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": self.add(kwargs["hidden_states"], stream)}

    def perturb_output(self, stream: int, part: nn.Module, args: tuple, output: Any) -> Any:
        """Hook on what the feed-forward part and its residual read."""
        if not part.training:
            return None
        if isinstance(output, tuple):
            return (self.add(output[0], stream), *output[1:])
        return self.add(output, stream)

    def add(self, hidden: torch.Tensor, stream: int) -> torch.Tensor:
        """h + scale * e in float32 or wider, (B, T, D).

        Raises:
            ValueError: 16-bit hidden states, outside autocast or in a layer with 16-bit weights, and a scale below
                their spacing.
        """
        if hidden.dtype not in HALF:
            return torch.add(hidden, self.draw(hidden, stream), alpha=self.scale)
        noisy = torch.add(hidden.float(), self.draw(hidden, stream), alpha=self.scale)
        if torch.is_autocast_enabled(hidden.device.type) and not self.has_half_weights(stream // 2):
            return noisy
        spacing = torch.finfo(hidden.dtype).eps
        if self.scale < spacing:
            raise ValueError(
                f"HypeConfig.noise_scale is {self.scale}, but {hidden.dtype} numbers about 1 are {spacing} apart, so "
                "that the noise would vanish. Keep float32 weights and train with autocast (bf16=True in the training "
                f"arguments), or take a noise_scale of at least {spacing}."
            )
        return noisy.to(hidden.dtype)

    def has_half_weights(self, number: int) -> bool:
        """Whether a layer has 16-bit parameters."""
        return any(parameter.dtype in HALF for parameter in self.layers[number].parameters())

    @torch.no_grad()
    def draw(self, hidden: torch.Tensor, stream: int) -> torch.Tensor:
        """Noise e of scale 1 for hidden states (B, T, D): N(0, 1), U(-1, 1), or with `official_uniform` U[0, 1).

        `stream` is 2 l for the input of layer l, 2 l + 1 for its middle.
        """
        rows, length, width = hidden.shape
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        if self.noise == "normal":
            if self.seeds is not None:
                return keyed_normal((rows, length, width), self.seeds, stream)
            return torch.randn(hidden.shape, dtype=dtype, device=hidden.device)
        if self.seeds is not None:
            unit = keyed_uniform((rows, length, width), self.seeds, stream)
        else:
            unit = torch.rand(hidden.shape, dtype=dtype, device=hidden.device)
        return unit if self.official_uniform else unit.mul_(2).sub_(1)


def feed_forward_input(layer: nn.Module) -> nn.Module:
    """The part of a layer whose output is the input of the feed-forward part and of its residual connection.

    Raises:
        ValueError: a layout that is not BERT's or DistilBERT's.
    """
    parts = dict(layer.named_children())  # all of them: one more (post_attention, layernorm_before) is another layout
    if parts.keys() == {"attention", "intermediate", "output"}:
        return parts["attention"]
    if parts.keys() == {"attention", "sa_layer_norm", "ffn", "output_layer_norm"}:
        return parts["sa_layer_norm"]
    raise ValueError(
        f"HypeConfig.noise_position: {type(layer).__name__} has no known place between attention and feed-forward "
        f"(its parts are {', '.join(parts)}); use noise_position='input'."
    )


@contextmanager
def perturbed(model: PreTrainedModel, **settings: Any) -> Iterator[Perturbation]:
    """Noise in a plain model while the context lasts and the model is in training mode; nothing is left afterwards.

    Args:
        model: a plain model, stock or ours.
        settings: `noise`, `noise_scale`, `noise_layers`, `noise_position`, `official_uniform` of `HypeConfig`.

    Raises:
        ValueError: as `HypeConfig` and `Perturbation`; or the model has its own noise already.
    """
    if isinstance(model, WrapperPreTrainedModel):
        raise ValueError(f"perturbed: {type(model).__name__} wraps a method already; give the plain model: to_base().")
    perturbation = Perturbation(model, HypeConfig(encoder_config=model.config, **settings))
    perturbation.attach()
    try:
        yield perturbation
    finally:
        perturbation.detach()


class HypePreTrainedModel(WrapperPreTrainedModel):
    """A model with noise in its layers in training mode. `to_base()` gives it back without the hooks, which return
    with the next training step of this one.
    """

    config: HypeConfig

    def add_method(self) -> None:
        self.perturbation = Perturbation(self.wrapped, self.config)
        self.perturbation.attach()

    def to_base(self) -> PreTrainedModel:
        self.perturbation.detach()
        return super().to_base()

    @wraps(WrapperPreTrainedModel.forward)
    def forward(self, *args: Any, noise_seeds: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """As the base's. `noise_seeds` (B,) int64: the noise of an example depends on its seed alone, so that
        splitting a batch does not change it; None draws from the global generator. With activation checkpointing and
        noise inside layers, run backward before the next forward pass with other seeds.

        Raises:
            ValueError: noise that half precision would swallow, or seeds that do not fit the rows.
        """
        if self.training:
            self.perturbation.attach()
            self.perturbation.seeds = noise_seeds
        return super().forward(*args, **kwargs)


class HypeModel(HypePreTrainedModel):
    """An encoder with noise in its layers."""


class HypeForSequenceClassification(HypePreTrainedModel):
    """A sequence classifier or regressor with noise in its encoder."""

    wrapped_auto_class = AutoModelForSequenceClassification


class HypeForTokenClassification(HypePreTrainedModel):
    """A tagger with noise in its encoder."""

    wrapped_auto_class = AutoModelForTokenClassification


class HypeForQuestionAnswering(HypePreTrainedModel):
    """A reader of answer spans with noise in its encoder."""

    wrapped_auto_class = AutoModelForQuestionAnswering


class HypeForMultipleChoice(HypePreTrainedModel):
    """A scorer of choices with noise in its encoder."""

    wrapped_auto_class = AutoModelForMultipleChoice
