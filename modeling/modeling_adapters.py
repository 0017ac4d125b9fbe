"""Bottleneck adapters: two small residual networks in every layer are trained, and the pre-trained weights are not.

Paper: "Parameter-Efficient Transfer Learning for NLP", Houlsby, Giurgiu, Jastrzebski, Morrone, de Laroussilhe,
Gesmundo, Attariyan, Gelly, 2019, arXiv 1902.00751. Official code: google-research/adapter-bert (Apache-2.0,
TensorFlow 1). Written from the paper and the code's published behaviour; no code was taken over.

    attention:     y  = LN1(adapter(dropout(W_o context + b_o)) + h)
    feed-forward:  h' = LN2(adapter(dropout(W_out f(W_in y + b_in) + b_out)) + y)

What is decided here, and where implementations differ:
* An adapter stands after the hidden dropout and before the residual, as in the official code. Wrapping the dense layer
  would put it before the dropout, which is another model in training; behind the residual the adapter's own skip
  connection would add h a second time.
* Every LayerNorm of the encoder is trained, that of the embeddings included, as the paper says (AdapterHub leaves them
  frozen); the pooler is frozen, although the head reads it. The head is what stands outside the encoder: for RoBERTa,
  ELECTRA, DeBERTa and DistilBERT more than the last matrix, since all of it is new.
* What the encoder's checkpoint lacked (the pooler of a masked language model) is new too, and trained with the head,
  whether `from_encoder` or `from_pretrained` with a configuration of adapters reads that checkpoint.
* Initial deviation 1e-2, the paper's; the official code has 1e-3 as its default. Cut at two deviations.
* The form with one adapter behind the layer's LayerNorm (Pfeiffer et al.) is another method and not built;
  `adapter_locations=["output"]` only leaves one of the two places out.
* Weights of adapters are kept in float32 over an encoder that is loaded in half precision.

These classes need no PEFT, and neither does their exported code. The same adapters as a PEFT method, with files that
hold the trained tensors alone, are `bestiary.BottleneckAdapterConfig`; `bestiary.save_adapter` writes such files from
these classes.
"""

import copy
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

from transformers import (
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from ..configuration.configuration_adapters import AdaptersConfig
from .layers.bottleneck import (
    Bottleneck,
    adapters_off,
    add_adapters,
    fresh_modules,
    is_layer_norm,
    remove_adapters,
)
from .layers.wrapping import WrapperPreTrainedModel


class AdaptersPreTrainedModel(WrapperPreTrainedModel):
    """A wrapped model with adapters in every layer, of which only adapters, LayerNorms and head are trained.

    `from_encoder` changes the model that it is given, in place.
    """

    config: AdaptersConfig
    _keep_in_fp32_modules_strict = {"adapter"}

    def add_method(self) -> None:
        config = self.config
        if any(isinstance(part, Bottleneck) for part in self.wrapped.modules()):
            raise ValueError(
                f"{type(self).__name__}: this {type(self.wrapped).__name__} has adapters already; take to_base() of "
                "the model that it came from."
            )
        add_adapters(
            self.wrapped, config.adapter_size, config.adapter_act, config.adapter_init_std, config.adapter_locations
        )
        self.add_new_modules(fresh_modules(self.wrapped))

    def add_new_modules(self, names: Iterable[str]) -> None:
        """Train these parts of the encoder, by their names in it, with the head, and save them with the adapters."""
        self.config.new_modules = list(dict.fromkeys((*(self.config.new_modules or ()), *names)))
        self.freeze()

    def post_init(self) -> None:
        super().post_init()
        self.freeze()

    def initialize_weights(self, *args: Any, **kwargs: Any) -> None:
        """Adapters first: left to the encoder, their matrices would start like its own."""
        for part in self.modules():
            if isinstance(part, Bottleneck):
                part.reset()
                part.down._is_hf_initialized = part.up._is_hf_initialized = True
        super().initialize_weights(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, with the pre-trained weights frozen again, which loading makes trainable. What the
        checkpoint lacked is found as by `from_encoder`.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.add_new_modules(fresh_modules(model.wrapped))
        return loaded

    def freeze(self) -> None:
        """Make adapters, LayerNorms of the encoder (unless `train_layer_norm` is off), the head and what the
        checkpoint lacked trainable, and nothing else.
        """
        encoder = self.wrapped.base_model
        self.requires_grad_(True)
        encoder.requires_grad_(False)
        for part in encoder.modules():
            if isinstance(part, Bottleneck) or (self.config.train_layer_norm and is_layer_norm(part)):
                part.requires_grad_(True)
        for name, part in encoder.named_children():
            if name in (self.config.new_modules or ()):
                part.requires_grad_(True)

    def adapters_off(self, layers: Iterable[int] | None = None) -> AbstractContextManager[None]:
        """`with model.adapters_off(layers=range(5)):` passes by the adapters of these layers, by default of all."""
        return adapters_off(self, layers)

    def to_base(self) -> PreTrainedModel:
        """The model without adapters. It shares its parameters with this one: trained LayerNorms and head stay."""
        shared = {id(part): part for part in (*self.wrapped.parameters(), *self.wrapped.buffers())}
        base = copy.deepcopy(self.wrapped, shared)
        remove_adapters(base)
        return base


class AdaptersModel(AdaptersPreTrainedModel):
    """The encoder with adapters, without a head."""


class AdaptersForSequenceClassification(AdaptersPreTrainedModel):
    """With the head of `AutoModelForSequenceClassification`."""

    wrapped_auto_class = AutoModelForSequenceClassification


class AdaptersForTokenClassification(AdaptersPreTrainedModel):
    """With the head of `AutoModelForTokenClassification`."""

    wrapped_auto_class = AutoModelForTokenClassification


class AdaptersForQuestionAnswering(AdaptersPreTrainedModel):
    """With the head of `AutoModelForQuestionAnswering`."""

    wrapped_auto_class = AutoModelForQuestionAnswering


class AdaptersForMultipleChoice(AdaptersPreTrainedModel):
    """With the head of `AutoModelForMultipleChoice`."""

    wrapped_auto_class = AutoModelForMultipleChoice
