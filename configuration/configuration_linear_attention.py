"""Configuration of linear attention.

Source: "Exploring linear attention: must attention have a softmax?", Su Jianlin, 2020, spaces.ac.cn/archives/7546, a
survey of Katharopoulos et al., 2020, arXiv 2006.16236 (code idiap/fast-transformers, MIT), and Shen et al., 2018,
arXiv 1812.01243 (code cmsflash/efficient-attention), with a form of its own.
"""

from typing import ClassVar, Self

from huggingface_hub.dataclasses import strict

from .kernel_settings import KernelEncoderConfig


KERNELS = ("elu", "double_softmax", "cosine", "scaling", "relu", "sigmoid", "exp", "square")


@strict
class LinearAttentionConfig(KernelEncoderConfig):
    """A BERT-like network with linear attention. Defaults are BERT-base with elu(x) + 1.

    Args:
        attention_kernel: "elu" (elu(x) + 1, Katharopoulos), "double_softmax" (softmax over the features of queries
            and over the positions of keys, Shen), "cosine" (1 + cos(q, k), Su), "scaling" (q . k / length, Shen; no
            weighted average, bidirectional only), or the features relu(x), sigmoid(x), exp(x), x^2.
        causal_double_softmax: what "double_softmax" is for a decoder: "prefix", a softmax over the positions so far
            for every feature, equal to the bidirectional form at the last position; "shared_denominator", exp(k)
            and one denominator, as in common libraries.
        denominator_eps: added to the denominator (fast-transformers: 1e-6); "double_softmax" in the prefix form and
            "scaling" have none.
        qk_scale: factor of queries and of keys before the features.
    """

    model_type = "bestiary-linear-attention"

    SIZES: ClassVar[dict[str, dict[str, int]]] = {
        name: {
            "num_hidden_layers": layers,
            "hidden_size": heads * width,
            "num_attention_heads": heads,
            "intermediate_size": 4 * heads * width,
        }
        for name, layers, heads, width in (("copy", 4, 8, 32), ("mnist", 8, 8, 32), ("base", 12, 12, 64))
    }
    """Katharopoulos et al.'s copy task and MNIST (width 32 a head), and BERT-base."""

    layer_norm_eps: float = 1e-5
    max_position_embeddings: int = 8192

    attention_kernel: str = "elu"
    causal_double_softmax: str = "prefix"
    denominator_eps: float | int = 1e-6
    qk_scale: float | int = 1.0

    def validate_linear_attention(self):
        """Names are known, numbers in their range, and the kernel exists for a decoder."""
        self.choose("attention_kernel", KERNELS)
        self.choose("causal_double_softmax", ("prefix", "shared_denominator"))
        if self.denominator_eps < 0:
            raise self.reject("denominator_eps", "at least 0")
        if self.qk_scale <= 0:
            raise self.reject("qk_scale", "above 0")
        if self.is_decoder and self.attention_kernel == "scaling":
            raise self.reject("attention_kernel", "another one for a decoder, since it divides by the whole length")

    @classmethod
    def from_size(cls, size: str, **overrides) -> Self:
        """One of the sizes in `SIZES`."""
        if size not in cls.SIZES:
            raise ValueError(f"{cls.__name__} has no size {size!r}; there are {', '.join(cls.SIZES)}.")
        return cls(**(cls.SIZES[size] | overrides))
