"""Rethinking Attention with Performers: softmax attention estimated by random features in linear time (FAVOR+).

Choromanski, Likhosherstov, Dohan, Song, Gane, Sarlos, Hawkins, Davis, Mohiuddin, Kaiser, Belanger, Colwell, Weller,
2021 (ICLR), arXiv 2009.14794. Official code: google-research/google-research, performer/fast_attention (Apache-2.0,
JAX and TensorFlow; attention only). The common PyTorch code is lucidrains/performer-pytorch (MIT), written P below.
Parameter names are BERT's, so that BERT's checkpoints load; the projections are then drawn, and a little training is
needed, because errors of the estimate add up over layers.

Decisions, and differences from the paper and from both codes:
* padded keys are left out of numerator, denominator and maximum; the official code knows no padding, P leaves their
  features in the denominator (`mask_values_only` does as P);
* a decoder's keys subtract no maximum over the sequence. In exact arithmetic it cancels, but epsilon and underflow
  make it a look into the future; exponents are below |w|^2 / 2, in float32 far from overflow for heads up to 128 wide
  (`key_stabilizer="sequence"` does as the official code, and cannot decode with a state);
* orthogonal blocks are made uniform by the signs of R; the official blocks are not, and estimates are some per cent
  off (`orthogonal_sign_fix=False`);
* projections are drawn by (seed, update, layer) at the beginning of an update, by the trainer, the same on every
  process: gradient accumulation and recomputation see one projection. JAX draws in every call, P in the forward pass;
* the projection is saved with the weights, once (P saves every weight twice);
* epsilon and the guard of the denominator are those of the paper's formula; P's are options, see the configuration.
  With the default guard of 0 a position that has seen no token gets 0;
* maxima are constants for the gradient, as in P; the official JAX code differentiates them, which gives the same up to
  epsilon;
* c = d^(-1/4) is on queries and keys; TensorFlow's factor m^(-1/2) before the ReLU equals kernel_epsilon * sqrt(m);
* the generalised kernel exp cuts its exponents at +-30, where float32 holds all sums;
* large queries and keys: features carry exp(-|c x|^2 / 2), and below epsilon attention turns uniform. The paper's
  accuracy holds for small norms; see the model card;
* features, sums and denominators are in float32 under autocast; rotary positions come before the features; dropout of
  attention probabilities is not defined and not done.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.generation import GenerationMixin

from ..configuration.configuration_performer import PerformerConfig
from .layers.attention import EncoderAttention
from .layers.causal_lm import BidirectionalLMHead, CausalLMHead, LanguageModelPretrainingHead
from .layers.encoder import EncoderLayer, PreNormEncoderAttention, PreNormEncoderLayer
from .layers.heads import (
    MultipleChoiceHead,
    QuestionAnsweringHead,
    SequenceClassificationHead,
    TokenClassificationHead,
)
from .layers.kernel_attention import FUNCTIONS, KernelSelfAttention, runs_eagerly_on_cpu
from .layers.kernel_encoder import KernelEncoderModel, KernelPreTrainedModel
from .layers.random_features import (
    causal_positive_attention,
    draw_projection,
    positive_attention,
    positive_features,
    projection_generator,
    trigonometric_features,
)


class PerformerSelfAttention(KernelSelfAttention):
    """FAVOR+ (section 2). One projection (m, d) for all heads of a layer, in a buffer that is saved."""

    def __init__(self, config: PerformerConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.mask_values_only = config.mask_values_only
        if config.projects:
            shape = (config.num_random_features, self.head_dim)
            self.projection_matrix = nn.Buffer(torch.empty(shape, dtype=torch.float32))

    def new_projection(self, seed: int, draw: int) -> torch.Tensor:
        """The projection (m, d) of this layer at the `draw`-th drawing."""
        config = self.config
        return draw_projection(
            config.num_random_features,
            self.head_dim,
            projection_generator(seed, draw, self.layer_idx),
            config.orthogonal_features,
            config.ortho_scaling,
            config.orthogonal_sign_fix,
        )

    def features(self, query, key, key_mask, state):
        config = self.config
        scale, epsilon, sequence = config.query_key_scale, config.feature_epsilon, config.stabilizer == "sequence"
        maximum = "sequence" if sequence else "none"
        if not config.is_softmax:
            function = FUNCTIONS[config.attention_kernel.removeprefix("generalized_")]
            if config.projects:
                weight = (self.projection_matrix.to(query.dtype) * scale).T
                query, key = query @ weight, key @ weight  # (B, H, T, m)
            elif scale != 1.0:
                query, key = query * scale, key * scale
            return function(query) + epsilon, function(key) + epsilon
        weight = self.projection_matrix.to(query.dtype)
        if config.attention_kernel == "softmax_trig":
            return (
                trigonometric_features(query, weight, scale, maximum if sequence else "row"),
                trigonometric_features(key, weight, scale, maximum, key_mask),
            )
        return (
            positive_features(query, weight, scale, epsilon, "row"),
            positive_features(key, weight, scale, epsilon, maximum, key_mask),
        )

    def bidirectional(self, query, key, value, key_mask):
        config = self.config
        if config.attention_kernel != "softmax_positive" or not runs_eagerly_on_cpu(query):
            return super().bidirectional(query, key, value, key_mask)
        return positive_attention(
            query,
            key,
            value,
            self.projection_matrix.to(query.dtype),
            config.query_key_scale,
            config.feature_epsilon,
            config.stabilizer,
            key_mask,
        )

    def causal(self, query, key, value, key_mask, state):
        config = self.config
        one_token = query.shape[2] == 1 and not torch.is_grad_enabled()
        streams = config.attention_kernel == "softmax_positive" and config.stabilizer == "none" and not one_token
        if not streams or not runs_eagerly_on_cpu(query):
            return super().causal(query, key, value, key_mask, state)
        return causal_positive_attention(
            query,
            key,
            value,
            self.projection_matrix.to(query.dtype),
            config.query_key_scale,
            config.feature_epsilon,
            config.chunk_size,
            self.initial_state(value, config.num_random_features) if state is None else state,
            key_mask,
        )

    def initial_state(self, value, width):
        state = super().initial_state(value, width)
        state[..., -1] = self.config.key_sum_epsilon
        return state

    def normalise(self, sums):
        if not self.config.renormalize_attention:
            return sums[..., :-1]
        guard = self.config.denominator_guard
        if guard:
            total = sums[..., -1:]
            return sums[..., :-1] / (total + 2 * guard * (total.abs() <= guard))
        return super().normalise(sums)


class PerformerAttention(EncoderAttention):
    """FAVOR+, output projection, residual, LayerNorm."""

    self_class = PerformerSelfAttention


class PerformerLayer(EncoderLayer):
    """Post-norm layer, as BERT's."""

    attention_class = PerformerAttention


class PreNormPerformerAttention(PreNormEncoderAttention):
    """LayerNorm, FAVOR+, output projection, residual."""

    self_class = PerformerSelfAttention


class PreNormPerformerLayer(PreNormEncoderLayer):
    """Pre-norm layer, as performer-pytorch's."""

    attention_class = PreNormPerformerAttention


class PerformerPreTrainedModel(KernelPreTrainedModel):
    """Base of the Performer classes."""

    config: PerformerConfig
    base_model_prefix = "bert"

    def build_encoder(self, add_pooling_layer: bool) -> "PerformerModel":
        return PerformerModel(self.config, add_pooling_layer)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PerformerSelfAttention) and self.config.projects:
            init.copy_(module.projection_matrix, module.new_projection(self.config.feature_seed, 0))

    @torch.no_grad()
    def redraw_projections(self, seed: int, draw: int) -> None:
        """Give every layer the projection of the `draw`-th drawing; the same numbers on every process."""
        for module in self.modules():
            if isinstance(module, PerformerSelfAttention) and self.config.projects:
                module.projection_matrix.copy_(module.new_projection(seed, draw))


class PerformerModel(KernelEncoderModel, PerformerPreTrainedModel):
    """The Performer encoder, or with `is_decoder` decoder."""

    post_norm_layer_class = PerformerLayer
    pre_norm_layer_class = PreNormPerformerLayer

    def check_decoding(self) -> None:
        if self.config.stabilizer == "sequence" and self.config.is_decoder and self.config.is_softmax:
            raise ValueError(
                f"{type(self).__name__}: key_stabilizer='sequence' looks at the whole sequence, so there is no state "
                "to decode with; set key_stabilizer='none', or generate with use_cache=False."
            )
        super().check_decoding()


class PerformerForPreTraining(LanguageModelPretrainingHead, PerformerPreTrainedModel):
    """Masked language model, or next-token model with `is_decoder`."""


class PerformerForMaskedLM(BidirectionalLMHead, PerformerPreTrainedModel):
    """Performer as a masked language model."""


class PerformerForCausalLM(CausalLMHead, PerformerPreTrainedModel, GenerationMixin):
    """Performer as a next-token language model, which generates with a state of constant size."""


class PerformerForSequenceClassification(SequenceClassificationHead, PerformerPreTrainedModel):
    """Performer with a classification or regression layer on the pooled token."""


class PerformerForTokenClassification(TokenClassificationHead, PerformerPreTrainedModel):
    """Performer with a classification layer on every token."""


class PerformerForQuestionAnswering(QuestionAnsweringHead, PerformerPreTrainedModel):
    """Performer with start and end scores of an answer span."""


class PerformerForMultipleChoice(MultipleChoiceHead, PerformerPreTrainedModel):
    """Performer scoring several choices."""
