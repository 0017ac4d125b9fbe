"""Configurations of sparse sequence-to-sequence models, and of the Transformer encoder with the same attention.

Paper: "Sparse Sequence-to-Sequence Models", Peters, Niculae, Martins, 2019 (ACL), arXiv 1905.05702. Official code:
deep-spin/OpenNMT-entmax (MIT). The encoder is an extension after "Adaptively Sparse Transformers", Correia, Niculae,
Martins, 2019 (EMNLP), arXiv 1909.00015, code deep-spin/entmax (MIT).
"""

import math
from typing import Any, ClassVar, Self

from huggingface_hub.dataclasses import strict

from .configuration_core import BestiaryConfig, EncoderConfig


METHODS = ("newton", "sort", "topk", "bisection")


def validate_alpha(config: BestiaryConfig, field: str, is_learned: bool) -> None:
    """`ValueError` unless a field is a finite number of at least 1; between 1 and 2 if it is only where learning
    starts.
    """
    value = getattr(config, field)
    if not 1 <= value < math.inf:
        raise config.reject(field, "at least 1 (softmax); 2 is sparsemax")
    if is_learned and not 1 < value < 2:
        raise config.reject(field, "between 1 and 2, both excluded, where alpha is learned")


def validate_method(config: BestiaryConfig, alphas: tuple[float, ...]) -> None:
    """`ValueError` unless the method is known and every alpha has it."""
    method = config.entmax_method  # type: ignore[attr-defined]
    if method is not None and method not in METHODS:
        raise config.reject("entmax_method", f"one of {', '.join(METHODS)} or None")
    if method not in (None, "bisection") and not set(alphas) <= {1, 1.5, 2}:
        raise config.reject("entmax_method", f"None or 'bisection' for the alphas {', '.join(map(str, alphas))}")


@strict
class SparseSeq2seqConfig(BestiaryConfig):
    """An LSTM encoder-decoder with alpha-entmax attention and output. Defaults are those of the official code.

    Args:
        src_vocab_size: symbols of the source; None is as many as of the target.
        tgt_vocab_size: symbols of the target; `vocab_size` is another name of it.
        embedding_size: width of both tables.
        hidden_size: width of the decoder; even with `bidirectional_encoder`, whose directions have half of it each.
        num_encoder_layers: LSTM layers that read.
        num_decoder_layers: LSTM layers that write, at most as many, since each starts from the last state of one.
        attention_score: "general" (W h . H_s), "dot" (h . H_s) or "mlp" (v . tanh(W h + b + V H_s)).
        attention_alpha: alpha of the attention: 1 softmax, 1.5, 2 sparsemax, or any number of at least 1.
        output_alpha: alpha of the next symbol's probabilities and of the loss.
        learn_attention_alpha: learn alpha between 1 and 2, from `attention_alpha` on (after Correia et al., 2019).
        entmax_method: "newton", "sort", "topk" or "bisection"; None is "newton" where there is one. They differ in
            speed alone.
        entmax_topk: logits that "topk" sorts first; it goes on with more where these do not suffice.
        entmax_n_iter: halvings by "bisection".
        input_feed: whether the decoder reads its last attentional state beside the last symbol.
        bidirectional_encoder: whether the source is read in both directions.
        dropout: rate between layers and on attentional states.
        init_range: all parameters start uniform in +- this.
        pad_token_id, bos_token_id, eos_token_id, unk_token_id: ids of both vocabularies.
        decoder_start_token_id: what the decoder reads first; None is `bos_token_id`.
        use_cache: whether the decoder returns its state for the next symbol.
    """

    model_type = "bestiary-sparse-seq2seq"
    attribute_map: ClassVar[dict[str, str]] = {
        "vocab_size": "tgt_vocab_size",
        "num_hidden_layers": "num_decoder_layers",
    }

    src_vocab_size: int | None = None
    tgt_vocab_size: int = 32000
    embedding_size: int = 500
    hidden_size: int = 500
    num_encoder_layers: int = 2
    num_decoder_layers: int = 2
    attention_score: str = "general"
    attention_alpha: float | int = 1.5
    output_alpha: float | int = 1.5
    learn_attention_alpha: bool = False
    entmax_method: str | None = None
    entmax_topk: int = 100
    entmax_n_iter: int = 50
    input_feed: bool = True
    bidirectional_encoder: bool = True
    dropout: float | int = 0.3
    init_range: float = 0.1
    unk_token_id: int | None = 0
    pad_token_id: int = 1
    bos_token_id: int | None = 2
    eos_token_id: int = 3
    decoder_start_token_id: int | None = None
    is_encoder_decoder: bool = True
    use_cache: bool = True
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any):
        for name, field in self.attribute_map.items():
            if name in kwargs:
                setattr(self, field, kwargs.pop(name))
        if self.src_vocab_size is None:
            self.src_vocab_size = self.tgt_vocab_size
        if self.decoder_start_token_id is None:
            self.decoder_start_token_id = self.bos_token_id
        super().__post_init__(**kwargs)

    def validate_sizes(self):
        """Sizes are positive, the layers of both sides fit, a width for two directions is even."""
        for name in (
            "src_vocab_size",
            "tgt_vocab_size",
            "embedding_size",
            "hidden_size",
            "num_encoder_layers",
            "num_decoder_layers",
            "entmax_topk",
            "entmax_n_iter",
        ):
            if getattr(self, name) < 1:
                raise self.reject(name, "at least 1")
        if self.num_decoder_layers > self.num_encoder_layers:
            raise self.reject("num_decoder_layers", f"at most num_encoder_layers={self.num_encoder_layers}")
        if self.bidirectional_encoder and self.hidden_size % 2:
            raise self.reject("hidden_size", "even, since each direction of the encoder has half of it")
        if not 0 <= self.dropout < 1:
            raise self.reject("dropout", "in [0, 1)")
        if self.init_range <= 0:
            raise self.reject("init_range", "above 0")

    def validate_sparsity(self):
        """Scores, alphas and the method are known and fit each other."""
        if self.attention_score not in ("general", "dot", "mlp"):
            raise self.reject("attention_score", "one of general, dot, mlp")
        validate_alpha(self, "attention_alpha", self.learn_attention_alpha)
        validate_alpha(self, "output_alpha", False)
        learned = () if self.learn_attention_alpha else (self.attention_alpha,)
        validate_method(self, (*learned, self.output_alpha))

    def validate_tokens(self):
        """Special tokens are in the vocabularies; the sides have tables of their own."""
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "unk_token_id", "decoder_start_token_id"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < self.tgt_vocab_size:
                raise self.reject(name, f"in [0, {self.tgt_vocab_size})")
        if self.src_vocab_size is not None and self.pad_token_id >= self.src_vocab_size:
            raise self.reject("pad_token_id", f"in [0, {self.src_vocab_size}), the source's vocabulary")
        if self.decoder_start_token_id is None:
            raise self.reject("decoder_start_token_id", "a token, since bos_token_id is None too")
        if self.tie_word_embeddings:
            raise self.reject("tie_word_embeddings", "False: source, target and output have tables of their own")


@strict
class SparseTransformerConfig(EncoderConfig):
    """A BERT-like encoder with alpha-entmax attention: an extension, not a model of the paper.

    Args:
        attention_alpha: alpha of every head: 1 softmax (BERT), 1.5, 2 sparsemax, or any number of at least 1.
        learn_attention_alpha: learn one alpha a head and layer, between 1 and 2, starting at `attention_alpha`.
        entmax_method: "newton", "sort", "topk" or "bisection"; None is "newton" where there is one.
        entmax_topk: scores that "topk" sorts first.
        entmax_n_iter: halvings by "bisection".
    """

    model_type = "bestiary-sparse-seq2seq-transformer"

    SIZES: ClassVar[dict[str, dict[str, int]]] = {"base": {}}
    """BERT-base, whose sizes are the defaults."""

    attention_alpha: float | int = 1.5
    learn_attention_alpha: bool = False
    entmax_method: str | None = None
    entmax_topk: int = 100
    entmax_n_iter: int = 50

    def validate_sparsity(self):
        """alpha and the method are known and fit each other."""
        validate_alpha(self, "attention_alpha", self.learn_attention_alpha)
        validate_method(self, () if self.learn_attention_alpha else (self.attention_alpha,))
        for name in ("entmax_topk", "entmax_n_iter"):
            if getattr(self, name) < 1:
                raise self.reject(name, "at least 1")

    @classmethod
    def from_size(cls, size: str, **overrides: Any) -> Self:
        """One of the sizes in `SIZES`."""
        if size not in cls.SIZES:
            raise ValueError(f"{cls.__name__} has no size {size!r}; there are {', '.join(cls.SIZES)}.")
        return cls(**(cls.SIZES[size] | overrides))
