"""Base of method papers: a model of any type, stock or ours, wrapped whole with its head, and given back plain."""

import copy
import os
from typing import Any, ClassVar, Self

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from ...configuration.configuration_core import LABELS, WrapperConfig
from .losses import check_labels
from .pretrained import BestiaryPreTrainedModel


LOADING = (
    "attn_implementation",
    "cache_dir",
    "dtype",
    "local_files_only",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)
"""Keywords of `from_encoder` that say how a checkpoint is loaded."""


class BareEncoder(nn.Module):
    """An encoder under the name that it has inside a task model, so that checkpoints of both fit each other."""

    def __init__(self, encoder: PreTrainedModel):
        super().__init__()
        self.add_module(encoder.base_model_prefix, encoder)

    @property
    def encoder(self) -> PreTrainedModel:
        (encoder,) = self.children()
        return encoder

    def forward(self, **inputs: Any) -> Any:
        return self.encoder(**inputs)


class WrapperPreTrainedModel(BestiaryPreTrainedModel):
    """A model of `wrapped_auto_class` under `model.`, to which a method adds what it needs in `add_method`.

    Inputs, outputs and loss are those of the wrapped model. A paper's class is two lines for every task:
    `class XForSequenceClassification(XPreTrainedModel): wrapped_auto_class = AutoModelForSequenceClassification`.

    Args:
        config: the method's settings and the configuration of the encoder.
        wrapped: a model to wrap as it is; by default one with fresh weights is built from `config.encoder_config`.
    """

    config: WrapperConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    wrapped_auto_class: ClassVar[Any] = AutoModel

    def __init__(self, config: WrapperConfig, wrapped: PreTrainedModel | None = None):
        super().__init__(config)
        if wrapped is None:
            wrapped = self.wrapped_auto_class.from_config(config.encoder_config)
        else:
            for module in wrapped.modules():
                module._is_hf_initialized = True
        config.encoder_config = wrapped.config  # one object, so that a change is seen from both sides
        config._attn_implementation_internal = wrapped.config._attn_implementation
        # an encoder that holds its base under that base's name needs no other
        bare = self.wrapped_auto_class is AutoModel and wrapped.base_model is wrapped
        self.model = BareEncoder(wrapped) if bare else wrapped
        self.accepts_loss_kwargs = bool(getattr(wrapped, "accepts_loss_kwargs", False))
        self.add_method()
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, for checkpoints of this method and plain ones with a head.

        Raises:
            ValueError: a checkpoint without the encoder, or with its names outside a task's model.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if not is_loaded(model.wrapped.base_model):
            raise ValueError(
                f"{cls.__name__}.from_pretrained: the checkpoint {model.name_or_path!r} has no weight of a "
                f"{type(model.wrapped.base_model).__name__} under the names that this class saves; a plain encoder is "
                f"wrapped by {cls.__name__}.from_encoder(...)."
            )
        return loaded

    def add_method(self) -> None:
        """Add the method's modules and hooks; `self.wrapped` is there. Fresh parameters are initialised afterwards."""

    def post_init(self) -> None:
        super().post_init()
        layers = {type(part).__name__ for part in self.modules() if isinstance(part, GradientCheckpointingLayer)}
        self._no_split_modules = layers

    @torch.no_grad()
    # trf-ignore: TRF018
    def _init_weights(self, module: nn.Module) -> None:
        """As the wrapped model initialises its own."""
        self.wrapped._init_weights(module)

    @property
    def wrapped(self) -> PreTrainedModel:
        """The wrapped model, with its head if it has one."""
        return self.model.encoder if isinstance(self.model, BareEncoder) else self.model

    @classmethod
    def from_encoder(
        cls, encoder: str | os.PathLike | PreTrainedModel, config: WrapperConfig | None = None, **settings: Any
    ) -> Self:
        """Wrap a pre-trained or fine-tuned model.

        Args:
            encoder: folder or Hub name of a plain checkpoint, or a model, which is then shared and not copied. A head
                that the checkpoint lacks starts from the global generator, as what the method adds.
            config: the method's configuration around the encoder's; by default made from `settings`.
            settings: fields of the method's configuration, and labels (`num_labels`, ...). `encoder_config` is a
                dictionary of changes to the encoder's configuration. Labels and changes are for a checkpoint only, and
                so are the keywords of loading: `dtype`, `attn_implementation`, `revision`, `token`, ...

        Raises:
            ValueError: a checkpoint of this or another wrapped method, an encoder-decoder, a model of another kind
                than `wrapped_auto_class`, or both `config` and `settings`.
        """
        loading = {name: settings.pop(name) for name in LOADING if name in settings}
        if config is not None and settings:
            raise ValueError(
                f"{cls.__name__}.from_encoder: give either config or single settings, got config and "
                f"{', '.join(settings)}."
            )
        config = copy.deepcopy(config)
        if isinstance(encoder, (str, os.PathLike)):
            where = {name: value for name, value in loading.items() if name not in ("dtype", "attn_implementation")}
            if config is None:
                config = cls.config_class.from_encoder(AutoConfig.from_pretrained(encoder, **where), **settings)
            wrapped = cls.load_wrapped(encoder, config.encoder_config, **loading)
        else:
            if isinstance(encoder, WrapperPreTrainedModel):
                raise ValueError(
                    f"{cls.__name__}.from_encoder wraps a plain model, but got a {type(encoder).__name__}; unwrap it "
                    "first: to_base()."
                )
            fixed = {"encoder_config", *LABELS} & {name for name, value in settings.items() if value not in (None, {})}
            if fixed or loading:
                raise ValueError(
                    f"{cls.__name__}.from_encoder: {', '.join(sorted((*fixed, *loading)))} cannot be given for a "
                    f"{type(encoder).__name__} that is built already; change it before, or give a checkpoint."
                )
            wrapped = encoder.base_model if cls.wrapped_auto_class is AutoModel else encoder
            cls._check_kind(wrapped)
            config = cls.config_class.from_encoder(wrapped.config, **settings) if config is None else config
        there = {id(part) for part in (*wrapped.parameters(), *wrapped.buffers())}
        model = cls(config, wrapped)
        model._follow(wrapped, there)
        return model.train(wrapped.training)

    @classmethod
    def load_wrapped(cls, encoder: str | os.PathLike, config: PreTrainedConfig, **loading: Any) -> Any:
        """The model of a plain checkpoint that `from_encoder` wraps, with what `from_pretrained` returns beside it."""
        return cls.wrapped_auto_class.from_pretrained(encoder, config=config, **loading)

    def _follow(self, wrapped: PreTrainedModel, there: set[int]) -> None:
        """Move what the method added to the device of the wrapped model, and to its type but where that must stay."""
        names = [*(self._keep_in_fp32_modules or ()), *(self._keep_in_fp32_modules_strict or ())]
        for name, part in (*self.named_parameters(), *self.named_buffers()):
            if id(part) not in there:
                floating = part.is_floating_point() and not set(names) & set(name.split("."))
                part.data = part.data.to(wrapped.device, wrapped.dtype if floating else part.dtype)
        self.config.dtype = wrapped.config.dtype

    @classmethod
    def _check_kind(cls, model: PreTrainedModel) -> None:
        known: Any = cls.wrapped_auto_class._model_mapping
        fitting = known[type(model.config)] if type(model.config) in known else ()
        if not isinstance(model, fitting):
            raise ValueError(
                f"{cls.__name__} wraps models of {cls.wrapped_auto_class.__name__}, but got a {type(model).__name__}."
            )

    def to_base(self) -> PreTrainedModel:
        """The plain model, without a trace of the method; it shares its parameters with this one."""
        return self.wrapped

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """What the wrapped model returns. Inputs that are None are not passed: not every model knows them all.

        Raises:
            ValueError: the number of a class out of range.
        """
        if labels is not None:
            self._check_classes(labels)
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "start_positions": start_positions,
            "end_positions": end_positions,
        }
        return self.model(**{name: value for name, value in given.items() if value is not None}, **kwargs)

    def _check_classes(self, labels: torch.Tensor) -> None:
        """Stock heads let the loss fail instead, on a GPU without a word of what is wrong."""
        classes = self.config.num_labels
        numbered = not labels.is_floating_point() and classes > 1
        if self.wrapped_auto_class is AutoModelForSequenceClassification:
            numbered = numbered and self.config.problem_type in (None, "single_label_classification")
        elif self.wrapped_auto_class is not AutoModelForTokenClassification:
            return
        if numbered:
            check_labels(type(self).__name__, labels, classes)

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers; the configuration says what the wrapped model took over."""
        super().set_attn_implementation(*args, **kwargs)
        self.config._attn_implementation_internal = self.wrapped.config._attn_implementation

    def get_input_embeddings(self) -> nn.Module:
        return self.wrapped.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.wrapped.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.wrapped.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.wrapped.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        return self.wrapped.resize_token_embeddings(*args, **kwargs)


def is_loaded(module: nn.Module) -> bool:
    """Whether any parameter of a module was read from a checkpoint, which transformers marks."""
    return any(getattr(value, "_is_hf_initialized", False) for value in module.parameters())


def layer_list(model: PreTrainedModel) -> nn.ModuleList:
    """The list of an encoder's layers, in order, whatever the type calls it (`encoder.layer`, `transformer.layer`).

    Raises:
        ValueError: there is no such list of `num_hidden_layers` modules of one class (layers shared as in ALBERT, an
            encoder-decoder), or more than one.
    """
    config: PreTrainedConfig = model.config
    found = [
        part
        for part in model.base_model.modules()
        if isinstance(part, nn.ModuleList)
        and len(part) == config.num_hidden_layers
        and len({type(layer) for layer in part}) == 1
    ]
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(found) or 'no'} lists of {config.num_hidden_layers} layers, where one "
            "is needed; methods that work on layers take encoders such as BERT, RoBERTa, ELECTRA, DeBERTa, XLM-R and "
            "DistilBERT, not models that share their layers or have two stacks."
        )
    return found[0]
