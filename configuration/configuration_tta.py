"""Configuration of T-TA, the Transformer-based Text Autoencoder.

Paper: "Fast and Accurate Deep Bidirectional Language Representations for Unsupervised Learning", Shin, Lee, Yoon,
Jung, 2020 (ACL 2020), arXiv 2004.08097. Official code: joongbo/tta (Apache-2.0).
"""

from typing import ClassVar, Self

from huggingface_hub.dataclasses import strict

from .configuration_core import EncoderConfig


@strict
class TtaConfig(EncoderConfig):
    """T-TA encoder and its language-model head. Defaults are the released model.

    The model has no token types: `type_vocab_size` is 1.

    Args:
        query_token_id: token whose embedding, with that of the position, starts the query stream: [MASK] in the
            official code, id 4 of the released vocabulary. None starts it from the position alone, as the paper writes
            it.
    """

    model_type = "bestiary-tta"

    SIZES: ClassVar[dict[str, dict[str, int]]] = {
        "released": {
            "vocab_size": 29530,
            "num_hidden_layers": 3,
            "hidden_size": 512,
            "num_attention_heads": 8,
            "intermediate_size": 2048,
            "max_position_embeddings": 128,
        },
        "base": {
            "vocab_size": 30522,
            "num_hidden_layers": 12,
            "hidden_size": 768,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "max_position_embeddings": 512,
        },
    }
    """The one size that is published, and BERT-base's, for comparison."""

    vocab_size: int = 29530
    hidden_size: int = 512
    num_hidden_layers: int = 3
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    max_position_embeddings: int = 128
    type_vocab_size: int = 1
    query_token_id: int | None = 4

    def validate_query_token(self):
        """The token that starts the query stream is in the vocabulary, and there are no token types."""
        if self.query_token_id is not None and not 0 <= self.query_token_id < self.vocab_size:
            raise self.reject("query_token_id", f"in [0, vocab_size={self.vocab_size}) or None (position only)")
        if self.type_vocab_size != 1:
            raise self.reject("type_vocab_size", "1, since T-TA has no token types")

    @classmethod
    def from_size(cls, size: str, **overrides) -> Self:
        """The released size, or `base`, which is BERT-base's."""
        if size not in cls.SIZES:
            raise ValueError(f"{cls.__name__} has no size {size!r}; there are {', '.join(cls.SIZES)}.")
        return cls(**(cls.SIZES[size] | overrides))
