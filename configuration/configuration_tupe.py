"""Configuration of TUPE.

Paper: "Rethinking Positional Encoding in Language Pre-training", Ke, He, Liu, 2020 (ICLR 2021), arXiv 2006.15595.
Official code: guolinke/TUPE (MIT).
"""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from .configuration_bert import BertPretrainingConfig


@strict
class TupeConfig(BertPretrainingConfig):
    """TUPE encoder. Defaults are TUPE-R of base size with the official vocabulary.

    Fields of `BertPretrainingConfig` that mean something else here: `max_position_embeddings` counts usable positions,
    the table has one row more; `type_vocab_size` is not used, the encoder has no segment embeddings;
    `next_sentence_prediction` is off, as in the paper.

    Args:
        use_relative_bias: TUPE-R, a learned bias by distance on top of the position scores; False is TUPE-A.
        relative_attention_num_buckets: buckets of distances, half of them for keys on the left; one more is added for
            the scores of other tokens to [CLS]. Even, at least 4.
        relative_attention_max_distance: distance from which on all share the last bucket.
        untie_cls: reset the position scores from and to [CLS]; False is the "tie-cls" ablation.
        attn_scale_factor: word scores and position scores are both divided by sqrt(attn_scale_factor * head width).
        embedding_layer_norm: LayerNorm on the word embeddings, as in all published commands.
        normalize_before: pre-norm layers and a LayerNorm at the end, an unused variant of the official code.
        bos_token_id, eos_token_id: [CLS] and [SEP] of the official dictionary, whose padding is 1.
    """

    model_type = "bestiary-tupe"

    SIZES: ClassVar[dict[str, dict[str, int]]] = {
        name: BertPretrainingConfig.SIZES[name] for name in ("base", "large")
    }
    """Published sizes."""

    vocab_size: int = 32769
    layer_norm_eps: float = 1e-5
    pad_token_id: int | None = 1
    bos_token_id: Any = 0
    eos_token_id: Any = 2
    next_sentence_prediction: bool = False
    use_relative_bias: bool = True
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    untie_cls: bool = True
    attn_scale_factor: float | int = 2
    embedding_layer_norm: bool = True
    normalize_before: bool = False

    def validate_positions(self):
        """Buckets come in two halves of at least two, and the distances go beyond the exact ones."""
        if self.relative_attention_num_buckets < 4 or self.relative_attention_num_buckets % 2:
            raise self.reject("relative_attention_num_buckets", "even and at least 4")
        exact = self.relative_attention_num_buckets // 4
        if self.relative_attention_max_distance <= exact:
            raise self.reject("relative_attention_max_distance", f"above {exact}, a quarter of the buckets")
        if self.attn_scale_factor <= 0:
            raise self.reject("attn_scale_factor", "above 0")
