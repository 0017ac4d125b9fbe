"""RealFormer: Transformer Likes Residual Attention.

Ruining He, Anirudh Ravula, Bhargav Kanagal, Joshua Ainslie, 2020 (Findings of ACL 2021), arXiv 2012.11747. Official
code: google-research/google-research, folder realformer (Apache-2.0, TensorFlow). BERT in which head h of a layer adds
its raw scores to those of head h of all layers before: softmax(sum of q k^T / sqrt(d)), or of their mean. Parameters
and their names are BERT's, so BERT's checkpoints load as they are.

What is easily got wrong, and how it is here:
* what goes on is the sum of raw scores, before mask, softmax and dropout, and with its gradient;
* the mean divides for the softmax only. The fast path carries the mean itself and weighs it by l / (l + 1), which is
  the same sum with one pass less; and it starts the sum from the mask, added once, which no later layer can undo
  (an additive mask and the mean go the plain way);
* sum and softmax are computed in float32, also under autocast and in a half-precision model;
* the GELU is the tanh form of the official code, `hidden_act="gelu_new"`;
* heads are matched by their number across layers, so one head can only be pruned in all layers.

What it costs, against the fused attention of plain BERT: the scores are written out. A forward pass without gradients
holds one (B, H, T, T) tensor through the layers, and from 512 tokens on (CPU, float32) nothing else of that size;
below, the probabilities of the layer that runs as well. Training keeps the probabilities of every layer for backward
(and what dropout made of them), as any attention with dropout on a CPU does.

Not in the paper: `normalize_before`, and `residual_attention=False`, which is BERT.
"""

import torch
from torch import nn

from ..configuration.configuration_realformer import RealformerConfig
from .layers.attention import EncoderAttention, EncoderSelfAttention
from .layers.encoder import (
    Encoder,
    EncoderLayer,
    EncoderModel,
    EncoderPreTrainedModel,
    PreNormEncoderAttention,
    PreNormEncoderLayer,
)
from .layers.heads import (
    MaskedLMHead,
    MultipleChoiceHead,
    NextSentencePredictionHead,
    PreTrainingHead,
    QuestionAnsweringHead,
    SequenceClassificationHead,
    TokenClassificationHead,
)
from .layers.scores import accumulate_scores, attend, attend_in_blocks


LONG = 512
"""Length from which on a pass without gradients on a CPU goes through the scores block by block. (The fused kernel
with the scores so far as its mask, and a second product for the sum, was measured to be slower.)"""


class RealformerSelfAttention(EncoderSelfAttention):
    """softmax((Prev + q k^T / sqrt(d)) [/ number of layers] + mask) v."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        scores: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Returns the context (B, T, D), the probabilities (B, H, T, T) where they were computed, and the scores for
        the next layer (B, H, T, T).
        """
        config = self.config
        if not config.residual_attention or config.num_hidden_layers == 1:
            return *super().forward(hidden_states, attention_mask, **kwargs), None
        query, key, value = self.project(hidden_states)
        # a mask is the same in every mean; the fast path's would shrink, which padding does not show but a bias does
        biased = config.use_running_mean and attention_mask is not None and attention_mask.is_floating_point()
        if config._attn_implementation == "eager" or biased:
            context, probabilities, scores = self._plain(query, key, value, attention_mask, scores)
        else:
            recorded = kwargs.get("output_attentions", config.output_attentions)
            context, probabilities, scores = self._fast(query, key, value, attention_mask, scores, recorded)
        return context.flatten(-2), probabilities, scores

    def _plain(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scores: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The equations one by one, the reference of the fast path; `scores` is the sum."""
        raw = query @ key.mT * self.score_scale()  # (B, H, T, T)
        raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
        scores = raw if scores is None else scores + raw  # Cur_l = raw_l + Prev_l
        logits = scores / (self.layer_idx + 1) if self.config.use_running_mean else scores
        if attention_mask is not None:
            logits = logits + attention_mask.clamp(min=torch.finfo(attention_mask.dtype).min)
        probabilities = nn.functional.softmax(logits, dim=-1).to(value.dtype)
        dropped = nn.functional.dropout(probabilities, self.dropout_prob, self.training)
        return (dropped @ value).transpose(1, 2), probabilities, scores

    def _fast(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scores: torch.Tensor | None,
        recorded: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """The same with the mask in the first layer's `scores`, which are the mean if the mean is used."""
        depth = self.layer_idx + 1
        scale, keep = self.score_scale(), 1.0
        if self.config.use_running_mean:
            scale, keep = scale / depth, (depth - 1) / depth if depth > 1 else 1.0  # A_l = (l A_{l-1} + raw_l)/(l+1)
        if scores is None and attention_mask is not None:
            wide = torch.promote_types(query.dtype, torch.float32)
            smallest = torch.finfo(wide).min
            if attention_mask.dtype == torch.bool:
                scores = torch.where(attention_mask, 0.0, smallest).to(wide)  # (B, 1, T, T)
            else:
                scores = attention_mask.to(wide).clamp(min=smallest)  # a copy: it is the caller's
        in_place = not (self.training or torch.is_grad_enabled())  # checkpointing keeps its inputs
        if in_place and not recorded and query.shape[-2] >= LONG and not torch.compiler.is_compiling():
            if query.device.type == "cpu" and query.dtype == torch.float32:
                context, scores = attend_in_blocks(scores, query, key, value, scale, keep)
                return context, None, scores
        scores = accumulate_scores(scores, query, key, scale, keep, in_place)
        context, probabilities = attend(scores, value, self.dropout_prob, self.training)
        return context, probabilities, scores


class RealformerAttention(EncoderAttention):
    """BERT's attention block that hands the scores on."""

    self_class = RealformerSelfAttention

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        scores: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T, D) -> (B, T, D), and the scores for the next layer."""
        context, _, scores = self.self(hidden_states, attention_mask, scores, **kwargs)
        return self.output(context, hidden_states), scores


class RealformerLayer(EncoderLayer):
    """BERT's layer that hands the scores on."""

    attention_class = RealformerAttention
    returns_tuple = True

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        scores: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T, D) -> (B, T, D), and the scores for the next layer."""
        hidden_states, scores = self.attention(hidden_states, attention_mask, scores, **kwargs)
        return self.output(self.intermediate(hidden_states), hidden_states), scores


class RealformerPreNormAttention(PreNormEncoderAttention):
    """The pre-norm attention block that hands the scores on."""

    self_class = RealformerSelfAttention

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        scores: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T, D) -> (B, T, D), and the scores for the next layer."""
        context, _, scores = self.self(self.LayerNorm(hidden_states), attention_mask, scores, **kwargs)
        return self.output(context, hidden_states), scores


class RealformerPreNormLayer(PreNormEncoderLayer):
    """The pre-norm layer that hands the scores on."""

    attention_class = RealformerPreNormAttention
    returns_tuple = True

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        scores: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T, D) -> (B, T, D), and the scores for the next layer."""
        hidden_states, scores = self.attention(hidden_states, attention_mask, scores, **kwargs)
        return self.output(self.intermediate(self.LayerNorm(hidden_states)), hidden_states), scores


class RealformerEncoder(Encoder):
    """A stack of layers through which the scores run; with pre-norm layers it ends in a LayerNorm."""

    def __init__(self, config: RealformerConfig, layer_class: type[nn.Module]):
        super().__init__(config, layer_class)
        if config.normalize_before:
            self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        else:
            self.LayerNorm = None

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)."""
        scores = None
        for layer in self.layer:
            hidden_states, scores = layer(hidden_states, attention_mask, scores, **kwargs)
        return hidden_states if self.LayerNorm is None else self.LayerNorm(hidden_states)


class RealformerPreTrainedModel(EncoderPreTrainedModel):
    """Base of the RealFormer classes."""

    config: RealformerConfig
    _supports_flex_attn = False  # it does not return scores

    def build_encoder(self, add_pooling_layer: bool) -> "RealformerModel":
        return RealformerModel(self.config, add_pooling_layer)


class RealformerModel(EncoderModel, RealformerPreTrainedModel):
    """The RealFormer encoder."""

    encoder_class = RealformerEncoder

    @property
    def layer_class(self) -> type[nn.Module]:
        """Post-norm as in the paper, or pre-norm."""
        return RealformerPreNormLayer if self.config.normalize_before else RealformerLayer


class RealformerForPreTraining(PreTrainingHead, RealformerPreTrainedModel):
    """Masked language model and next-sentence prediction; the second is left out by
    `next_sentence_prediction=False`.
    """

    @staticmethod
    def uses_pooler(config: RealformerConfig) -> bool:
        return config.next_sentence_prediction

    def loss_weights(self) -> dict[str, float]:
        return {"mlm": self.config.masked_lm_loss_weight, "sentence": self.config.next_sentence_loss_weight}


class RealformerForMaskedLM(MaskedLMHead, RealformerPreTrainedModel):
    """RealFormer as a masked language model."""


class RealformerForNextSentencePrediction(NextSentencePredictionHead, RealformerPreTrainedModel):
    """RealFormer deciding whether a segment follows another."""


class RealformerForSequenceClassification(SequenceClassificationHead, RealformerPreTrainedModel):
    """RealFormer with a classification or regression layer on the pooled first token."""


class RealformerForTokenClassification(TokenClassificationHead, RealformerPreTrainedModel):
    """RealFormer with a classification layer on every token."""


class RealformerForQuestionAnswering(QuestionAnsweringHead, RealformerPreTrainedModel):
    """RealFormer with start and end scores of an answer span."""


class RealformerForMultipleChoice(MultipleChoiceHead, RealformerPreTrainedModel):
    """RealFormer scoring several choices."""
