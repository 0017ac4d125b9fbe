"""Configuration of BERT pre-training.

Paper: "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", Devlin, Chang, Lee,
Toutanova, 2018, arXiv 1810.04805. Official code: google-research/bert (Apache-2.0).
"""

from typing import ClassVar, Self

from huggingface_hub.dataclasses import strict

from .configuration_core import EncoderConfig


@strict
class BertPretrainingConfig(EncoderConfig):
    """BERT encoder plus the settings of its pre-training heads. Defaults are BERT-base.

    Args:
        next_sentence_prediction: whether `BertPretrainingForPreTraining` has the next-sentence head; False gives the
            "no NSP" ablation of the paper (section 5.1) and the MLM-only control of later papers.
        masked_lm_loss_weight: weight of the masked-language-model loss in the sum (paper: 1).
        next_sentence_loss_weight: weight of the next-sentence loss in the sum (paper: 1).
    """

    model_type = "bestiary-bert"

    SIZES: ClassVar[dict[str, dict[str, int]]] = {
        name: {
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "intermediate_size": 4 * hidden,
        }
        for name, layers, hidden, heads in (
            ("tiny", 2, 128, 2),
            ("mini", 4, 256, 4),
            ("small", 4, 512, 8),
            ("medium", 8, 512, 8),
            ("base", 12, 768, 12),
            ("large", 24, 1024, 16),
        )
    }
    """Released sizes (L, H, A of the note; feed-forward 4H)."""

    next_sentence_prediction: bool = True
    masked_lm_loss_weight: float | int = 1.0
    next_sentence_loss_weight: float | int = 1.0

    def validate_loss_weights(self):
        """Loss weights are not negative."""
        for name in ("masked_lm_loss_weight", "next_sentence_loss_weight"):
            if getattr(self, name) < 0:
                raise self.reject(name, "at least 0")

    @classmethod
    def from_size(cls, size: str, **overrides) -> Self:
        """One of the released sizes: tiny, mini, small, medium, base, large."""
        if size not in cls.SIZES:
            raise ValueError(f"{cls.__name__} has no size {size!r}; there are {', '.join(cls.SIZES)}.")
        return cls(**(cls.SIZES[size] | overrides))
