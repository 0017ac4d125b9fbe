"""Queries, keys and values of one layer of any encoder, before they are cut into heads: where they are, how to run an
encoder up to them and no further, and a trial of both.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from .wrapping import layer_list


Projections = dict[str, torch.Tensor]
"""Queries "q", keys "k" and values "v", (B, N, D) each."""


WORKING = (
    "Projections are found in encoders such as BERT, RoBERTa, XLM-R, CamemBERT, ELECTRA, DeBERTa, DeBERTa-v2, "
    "DistilBERT, RoBERTa-PreLayerNorm and bestiary's own with one stream (bert, tupe, performer, linear-attention, "
    "realformer)."
)


class LayerProjections:
    """The query, key and value projections of a layer of any known layout.

    Known are three linear maps (BERT, RoBERTa, ELECTRA, XLM-R, DeBERTa-v2, DistilBERT, our encoders) and DeBERTa's
    fused one, in post-norm layers and in pre-norm layers with the LayerNorm in the attention block.

    Args:
        layer: one layer of an encoder.

    Raises:
        ValueError: another layout.
    """

    LAYOUTS = (
        ("attention.self", ("query", "key", "value"), False),
        ("attention.self", ("query_proj", "key_proj", "value_proj"), True),
        ("attention.self", ("in_proj",), True),
        ("attention", ("q_lin", "k_lin", "v_lin"), False),
    )
    """Module that holds the projections, their names, and whether the layer returns a tuple."""

    def __init__(self, layer: nn.Module):
        modules = dict(layer.named_modules())
        for place, names, returns_tuple in self.LAYOUTS:
            owner = modules.get(place)
            if owner is not None and set(names) <= {name for name, _ in owner.named_children()}:
                self.owner = owner
                self.returns_tuple = getattr(layer, "returns_tuple", returns_tuple)  # layers of others do not say
                self.linears = [modules[f"{place}.{name}"] for name in names]
                self.norm = modules.get("attention.LayerNorm")
                break
        else:
            raise ValueError(
                f"{type(layer).__name__} has no query, key and value projections where they are looked for "
                f"({'; '.join(f'{place}: ' + ', '.join(names) for place, names, _ in self.LAYOUTS)}); {WORKING}"
            )

    def __call__(self, hidden_states: torch.Tensor, wanted: str = "qkv") -> Projections:
        """The projections whose letters are in `wanted`, of the layer's input (B, N, D)."""
        if self.norm is not None:
            hidden_states = self.norm(hidden_states)
        if len(self.linears) == 3:
            return {name: linear(hidden_states) for name, linear in zip("qkv", self.linears) if name in wanted}
        return self.split(self.linears[0](hidden_states), wanted)

    def split(self, projected: torch.Tensor, wanted: str) -> Projections:
        """The projections in the output of the fused linear map."""
        heads = self.owner.num_attention_heads  # DeBERTa: a head's queries, keys and values lie side by side
        fused = projected.unflatten(-1, (heads, 3, -1))  # (B, N, H, 3, d)
        query, key, value = (part.flatten(-2) for part in fused.unbind(-2))
        found = {"q": query + self.owner.q_bias, "k": key, "v": value + self.owner.v_bias}
        return {name: found[name] for name in wanted}

    def parameters(self, wanted: str) -> list[nn.Parameter]:
        """What the projections in `wanted` are made of."""
        used = [] if self.norm is None else list(self.norm.parameters())
        if len(self.linears) == 3:
            chosen = [linear for name, linear in zip("qkv", self.linears) if name in wanted]
            return used + [parameter for linear in chosen for parameter in linear.parameters()]
        biases = {"q": self.owner.q_bias, "v": self.owner.v_bias}
        return used + [*self.linears[0].parameters(), *(bias for name, bias in biases.items() if name in wanted)]


AFTER_LAYERS = ("pooler",)
AFTER_PRE_NORM_LAYERS = ("pooler", "LayerNorm", "encoder.LayerNorm")
"""Modules of an encoder that follow the layers. (DeBERTa-v2's `encoder.LayerNorm` does not: it comes before.)"""


def project_at(encoder: PreTrainedModel, layer: int, wanted: str, inputs: dict[str, Any]) -> Projections:
    """Run an encoder up to the projections of a layer (counted from 1), and no further.

    For the time of the call that layer returns its projections, side by side, in place of its output, and what follows
    hands them on. So they pass through activation checkpointing, packing and the hooks of FSDP as any state does.
    """
    layers = layer_list(encoder)
    projections = LayerProjections(layers[layer - 1])

    def project(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = projections(hidden_states, wanted)
        return hand_on(torch.cat([found[name] for name in wanted], -1))

    def hand_on(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden_states, None) if projections.returns_tuple else hidden_states

    changed = {layers[layer - 1]: project} | dict.fromkeys(layers[layer:], hand_on)
    after = AFTER_LAYERS if projections.norm is None else AFTER_PRE_NORM_LAYERS
    for name, module in encoder.named_modules():
        if name in after:
            changed[module] = lambda states: states
        elif name == "encoder.conv" and layer == 1:  # of DeBERTa-v2, on the output of the first layer
            changed[module] = lambda states, residual, mask: residual
    before = {module: module.__dict__["forward"] for module in changed if "forward" in module.__dict__}  # accelerate's
    try:
        for module, forward in changed.items():
            module.forward = forward
        states = encoder(**inputs)[0]  # (B, N, len(wanted) * D)
    finally:
        for module in changed:
            module.__dict__.pop("forward", None)
            if module in before:
                module.forward = before[module]
    return dict(zip(wanted, states.chunk(len(wanted), -1)))


def can_probe(encoder: PreTrainedModel) -> bool:
    """Whether an encoder can run here and now: it has its weights, whole, and nothing is being traced."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or is_deepspeed_zero3_enabled():
        return False
    return not any(part.is_meta or part.is_inference() or isinstance(part, DTensor) for part in encoder.parameters())


@contextmanager
def _at_rest(encoder: PreTrainedModel) -> Iterator[None]:
    """In evaluation mode, with all parameters trainable and attention that runs anywhere; all is undone at the end,
    the random state included.
    """
    modes = {module: module.training for module in encoder.modules()}
    trainable = {part: part.requires_grad for part in encoder.parameters() if part.is_floating_point()}
    attention = encoder.config._attn_implementation
    try:
        with torch.random.fork_rng([encoder.device] if encoder.device.type == "cuda" else []):
            for module in modes:
                module.training = False
            for part in trainable:
                part.requires_grad_(True)
            if attention not in (None, "eager", "sdpa"):
                encoder.config._attn_implementation_internal = "eager"
            yield
    finally:
        encoder.config._attn_implementation_internal = attention
        for part, flag in trainable.items():
            part.requires_grad_(flag)
        for module, mode in modes.items():
            module.training = mode


def probe(encoder: PreTrainedModel, layer: int, wanted: str = "qkv", gradients: bool = False) -> set[str]:
    """Compare `project_at` on three tokens with what the layer's linear maps return in a whole forward pass.

    Args:
        encoder: it is left as it was.
        layer: counted from 1.
        wanted: letters of the projections.
        gradients: find the parameters that have no part in the projections too.

    Returns:
        Names of these parameters; without `gradients` none.

    Raises:
        ValueError: the encoder computes these projections in another way, or not at all.
    """
    projections = LayerProjections(layer_list(encoder)[layer - 1])
    tokens = [number for number in range(4) if number != encoder.config.pad_token_id][:3]
    ids = torch.tensor([tokens], device=encoder.device) % encoder.config.vocab_size
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    try:
        with _at_rest(encoder):
            with torch.no_grad():
                expected = _observed(encoder, projections, wanted, inputs)
            with torch.set_grad_enabled(gradients):
                found = project_at(encoder, layer, wanted, inputs)
                total = sum(vectors.sum() for vectors in found.values())
            for name, ours in found.items():
                theirs = expected[name].reshape(*ids.shape, -1)
                if ours.shape != theirs.shape or (ours - theirs).abs().max() > 0.01 * theirs.abs().max():
                    raise ValueError(f"{name!r} at its layer {layer} is computed from something else")
            if not gradients:
                return set()
            parameters = {name: part for name, part in encoder.named_parameters() if part.is_floating_point()}
            reached = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
            return {name for name, gradient in zip(parameters, reached) if gradient is None}
    except Exception as error:
        raise ValueError(
            f"{type(encoder).__name__} does not project to queries, keys and values in a way that is known, or does "
            f"not run ({error}). {WORKING}"
        ) from error


def _observed(
    encoder: PreTrainedModel, projections: LayerProjections, wanted: str, inputs: dict[str, Any]
) -> Projections:
    """What the linear maps return in a whole forward pass."""
    seen: dict[nn.Module, torch.Tensor] = {}

    def keep(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        seen.setdefault(module, output)  # DeBERTa-v2 calls them again, for its relative positions

    hooks = [linear.register_forward_hook(keep) for linear in projections.linears]
    try:
        encoder(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if len(projections.linears) == 1:
        return projections.split(seen[projections.linears[0]], wanted)
    return {name: seen[linear] for name, linear in zip("qkv", projections.linears) if name in wanted}
