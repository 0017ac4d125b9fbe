"""Configuration of MiniLMv2: a student, and what it imitates of a teacher.

Paper: "MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained Transformers", Wang, Bao,
Huang, Dong, Wei, 2021, arXiv 2012.15828. The distillation code was never released; published checkpoints are plain
BERT, RoBERTa and XLM-R.
"""

from dataclasses import fields
from typing import Any, ClassVar, Literal, Self

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .configuration_core import WrapperConfig, refuse_near_misses


PAIRS = ("qq", "kk", "vv", "qk", "qv", "kq", "kv", "vq", "vk")
"""Relations: the first letter is the projection on the left of the product, the second that on the right."""
OF_THE_VOCABULARY = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
OF_THE_INPUT = ("type_vocab_size", "layer_norm_eps")
OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "roberta-prelayernorm", "xlm-roberta-xl")
"""Types whose position ids begin behind the padding id, so that a table of 514 rows serves 512 tokens."""

_LAYER_OF_LARGE = {"bert": 21, "roberta": 19, "xlm-roberta": 19}


def longest_input(config: PreTrainedConfig) -> int:
    """Longest sequence, in tokens, that an encoder's table of positions serves."""
    offset = config.pad_token_id + 1 if config.model_type in OFFSET_POSITIONS else 0
    return config.max_position_embeddings - offset


def paper_teacher_layer(config: PreTrainedConfig) -> int:
    """The paper's choice of the layer to imitate: the last one, but 21 of 24 of BERT-large and 19 of 24 of
    RoBERTa-large and XLM-R-large.
    """
    large = config.num_hidden_layers == 24 and config.hidden_size == 1024
    return _LAYER_OF_LARGE.get(config.model_type, 24) if large else config.num_hidden_layers


def _student(model_type: str, layers: int, width: int) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "bert": {},
        "roberta": {"vocab_size": 50265},
        "xlm-roberta": {"vocab_size": 250002},
    }[model_type]
    if model_type != "bert":
        settings |= {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
    sizes: dict[str, Any] = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": 4 * width}
    return {"model_type": model_type, "num_attention_heads": 12} | sizes | settings


@strict
class MiniLMv2Config(WrapperConfig):
    """A student and the objective that trains it. The default is BERT's L6-H384 with a base-size teacher.

    Args:
        encoder_config: configuration of the student, of any type with an auto class.
        teacher: folder or Hub name of the teacher; None if it is attached by hand.
        teacher_layer: layer of the teacher whose projections are imitated, counted from 1. None: the paper's choice
            for the teacher, see `paper_teacher_layer`.
        student_layer: layer of the student that learns them, counted from 1; None: the last.
        num_relation_heads: parts into which projections are cut for the relations; must divide both widths (paper: 48
            for teachers of base size, 64 for large ones).
        relation_weights: weight of each relation in the loss, by its two letters; those left out weigh 0. None: 1 for
            qq, kk and vv.
        student_init: `"random"`, or `"first_layers"` to start from the teacher's embeddings and first layers (same
            type and width).

    Raises:
        ValueError: heads that do not divide the student's width, a layer that it has not, or an unknown relation.
    """

    model_type = "bestiary-minilmv2"

    SIZES: ClassVar[dict[str, tuple[dict[str, Any], int]]] = {
        "bert-L6-H384": (_student("bert", 6, 384), 48),
        "bert-L6-H768": (_student("bert", 6, 768), 48),
        "roberta-L6-H384": (_student("roberta", 6, 384), 64),
        "roberta-L12-H384": (_student("roberta", 12, 384), 64),
        "roberta-L6-H768": (_student("roberta", 6, 768), 64),
        "xlm-roberta-L6-H384": (_student("xlm-roberta", 6, 384), 64),
        "xlm-roberta-L12-H384": (_student("xlm-roberta", 12, 384), 64),
    }
    """Published students with the number of relation heads. BERT's were also distilled from BERT-large, with 64."""

    teacher: str | None = None
    teacher_layer: int | None = None
    student_layer: int | None = None
    num_relation_heads: int = 48
    relation_weights: dict[str, float | int] | None = None
    student_init: Literal["random", "first_layers"] = "random"

    def __post_init__(self, **kwargs):
        if self.encoder_config is None:
            self.encoder_config = dict(self.SIZES["bert-L6-H384"][0])
        if self.relation_weights is None:
            self.relation_weights = {"qq": 1.0, "kk": 1.0, "vv": 1.0}
        super().__post_init__(**kwargs)
        if self.student_layer is None:
            self.student_layer = self.encoder_config.num_hidden_layers

    def validate_relations(self):
        """Relations are known, at least one counts, heads divide the student's width, layers exist."""
        weights = self.relation_weights or {}
        if not set(weights) <= set(PAIRS) or min(weights.values(), default=0) < 0 or not any(weights.values()):
            raise self.reject(
                "relation_weights", f"weights of at least 0 for some of {', '.join(PAIRS)}, one of them above 0"
            )
        if self.num_relation_heads < 1:
            raise self.reject("num_relation_heads", "at least 1")
        self.check_width("student", self.encoder_config)
        if not 1 <= (self.student_layer or 0) <= self.encoder_config.num_hidden_layers:
            raise self.reject(
                "student_layer", f"in 1..{self.encoder_config.num_hidden_layers}, the layers of the student"
            )
        if self.teacher_layer is not None and self.teacher_layer < 1:
            raise self.reject("teacher_layer", "at least 1")

    def check_width(self, owner: str, config: PreTrainedConfig) -> None:
        """`ValueError` unless the relation heads divide the width of an encoder."""
        if config.hidden_size % self.num_relation_heads:
            raise self.reject("num_relation_heads", f"a divisor of the {owner}'s hidden_size={config.hidden_size}")

    def check_teacher(self, config: PreTrainedConfig) -> int:
        """The layer of a teacher that is imitated, after checking that the teacher fits the student.

        Raises:
            ValueError: another vocabulary, a width that the relation heads do not divide, or too few layers.
        """
        if config.vocab_size != self.vocab_size:
            raise ValueError(
                f"{type(self).__name__}: the teacher has vocab_size={config.vocab_size}, the student {self.vocab_size}"
                "; both must read the same tokens. Build the student for this teacher: "
                f"{type(self).__name__}.from_teacher."
            )
        self.check_width("teacher", config)
        layer = self.teacher_layer or paper_teacher_layer(config)
        if layer > config.num_hidden_layers:
            raise self.reject("teacher_layer", f"in 1..{config.num_hidden_layers}, the layers of the teacher")
        return layer

    @property
    def active_relations(self) -> dict[str, float]:
        """Weights of the relations that count, in the order of `PAIRS`."""
        weights = self.relation_weights or {}
        return {pair: float(weights[pair]) for pair in PAIRS if weights.get(pair)}

    @classmethod
    def from_size(cls, size: str, **overrides: Any) -> Self:
        """One of the published students, by name (`SIZES`). `overrides` are fields of this class."""
        if size not in cls.SIZES:
            raise ValueError(f"{cls.__name__} has no size {size!r}; there are {', '.join(cls.SIZES)}.")
        encoder, heads = cls.SIZES[size]
        settings: dict[str, Any] = {"encoder_config": dict(encoder), "num_relation_heads": heads}
        return cls(**(settings | overrides))

    @classmethod
    def from_teacher(
        cls,
        teacher: str | PreTrainedConfig,
        encoder_config: dict[str, Any] | PreTrainedConfig | None = None,
        **settings: Any,
    ) -> Self:
        """The configuration of a student that reads what a teacher reads.

        Args:
            teacher: folder or Hub name, or the configuration of the teacher.
            encoder_config: the student's own fields, as `hidden_size`, `num_hidden_layers`, `num_attention_heads` and
                `intermediate_size`, by default those of L6-H384; the inner width is four times the width unless given.
                The vocabulary, the padding, positions, token types and epsilon are the teacher's, and so is all the
                rest if `model_type` is left out or the teacher's. A whole configuration is taken as it is.
            settings: further fields of this class. `num_relation_heads` is by default 64 for a teacher of width 1024,
                else 48.

        Raises:
            ValueError: a student that cannot imitate this teacher, see `check_teacher`, or a teacher that is not
                found.
        """
        theirs: Any = teacher
        if isinstance(teacher, str):
            settings = {"teacher": teacher} | settings
            try:
                theirs = AutoConfig.from_pretrained(teacher)
            except OSError as error:
                raise ValueError(
                    f"{cls.__name__}.teacher={teacher!r} is no folder with a config.json and no model on the Hub that "
                    f"can be reached: {error}"
                ) from error
        settings.setdefault("num_relation_heads", 64 if theirs.hidden_size == 1024 else 48)
        if not isinstance(encoder_config, PreTrainedConfig):
            encoder_config = cls._student_for(theirs, dict(encoder_config or {}))
        config = cls(encoder_config=encoder_config, **settings)
        config.teacher_layer = config.check_teacher(theirs)
        return config

    @classmethod
    def _student_for(cls, teacher: PreTrainedConfig, given: dict[str, Any]) -> PreTrainedConfig:
        model_type = given.pop("model_type", teacher.model_type)
        if model_type not in CONFIG_MAPPING:
            raise ValueError(
                f"{cls.__name__}: no encoder type {model_type!r} is registered; import the package that registers it."
            )
        student_class = CONFIG_MAPPING[model_type]
        refuse_near_misses(student_class, given)
        names = ("num_hidden_layers", "hidden_size", "num_attention_heads")
        sizes = {name: cls.SIZES["bert-L6-H384"][0][name] for name in names} | given
        known = {field.name for field in fields(student_class)} | set(student_class.attribute_map)
        inner = "intermediate_size" if "intermediate_size" in known else "hidden_dim"
        sizes.setdefault(inner, 4 * sizes["hidden_size"])
        if model_type == teacher.model_type:
            own = {student_class.attribute_map.get(name, name): value for name, value in sizes.items()}
            theirs = {k: v for k, v in teacher.to_dict().items() if k not in ("architectures", "auto_map", "dtype")}
            for name in ("embedding_size", "pooler_hidden_size"):
                if theirs.get(name) == teacher.hidden_size:
                    theirs[name] = sizes["hidden_size"]
            return student_class.from_dict(theirs | own)
        shared: dict[str, Any] = {name: getattr(teacher, name, None) for name in (*OF_THE_VOCABULARY, *OF_THE_INPUT)}
        if not shared["type_vocab_size"]:  # DeBERTa has none; others need a row
            del shared["type_vocab_size"]
        shared = {name: value for name, value in shared.items() if name in known and value is not None}
        positions = longest_input(teacher)
        if model_type in OFFSET_POSITIONS:
            positions += shared["pad_token_id"] + 1
        settings: dict[str, Any] = {"max_position_embeddings": positions}
        return student_class(**(settings | shared | sizes))
