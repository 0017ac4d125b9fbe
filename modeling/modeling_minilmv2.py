"""MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained Transformers.

Wang, Bao, Huang, Dong, Wei, Findings of ACL 2021, arXiv 2012.15828. The distillation code was never released
(microsoft/unilm, folder minilm, MIT, has links to checkpoints); numbers are compared with the third-party
bloomberg/minilmv2.bb (Apache-2.0). A student of any width, depth and type learns relations between the tokens of one
layer of a teacher: softmaxes over products of queries with queries, keys with keys and values with values, cut into
relation heads whose number is independent of the attention heads of either model. The student is an ordinary encoder.

Decisions, where implementations differ or go wrong:
* layers are counted from 1, and the projections of layer l are those of the output of layer l - 1, weight and bias
  included, before any cut into attention heads and without attention dropout;
* each model's scores are divided by the root of its own width per relation head;
* the divergence is KL(teacher || student), the teacher detached;
* padding is neither row nor column; a batch's loss is the mean over sequences of the mean over the sequence's rows
  (the choice of the third-party code; for equal lengths the same as a mean over all rows);
* the teacher ends with the projections of its layer: later layers do not exist in memory, and that layer's attention
  and feed-forward are not run. The student ends in the same way while it learns;
* what the loss does not reach (the rest of the student's layer, later layers, the pooler) is frozen while the student
  learns, so that neither DDP nor weight decay touches it, and keeps its initial values until fine-tuning;
* the teacher is never a module of the student: it is neither saved nor trained nor wrapped with it. It follows the
  device of the inputs;
* whether an encoder is one whose projections are found is tried on three tokens (`probe`), not only read off the names
  of its modules: a type that computes otherwise is refused.

torch.compile(fullgraph=True) takes the plain path of the loss and needs memory for all scores.
"""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModel, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from ..configuration.configuration_minilmv2 import MiniLMv2Config
from .layers.relations import relation_losses
from .layers.wrapping import WrapperPreTrainedModel, layer_list
from .modeling_realformer import RealformerLayer, RealformerPreNormLayer


Projections = dict[str, torch.Tensor]
"""Queries "q", keys "k" and values "v", (B, N, D) each."""


# ---------------------------------------------------------------------------------------------- projections of a layer


WORKING = (
    "MiniLMv2 takes encoders such as BERT, RoBERTa, XLM-R, CamemBERT, ELECTRA, DeBERTa, DeBERTa-v2, DistilBERT, "
    "RoBERTa-PreLayerNorm and bestiary's own with one stream (bert, tupe, performer, linear-attention, realformer)."
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
                self.returns_tuple = returns_tuple or isinstance(layer, (RealformerLayer, RealformerPreNormLayer))
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


# ---------------------------------------------------------------------------------------------------------- self-check


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


class RelationTeacher(nn.Module):
    """A frozen encoder that ends with the projections of one layer.

    Args:
        encoder: the teacher; it is changed: layers after `layer` are dropped, and so are its gradients and dropout.
        layer: counted from 1.
        wanted: letters of the projections.

    Raises:
        ValueError: a type whose projections are not found, see `probe`.
    """

    def __init__(self, encoder: PreTrainedModel, layer: int, wanted: str = "qkv"):
        super().__init__()
        LayerProjections(layer_list(encoder)[layer - 1])
        del layer_list(encoder)[layer:]
        encoder.config.num_hidden_layers = layer
        self.encoder = encoder.requires_grad_(False)
        self.layer, self.wanted = layer, wanted
        self.train(False)
        if can_probe(encoder):
            probe(encoder, layer, wanted)

    def train(self, mode: bool = True) -> Self:
        """A teacher is never in training mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, **inputs: Any) -> Projections:
        """Projections of the layer for the encoder's own inputs."""
        return project_at(self.encoder, self.layer, self.wanted, inputs)


# -------------------------------------------------------------------------------------------------------------- models


@dataclass
class MiniLMv2Output(ModelOutput):
    """Output of `MiniLMv2ForPreTraining` with a teacher.

    loss (): weighted sum of the parts. qq_loss () and so on: of every relation with a weight, the mean over sequences.
    sequence_losses (B,): the loss of every sequence of the batch.
    """

    loss: torch.Tensor | None = None
    qq_loss: torch.Tensor | None = None
    kk_loss: torch.Tensor | None = None
    vv_loss: torch.Tensor | None = None
    qk_loss: torch.Tensor | None = None
    qv_loss: torch.Tensor | None = None
    kq_loss: torch.Tensor | None = None
    kv_loss: torch.Tensor | None = None
    vq_loss: torch.Tensor | None = None
    vk_loss: torch.Tensor | None = None
    sequence_losses: torch.Tensor | None = None


class MiniLMv2PreTrainedModel(WrapperPreTrainedModel):
    """Base of the MiniLMv2 classes; what is wrapped is the student."""

    config: MiniLMv2Config


class MiniLMv2Model(MiniLMv2PreTrainedModel):
    """The student as it is."""


class MiniLMv2ForPreTraining(MiniLMv2PreTrainedModel):
    """The student with the loss that distils a teacher into it. Without a teacher it is the student."""

    def add_method(self) -> None:
        self._frozen: list[str] = []
        self._unreached: set[str] | None = None  # names, once the encoder has run
        self._attached: tuple[RelationTeacher, ...] = ()  # a tuple, so that the teacher is no module of this one
        self.relations = self.config.active_relations
        self.wanted = "".join(letter for letter in "qkv" if any(letter in pair for pair in self.relations))
        self.freeze_unused()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, which makes every parameter that it loads trainable; then `freeze_unused()`."""
        found = super().from_pretrained(*args, **kwargs)
        (found[0] if isinstance(found, tuple) else found).freeze_unused()
        return found

    @classmethod
    def from_teacher(
        cls, teacher: str | os.PathLike | PreTrainedModel, config: MiniLMv2Config | None = None, **settings: Any
    ) -> Self:
        """A new student of a teacher, which is attached to it.

        Args:
            teacher: folder or Hub name of any encoder, or a model, of which a copy is taken.
            config: of the student; by default `MiniLMv2Config.from_teacher(teacher, **settings)`.
            settings: see there; `encoder_config` has the student's own sizes.

        Raises:
            ValueError: both `config` and `settings`, a student that cannot imitate this teacher, or one that cannot
                start from its first layers.
        """
        if config is not None and settings:
            raise ValueError(
                f"{cls.__name__}.from_teacher: give either config or single settings, got config and "
                f"{', '.join(settings)}."
            )
        encoder = load_encoder(teacher)
        if config is None:
            found = encoder.config if isinstance(teacher, PreTrainedModel) else str(teacher)
            config = MiniLMv2Config.from_teacher(found, **settings)
        model = cls(config)
        if config.student_init == "first_layers":
            model._start_from(encoder)
        model.attach_teacher(RelationTeacher(encoder, config.check_teacher(encoder.config), model.wanted))
        return model

    def _start_from(self, teacher: PreTrainedModel) -> None:
        """Copy all that the student shares with the teacher; `ValueError` if the teacher lacks a parameter."""
        theirs = teacher.state_dict()
        own = self.wrapped.state_dict()
        lacking = [name for name, value in own.items() if name not in theirs or theirs[name].shape != value.shape]
        if lacking:
            raise ValueError(
                f"{type(self.config).__name__}.student_init='first_layers' needs a student of the teacher's type and "
                f"width, but {len(lacking)} of its parameters are not in the teacher in that shape, such as "
                f"{lacking[0]}; use student_init='random'."
            )
        self.wrapped.load_state_dict({name: theirs[name] for name in own})

    @property
    def teacher(self) -> RelationTeacher | None:
        """The attached teacher."""
        return self._attached[0] if self._attached else None

    def attach_teacher(
        self, teacher: str | os.PathLike | PreTrainedModel | RelationTeacher, dtype: torch.dtype | None = None
    ) -> None:
        """Let `forward` ask this teacher; of a model a truncated copy is kept, in `dtype` if that is given.

        Raises:
            ValueError: it does not fit the student, see `MiniLMv2Config.check_teacher`.
        """
        if not isinstance(teacher, RelationTeacher):
            encoder = load_encoder(teacher)
            teacher = RelationTeacher(encoder, self.config.check_teacher(encoder.config), self.wanted)
        device = teacher.encoder.device if self.device.type == "meta" else self.device
        self._attached = (teacher.to(device=device, dtype=dtype),)

    def freeze_unused(self) -> None:
        """Freeze what the loss does not reach: the rest of the student's layer, what lies above, the pooler, and what
        only these use, such as DeBERTa's relative positions.

        Raises:
            ValueError: a student of a type whose projections are not found, see `probe`.
        """
        self.unfreeze()
        encoder = self.wrapped
        layers = layer_list(encoder)
        place = self.config.student_layer - 1
        projections = LayerProjections(layers[place])
        reached = {id(parameter) for parameter in projections.parameters(self.wanted)}
        upper = {id(parameter) for layer in layers[place:] for parameter in layer.parameters()}
        after = tuple(f"{name}." for name in (AFTER_LAYERS if projections.norm is None else AFTER_PRE_NORM_LAYERS))
        if self._unreached is None and can_probe(encoder):
            self._unreached = probe(encoder, place + 1, self.wanted, gradients=True)
        unreached = self._unreached or set()
        for name, parameter in encoder.named_parameters():
            above = id(parameter) in upper - reached or name.startswith(after) or name in unreached
            if above and parameter.requires_grad:
                parameter.requires_grad_(False)
                self._frozen.append(name)

    def unfreeze(self) -> None:
        """Undo `freeze_unused`."""
        frozen = set(self._frozen)
        for name, parameter in self.wrapped.named_parameters():
            if name in frozen:
                parameter.requires_grad_(True)
        self._frozen.clear()

    def to_base(self) -> PreTrainedModel:
        """The plain student, with all its parameters trainable; it shares them with this model."""
        self.unfreeze()
        return super().to_base()

    def loss_weights(self) -> dict[str, float]:
        """Weights of the relations in the loss."""
        return dict(self.relations)

    def _ask_teacher(self, inputs: dict[str, torch.Tensor]) -> Projections:
        (teacher,) = self._attached
        device = next(iter(inputs.values())).device
        if not torch.compiler.is_compiling() and teacher.encoder.device != device:
            teacher.to(device)  # `to` of this model does not reach it
        return teacher(**inputs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        teacher_query: torch.Tensor | None = None,
        teacher_key: torch.Tensor | None = None,
        teacher_value: torch.Tensor | None = None,
        num_items_in_batch: dict[str, torch.Tensor | int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The loss if there is a teacher, else what the student returns.

        Args:
            input_ids: (B, N), of the vocabulary that teacher and student share.
            attention_mask: (B, N), 1 at real tokens.
            teacher_query, teacher_key, teacher_value: (B, N, D_T), projections of a teacher's layer, in place of the
                attached teacher; those that the relations need.
            num_items_in_batch: number of sequences of the whole optimizer step, for each relation.

        Raises:
            ValueError: some but not all of the teacher's projections.
        """
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        inputs = {name: value for name, value in given.items() if value is not None}
        vectors = {"q": teacher_query, "k": teacher_key, "v": teacher_value}
        theirs = {name: value for name, value in vectors.items() if value is not None}
        if not theirs and not self._attached:
            return self.model(**inputs, **kwargs)
        if not theirs:
            theirs = self._ask_teacher(inputs)
        if not set(self.wanted) <= set(theirs):
            raise ValueError(
                f"{type(self).__name__}.forward needs the teacher's projections {', '.join(self.wanted)} for the "
                f"relations {', '.join(self.relations)}, but got {', '.join(theirs)}."
            )
        ours = project_at(self.wrapped, self.config.student_layer, self.wanted, inputs)
        outputs = MiniLMv2Output(loss=0.0)
        per_sequence = 0.0
        counts = num_items_in_batch or {}
        for pair, weight in self.relations.items():
            losses = relation_losses(
                (theirs[pair[0]], theirs[pair[1]]),
                (ours[pair[0]], ours[pair[1]]),
                self.config.num_relation_heads,
                attention_mask,
            )  # (B,)
            part = losses.sum() / counts.get(pair, losses.shape[0])
            outputs[f"{pair}_loss"] = part
            outputs.loss = outputs.loss + weight * part
            per_sequence = per_sequence + weight * losses.detach()
        outputs.sequence_losses = per_sequence
        return outputs


def load_encoder(model: str | os.PathLike | PreTrainedModel) -> PreTrainedModel:
    """A copy of a model's encoder, or the encoder of a checkpoint in the checkpoint's precision; `ValueError` if there
    is no such checkpoint.
    """
    if isinstance(model, PreTrainedModel):
        plain = model.to_base() if isinstance(model, WrapperPreTrainedModel) else model
        return copy.deepcopy(plain.base_model)
    try:
        loaded = AutoModel.from_pretrained(model)
    except OSError as error:
        raise ValueError(
            f"There is no teacher at {str(model)!r}: it is neither a folder with config.json and weights nor a model "
            f"on the Hub that can be reached ({error})."
        ) from error
    return loaded.to_base().base_model if isinstance(loaded, WrapperPreTrainedModel) else loaded
