"""What configurations of encoders and decoders with linear-time attention share."""

from huggingface_hub.dataclasses import strict

from .configuration_core import EncoderConfig


@strict
class KernelEncoderConfig(EncoderConfig):
    """Fields of a BERT-like network whose attention is a product of features, bidirectional or causal.

    `attention_probs_dropout_prob` is without effect, since there are no probabilities.

    Args:
        is_decoder: whether a token sees only itself and earlier ones; causal language models set it.
        use_cache: whether `generate()` keeps a decoder's state between tokens; a forward pass returns it only if its
            own `use_cache` is true.
        chunk_size: tokens whose products a causal pass forms directly; changes speed and memory, not results.
        position_embedding_type: "absolute" (a learned table added to the words), "rotary" (queries and keys are
            rotated before the features) or "absolute_and_rotary".
        layer_norm_position: "post" as in BERT, or "pre".
        embedding_layer_norm: whether the embeddings end in a LayerNorm, as in BERT.
        final_layer_norm: whether a LayerNorm closes the stack of layers; "pre" always has one.
        prediction_transform: whether the language-model head has BERT's transform before the vocabulary.
        bos_token_id: id that begins a text, where generation needs one.
        eos_token_id: id that ends a text; generation stops there.
    """

    is_decoder: bool = False
    use_cache: bool = True
    chunk_size: int = 64
    position_embedding_type: str = "absolute"
    layer_norm_position: str = "post"
    embedding_layer_norm: bool = True
    final_layer_norm: bool = False
    prediction_transform: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def choose(self, field: str, allowed: tuple) -> None:
        """`ValueError` unless a field has one of the allowed values."""
        if getattr(self, field) not in allowed:
            raise self.reject(field, f"one of {', '.join(map(str, allowed))}")

    def validate_kernel_encoder(self):
        """Names are known, the chunk is positive, rotary positions find pairs, and nothing asks for packed rows."""
        self.choose("position_embedding_type", ("absolute", "rotary", "absolute_and_rotary"))
        self.choose("layer_norm_position", ("post", "pre"))
        if self.chunk_size < 1:
            raise self.reject("chunk_size", "at least 1")
        if "rotary" in self.position_embedding_type and self.hidden_size // self.num_attention_heads % 2:
            raise self.reject("position_embedding_type", "absolute, since heads of odd width have no pairs to rotate")
        if self.unpad_threshold is not None:
            raise self.reject("unpad_threshold", "None: sums over a row cannot keep packed sequences apart")
