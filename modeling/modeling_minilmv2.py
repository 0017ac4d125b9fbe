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
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from ..configuration.configuration_minilmv2 import MiniLMv2Config
from .layers.projections import (
    AFTER_LAYERS,
    AFTER_PRE_NORM_LAYERS,
    LayerProjections,
    Projections,
    can_probe,
    probe,
    project_at,
)
from .layers.relations import relation_losses
from .layers.wrapping import WrapperPreTrainedModel, layer_list


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
