"""T-TA, the Transformer-based Text Autoencoder: Fast and Accurate Deep Bidirectional Language Representations for
Unsupervised Learning.

Shin, Lee, Yoon, Jung, 2020 (ACL 2020), arXiv 2004.08097. Official code: joongbo/tta (Apache-2.0, TensorFlow, made from
google-research/bert). Every token is predicted from all the others in one pass: p(x_i | x_{!=i}) for all i.

Two streams. The content C = dropout(LN(E[x] + position)) gives keys and values of every layer; it is never updated
(input isolation). The queries start without the text, q^0 = dropout(LN(E[MASK] + position)), and alone pass through
the residual connections. The diagonal of the attention is masked. So x_i reaches output i by no path, in any number of
layers. Parameter names are BERT's; the modules that are not there are the token types and the decision on pairs.

Differences from the paper:
* it starts the queries from positions alone; the code adds the [MASK] embedding, and so does the default here
  (`query_token_id=None` is the paper's form). Neither knows the text.
* the heads for labelled tasks are ours: the paper uses the model without labels. The output at a token leaves that
  token out, so heads that judge tokens one by one (TokenClassification, QuestionAnswering) read q^L_i + C_i; heads on
  the first token (SequenceClassification, MultipleChoice) read q^L_0, which has seen every other token.

Differences from the official code:
* the diagonal and padding are masked exactly. The official -10000 lets a token that is alone in its sequence see
  itself; here attention over nothing is zero, so that output depends on the position only;
* the queries at padding start from [PAD], as there; with `query_token_id=None` from the position, as everywhere;
* `token_type_ids` are accepted, since tokenizers return them, and ignored: the model has no token types;
* a pooler exists only where a head reads it; the official one is in the checkpoint, untrained.

Keys and values of all layers are projected layer by layer: one product for all of them, which the constant content
allows, was no faster on a CPU (32 to 512 tokens of width 512), and sharding and checkpointing work on layers.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput
from transformers.utils.output_capturing import capture_outputs

from ..configuration.configuration_tta import TtaConfig
from .layers.attention import EncoderAttention, EncoderSelfAttention, eager_attention_forward
from .layers.dropout import Dropout
from .layers.encoder import Encoder, EncoderLayer, EncoderModel, EncoderPreTrainedModel
from .layers.heads import (
    MaskedLMHead,
    MultipleChoiceHead,
    QuestionAnsweringHead,
    SequenceClassificationHead,
    TokenClassificationHead,
)
from .layers.linear_cross_entropy import CHUNK_LOGITS


class TtaEmbeddings(nn.Module):
    """Starts of both streams: one word table, one position table, one LayerNorm."""

    def __init__(self, config: TtaConfig):
        super().__init__()
        self.query_token_id = config.query_token_id
        self.word_embeddings = nn.Embedding(config.vocab_size, config.embedding_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.embedding_size)
        self.LayerNorm = nn.LayerNorm(config.embedding_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(
        self, input_ids: torch.Tensor | None, position_ids: torch.Tensor, inputs_embeds: torch.Tensor | None
    ) -> torch.Tensor:
        """Content C of `input_ids` (B, T), or of `inputs_embeds` (B, T, E) for the words: (B, T, E)."""
        words = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        return self.dropout(self.LayerNorm(words + self.position_embeddings(position_ids)))

    def queries(self, position_ids: torch.Tensor, real: torch.Tensor | None, batch: int) -> torch.Tensor:
        """Query stream q^0 (B, T, E) at `position_ids` (1 or B, T); `real` (B, T) is false at padding."""
        start = self.position_embeddings(position_ids)
        if self.query_token_id is not None:
            ids = torch.full((1, 1), self.query_token_id, device=start.device)
            padding = self.word_embeddings.padding_idx
            if real is not None and padding is not None:
                ids = torch.where(real, ids, padding)
            start = self.word_embeddings(ids) + start
        return self.dropout(self.LayerNorm(start).expand(batch, -1, -1))


class TtaSelfAttention(EncoderSelfAttention):
    """Queries look at the content of all tokens but their own."""

    def forward(
        self,
        queries: torch.Tensor,
        content: torch.Tensor,
        attention_mask: torch.Tensor,
        alone: torch.Tensor | None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T, D), (B, T, D) -> the context (B, T, D) and, from the eager backend, the probabilities (B, H, T, T).

        `attention_mask` and `alone` as `other_tokens` gives them.
        """
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        context, probabilities = attend(
            self,
            self.split_heads(self.query(queries)),
            self.split_heads(self.key(content)),
            self.split_heads(self.value(content)),
            attention_mask,
            dropout=self.dropout_prob if self.training else 0.0,
            scaling=self.score_scale(),
            **kwargs,
        )  # (B, T, H, d)
        if alone is not None:
            context = context.masked_fill(alone, 0)
        return context.flatten(-2), probabilities


class TtaAttention(EncoderAttention):
    """LN(q + attention(q, C)): the residual is the query's."""

    self_class = TtaSelfAttention

    def forward(
        self,
        queries: torch.Tensor,
        content: torch.Tensor,
        attention_mask: torch.Tensor,
        alone: torch.Tensor | None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T, D), (B, T, D) -> (B, T, D), and the probabilities if the backend gives them."""
        context, probabilities = self.self(queries, content, attention_mask, alone, **kwargs)
        return self.output(context, queries), probabilities


class TtaLayer(EncoderLayer):
    """y = LN(q + attention(q, C)); q = LN(y + feed_forward(y))."""

    attention_class = TtaAttention

    def forward(
        self,
        queries: torch.Tensor,
        content: torch.Tensor,
        attention_mask: torch.Tensor,
        alone: torch.Tensor | None,
        **kwargs,
    ) -> torch.Tensor:
        """Queries (B, T, D) and content (B, T, D) -> queries (B, T, D)."""
        queries, _ = self.attention(queries, content, attention_mask, alone, **kwargs)
        return self.output(self.intermediate(queries), queries)


class TtaEncoder(Encoder):
    """The layers, all of which read the same content."""

    def forward(
        self,
        queries: torch.Tensor,
        content: torch.Tensor,
        attention_mask: torch.Tensor,
        alone: torch.Tensor | None,
        **kwargs,
    ) -> torch.Tensor:
        """(B, T, D), (B, T, D) -> (B, T, D)."""
        for layer in self.layer:
            queries = layer(queries, content, attention_mask, alone, **kwargs)
        return queries


def other_tokens(
    config: PreTrainedConfig, content: torch.Tensor, attention_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Mask for content (B, T, D): a token may be seen by all but itself.

    Args:
        attention_mask: None; (B, T), non-zero at real tokens; or (B, 1 or H, T, T), boolean (true = attend) or
            additive.

    Returns:
        The mask in the form of the attention backend, and `alone` (1 or B, T, 1 or H, 1), true where nothing is left
        to see; None if there is no such place. In the mask these rows see everything, because a softmax over nothing
        is no number in some kernels; what they see is replaced by zero.

    Raises:
        ValueError: a mask of another kind.
    """
    length, backend = content.shape[1], config._attn_implementation
    if attention_mask is not None:
        tensor = isinstance(attention_mask, torch.Tensor)
        pairs = tensor and (attention_mask.dtype == torch.bool or attention_mask.is_floating_point())
        if not tensor or attention_mask.dim() not in ((2, 4) if pairs else (2,)):
            raise ValueError(
                "T-TA: attention_mask must be a tensor (batch, length), or (batch, 1 or heads, length, length) "
                f"boolean or additive, got {attention_mask.dtype if tensor else type(attention_mask).__name__} "
                f"{list(attention_mask.shape)}; the model masks the diagonal itself."
            )
    itself = torch.eye(length, dtype=torch.bool, device=content.device)  # (T, T)
    smallest = torch.finfo(content.dtype).min
    bias = None
    if attention_mask is None:
        allowed = ~itself[None, None]
    elif attention_mask.dim() == 2:
        allowed = ~itself & (attention_mask != 0)[:, None, None, :]
    elif attention_mask.dtype == torch.bool:
        allowed = ~itself & attention_mask
    else:
        allowed, bias = ~itself & (attention_mask > smallest / 2), attention_mask
    alone = None
    if attention_mask is not None or length == 1:
        empty = ~allowed.any(-1, keepdim=True)  # (1 or B, 1 or H, T, 1)
        allowed = allowed | empty
        known = not torch.compiler.is_compiling() and content.device.type == "cpu"  # elsewhere looking would wait
        alone = None if known and not empty.any() else empty.transpose(1, 2)
    if backend == "flex_attention" and (attention_mask is None or attention_mask.dim() == 2):
        return create_bidirectional_mask(config, content, attention_mask, and_mask_function=_not_itself), alone
    if bias is not None:
        return torch.where(allowed, bias.clamp(min=smallest), smallest), alone
    if backend in ("eager", "flex_attention"):
        return torch.where(allowed, 0.0, smallest).to(content.dtype), alone
    return allowed, alone


def _not_itself(batch_idx: int, head_idx: int, q_idx: int, kv_idx: int) -> bool:
    return q_idx != kv_idx


@dataclass
class TtaModelOutput(BaseModelOutputWithPooling):
    """Output of `TtaModel`. content_states (B, T, D): the content C, which knows each token itself."""

    content_states: torch.Tensor | None = None


class TtaPreTrainedModel(EncoderPreTrainedModel):
    """Base of the T-TA classes."""

    config: TtaConfig

    def build_encoder(self, add_pooling_layer: bool) -> "TtaModel":
        return TtaModel(self.config, add_pooling_layer)


class TtaModel(EncoderModel, TtaPreTrainedModel):
    """The T-TA encoder. Its state at a token tells what the other tokens say about that place."""

    embeddings_class = TtaEmbeddings
    encoder_class = TtaEncoder
    layer_class = TtaLayer

    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> TtaModelOutput:
        """Encode `input_ids` (B, T) or `inputs_embeds` (B, T, E); `token_type_ids` are ignored.

        `attention_mask` is (B, T) with 1 at real tokens, or a mask (B, 1, T, T), boolean or additive, whose diagonal
        does not matter. `position_ids` default to 0 ... T-1.

        Raises:
            ValueError: both or none of `input_ids` and `inputs_embeds`, a sequence longer than the position table, or
                a mask of another shape.
        """
        self.check_inputs(input_ids, inputs_embeds, position_ids)
        batch, length = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        if position_ids is None:
            position_ids = torch.arange(length, device=self.device).unsqueeze(0)  # (1, T)
        real = attention_mask != 0 if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2 else None
        packing = self.plan_unpadding(attention_mask, kwargs)
        if packing is not None:
            position_ids = packing.pack(position_ids.expand(batch, length))
            input_ids, inputs_embeds = (
                None if given is None else packing.pack(given) for given in (input_ids, inputs_embeds)
            )
            attention_mask, real = packing.attention_mask(), None  # (R, 1, L, L)
            batch = len(packing.index)
        content = self.embeddings(input_ids, position_ids, inputs_embeds)  # (B, T, E)
        queries = self.embeddings.queries(position_ids, real, batch)  # (B, T, E)
        if self.config.embedding_size != self.config.hidden_size:
            content, queries = self.embeddings_project(content), self.embeddings_project(queries)  # (B, T, D)
        mask, alone = other_tokens(self.config, content, attention_mask)
        queries = self.encoder(queries, content, mask, alone, **kwargs)
        if packing is not None:
            queries, content = packing.unpack(queries), packing.unpack(content)
        pooled = None if self.pooler is None else self.pooler(queries)
        return TtaModelOutput(last_hidden_state=queries, pooler_output=pooled, content_states=content)


class TtaForMaskedLM(MaskedLMHead, TtaPreTrainedModel):
    """T-TA as a language model: one pass gives, at every position, the distribution of its token given all the others.
    No token need be masked.
    """

    sees_own_token: ClassVar[bool] = False

    def token_log_likelihoods(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        scored: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """log p(x_i | x_{!=i}) for tokens `input_ids` (B, T), in one pass: (B, T) in float32.

        It is 0 where `scored` (B, T; by default the real tokens) is 0. Vocabulary logits are held for some rows at a
        time only.
        """
        states = self.base_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if scored is None:
            scored = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        scored = scored != 0
        rows, tokens = states[scored], input_ids[scored]  # (N, D), (N,)
        size = max(1, CHUNK_LOGITS // self.config.vocab_size)
        likelihoods = [
            -F.cross_entropy(self.cls.predictions(some).float(), their_tokens, reduction="none")
            for some, their_tokens in zip(rows.split(size), tokens.split(size))
        ]
        found = torch.zeros(input_ids.shape, device=rows.device)
        return found.masked_scatter(scored, torch.cat(likelihoods))


class OwnTokenHead:
    """Mixin of heads that judge single tokens: to the state, which leaves the token out, its content is added."""

    def encode(self, *inputs, **kwargs) -> ModelOutput:
        """Output of the base model with q^L + C as its states."""
        outputs = super().encode(*inputs, **kwargs)
        outputs.last_hidden_state = outputs.last_hidden_state + outputs.content_states
        return outputs


class TtaForSequenceClassification(SequenceClassificationHead, TtaPreTrainedModel):
    """T-TA with a classification or regression layer on the pooled first token."""


class TtaForTokenClassification(OwnTokenHead, TokenClassificationHead, TtaPreTrainedModel):
    """T-TA with a classification layer on every token, of which it sees the content too."""


class TtaForQuestionAnswering(OwnTokenHead, QuestionAnsweringHead, TtaPreTrainedModel):
    """T-TA with start and end scores of an answer span on every token, of which they see the content too."""


class TtaForMultipleChoice(MultipleChoiceHead, TtaPreTrainedModel):
    """T-TA scoring several choices."""
