"""Rethinking Positional Encoding in Language Pre-training (TUPE).

Guolin Ke, Di He, Tie-Yan Liu, 2020 (ICLR 2021), arXiv 2006.15595. Official code: guolinke/TUPE (MIT, fairseq). Scores
are (x W_Q)(x W_K)^T / sqrt(2d) + v, where v comes from the positions alone by projections of its own, is the same in
all layers, and is replaced by learned numbers where [CLS] is the query or the key.

What is easily got wrong, and how it is here:
* both terms are divided by sqrt(2d); the relative bias is added as it is;
* one pair of position projections, with biases, after a LayerNorm of the position vectors, for all layers; v is
  computed once per forward pass;
* the input has neither position nor segment embeddings; `token_type_ids` are accepted and not used;
* from and to [CLS] the absolute and the relative part are both reset, the row last: [CLS] to itself is theta_1. (A row
  of equal scores cancels in the softmax, so theta_1 and its bucket stay where they were initialised; they are kept
  because the official checkpoint has them.)
* [CLS] is the token with position 0, wherever it stands. Rows that begin with padding are counted from their first
  real token; a mask (B, 1, T, T), as packed rows have it, needs `position_ids`;
* v is computed in float32 whatever the type of the model.

Differences from the official code:
* hidden states of padding are not set to zero after the embeddings: no token sees them;
* there is no dropout after the activation (its rate is 0 in all published commands);
* buckets of distances are computed where they are needed; the official code stores the table of all pairs.
"""

import math

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from ..configuration.configuration_tupe import TupeConfig
from .layers.attention import EncoderAttention, EncoderSelfAttention
from .layers.dropout import Dropout
from .layers.encoder import (
    Encoder,
    EncoderLayer,
    EncoderModel,
    EncoderPreTrainedModel,
    PreNormEncoder,
    PreNormEncoderAttention,
    PreNormEncoderLayer,
)
from .layers.heads import (
    MaskedLMHead,
    MultipleChoiceHead,
    PreTrainingHead,
    QuestionAnsweringHead,
    SequenceClassificationHead,
    TokenClassificationHead,
)
from .layers.scores import accumulate_scores, attend


def relative_buckets(distance: torch.Tensor, num_buckets: int, max_distance: int) -> torch.Tensor:
    """T5's buckets of distances (key position - query position), int64 of any shape.

    The first half is for keys on the left. Of each half the first half is exact, the rest grows logarithmically up to
    `max_distance`. Bucket num_buckets / 2, distance +0, never occurs.
    """
    half = num_buckets // 2
    exact = half // 2
    size = distance.abs()
    growth = torch.log(size.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (growth * (half - exact)).long()).clamp(max=half - 1)
    return half * (distance > 0) + torch.where(size < exact, size, far)


class UntiedPositions(nn.Module):
    """The position scores v of all layers.

    Row 0 of the table gives theta_1, the score of [CLS] to all; row 1, which would be the position of [CLS], gives
    theta_2, the score of others to [CLS]; row t + 1 is position t. `relative` holds a bias for every bucket of
    distances, `num_buckets / 2` being used for [CLS] to all and one more, the last, for others to [CLS].
    """

    def __init__(self, config: TupeConfig):
        super().__init__()
        self.config = config
        self.table = nn.Embedding(config.max_position_embeddings + 1, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        if config.use_relative_bias:
            self.relative = nn.Embedding(config.relative_attention_num_buckets + 1, config.num_attention_heads)
        self._kept: tuple[list[torch.Tensor], torch.Tensor] | None = None

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """Scores (B, H, T, T) in float32 (or wider), of positions (B, T)."""
        config = self.config
        heads, head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        wide = torch.promote_types(self.table.weight.dtype, torch.float32)
        with torch.autocast(positions.device.type, enabled=False):
            # project the positions that are asked for, or the whole table once if that is less
            whole = self.plain and positions.numel() > config.max_position_embeddings
            rows = torch.cat([positions.new_tensor([0, 1]), positions.flatten() + 1])  # (2 + B * T,)
            vectors = self.table.weight if whole else self.table(rows)
            vectors = self._in(wide, self.LayerNorm, vectors.to(wide))
            query, key = (self._in(wide, projection, vectors) for projection in (self.query, self.key))
            if whole:
                query, key = (nn.functional.embedding(rows, part) for part in (query, key))
            query, key = (part.unflatten(-1, (heads, head_dim)) for part in (query, key))  # (2 + B * T, H, d)
            scale = (config.attn_scale_factor * head_dim) ** -0.5
            theta = (query[:2] * key[:2]).sum(-1) * scale  # (2, H)
            query, key = (part[2:].unflatten(0, positions.shape).transpose(1, 2) for part in (query, key))
            scores = (query * scale) @ key.mT  # (B, H, T, T)
            first = positions == 0  # (B, T)
            from_cls, to_cls = first[:, None, :, None], first[:, None, None, :]
            if config.untie_cls:
                scores = torch.where(to_cls, theta[1].view(-1, 1, 1), scores)
                scores = torch.where(from_cls, theta[0].view(-1, 1, 1), scores)
            if config.use_relative_bias:
                buckets = config.relative_attention_num_buckets
                distance = positions[:, None, :] - positions[:, :, None]  # (B, T, T)
                bucket = relative_buckets(distance, buckets, config.relative_attention_max_distance)
                if config.untie_cls:
                    bucket = torch.where(to_cls[:, 0], buckets, bucket)
                    bucket = torch.where(from_cls[:, 0], buckets // 2, bucket)
                scores = scores + self.relative(bucket).to(wide).movedim(-1, 1)
            return scores

    @property
    def plain(self) -> bool:
        """Whether the parts are those made here, with no LoRA, quantized layer or parametrization in their place."""
        return all(type(part) in (nn.Embedding, nn.LayerNorm, nn.Linear) for part in self.children())

    def _in(self, dtype: torch.dtype, module: nn.Module, states: torch.Tensor) -> torch.Tensor:
        """A linear map or LayerNorm computed in a type that may be wider than that of its parameters."""
        if not self.plain:
            return module(states.to(self.table.weight.dtype)).to(dtype)
        weight, bias = module.weight.to(dtype), module.bias.to(dtype)
        if isinstance(module, nn.LayerNorm):
            return nn.functional.layer_norm(states, module.normalized_shape, weight, bias, module.eps)
        return nn.functional.linear(states, weight, bias)

    def of_first(self, length: int) -> torch.Tensor:
        """Scores (1, H, T, T) of positions 0 ... T-1.

        In evaluation without gradients on a CPU, and if the parts are `plain`, those of the longest T so far are kept
        beside a copy of the parameters, and taken again as long as these are equal to it, number by number: reading
        them costs a sixth of the scores at base size and T = 128. (Version counters would not do: torch's fused
        optimizers and writes to `parameter.data` do not raise them.)
        """
        places = torch.arange(length, device=self.table.weight.device).unsqueeze(0)  # (1, T)
        recorded = torch.is_grad_enabled() or torch.compiler.is_compiling() or not self.plain
        if self.training or recorded or places.device.type != "cpu" or torch._C._are_functorch_transforms_active():
            self._kept = None
            return self(places)
        now = list(self.parameters())
        if self._kept is not None:
            then, scores = self._kept
            same = all(old.dtype == new.dtype and torch.equal(old, new) for old, new in zip(then, now))
            if same and scores.shape[-1] >= length:
                return scores[..., :length, :length]
        scores = self(places)
        self._kept = [parameter.detach().clone() for parameter in now], scores
        return scores


class TupeEmbeddings(nn.Module):
    """Word embeddings, LayerNorm, dropout: positions and segments are not part of the input."""

    def __init__(self, config: TupeConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.embedding_size, padding_idx=config.pad_token_id)
        if config.embedding_layer_norm:
            self.LayerNorm = nn.LayerNorm(config.embedding_size, eps=config.layer_norm_eps)
        else:
            self.LayerNorm = nn.Identity()
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
    ) -> torch.Tensor:
        """Embed `input_ids` (B, T), or take `inputs_embeds` (B, T, E) for the words; returns (B, T, E)."""
        words = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        return self.dropout(self.LayerNorm(words))


class TupeSelfAttention(EncoderSelfAttention):
    """Word scores are divided by sqrt(2d), and the position scores are in the mask."""

    def score_scale(self) -> float:
        return (self.config.attn_scale_factor * self.head_dim) ** -0.5

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the context (B, T, D), and the probabilities (B, H, T, T) where they were computed."""
        fused = self.config._attn_implementation == "sdpa" and hidden_states.device.type == "cpu"
        if not (fused and torch.is_grad_enabled() and attention_mask.requires_grad):
            return super().forward(hidden_states, attention_mask, **kwargs)
        # this kernel takes no mask that requires grad
        query, key, value = self.project(hidden_states)
        scores = accumulate_scores(attention_mask, query, key, self.score_scale())
        context, probabilities = attend(scores, value, self.dropout_prob, self.training)
        return context.flatten(-2), probabilities


class TupeAttention(EncoderAttention):
    """BERT's attention block with TUPE's scores."""

    self_class = TupeSelfAttention


class TupeLayer(EncoderLayer):
    """BERT's layer with TUPE's scores."""

    attention_class = TupeAttention


class TupePreNormAttention(PreNormEncoderAttention):
    """The pre-norm attention block with TUPE's scores."""

    self_class = TupeSelfAttention


class TupePreNormLayer(PreNormEncoderLayer):
    """The pre-norm layer with TUPE's scores."""

    attention_class = TupePreNormAttention


class TupePreTrainedModel(EncoderPreTrainedModel):
    """Base of the TUPE classes."""

    config: TupeConfig
    base_model_prefix = "tupe"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Matrices and tables from a normal distribution that is not cut, zeros for the padding row."""
        super(EncoderPreTrainedModel, self)._init_weights(module)

    def build_encoder(self, add_pooling_layer: bool) -> "TupeModel":
        return TupeModel(self.config, add_pooling_layer)


class TupeModel(EncoderModel, TupePreTrainedModel):
    """The TUPE encoder."""

    embeddings_class = TupeEmbeddings

    def __init__(self, config: TupeConfig, add_pooling_layer: bool = True):
        super().__init__(config, add_pooling_layer)
        self.positions = UntiedPositions(config)
        self.post_init()

    @property
    def layer_class(self) -> type[nn.Module]:
        """Post-norm, or the unused variant of the official code."""
        return TupePreNormLayer if self.config.normalize_before else TupeLayer

    @property
    def encoder_class(self) -> type[nn.Module]:
        """A pre-norm stack ends in a LayerNorm."""
        return PreNormEncoder if self.config.normalize_before else Encoder

    def attention_inputs(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """The mask with the position scores in it, (1 or B, H, T, T), made once for all layers."""
        batch, length = hidden_states.shape[:2]
        bias = self.positions.of_first(length) if position_ids is None else self.positions(position_ids)
        bias = bias.to(hidden_states.dtype)
        if not torch.is_grad_enabled():
            bias = bias.detach()
        if self.config._attn_implementation == "flex_attention":  # the mask is one of blocks
            return attention_mask, {"position_bias": bias.expand(batch, -1, -1, -1)}
        if attention_mask is None:
            return bias.contiguous(), {}
        if attention_mask.dtype == torch.bool:
            return torch.where(attention_mask, bias, torch.finfo(bias.dtype).min), {}
        return (bias + attention_mask).clamp(min=torch.finfo(bias.dtype).min), {}

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Encode `input_ids` (B, T) or `inputs_embeds` (B, T, E); see `EncoderModel.forward`.

        `position_ids` (1 or B, T) count the tokens of each sequence from 0, its [CLS]. They default to 0 ... T-1, or,
        for rows that begin with padding, to the distance from the first real token. The pooled token of a row is its
        first real one with position 0.

        Raises:
            ValueError: as `EncoderModel.forward`; a mask (B, 1, T, T) without `position_ids`; or positions out of
                range (looked at on a CPU, outside torch.compile).
        """
        self.check_inputs(input_ids, inputs_embeds, position_ids)
        if position_ids is not None and position_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            lowest, highest = int(position_ids.min()), int(position_ids.max())
            if lowest < 0 or highest >= self.config.max_position_embeddings:
                raise ValueError(
                    f"{type(self).__name__}: position_ids must be in [0, {self.config.max_position_embeddings}), got "
                    f"{lowest} to {highest}; count each sequence from 0, padding as 0."
                )
        if attention_mask is not None and attention_mask.dim() > 2:
            if position_ids is None:
                raise ValueError(
                    f"{type(self).__name__} got an attention_mask of shape {tuple(attention_mask.shape)}, which does "
                    "not show where sequences begin; pass position_ids, 0 at every [CLS]."
                )
        elif attention_mask is not None and position_ids is None:
            real = attention_mask != 0  # (B, T)
            right = real[:, 0] | ~real.any(1)  # (B,): the row begins with a token
            if torch.compiler.is_compiling():
                torch._assert_async(
                    right.all(), "TUPE: rows that begin with padding need position_ids under torch.compile"
                )
            elif not right.all():
                places = torch.arange(real.shape[1], device=real.device)
                position_ids = (places - real.int().argmax(1, keepdim=True)).clamp(min=0)  # (B, T)
        outputs = super().forward(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        if position_ids is not None and self.pooler is not None:
            starts = position_ids == 0  # (1 or B, T)
            if attention_mask is not None and attention_mask.dim() == 2:
                starts = starts & (attention_mask != 0)
            rows = torch.arange(len(outputs.last_hidden_state), device=starts.device)
            first = outputs.last_hidden_state[rows, starts.int().argmax(1)]  # (B, D)
            outputs.pooler_output = self.pooler(first.unsqueeze(1))
        return outputs


class TupeForPreTraining(PreTrainingHead, TupePreTrainedModel):
    """Masked language model; with `next_sentence_prediction=True` BERT's decision on the sentence pair as well."""

    @staticmethod
    def uses_pooler(config: TupeConfig) -> bool:
        return config.next_sentence_prediction

    def loss_weights(self) -> dict[str, float]:
        return {"mlm": self.config.masked_lm_loss_weight, "sentence": self.config.next_sentence_loss_weight}


class TupeForMaskedLM(MaskedLMHead, TupePreTrainedModel):
    """TUPE as a masked language model."""


class TupeForSequenceClassification(SequenceClassificationHead, TupePreTrainedModel):
    """TUPE with a classification or regression layer on the pooled first token."""


class TupeForTokenClassification(TokenClassificationHead, TupePreTrainedModel):
    """TUPE with a classification layer on every token."""


class TupeForQuestionAnswering(QuestionAnsweringHead, TupePreTrainedModel):
    """TUPE with start and end scores of an answer span."""


class TupeForMultipleChoice(MultipleChoiceHead, TupePreTrainedModel):
    """TUPE scoring several choices."""
