"""Exploring linear attention: must attention have a softmax? A family of attentions in linear time.

Su Jianlin, 2020-07-04, spaces.ac.cn/archives/7546, a survey without code or experiments, of: Katharopoulos, Vyas,
Pappas, Fleuret, "Transformers are RNNs", 2020 (ICML), arXiv 2006.16236, code idiap/fast-transformers (MIT); Shen,
Zhang, Zhao, Yi, Li, "Efficient Attention", 2018, arXiv 1812.01243, code cmsflash/efficient-attention; and of a
similarity of its own, 1 + cos(q, k), from the first-order Taylor series of exp. Parameter names are BERT's.

Decisions, and differences from those codes:
* padded keys are out of numerator and denominator (several codes zero the values only): for "cosine" the constant
  feature counts real keys, for "double_softmax" the softmax over positions runs over real keys;
* "double_softmax": over features for queries, over positions for keys, and no denominator after it. The paper defines
  nothing causal; "prefix" is a softmax over the positions so far, "shared_denominator" the form of common libraries;
* "cosine" divides vectors by norms of at least 1e-6, so that zero vectors are harmless. One third-party module puts an
  epsilon into the sum of keys instead (differences of 1e-7). Its weights lie in [0, 2] and near 1: nearly uniform;
* exp of keys without a maximum over positions, which would be a look into the future: keys are cut at +-30, where
  float32 holds all sums, their products and gradients. Keys of a trained network are far from that;
* elu(x) + 1 rounds to 0 below -17 in float32; the epsilon of the denominator then gives 0 and not NaN;
* sums and denominators are in float32 under autocast; no 1 / sqrt(d), as in all three sources;
* rotary positions come before the features, so that similarities stay non-negative;
* dropout of attention probabilities is not defined and not done; masks of single pairs are refused;
* fast-transformers' encoder is the post-norm layer here with `final_layer_norm`; its chunk is replaced by 64, which is
  fastest on CPU.
"""

import torch
import torch.nn.functional as F
from transformers.generation import GenerationMixin

from ..configuration.configuration_linear_attention import LinearAttentionConfig
from .layers.attention import EncoderAttention
from .layers.causal_lm import BidirectionalLMHead, CausalLMHead, LanguageModelPretrainingHead
from .layers.encoder import EncoderLayer, PreNormEncoderAttention, PreNormEncoderLayer
from .layers.heads import (
    MultipleChoiceHead,
    QuestionAnsweringHead,
    SequenceClassificationHead,
    TokenClassificationHead,
)
from .layers.kernel_attention import FUNCTIONS, KernelSelfAttention, bounded_exp
from .layers.kernel_encoder import KernelEncoderModel, KernelPreTrainedModel


class LinearSelfAttention(KernelSelfAttention):
    """Linear attention by `config.attention_kernel`."""

    def __init__(self, config: LinearAttentionConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.kernel = config.attention_kernel
        self.is_prefix = self.kernel == "double_softmax" and config.is_decoder
        self.is_prefix &= config.causal_double_softmax == "prefix"
        normalised = self.kernel == "double_softmax" and not config.is_decoder
        self.has_denominator = not normalised and self.kernel != "scaling"
        self.denominator_eps = config.denominator_eps

    def features(self, query, key, key_mask, state):
        scale = self.config.qk_scale
        if scale != 1:
            query, key = query * scale, key * scale
        if self.kernel in FUNCTIONS:  # Katharopoulos et al., equation 7, and the survey
            return FUNCTIONS[self.kernel](query), FUNCTIONS[self.kernel](key)
        if self.kernel == "cosine":  # features [1, x / |x|]
            return tuple(F.pad(F.normalize(states, dim=-1, eps=1e-6), (1, 0), value=1.0) for states in (query, key))
        if self.kernel == "scaling":
            length = key.shape[2] if key_mask is None else key_mask.sum(2, keepdim=True).clamp(min=1)
            return query, key / length
        query = query.softmax(-1)
        if not self.config.is_decoder:
            key = key if key_mask is None else key.masked_fill(~key_mask, torch.finfo(key.dtype).min)
            return query, key.softmax(-2)
        key = bounded_exp(key)  # (B, H, T, d)
        if self.is_prefix:
            # numerators of all features, each over its own sum so far: the sums go to the queries
            sums = (key if key_mask is None else key * key_mask).cumsum(2)
            if state is not None:
                sums = sums + state[..., -1].unsqueeze(2)
            query = query / sums.clamp(min=torch.finfo(sums.dtype).tiny)
        return query, key

    def normalise(self, sums):
        if self.is_prefix:
            return sums[..., :-1]  # the weights sum to 1 already
        return super().normalise(sums)


class LinearAttention(EncoderAttention):
    """Linear attention, output projection, residual, LayerNorm."""

    self_class = LinearSelfAttention


class LinearAttentionLayer(EncoderLayer):
    """Post-norm layer, as BERT's."""

    attention_class = LinearAttention


class PreNormLinearAttention(PreNormEncoderAttention):
    """LayerNorm, linear attention, output projection, residual."""

    self_class = LinearSelfAttention


class PreNormLinearAttentionLayer(PreNormEncoderLayer):
    """Pre-norm layer."""

    attention_class = PreNormLinearAttention


class LinearAttentionPreTrainedModel(KernelPreTrainedModel):
    """Base of the linear-attention classes."""

    config: LinearAttentionConfig
    base_model_prefix = "bert"

    def build_encoder(self, add_pooling_layer: bool) -> "LinearAttentionModel":
        return LinearAttentionModel(self.config, add_pooling_layer)


class LinearAttentionModel(KernelEncoderModel, LinearAttentionPreTrainedModel):
    """The encoder, or with `is_decoder` decoder."""

    post_norm_layer_class = LinearAttentionLayer
    pre_norm_layer_class = PreNormLinearAttentionLayer


class LinearAttentionForPreTraining(LanguageModelPretrainingHead, LinearAttentionPreTrainedModel):
    """Masked language model, or next-token model with `is_decoder`."""


class LinearAttentionForMaskedLM(BidirectionalLMHead, LinearAttentionPreTrainedModel):
    """A masked language model."""


class LinearAttentionForCausalLM(CausalLMHead, LinearAttentionPreTrainedModel, GenerationMixin):
    """A next-token language model, which generates with a state of constant size."""


class LinearAttentionForSequenceClassification(SequenceClassificationHead, LinearAttentionPreTrainedModel):
    """A classification or regression layer on the pooled token."""


class LinearAttentionForTokenClassification(TokenClassificationHead, LinearAttentionPreTrainedModel):
    """A classification layer on every token."""


class LinearAttentionForQuestionAnswering(QuestionAnsweringHead, LinearAttentionPreTrainedModel):
    """Start and end scores of an answer span."""


class LinearAttentionForMultipleChoice(MultipleChoiceHead, LinearAttentionPreTrainedModel):
    """Scores of several choices."""
