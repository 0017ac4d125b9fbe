"""Configuration of RealFormer.

Paper: "RealFormer: Transformer Likes Residual Attention", He, Ravula, Kanagal, Ainslie, 2020 (Findings of ACL 2021),
arXiv 2012.11747. Official code: google-research/google-research, folder realformer (Apache-2.0).
"""

from typing import ClassVar

from huggingface_hub.dataclasses import strict

from .configuration_bert import BertPretrainingConfig


@strict
class RealformerConfig(BertPretrainingConfig):
    """BERT with residual attention scores. Defaults are RealFormer-base; it has the parameters of BERT and no others.

    Args:
        residual_attention: add the scores of all earlier layers; False is plain BERT.
        use_running_mean: divide the sum by the number of layers in it (published for the 36-layer size).
        normalize_before: pre-norm layers and a LayerNorm at the end. Not in the paper, whose backbone is post-norm.
    """

    model_type = "bestiary-realformer"

    SIZES: ClassVar[dict[str, dict[str, int | bool]]] = {
        **{name: BertPretrainingConfig.SIZES[name] for name in ("small", "base", "large")},
        "xlarge": {
            "num_hidden_layers": 36,
            "hidden_size": 1536,
            "num_attention_heads": 24,
            "intermediate_size": 6144,
            "use_running_mean": True,
        },
    }
    """Released sizes."""

    hidden_act: str = "gelu_new"
    residual_attention: bool = True
    use_running_mean: bool = False
    normalize_before: bool = False
