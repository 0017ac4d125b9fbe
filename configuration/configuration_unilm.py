"""Configuration of UniLM.

Paper: "Unified Language Model Pre-training for Natural Language Understanding and Generation", Dong, Yang, Wang, Wei,
Liu, Wang, Gao, Zhou, Hon, 2019, arXiv 1905.03197. Official code: microsoft/unilm, unilm-v1 and s2s-ft (MIT).
"""

from typing import ClassVar, Self

from huggingface_hub.dataclasses import strict

from .configuration_core import EncoderConfig


@strict
class UniLMConfig(EncoderConfig):
    """BERT encoder that is a language model in four directions. Defaults are `unilm1-base-cased`.

    Args:
        source_type_id: segment of the source in sequence-to-sequence mode (4; unilm1.2: 0).
        target_type_id: segment of the target in that mode (5; unilm1.2: 1).
        mask_token_id: [MASK], which the next token is predicted under.
        eos_token_id: [SEP], which ends a target.
        decoder_start_token_id: [CLS], what `generate()` begins a target with; the network never reads it there.
        label_smoothing: probability that the fine-tuning loss spreads over all other tokens (0.1).
        masked_lm_loss_weight: weight of the cloze loss in pre-training (paper: 1).
        next_sentence_loss_weight: weight of the next-sentence loss (paper: 1).

    `is_encoder_decoder` is set by the class: only `UniLMForConditionalGeneration` reads sources and writes targets.
    """

    model_type = "bestiary-unilm"

    SIZES: ClassVar[dict[str, dict[str, int | float]]] = {
        "base": {},
        "large": {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
        },
        "base-uncased": {
            "vocab_size": 30522,
            "type_vocab_size": 2,
            "source_type_id": 0,
            "target_type_id": 1,
            "layer_norm_eps": 1e-12,
        },
    }
    """unilm1-base-cased, unilm1-large-cased and unilm1.2-base-uncased."""

    vocab_size: int = 28996
    type_vocab_size: int = 6
    layer_norm_eps: float = 1e-5
    source_type_id: int = 4
    target_type_id: int = 5
    mask_token_id: int = 103
    eos_token_id: int | list[int] | None = 102
    decoder_start_token_id: int | None = 101
    label_smoothing: float | int = 0.1
    masked_lm_loss_weight: float | int = 1.0
    next_sentence_loss_weight: float | int = 1.0

    def validate_segments(self):
        """Segments of source and target are in the table."""
        for name in ("source_type_id", "target_type_id"):
            if not 0 <= getattr(self, name) < self.type_vocab_size:
                raise self.reject(name, f"in [0, type_vocab_size={self.type_vocab_size})")

    def validate_losses(self):
        """The smoothing is in [0, 1), weights are not negative."""
        if not 0 <= self.label_smoothing < 1:
            raise self.reject("label_smoothing", "in [0, 1)")
        for name in ("masked_lm_loss_weight", "next_sentence_loss_weight"):
            if getattr(self, name) < 0:
                raise self.reject(name, "at least 0")

    @classmethod
    def from_size(cls, size: str, **overrides) -> Self:
        """One of the published sizes: base, large (cased), base-uncased (version 1.2)."""
        if size not in cls.SIZES:
            raise ValueError(f"{cls.__name__} has no size {size!r}; there are {', '.join(cls.SIZES)}.")
        return cls(**(cls.SIZES[size] | overrides))
