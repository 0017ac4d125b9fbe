"""The shared encoder with attention in linear time, bidirectional or causal, and its cache.

BERT's parameter names, so that BERT's checkpoints load. What `KernelEncoderConfig` offers beside BERT: causal
attention, pre-norm layers, a closing LayerNorm, no LayerNorm on the embeddings, rotary positions.
"""

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.utils.output_capturing import capture_outputs

from .dropout import Dropout
from .embeddings import EncoderEmbeddings
from .encoder import Encoder, EncoderLayer, EncoderModel, EncoderPreTrainedModel, PreNormEncoder, PreNormEncoderLayer
from .kernel_attention import KernelCache, runs_eagerly_on_cpu


class KernelEmbeddings(EncoderEmbeddings):
    """BERT's embeddings; the position table and the LayerNorm are left out where the configuration says so."""

    def __init__(self, config):
        super().__init__(config)
        if config.position_embedding_type == "rotary":
            self.position_embeddings = None
        if not config.embedding_layer_norm:
            self.LayerNorm = nn.Identity()
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
        position_ids: torch.Tensor,
        inputs_embeds: torch.Tensor | None,
    ) -> torch.Tensor:
        """As in `EncoderEmbeddings`: (B, T) -> (B, T, E)."""
        if self.position_embeddings is not None:
            return super().forward(input_ids, token_type_ids, position_ids, inputs_embeds)
        words = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        table = self.token_type_embeddings
        types = table.weight[0] if token_type_ids is None else table(token_type_ids)
        return self.dropout(self.LayerNorm(words + types))


class KernelPreTrainedModel(EncoderPreTrainedModel):
    """What models with attention in linear time declare: the backends "sdpa" (the linear form; the name is that of
    transformers' default) and "eager" (the explicit form, which returns attention weights).
    """

    _supports_flex_attn = False
    _supports_attention_backend = False

    def check_inputs(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, position_ids: torch.Tensor | None
    ) -> None:
        """As in `EncoderPreTrainedModel`; rotary positions alone set no limit, and given positions must exist."""
        if self.config.position_embedding_type == "rotary":
            position_ids = torch.zeros((), dtype=torch.long) if position_ids is None else position_ids
        elif position_ids is not None and runs_eagerly_on_cpu(position_ids) and position_ids.numel():
            self.check_position(int(position_ids.max()))
        super().check_inputs(input_ids, inputs_embeds, position_ids)

    def check_position(self, last: int) -> None:
        """`ValueError` if the largest position is beyond the table."""
        if self.config.position_embedding_type != "rotary" and last >= self.config.max_position_embeddings:
            raise ValueError(
                f"{type(self).__name__} got position {last}, but config.max_position_embeddings is "
                f"{self.config.max_position_embeddings}; generate fewer tokens, or use rotary positions."
            )


class KernelEncoderModel(EncoderModel):
    """Embeddings, layers and pooler. A paper names its two layer classes and, as second parent, its own base."""

    embeddings_class = KernelEmbeddings
    post_norm_layer_class: type[nn.Module] = EncoderLayer
    pre_norm_layer_class: type[nn.Module] = PreNormEncoderLayer
    supports_unpadding = False

    @property
    def layer_class(self) -> type[nn.Module]:
        """By `config.layer_norm_position`."""
        before = self.config.layer_norm_position == "pre"
        return self.pre_norm_layer_class if before else self.post_norm_layer_class

    @property
    def encoder_class(self) -> type[nn.Module]:
        """A stack, with a LayerNorm at its end if the configuration has one."""
        closed = self.config.layer_norm_position == "pre" or self.config.final_layer_norm
        return PreNormEncoder if closed else Encoder

    def check_decoding(self) -> None:
        """`ValueError` unless the model can go on from a state."""
        if not self.config.is_decoder:
            raise ValueError(
                f"{type(self).__name__}: a cache needs config.is_decoder=True; here every token sees every other."
            )

    def rotary(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine, (B, 1, T, d / 2), of positions (B, T) times 10000^(-2i / d)."""
        width = self.config.hidden_size // self.config.num_attention_heads
        steps = torch.arange(0, width, 2, device=position_ids.device, dtype=torch.float32) / width
        angles = position_ids[:, None, :, None] * 10000.0**-steps
        return angles.cos(), angles.sin()

    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: KernelCache | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """Encode `input_ids` (B, T) or `inputs_embeds` (B, T, E).

        `attention_mask` (B, T), or (B, earlier tokens + T) with a cache, has 1 at real tokens. A decoder with
        `use_cache=True` returns its state as `past_key_values`; pass it with the tokens that follow. The pooler of a
        decoder reads the last real token, which alone has seen them all.

        Raises:
            ValueError: both or none of `input_ids` and `inputs_embeds`; a token beyond the position table; a mask of
                another shape, or several sequences in a row; a cache for a model that cannot use it, or attention
                weights beside a cache.
        """
        self.check_inputs(input_ids, inputs_embeds, position_ids)
        first = input_ids if inputs_embeds is None else inputs_embeds
        batch, length = first.shape[:2]
        if use_cache or past_key_values is not None:
            self.check_decoding()
            if kwargs.get("output_attentions", self.config.output_attentions):
                raise ValueError(
                    f"{type(self).__name__}: a state keeps no keys, so there are no attention weights beside it; give "
                    "use_cache=False with output_attentions=True."
                )
        if past_key_values is None:
            past_key_values = KernelCache(self.config.num_hidden_layers) if use_cache else None
        elif not isinstance(past_key_values, KernelCache) or len(past_key_values) != self.config.num_hidden_layers:
            raise ValueError(
                f"{type(self).__name__} decodes with a KernelCache of {self.config.num_hidden_layers} layers, got a "
                f"{type(past_key_values).__name__}; leave past_key_values out to start with a new one."
            )
        self.refuse_packed_rows(attention_mask, position_ids, kwargs)
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        mask = self.key_mask(attention_mask, batch, length, seen)
        if position_ids is None:
            self.check_position(seen + length - 1)
            position_ids = torch.arange(seen, seen + length, device=first.device).unsqueeze(0)
        hidden_states = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)  # (B, T, E)
        if self.config.embedding_size != self.config.hidden_size:
            hidden_states = self.embeddings_project(hidden_states)  # (B, T, D)
        if "rotary" in self.config.position_embedding_type:
            kwargs["rotary"] = self.rotary(position_ids)
        if past_key_values is not None:
            kwargs["past_key_values"] = past_key_values
        hidden_states = self.encoder(hidden_states, mask, **kwargs)
        pooled = None
        if self.pooler is not None:
            pooled = self.pooler(self.pooled_token(hidden_states, mask))
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=hidden_states, pooler_output=pooled, past_key_values=past_key_values
        )

    def refuse_packed_rows(
        self, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None, others: dict
    ) -> None:
        """`ValueError` if rows hold several sequences: lengths of such are given, or positions (B, T) start again and
        no mask says that this is padding (looked at on CPU, outside torch.compile).
        """
        packed = others.get("cu_seq_lens_q") is not None or others.get("seq_idx") is not None
        if attention_mask is None and position_ids is not None and runs_eagerly_on_cpu(position_ids):
            packed |= bool(((position_ids[..., 1:] == 0) & (position_ids[..., :-1] > 0)).any())
        if packed:
            raise ValueError(
                f"{type(self).__name__}: a row holds several sequences, which sums over the row cannot keep apart; "
                "give every sequence a row of its own, padded, with an attention_mask."
            )

    def key_mask(self, attention_mask: torch.Tensor | None, batch: int, length: int, seen: int) -> torch.Tensor | None:
        """(B, 1, T, 1), True at tokens, of a mask (B, T) or (B, seen + T); None if there is no padding."""
        if attention_mask is None:
            return None
        if attention_mask.shape not in ((batch, length), (batch, seen + length)):
            raise ValueError(
                f"{type(self).__name__}: attention_mask must have the shape (batch, length), here "
                f"{(batch, seen + length)}, got {tuple(attention_mask.shape)}; linear attention cannot keep single "
                "pairs of tokens apart."
            )
        mask = attention_mask[:, -length:].bool()
        if runs_eagerly_on_cpu(mask) and mask.all():
            return None
        return mask[:, None, :, None]

    def pooled_token(self, hidden_states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """States (B, T, D) -> (B, 1, D): the first token; of a decoder the last real one."""
        if not self.config.is_decoder:
            return hidden_states[:, :1]
        if mask is None:
            return hidden_states[:, -1:]
        last = hidden_states.shape[1] - 1 - mask[:, 0, :, 0].flip(1).int().argmax(1)  # (B,)
        return hidden_states.gather(1, last[:, None, None].expand(-1, 1, hidden_states.shape[-1]))
