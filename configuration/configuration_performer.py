"""Configuration of the Performer.

Paper: "Rethinking Attention with Performers", Choromanski, Likhosherstov, Dohan, Song, Gane, Sarlos, Hawkins, Davis,
Mohiuddin, Kaiser, Belanger, Colwell, Weller, 2021 (ICLR), arXiv 2009.14794. Official code: google-research/
google-research, performer/fast_attention (Apache-2.0).
"""

from typing import ClassVar, Self

from huggingface_hub.dataclasses import strict

from .kernel_settings import KernelEncoderConfig


FUNCTIONS = ("relu", "elu", "exp", "sigmoid", "abs", "gelu", "identity")
KERNELS = ("softmax_positive", "softmax_trig", *(f"generalized_{name}" for name in FUNCTIONS))


@strict
class PerformerConfig(KernelEncoderConfig):
    """A BERT-like network with FAVOR+ attention. Defaults are the paper's "regular" size and its softmax kernel.

    `None` in a field of the kernel means the paper's value for the kernel that is chosen.

    Args:
        attention_kernel: "softmax_positive" (FAVOR+), "softmax_trig" (sine and cosine, unstable, the paper's
            baseline) or "generalized_<f>" with f one of relu (the paper's Performer-ReLU), elu, exp, sigmoid, abs,
            gelu, identity.
        num_random_features: m, rows of the projection (paper: 256).
        use_projection: whether the generalised kernels project; None and False is f(x) on the queries and keys
            themselves, as in the paper. The softmax kernels always project.
        orthogonal_features: whether the rows of a projection are orthogonal in blocks of the width of a head.
        ortho_scaling: 0, row lengths as of normal vectors; 1, all sqrt(width of a head) (the paper's SMREG).
        orthogonal_sign_fix: whether orthogonal blocks are uniform among rotations. False is the official sampling,
            whose estimates of the softmax kernel are some per cent off.
        feature_redraw_interval: updates after which `PerformerTrainer` draws new projections; None never.
        feature_seed: of the projections that a new model starts with.
        kernel_epsilon: added to every feature (paper: 1e-6 for the softmax kernels, 1e-3 for the others;
            performer-pytorch: 1e-4 for softmax).
        normalize_data: whether queries and keys are divided by the fourth root of a head's width (paper: by the
            softmax kernels only; performer-pytorch: always).
        renormalize_attention: whether the sum of similarities divides.
        key_stabilizer: "sequence", the features of keys subtract their largest exponent in the sequence, as in the
            official code; "none", they do not, which alone is strictly causal. None is "none" for a decoder,
            "sequence" otherwise.
        denominator_guard: official guard s of the denominator R: R + 2 s where |R| <= s (official: 1e-6 for softmax;
            here 0, since padding is not counted and epsilon keeps R positive).
        key_sum_epsilon: added to the running sum of key features in causal attention (performer-pytorch: 1e-6).
        mask_values_only: leave padded keys in denominator and maximum, as performer-pytorch does by mistake.
    """

    model_type = "bestiary-performer"

    SIZES: ClassVar[dict[str, dict[str, int]]] = {
        "regular": {"num_hidden_layers": 6, "hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048},
        "trembl": {"num_hidden_layers": 36, "hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 1024},
        "bert_base": {
            "num_hidden_layers": 12,
            "hidden_size": 768,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
        },
    }
    """The paper's "regular" and protein (TrEMBL) sizes, and BERT-base."""

    hidden_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    max_position_embeddings: int = 8192

    attention_kernel: str = "softmax_positive"
    num_random_features: int = 256
    use_projection: bool | None = None
    orthogonal_features: bool = True
    ortho_scaling: int = 0
    orthogonal_sign_fix: bool = True
    feature_redraw_interval: int | None = 1000
    feature_seed: int = 0
    kernel_epsilon: float | int | None = None
    normalize_data: bool | None = None
    renormalize_attention: bool = True
    key_stabilizer: str | None = None
    denominator_guard: float | int = 0.0
    key_sum_epsilon: float | int = 0.0
    mask_values_only: bool = False

    @property
    def is_softmax(self) -> bool:
        """Whether the kernel estimates that of softmax."""
        return self.attention_kernel.startswith("softmax")

    @property
    def projects(self) -> bool:
        """Whether there is a projection."""
        return self.is_softmax or bool(self.use_projection)

    @property
    def feature_epsilon(self) -> float:
        """What is added to every feature."""
        if self.kernel_epsilon is None:
            return 1e-6 if self.is_softmax else 1e-3
        return self.kernel_epsilon

    @property
    def query_key_scale(self) -> float:
        """c, the factor of queries and of keys."""
        scaled = self.is_softmax if self.normalize_data is None else self.normalize_data
        return (self.hidden_size // self.num_attention_heads) ** -0.25 if scaled else 1.0

    @property
    def stabilizer(self) -> str:
        """`key_stabilizer`, or its default."""
        return self.key_stabilizer or ("none" if self.is_decoder else "sequence")

    def validate_performer(self):
        """Names are known, counts positive, epsilons not negative."""
        self.choose("attention_kernel", KERNELS)
        self.choose("ortho_scaling", (0, 1))
        self.choose("key_stabilizer", (None, "sequence", "none"))
        if self.num_random_features < 1:
            raise self.reject("num_random_features", "at least 1")
        if self.feature_redraw_interval is not None and self.feature_redraw_interval < 1:
            raise self.reject("feature_redraw_interval", "at least 1, or None for features that stay")
        if self.is_softmax and self.use_projection is False:
            raise self.reject("use_projection", "True or None for the softmax kernels, which are random features")
        for name in ("feature_seed", "kernel_epsilon", "denominator_guard", "key_sum_epsilon"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise self.reject(name, "at least 0")

    @classmethod
    def from_size(cls, size: str, **overrides) -> Self:
        """One of the sizes in `SIZES`."""
        if size not in cls.SIZES:
            raise ValueError(f"{cls.__name__} has no size {size!r}; there are {', '.join(cls.SIZES)}.")
        return cls(**(cls.SIZES[size] | overrides))
