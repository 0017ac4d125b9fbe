"""Configuration of ELECTRA's joint generator and discriminator.

Paper: "ELECTRA: Pre-training Text Encoders as Discriminators Rather Than Generators", Clark, Luong, Le, Manning, 2020,
arXiv 2003.10555. Official code: google-research/electra (Apache-2.0).
"""

from typing import Any, ClassVar, Literal, Self

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_core import BestiaryConfig, refuse_near_misses


NEEDED = ("intermediate_size", "hidden_act", "hidden_dropout_prob", "layer_norm_eps", "max_position_embeddings")
"""Fields of an encoder that the objective and the heads read, beside those that every configuration has."""


def _size(hidden: int, layers: int, heads: int, embedding: int, fraction: float) -> dict[str, Any]:
    encoder = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "embedding_size": embedding,
    }
    return {"discriminator_config": encoder, "generator_size_fraction": fraction}


@strict
class ElectraJointConfig(BestiaryConfig):
    """Two encoders and the objective that trains them together. Defaults are ELECTRA-base.

    Args:
        discriminator_config: configuration (or its dictionary; `model_type` defaults to `"electra"`) of the encoder
            that is kept. Any type with an auto class and BERT's field names will do; a narrower generator that shares
            its embeddings needs one with an `embedding_size` of its own.
        generator_config: the same for the generator; None derives it from the discriminator by the two fractions.
        generator_size_fraction: generator width / discriminator width (paper, table 6: small 1/4, base 1/3, large
            1/4). Heads become max(1, width // 64), the feed-forward width 4 * width.
        generator_layers_fraction: generator depth / discriminator depth (paper: 1).
        generator_loss_weight: weight of the masked-LM loss (paper: 1).
        discriminator_loss_weight: weight of the replaced-token-detection loss (paper: 50).
        sampling_temperature: divides the generator's logits before sampling.
        sampling: `"gumbel"` adds Gumbel noise and takes the largest, as the official code; `"inverse_cdf"` draws from
            the same distribution with one uniform number a position, many times cheaper on a CPU.
        disallow_correct: never sample the original token, so that every masked position is a fake one.
        tie_generator_embeddings: both networks use the same word, position and token-type tables and the same
            LayerNorm.
        untied_generator: False makes the generator the discriminator's own encoder ("all weights tied", section 3.2).
        uniform_generator: replacements are uniform over the vocabulary and nothing is learned to generate them.
        objective: `"electra"`, or `"mlm"` for the control: the discriminator's encoder as a plain masked language
            model.
        max_predictions_per_sequence: largest number of masked positions in a sequence; torch.compile needs it for
            static shapes.
        classifier_dropout: dropout rate before a classification layer; None means the encoder's.

    Raises:
        ValueError: a value out of range, or two encoders that cannot share what they are asked to share.
    """

    model_type = "bestiary-electra"
    sub_configs_defaults = {
        "discriminator_config": SubConfigSpec(AutoConfig, model_type="electra"),
        "generator_config": SubConfigSpec(AutoConfig, model_type="electra"),
    }

    SIZES: ClassVar[dict[str, dict[str, Any]]] = {
        "small": _size(256, 12, 4, 128, 1 / 4),
        "base": _size(768, 12, 12, 768, 1 / 3),
        "large": _size(1024, 24, 16, 1024, 1 / 4),
    }
    """Published sizes (paper, table 6). The published small checkpoint has a generator of full width, fraction 1."""

    discriminator_config: Any = None
    generator_config: Any = None
    generator_size_fraction: float | int = 1 / 3
    generator_layers_fraction: float | int = 1.0
    generator_loss_weight: float | int = 1.0
    discriminator_loss_weight: float | int = 50.0
    sampling_temperature: float | int = 1.0
    sampling: Literal["gumbel", "inverse_cdf"] = "gumbel"
    disallow_correct: bool = False
    tie_generator_embeddings: bool = True
    untied_generator: bool = True
    uniform_generator: bool = False
    objective: Literal["electra", "mlm"] = "electra"
    max_predictions_per_sequence: int | None = None
    classifier_dropout: float | int | None = None

    def __post_init__(self, **kwargs):
        vocab_size = kwargs.pop("vocab_size", None)
        for key in kwargs:
            if isinstance(ElectraJointConfig.__dict__.get(key), property):
                raise ValueError(
                    f"{type(self).__name__} has no field {key!r} of its own; give it in discriminator_config."
                )
        if self.discriminator_config is None:
            self.discriminator_config = self.SIZES["base"]["discriminator_config"]
        if vocab_size is not None and isinstance(self.discriminator_config, dict):
            self.discriminator_config = {"vocab_size": vocab_size} | self.discriminator_config
        self.discriminator_config = _as_config(self.discriminator_config)
        if vocab_size not in (None, self.discriminator_config.vocab_size):
            raise ValueError(
                f"{type(self).__name__}: vocab_size is {vocab_size}, but {self.discriminator_config.vocab_size} in "
                "discriminator_config; give it once."
            )
        if self.generator_config is None:
            self.generator_config = self._derived_generator()
        self.generator_config = _as_config(self.generator_config)
        super().__post_init__(**kwargs)

    def _derived_generator(self) -> dict[str, Any]:
        for name in ("generator_size_fraction", "generator_layers_fraction"):
            if not 0 < getattr(self, name) <= 1:
                raise self.reject(name, "in (0, 1]")
        theirs = self.discriminator_config
        width = round(theirs.hidden_size * self.generator_size_fraction)
        derived = theirs.to_dict() | {
            "hidden_size": width,
            "num_attention_heads": max(1, width // 64),
            "intermediate_size": 4 * width,
            "num_hidden_layers": round(theirs.num_hidden_layers * self.generator_layers_fraction),
        }
        if width % derived["num_attention_heads"]:
            raise ValueError(
                f"{type(self).__name__}: a generator of width {width} (hidden_size {theirs.hidden_size} * "
                "generator_size_fraction "
                f"{self.generator_size_fraction}) has {derived['num_attention_heads']} heads by ELECTRA's rule, "
                "which do not divide "
                "it; choose another fraction, or give generator_config."
            )
        return derived

    def validate_objective(self):
        """Weights, temperature and what the two encoders share."""
        for name in ("generator_loss_weight", "discriminator_loss_weight"):
            if getattr(self, name) < 0:
                raise self.reject(name, "at least 0")
        if self.sampling_temperature <= 0:
            raise self.reject("sampling_temperature", "above 0")
        if not self.tie_word_embeddings:
            allowed = "True (output and input table are one; for separate networks: tie_generator_embeddings=False)"
            raise self.reject("tie_word_embeddings", allowed)
        ours, theirs = self.discriminator_config, self.generator_config
        for config in (ours, theirs):
            if config.hidden_size % config.num_attention_heads:
                raise ValueError(
                    f"{type(self).__name__}: hidden_size {config.hidden_size} is no multiple of num_attention_heads "
                    f"{config.num_attention_heads} in the {'discriminator' if config is ours else 'generator'}_config."
                )
        if self.untied_generator and self.tie_generator_embeddings:
            for name in ("vocab_size", "max_position_embeddings", "type_vocab_size"):
                if getattr(ours, name, None) != getattr(theirs, name, None):
                    raise ValueError(
                        f"{type(self).__name__}: both encoders share the embedding block, but {name} is "
                        f"{getattr(ours, name)} in "
                        f"discriminator_config and {getattr(theirs, name)} in generator_config; make them equal, "
                        "or set "
                        "tie_generator_embeddings=False."
                    )
            if embedding_size(ours) != embedding_size(theirs):
                raise ValueError(
                    f"{type(self).__name__}: both encoders share the embedding block, but its width is "
                    f"{embedding_size(ours)} in the "
                    f"discriminator and {embedding_size(theirs)} in the generator; give both the same "
                    "embedding_size (an encoder type "
                    "without that field cannot have a narrower generator), or set tie_generator_embeddings=False."
                )

    @classmethod
    def from_size(cls, size: str, **overrides) -> Self:
        """One of the published sizes: small, base, large. `overrides` are fields of this class."""
        if size not in cls.SIZES:
            raise ValueError(f"{cls.__name__} has no size {size!r}; there are {', '.join(cls.SIZES)}.")
        return cls(**(cls.SIZES[size] | overrides))

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary of both encoders."""
        return self.discriminator_config.vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        self.discriminator_config.vocab_size = value
        self.generator_config.vocab_size = value

    @property
    def embedding_size(self) -> int:
        """Width of the discriminator's embedding block."""
        return embedding_size(self.discriminator_config)

    @property
    def hidden_size(self) -> int:
        """Width of the discriminator."""
        return self.discriminator_config.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        """Depth of the discriminator."""
        return self.discriminator_config.num_hidden_layers

    @property
    def num_attention_heads(self) -> int:
        """Heads of the discriminator."""
        return self.discriminator_config.num_attention_heads

    @property
    def max_position_embeddings(self) -> int:
        """Longest sequence, in tokens."""
        return self.discriminator_config.max_position_embeddings

    @property
    def pad_token_id(self) -> int | None:
        """Id of the padding token."""
        return self.discriminator_config.pad_token_id

    @property
    def hidden_dropout_prob(self) -> float:
        """Dropout rate of the discriminator."""
        return self.discriminator_config.hidden_dropout_prob

    @property
    def initializer_range(self) -> float:
        """Standard deviation of the initialisation."""
        return self.discriminator_config.initializer_range


def embedding_size(config: PreTrainedConfig) -> int:
    """Width of an encoder's embedding tables: `embedding_size` where the type has that field, else `hidden_size`."""
    return getattr(config, "embedding_size", None) or config.hidden_size


def _as_config(given: Any) -> PreTrainedConfig:
    config = _from_fields(given) if isinstance(given, dict) else given
    if not isinstance(config, PreTrainedConfig):
        raise ValueError(f"ElectraJointConfig: an encoder is given as a configuration or a dictionary, got {given!r}.")
    absent = [name for name in NEEDED if not hasattr(config, name)]
    if absent:
        raise ValueError(
            f"ElectraJointConfig cannot wrap the encoder type {config.model_type!r}, which has no "
            f"{', '.join(absent)}; wrap a type with BERT's field names (electra, bert, roberta, bestiary-bert, ...)."
        )
    return config


def _from_fields(given: dict[str, Any]) -> PreTrainedConfig:
    fields = dict(given)
    model_type = fields.pop("model_type", "electra")
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"ElectraJointConfig: no encoder type {model_type!r} is registered; import the package that registers it."
        )
    refuse_near_misses(CONFIG_MAPPING[model_type], fields)
    return AutoConfig.for_model(model_type, **fields)
