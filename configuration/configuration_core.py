"""Bases of every bestiary configuration: near-miss keywords are refused, the fields of a BERT-like encoder are
declared once, and methods that wrap any encoder hold its configuration.
"""

import copy
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, Self

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.configuration_utils import SubConfigSpec


def refuse_near_misses(config_class: type[PreTrainedConfig], keywords: Iterable[str]) -> None:
    """`ValueError` for a keyword that is no field of the class but nearly one."""
    known = {field.name for field in fields(config_class)} | set(config_class.attribute_map)
    known |= {"num_labels", "output_attentions", "attn_implementation", "name_or_path", "torch_dtype", "model_type"}
    for key in set(keywords) - known:
        close = [] if key.startswith("_") else difflib.get_close_matches(key, known, n=1, cutoff=0.85)
        if close:
            raise ValueError(
                f"{config_class.__name__} has no field {key!r}; did you mean {close[0]!r}? "
                "Rename the keyword, or choose a name that does not resemble a field."
            )


@strict
class BestiaryConfig(PreTrainedConfig):
    """A configuration that does not store a typo as a new field.

    transformers keeps unknown keywords as attributes, so `hiden_size=64` would silently build the default size.
    Keywords that resemble a declared field are refused here; others (a user's own notes, keys of newer releases) pass.

    Raises:
        ValueError: a keyword that is no field but nearly one.
    """

    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        refuse_near_misses(type(self), kwargs)
        kwargs.pop("model_type", None)  # that of a stock checkpoint would hide the class's own
        super().__post_init__(**kwargs)

    def reject(self, field: str, allowed: str) -> ValueError:
        """The error for a value outside its range, to be raised by a validator."""
        return ValueError(f"{type(self).__name__}.{field} must be {allowed}, got {getattr(self, field)!r}.")


@strict
class EncoderConfig(BestiaryConfig):
    """Fields of a BERT-like encoder (Devlin et al., 2018, arXiv 1810.04805), in transformers' names.

    Args:
        vocab_size: number of word pieces.
        hidden_size: width of the residual stream; a multiple of `num_attention_heads`.
        num_hidden_layers: number of layers.
        num_attention_heads: number of heads per layer.
        intermediate_size: inner width of the feed-forward part.
        hidden_act: activation of the feed-forward part and of the prediction head. The paper and released checkpoints
            use the exact `"gelu"`; the official TensorFlow code has the tanh form, `"gelu_new"` (at most 4.7e-4
            apart).
        hidden_dropout_prob: dropout rate on embeddings and on the output of each sub-layer.
        attention_probs_dropout_prob: dropout rate on attention probabilities.
        max_position_embeddings: longest sequence, in tokens.
        type_vocab_size: number of segment types.
        initializer_range: standard deviation of the normal initialisation.
        layer_norm_eps: epsilon of every LayerNorm.
        pad_token_id: id of the padding token.
        classifier_dropout: dropout rate before a classification layer; None means `hidden_dropout_prob`.
        embedding_size: width of the embedding tables when it differs from `hidden_size`; a linear map joins the two.
        unpad_threshold: share of padding (0 to 1) above which a batch is run on its real tokens only, packed into
            rows; None never. Outputs at real tokens are equal; outputs at padding are zero.
        max_predictions_per_sequence: largest number of labels in a sequence of a masked language model; torch.compile
            needs it for static shapes (None computes vocabulary logits everywhere there).
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    classifier_dropout: float | int | None = None
    embedding_size: int | None = None
    unpad_threshold: float | int | None = None
    max_predictions_per_sequence: int | None = None

    def __post_init__(self, **kwargs):
        if self.embedding_size is None:
            self.embedding_size = self.hidden_size
        super().__post_init__(**kwargs)

    def validate_sizes(self):
        """Sizes are positive, the heads divide the width, the activation is known."""
        for name in (
            "vocab_size",
            "hidden_size",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
            "type_vocab_size",
            "embedding_size",
        ):
            if getattr(self, name) < 1:
                raise self.reject(name, "at least 1")
        if self.num_hidden_layers < 0:
            raise self.reject("num_hidden_layers", "at least 0")
        if self.hidden_size % self.num_attention_heads:
            raise self.reject("num_attention_heads", f"a divisor of hidden_size={self.hidden_size}")
        if self.initializer_range <= 0:
            raise self.reject("initializer_range", "above 0")
        if self.hidden_act not in ACT2FN:
            raise self.reject("hidden_act", f"one of {', '.join(sorted(ACT2FN))}")

    def validate_rates(self):
        """Dropout rates are in [0, 1), the threshold in [0, 1]."""
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise self.reject(name, "in [0, 1)")
        if self.unpad_threshold is not None and not 0 <= self.unpad_threshold <= 1:
            raise self.reject("unpad_threshold", "in [0, 1] or None")

    @classmethod
    def from_stock(cls, config: PreTrainedConfig, **overrides) -> Self:
        """Build this configuration from a stock BERT-like one, taking over every field that both declare.

        Labels (`id2label`, `problem_type`) come along. Raises `ValueError` if `config` marks a decoder, since the
        encoders here are bidirectional.
        """
        if getattr(config, "is_decoder", False):
            raise ValueError(
                f"{cls.__name__}.from_stock: {type(config).__name__} has is_decoder=True; only encoders can be "
                "taken over."
            )
        theirs = config.to_dict()
        skipped = {"architectures", "transformers_version", "model_type"}
        ours = {field.name for field in fields(cls)} - skipped
        return cls(**({key: value for key, value in theirs.items() if key in ours} | overrides))


LABELS = ("num_labels", "id2label", "label2id", "problem_type")


def _of_encoder(name: str) -> property:
    def read(self: "WrapperConfig") -> Any:
        return getattr(self.encoder_config, name)

    def write(self: "WrapperConfig", value: Any) -> None:
        setattr(self.encoder_config, name, value)

    return property(read, write, doc=f"`{name}` of the encoder.")


@strict
class WrapperConfig(BestiaryConfig):
    """Settings of a method that works on any encoder, and the configuration of that encoder.

    Labels (`num_labels`, `id2label`, `label2id`, `problem_type`) may be given here or in `encoder_config`; both hold
    them afterwards. Sizes of the encoder can be read here, and its fields set once this is built, but they are stored
    there only; `vocab_size` may be given here, for a tokenizer's.

    Args:
        encoder_config: configuration of the wrapped encoder, or its dictionary, whose `model_type` names any type with
            an auto class.

    Raises:
        ValueError: an unknown `model_type`, a misspelt field, or a field of the encoder given outside
            `encoder_config`.
    """

    sub_configs_defaults = {"encoder_config": SubConfigSpec(AutoConfig, model_type="bert")}

    encoder_config: Any = None

    vocab_size = _of_encoder("vocab_size")
    hidden_size = _of_encoder("hidden_size")
    num_hidden_layers = _of_encoder("num_hidden_layers")
    num_attention_heads = _of_encoder("num_attention_heads")
    intermediate_size = _of_encoder("intermediate_size")
    max_position_embeddings = _of_encoder("max_position_embeddings")
    type_vocab_size = _of_encoder("type_vocab_size")
    pad_token_id = _of_encoder("pad_token_id")
    hidden_dropout_prob = _of_encoder("hidden_dropout_prob")
    initializer_range = _of_encoder("initializer_range")

    def __post_init__(self, **kwargs):
        vocab_size = kwargs.pop("vocab_size", None)
        if vocab_size is not None and not isinstance(self.encoder_config, PreTrainedConfig):
            self.encoder_config = {"vocab_size": vocab_size} | dict(self.encoder_config or {})
        self.encoder_config = encoder = self._encoder_from(self.encoder_config)
        if vocab_size not in (None, encoder.vocab_size):
            raise ValueError(
                f"{type(self).__name__}: vocab_size is {vocab_size}, but {encoder.vocab_size} in encoder_config; "
                "give it once."
            )
        own = {field.name for field in fields(PreTrainedConfig)}
        if misplaced := sorted((_known_fields(type(encoder)) - own) & set(kwargs)):
            raise ValueError(
                f"{type(self).__name__} has no field {misplaced[0]!r} of its own; give it in encoder_config."
            )
        given = {name: getattr(self, name) for name in LABELS[1:]} | {"num_labels": kwargs.pop("num_labels", None)}
        _set_labels(encoder, {name: value for name, value in given.items() if value is not None})
        for name in LABELS[1:]:
            setattr(self, name, getattr(encoder, name))
        super().__post_init__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        done = self.__dict__.get("_post_init_done", False)
        if done and name in _known_fields(type(self.encoder_config)) - _known_fields(type(self)):
            setattr(self.encoder_config, name, value)  # Trainer sets `use_cache` and token ids of the whole model's
            return
        super().__setattr__(name, value)
        if done:  # later changes reach both sides too
            if name in LABELS[1:]:
                setattr(self.encoder_config, name, value)
            elif name == "encoder_config":
                for label in LABELS[1:]:
                    super().__setattr__(label, getattr(value, label))

    def _encoder_from(self, given: Any) -> PreTrainedConfig:
        name = type(self).__name__
        if not isinstance(given, PreTrainedConfig):
            if not isinstance(given, Mapping | None):
                raise ValueError(f"{name}.encoder_config must be a configuration or its dictionary, got {given!r}.")
            settings = dict(given or {})
            model_type = settings.pop("model_type", type(self).sub_configs_defaults["encoder_config"].model_type)
            if model_type not in CONFIG_MAPPING:
                raise ValueError(
                    f"{name}: no encoder type {model_type!r} is registered; import the package that registers it."
                )
            refuse_near_misses(CONFIG_MAPPING[model_type], settings)
            found = AutoConfig.for_model(model_type, **settings)
        else:
            found = copy.deepcopy(given)
        if isinstance(found, WrapperConfig):
            raise ValueError(
                f"{name} wraps a plain encoder, but got a {type(found).__name__}; take its encoder_config, or of a "
                "model to_base()."
            )
        if found.is_encoder_decoder:
            raise ValueError(f"{name} wraps an encoder, but {type(found).__name__} is of an encoder-decoder.")
        return found

    @classmethod
    def from_encoder(cls, config: PreTrainedConfig, **settings: Any) -> Self:
        """The method's configuration around that of an encoder.

        `settings` are fields of this class and labels, which replace the encoder's (`problem_type=None` forgets it);
        `encoder_config` among them is a dictionary of what changes in the encoder's.

        Raises:
            ValueError: `config` is already one of a method, or of an encoder-decoder; or changes name a field that the
                encoder lacks.
        """
        if isinstance(config, WrapperConfig):
            raise ValueError(
                f"{cls.__name__}.from_encoder wraps a plain encoder, but got a {type(config).__name__}; load that "
                "checkpoint with from_pretrained, or unwrap it first: to_base()."
            )
        kind = type(config)
        changes = dict(settings.pop("encoder_config", None) or {})
        refuse_near_misses(kind, changes)
        known = _known_fields(kind) | {"num_labels", "attn_implementation", "model_type"}
        if unknown := sorted(changes.keys() - known):
            raise ValueError(
                f"{cls.__name__}.from_encoder: encoder_config names {unknown[0]!r}, but {kind.__name__} has no such "
                "field."
            )
        if changes.get("model_type", config.model_type) != config.model_type:
            raise ValueError(
                f"{cls.__name__}.from_encoder: encoder_config changes fields of a {kind.__name__} and cannot make it "
                f"a {changes['model_type']!r}."
            )
        if "problem_type" in settings:
            changes["problem_type"] = settings.pop("problem_type")
        renamed: dict[str, Any] = {(kind.attribute_map.get(name) or name): value for name, value in changes.items()}
        labels = {name: renamed.pop(name) for name in LABELS[:3] if renamed.get(name) is not None}
        present = config.to_dict()
        for part in renamed.keys() & kind.sub_configs_defaults.keys():
            renamed[part] = present[part] | renamed[part]
        encoder = kind.from_dict(present | renamed)
        if "attn_implementation" not in settings | renamed:
            settings["attn_implementation"] = config._attn_implementation
        _set_labels(encoder, labels)
        return cls(encoder_config=encoder, **settings)


def _known_fields(config_class: type[PreTrainedConfig]) -> set[str]:
    return {field.name for field in fields(config_class)} | set(config_class.attribute_map)


def _set_labels(config: PreTrainedConfig, given: Mapping[str, Any]) -> None:
    """Labels that fit each other: names give numbers, and a number other than theirs gives new names."""
    if "id2label" in given:
        config.id2label = {int(number): name for number, name in given["id2label"].items()}
        config.label2id = None
    if "label2id" in given:
        config.label2id = dict(given["label2id"])
    if "num_labels" in given:
        config.num_labels = given["num_labels"]
    if "problem_type" in given:
        config.problem_type = given["problem_type"]
    if config.id2label is not None and set((config.label2id or {}).values()) != set(config.id2label):
        config.label2id = {str(name): int(number) for number, name in config.id2label.items()}
