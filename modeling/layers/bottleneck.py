"""Bottleneck adapters in any encoder: the module, the places where it goes, and switching it off layer by layer.

An adapter stands behind the module whose output is that of a sub-layer before the residual: the hidden dropout in
BERT, RoBERTa, ELECTRA, DeBERTa, XLM-R and in the shared core of this package. DistilBERT has no dropout there after
attention; its last projection takes its place. The adapter is a child `adapter` of that module and is applied to its
output by a forward hook, so that no parameter of the encoder changes its name.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN

from .wrapping import is_loaded, layer_list


SITES = {
    "attention": ("attention.output.dropout", "attention.out_lin"),
    "output": ("output.dropout", "ffn.dropout"),
}
"""Where a sub-layer ends before its residual, by location: names inside a layer, of which a layer has one."""


class Switchable(nn.Module):
    """What `adapters_off` can pass by."""

    bypassed = False


def build_activation(name: str) -> nn.Module:
    """An activation by transformers' name; the tanh GELU, `gelu_new`, by torch's fused kernel."""
    return nn.GELU(approximate="tanh") if name == "gelu_new" else ACT2FN[name]


def apply_bottleneck(
    states: torch.Tensor, down: nn.Module, activation: Callable[[torch.Tensor], torch.Tensor], up: nn.Module
) -> torch.Tensor:
    """x + up(f(down(x))), (..., D) -> (..., D), computed in the type of the adapter's weights and added in that of
    x.
    """
    return states + up(activation(down(states.to(down.weight.dtype)))).to(states.dtype)


@torch.no_grad()
def init_bottleneck(down: nn.Linear, up: nn.Linear, std: float) -> None:
    """Nearly the identity: both matrices normal, cut at two deviations, both biases 0."""
    for linear in (down, up):
        init.trunc_normal_(linear.weight, std=std, a=-2 * std, b=2 * std)
        init.zeros_(linear.bias)


class Bottleneck(Switchable):
    """x + W2 f(W1 x + b1) + b2 (Houlsby et al., 2019, section 2.1): (..., D) -> (..., D).

    Args:
        width: D.
        size: m, width of the bottleneck; 2 D m + D + m parameters.
        activation: f, by transformers' name.
        std: of the initial matrices.
    """

    def __init__(self, width: int, size: int, activation: str, std: float):
        super().__init__()
        self.down = nn.Linear(width, size)
        self.activation = build_activation(activation)
        self.up = nn.Linear(size, width)
        self.std = std
        self.reset()

    def reset(self) -> None:
        """Initialise; parameters that a checkpoint gave are left alone."""
        init_bottleneck(self.down, self.up, self.std)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.bypassed:
            return hidden_states
        return apply_bottleneck(hidden_states, self.down, self.activation, self.up)


def adapter_sites(model: PreTrainedModel, locations: Sequence[str]) -> list[str]:
    """Names, inside a layer, of the modules behind which adapters of these locations go.

    Raises:
        ValueError: the model has no list of layers, or its layers none of the known modules.
    """
    modules = dict(layer_list(model)[0].named_modules())
    found = []
    for location in locations:
        names = [name for name in SITES[location] if name in modules]
        if not names:
            raise ValueError(
                f"{type(model).__name__}: its layers have none of the modules {', '.join(SITES[location])} behind "
                f"which the adapter of the location {location!r} would go; wrap an encoder such as BERT, RoBERTa, "
                "ELECTRA, DeBERTa, XLM-R or DistilBERT, or name the modules by target_modules of "
                "BottleneckAdapterConfig."
            )
        found.append(names[0])
    return found


def fresh_modules(model: PreTrainedModel) -> list[str]:
    """Names, in the encoder, of its parts that the checkpoint lacked, such as the pooler of a masked language model;
    none for a model that was not loaded from a checkpoint.

    They hold random numbers, so that an adapter without them would be loaded onto other ones.
    """
    if not is_loaded(model.base_model):
        return []
    parts = model.base_model.named_children()
    return [name for name, part in parts if next(part.parameters(), None) is not None and not is_loaded(part)]


def is_layer_norm(module: nn.Module) -> bool:
    """Whether a module is a LayerNorm, of torch or a model's own."""
    return isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("LayerNorm")


def add_adapters(model: PreTrainedModel, size: int, activation: str, std: float, locations: Sequence[str]) -> None:
    """Put fresh adapters into every layer of a model, in place."""
    sites = adapter_sites(model, locations)
    for layer in layer_list(model):
        for site in sites:
            module = layer.get_submodule(site)
            module.adapter = Bottleneck(model.config.hidden_size, size, activation, std)
            module.register_forward_hook(_adapt)


def remove_adapters(model: nn.Module) -> None:
    """Take out what `add_adapters` put in, so that the model is what it was before."""
    for module in list(model.modules()):
        for key, hook in list(module._forward_hooks.items()):
            if hook is _adapt:
                del module._forward_hooks[key], module.adapter


def _adapt(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    return module.adapter(output)


@contextmanager
def adapters_off(model: nn.Module, layers: Iterable[int] | None = None) -> Iterator[None]:
    """Pass by the adapters of some layers, of all by default, within a `with` block (paper, figure 6).

    Trained LayerNorms and the head stay as they are, as in the paper. PEFT's own `disable_adapter()` gives the
    original LayerNorms and head back instead.

    Args:
        model: a model of `AdaptersConfig`, or a PeftModel with bottleneck adapters.
        layers: numbers of layers, from 0.

    Raises:
        ValueError: a number that no layer has, or a model without such adapters.
    """
    stack: Any = layer_list(model)  # type: ignore[arg-type]
    chosen = range(len(stack)) if layers is None else list(layers)
    if wrong := [number for number in chosen if not 0 <= number < len(stack)]:
        raise ValueError(
            f"adapters_off: {type(model).__name__} has no layer {', '.join(map(str, wrong))}; its layers are 0 to "
            f"{len(stack) - 1}."
        )
    if not any(isinstance(part, Switchable) for part in stack.modules()):
        raise ValueError(f"adapters_off: {type(model).__name__} has no bottleneck adapters.")
    parts = [part for number in chosen for part in stack[number].modules() if isinstance(part, Switchable)]
    before = [part.bypassed for part in parts]
    for part in parts:
        part.bypassed = True
    try:
        yield
    finally:
        for part, was in zip(parts, before):
            part.bypassed = was
