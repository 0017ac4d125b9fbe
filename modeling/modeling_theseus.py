"""BERT-of-Theseus: Compressing BERT by Progressive Module Replacing.

Xu, Zhou, Ge, Wei, Zhou, EMNLP 2020, arXiv 2002.02925. Official code: JetRunner/BERT-of-Theseus (Apache-2.0, PyTorch,
on transformers 2.4). A fine-tuned predecessor of N layers is cut into modules of equally many layers; in training each
module is replaced by a single layer of the successor with probability p, drawn once per forward pass for the whole
batch. Only the successor is trained, by the task's loss alone; it alone is evaluated and kept.

Any encoder with a list of layers can be the predecessor; its own forward runs over the layers that are chosen.
Parameter names are the official ones under `model.`: `encoder.layer.*` the predecessor's, `encoder.scc_layer.*` the
successor's.

Differences from the paper: the successor starts from the first layers of the fine-tuned predecessor, as in the
official code; the paper's wording is the first layers of BERT-base (`successor_from`).

Differences from the official code, all of which are decisions:
* what is not trained is frozen (`requires_grad`), so that no gradient is computed in vain and the norm that is clipped
  is that of the successor alone; and what runs before the first drawn layer builds no graph;
* a module that was not drawn has no gradient (None) and Adam leaves it alone; there, zero gradients let its momentum
  move it on;
* without a value for the constant schedule's length the rate stays; there, it is 1 from the second update on;
* patterns are drawn on the host, before the forward pass: gradient checkpointing cannot draw anew, and
  `torch.compile` sees a fixed sequence of layers (one graph per pattern; compile the layers alone to have one graph).

Dropout of frozen layers is active in training, as in the official code.
"""

import copy
import inspect
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from functools import wraps
from typing import Any, Self

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init

from ..configuration.configuration_theseus import TheseusConfig
from .layers.wrapping import WrapperPreTrainedModel, layer_list


SUCCESSOR = "scc_layer"
WHERE = ("cache_dir", "local_files_only", "token", "trust_remote_code")
"""Keywords of loading that hold for `successor_from` too."""


class ReplaceableLayers(nn.ModuleList):
    """The predecessor's layers under their own names; as a sequence, the layers that are to run.

    In evaluation that is the successor; in training what `pattern` says, one entry per module, 1 for the successor's
    layer.
    """

    def __init__(self, predecessor: nn.ModuleList, successor: nn.ModuleList):
        super().__init__()
        for name, layer in predecessor.named_children():
            self.add_module(name, layer)
        self.successor = (successor,)  # a tuple: registered beside this list and not in it
        self.pattern: tuple[int, ...] | None = None
        self.rate: float | None = None  # at which the model draws a pattern by itself
        self.cuts_prefix = False

    def to_run(self) -> list[Any]:
        """Layers in order; those before the first of the successor run without a graph if `cuts_prefix`."""
        (successor,), predecessor = self.successor, list(self._modules.values())
        if not self.training or self.pattern is None or not predecessor:
            return list(successor)
        span = len(predecessor) // len(successor)
        chosen: list[Any] = []
        for index, replaced in enumerate(self.pattern):
            module = predecessor[index * span : (index + 1) * span]
            if self.cuts_prefix and not any(self.pattern[:index]):
                module = [WithoutGraph(layer) for layer in module]
            chosen += [successor[index]] if replaced else module
        return chosen

    def __iter__(self) -> Iterator[Any]:
        return iter(self.to_run())

    def __len__(self) -> int:
        return len(self.to_run())

    def __getitem__(self, index: int | slice) -> Any:
        return self.to_run()[index]


class WithoutGraph:
    """A frozen layer, for a loop that calls it and may read its attributes."""

    def __init__(self, layer: nn.Module):
        self.layer = layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self.layer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)


class TheseusPreTrainedModel(WrapperPreTrainedModel):
    """Base of the Theseus classes: predecessor and successor, of which the latter alone is trained.

    `eval()` is the successor, whatever the rate. In training a pattern is in force: the one of `set_pattern`, which
    the trainer calls before every update, or, if there is none, one drawn before each forward pass at the rate of
    `set_rate` (at first `config.replacing_rate`) from a generator that the model holds. So another trainer trains
    at a constant rate; the schedule, exact resuming and draws that accumulation does not change need `TheseusTrainer`.
    """

    config: TheseusConfig

    def add_method(self) -> None:
        layers = layer_list(self.wrapped)
        parent, name = next(
            (part, name)
            for part in self.wrapped.base_model.modules()
            for name, child in part.named_children()
            if child is layers
        )
        configs = (getattr(part, "config", None) for part in layers.modules())
        shared = {id(config): config for config in configs if config is not None}  # they hold the attention backend
        kept = self.config.successor_num_hidden_layers
        successor = nn.ModuleList([copy.deepcopy(layer, dict(shared)) for layer in layers[:kept]])
        parent.add_module(SUCCESSOR, successor)
        parent.add_module(name, ReplaceableLayers(layers, successor))
        if self.config.successor_init == "random":
            for part in successor.modules():
                part._is_hf_initialized = False
        else:
            self._fill(layers, self.wrapped.config)
        self._check_result()
        self.layers.rate = float(self.config.replacing_rate)
        self._random = random.Random(0)
        if not self.config.has_predecessor:
            self.drop_predecessor()
        self.freeze()

    @property
    def layers(self) -> ReplaceableLayers:
        """What the encoder's own forward runs over."""
        return next(part for part in self.wrapped.modules() if isinstance(part, ReplaceableLayers))

    @property
    def successor(self) -> nn.ModuleList:
        """The layers that are trained and kept."""
        return self.layers.successor[0]

    def freeze(self) -> None:
        """Train the successor and nothing else."""
        self.requires_grad_(False)
        self.successor.requires_grad_(True)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, which makes every parameter it loads trainable; then `freeze()`."""
        found = super().from_pretrained(*args, **kwargs)
        (found[0] if isinstance(found, tuple) else found).freeze()
        return found

    @classmethod
    def from_encoder(
        cls, encoder: str | os.PathLike | PreTrainedModel, config: TheseusConfig | None = None, **settings: Any
    ) -> Self:
        """Make a fine-tuned model the predecessor; arguments as in `WrapperPreTrainedModel.from_encoder`.

        A model that is given, and not a checkpoint, is taken over: called directly, in evaluation, it gives the
        successor's results from then on.

        Raises:
            ValueError: besides that method's, layers of `successor_from` or of the encoder that do not fit, an encoder
                whose result could not be built, or a checkpoint that was not fine-tuned for this task, for as many
                labels or with these names of labels in this order.
        """
        where = {name: settings[name] for name in WHERE if name in settings}
        model = super().from_encoder(encoder, config, **settings)
        if model.config.successor_from is not None:
            other = AutoModel.from_pretrained(model.config.successor_from, **where)
            model._fill(layer_list(other), other.config)
        return model

    @classmethod
    def load_wrapped(cls, encoder: str | os.PathLike, config: PreTrainedConfig, **loading: Any) -> Any:
        """As its base does, but a task's checkpoint must be whole: a head that is drawn here would stay as it is."""
        if cls.wrapped_auto_class is AutoModel:
            return super().load_wrapped(encoder, config, **loading)
        where = {name: value for name, value in loading.items() if name not in ("dtype", "attn_implementation")}
        there = AutoConfig.from_pretrained(encoder, **where)
        wrapped, report = super().load_wrapped(
            encoder, config, output_loading_info=True, ignore_mismatched_sizes=True, **loading
        )
        subject, advice = (
            f"{cls.__name__}.from_encoder: the predecessor {str(encoder)!r}",
            "it is not trained here; fine-tune it first, by examples/finetune.py --config finetune_classification or "
            "the recipe of another task.",
        )
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"{subject} lacks {', '.join(missing)} of a {type(wrapped).__name__}, and {advice}")
        if mismatched := sorted(report["mismatched_keys"]):
            sizes = ", ".join(f"{name} is {list(own)}, not {list(wanted)}" for name, own, wanted in mismatched)
            if there.num_labels != config.num_labels:
                subject += f" has {there.num_labels} labels, but num_labels is {config.num_labels}"
            else:
                subject += " has parameters of other sizes"
            raise ValueError(f"{subject} ({sizes}), and {advice}")
        if cls.wrapped_auto_class in (AutoModelForSequenceClassification, AutoModelForTokenClassification):
            own, wanted = ([each.id2label[number] for number in sorted(each.id2label)] for each in (there, config))
            if own != [f"LABEL_{number}" for number in range(len(own))] and own != wanted:
                raise ValueError(
                    f"{subject} has the labels {own}, but id2label is {wanted}, and its head stays as it is; use its "
                    "names in its order, or fine-tune it on this data first."
                )
        return wrapped

    def _fill(self, layers: nn.ModuleList, config: PreTrainedConfig) -> None:
        """Copy the weights of the layers that `successor_init` names, if they are layers of the successor's kind."""
        own = per_layer_settings(self.wrapped.config)
        theirs = per_layer_settings(config)
        for index, (place, layer) in enumerate(zip(self.config.source_layers(len(layers)), self.successor)):
            source = layers[place]
            shapes, wanted = (
                {key: value.shape for key, value in part.state_dict().items()} for part in (source, layer)
            )
            settings = {key: values[place] for key, values in theirs.items()}
            if (
                type(source) is not type(layer)
                or shapes != wanted
                or settings != {key: values[index] for key, values in own.items()}
            ):
                raise ValueError(
                    f"{type(self.config).__name__}.successor_init={self.config.successor_init!r}, successor_from="
                    f"{self.config.successor_from!r}: layer {place} of a {type(config).__name__} cannot become layer "
                    f"{index} of the successor, which is a {type(layer).__name__} of another kind or size; use layers "
                    "of the same encoder with successor_init='first', or 'random'."
                )
            layer.load_state_dict(source.state_dict())

    # What runs

    # trf-ignore: TRF033  what the next forward passes run, and no setting
    def set_pattern(self, pattern: Sequence[int] | None) -> None:
        """Use this pattern in training from now on: for every module 1 (the successor's layer) or 0 (the
        predecessor's). None: draw one before each forward pass.

        Raises:
            ValueError: a pattern of another length or with other numbers, or the predecessor is no longer there.
        """
        if pattern is not None:
            pattern = tuple(int(replaced) for replaced in pattern)
            if len(pattern) != len(self.successor) or not set(pattern) <= {0, 1}:
                raise ValueError(
                    f"{type(self).__name__}.set_pattern needs {len(self.successor)} numbers 0 or 1, one per module; "
                    f"got {pattern}."
                )
            if not (self.config.has_predecessor or all(pattern)):
                raise ValueError(
                    f"{type(self).__name__}: the predecessor was dropped, so the pattern {pattern} cannot run; start "
                    "from the fine-tuned model again, or from a checkpoint that was saved before."
                )
        layers = self.layers
        layers.rate, layers.pattern = float(self.config.replacing_rate) if pattern is None else None, pattern

    # trf-ignore: TRF033  likewise
    def set_rate(self, rate: float) -> None:
        """Draw a pattern before each forward pass in training, with this probability of replacement.

        Raises:
            ValueError: `rate` outside (0, 1].
        """
        if not 0 < rate <= 1:
            raise ValueError(f"{type(self).__name__}.set_rate: rate must be in (0, 1], got {rate}.")
        self.layers.rate = float(rate)

    def drop_predecessor(self) -> None:
        """Free the predecessor's layers: the rate is 1 for good. What is saved afterwards is loaded without them."""
        layers = self.layers
        for name, _ in list(layers.named_children()):
            delattr(layers, name)
        self.config.has_predecessor = False

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As in torch; the state of a model without its predecessor drops that of this one, and a state with one
        gives only the rest to a model without.
        """
        names = {part: f"{name}." for name, part in self.named_modules() if part in (self.layers, self.successor)}
        old, new = names[self.layers], names[self.successor]
        given = {name for name in state_dict if name.startswith(old)}
        if not given and any(name.startswith(new) for name in state_dict):
            self.drop_predecessor()
        elif given and not self.config.has_predecessor:
            state_dict = {name: value for name, value in state_dict.items() if name not in given}
        return super().load_state_dict(state_dict, *args, **kwargs)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """As in transformers.

        Raises:
            ValueError: `use_reentrant=True`, which gives layers no gradient whose input has none.
        """
        if (activation_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError(
                f"{type(self).__name__} cannot use reentrant checkpointing: frozen layers come first, and without a "
                "gradient at its input a layer gets none; set use_reentrant to False."
            )
        super().activation_checkpointing_enable(activation_checkpointing_kwargs, **options)

    @wraps(WrapperPreTrainedModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        layers = self.layers
        if self.training:
            if layers.rate is not None:
                layers.pattern = tuple(int(self._random.random() < layers.rate) for _ in self.successor)
            embeddings = kwargs.get("inputs_embeds")
            layers.cuts_prefix = self._only_successor_trains() and not (
                embeddings is not None and embeddings.requires_grad
            )
        outputs = super().forward(*args, **kwargs)
        if self.training and torch.is_grad_enabled() and self.config.has_predecessor and not any(layers.pattern):
            self._make_backward_possible(outputs)
        return outputs

    def _make_backward_possible(self, outputs: Any) -> None:
        """Nothing that is trained has run: the backward pass must find a leaf all the same.

        Gradients that earlier micro-batches left are joined as zeros, for distributed training to put them together.
        """
        given = [value.sum() for value in self.successor.parameters() if value.grad is not None]
        for name, value in list(outputs.items()) if isinstance(outputs, dict) else enumerate(outputs):
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                if given and isinstance(outputs, dict):
                    outputs[name] = value + 0 * sum(given)
                elif not value.requires_grad:
                    value.requires_grad_()

    def _only_successor_trains(self) -> bool:
        trained = {id(value) for value in self.successor.parameters()}
        return not any(value.requires_grad and id(value) not in trained for value in self.parameters())

    # The result

    def _plain_config(self) -> PreTrainedConfig:
        config, kept = self.wrapped.config, self.config.successor_num_hidden_layers
        changes = {config.attribute_map.get("num_hidden_layers", "num_hidden_layers"): kept}
        changes |= {name: values[:kept] for name, values in per_layer_settings(config).items()}
        plain = type(config).from_dict(config.to_dict() | changes)
        plain._attn_implementation = config._attn_implementation
        return plain

    def _plain_model(self) -> PreTrainedModel:
        """The result, its weights not set."""
        wrapped, options = self.wrapped, {}
        if "add_pooling_layer" in inspect.signature(type(wrapped).__init__).parameters:
            options["add_pooling_layer"] = any(name.startswith("pooler.") for name, _ in wrapped.named_parameters())
        with init.no_init_weights():
            return type(wrapped)(self._plain_config(), **options)

    def _check_result(self) -> None:
        """Refuse before the training what could not be exported after it, such as unknown settings per layer."""
        try:
            with torch.device("meta"):
                self._plain_model()
        except Exception as error:  # whatever the wrapped class finds wrong
            kept = self.config.successor_num_hidden_layers
            raise ValueError(
                f"{type(self).__name__}: no {type(self.wrapped).__name__} of {kept} layers can be made of this one's "
                f"configuration, so its successor could not be saved: {error}"
            ) from error

    def to_base(self) -> PreTrainedModel:
        """The plain small model: the wrapped model's class, with the successor as its layers.

        It shares the memory of its weights with this one, and all of them can be trained.
        """
        wrapped = self.wrapped
        state = wrapped.state_dict()
        names = {part: f"{name}." for name, part in wrapped.named_modules()}
        old, new = names[self.layers], names[self.successor]
        state = {name: value for name, value in state.items() if not name.startswith(old)}
        plain = self._plain_model()
        plain.to(wrapped.device).load_state_dict(
            {old + name.removeprefix(new) if name.startswith(new) else name: value for name, value in state.items()},
            assign=True,
        )
        return plain.train(self.training)


def per_layer_settings(config: PreTrainedConfig) -> dict[str, list]:
    """Fields of a configuration that hold one value per layer, such as `layer_types` and `attention_window`.

    By name and length: `pos_att_type` of DeBERTa may have as many values and is none of them.
    """
    return {
        name: list(value)
        for name, value in config.to_dict().items()
        if any(part in name for part in ("layer", "window"))
        and isinstance(value, (list, tuple))
        and len(value) == config.num_hidden_layers
    }


class TheseusModel(TheseusPreTrainedModel):
    """The bare encoder."""

    wrapped_auto_class = AutoModel


class TheseusForSequenceClassification(TheseusPreTrainedModel):
    """Classification or regression of texts and pairs."""

    wrapped_auto_class = AutoModelForSequenceClassification


class TheseusForTokenClassification(TheseusPreTrainedModel):
    """A class for every token."""

    wrapped_auto_class = AutoModelForTokenClassification


class TheseusForQuestionAnswering(TheseusPreTrainedModel):
    """Start and end of an answer."""

    wrapped_auto_class = AutoModelForQuestionAnswering


class TheseusForMultipleChoice(TheseusPreTrainedModel):
    """One of several continuations."""

    wrapped_auto_class = AutoModelForMultipleChoice
