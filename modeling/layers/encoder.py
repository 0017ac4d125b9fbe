"""The shared encoder: layers (post-norm and pre-norm), stack, pooler and base model. It knows no paper.

A paper names its parts by class attributes (`layer_class`, `attention_class`, `self_class`, `embeddings_class`) and
overrides the hooks `position_bias`, `score_scale` or `project`. A paper that changes the order of the parts writes
its own layer.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.output_capturing import capture_outputs

from .attention import EncoderAttention, EncoderSelfAttention, additive_mask
from .embeddings import EncoderEmbeddings
from .feed_forward import Intermediate, PreNormOutput, ResidualOutput
from .pretrained import BestiaryPreTrainedModel
from .unpadding import PackedRows, padding_share, plan_packing


class EncoderLayer(GradientCheckpointingLayer):
    """Post-norm layer of BERT: x = LN(x + attention(x)); x = LN(x + feed_forward(x))."""

    attention_class: type[nn.Module] = EncoderAttention
    returns_tuple = False
    """Whether something goes to the next layer beside the hidden states."""

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.attention = self.attention_class(config, layer_idx)
        self.intermediate = Intermediate(config)
        self.output = ResidualOutput(config, config.intermediate_size)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> torch.Tensor:
        """(B, T, D) -> (B, T, D); `attention_mask` in the form of the chosen attention backend."""
        hidden_states, _ = self.attention(hidden_states, attention_mask, **kwargs)
        return self.output(self.intermediate(hidden_states), hidden_states)


class PreNormEncoderAttention(nn.Module):
    """x + attention(LN(x))."""

    self_class: type[nn.Module] = EncoderSelfAttention

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self = self.self_class(config, layer_idx)
        self.output = PreNormOutput(config, config.hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T, D) -> (B, T, D), and the probabilities if the backend gives them."""
        context, probabilities = self.self(self.LayerNorm(hidden_states), attention_mask, **kwargs)
        return self.output(context, hidden_states), probabilities


class PreNormEncoderLayer(EncoderLayer):
    """Pre-norm layer: x = x + attention(LN(x)); x = x + feed_forward(LN(x)).

    Needs `PreNormEncoder`, which normalises last.
    """

    attention_class = PreNormEncoderAttention

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.output = PreNormOutput(config, config.intermediate_size)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)."""
        hidden_states, _ = self.attention(hidden_states, attention_mask, **kwargs)
        return self.output(self.intermediate(self.LayerNorm(hidden_states)), hidden_states)


class Encoder(nn.Module):
    """A stack of layers."""

    def __init__(self, config, layer_class: type[nn.Module]):
        super().__init__()
        self.layer = nn.ModuleList([layer_class(config, index) for index in range(config.num_hidden_layers)])

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)."""
        for layer in self.layer:
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
        return hidden_states


class PreNormEncoder(Encoder):
    """A stack of pre-norm layers and the LayerNorm that closes it."""

    def __init__(self, config, layer_class: type[nn.Module]):
        super().__init__(config, layer_class)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.LayerNorm(super().forward(hidden_states, attention_mask, **kwargs))


class Pooler(nn.Module):
    """tanh(W h_0 + b) of the first token: (B, T, D) -> (B, D)."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.dense(hidden_states[:, 0]))


class EncoderPreTrainedModel(BestiaryPreTrainedModel):
    """What all models around the shared encoder declare to transformers."""

    base_model_prefix = "bert"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keys_to_ignore_on_load_unexpected = [r"(^|\.)position_ids$"]  # a buffer in old BERT checkpoints
    _can_record_outputs = {"hidden_states": EncoderLayer, "attentions": EncoderSelfAttention}

    def post_init(self) -> None:
        """Initialise; then name the layers, of wrapped encoders too, as what FSDP shards one by one.

        Not the embeddings: a table that is tied to an output layer must be in the same group as that layer.
        """
        super().post_init()
        layers = {type(part).__name__ for part in self.modules() if isinstance(part, GradientCheckpointingLayer)}
        self._no_split_modules = layers

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Matrices and tables from a normal cut at two standard deviations, as in the official code of BERT and
        ELECTRA.
        """
        super()._init_weights(module)
        if isinstance(module, (nn.Linear, nn.Embedding)):
            std = self.config.initializer_range
            init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)

    def check_inputs(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, position_ids: torch.Tensor | None
    ) -> None:
        """`ValueError` unless exactly one of `input_ids` (..., T) and `inputs_embeds` (..., T, E) is given, no longer
        than the position table. A model without such a table overrides this.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(f"{type(self).__name__} needs exactly one of input_ids and inputs_embeds.")
        length = input_ids.shape[-1] if inputs_embeds is None else inputs_embeds.shape[-2]
        if length > self.config.max_position_embeddings and position_ids is None:
            raise ValueError(
                f"{type(self).__name__} got {length} tokens, but config.max_position_embeddings is "
                f"{self.config.max_position_embeddings}; truncate the input "
                "(tokenizer(..., truncation=True, max_length=...))."
            )

    def build_encoder(self, add_pooling_layer: bool) -> nn.Module:
        """The paper's base model for this configuration; heads call it once."""
        raise NotImplementedError(f"{type(self).__name__} must say which base model its heads stand on.")


class EncoderModel(EncoderPreTrainedModel):
    """Embeddings, encoder and optional pooler. A paper's model derives from this and from its own pre-trained base.

    Args:
        config: an `EncoderConfig`.
        add_pooling_layer: whether there is a pooler on the first token.
    """

    embeddings_class: type[nn.Module] = EncoderEmbeddings
    encoder_class: type[nn.Module] = Encoder
    layer_class: type[nn.Module] = EncoderLayer
    supports_unpadding = True
    """Whether tokens may be moved to other rows, given their position ids.

    False for a model with a bias between positions.
    """

    def __init__(self, config, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = self.embeddings_class(config)
        if config.embedding_size != config.hidden_size:
            self.embeddings_project = nn.Linear(config.embedding_size, config.hidden_size)
        self.encoder = self.encoder_class(config, self.layer_class)
        self.pooler = Pooler(config) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings.word_embeddings = value

    def position_bias(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Additive bias on all layers' scores, broadcastable to (B, H, T, T), from hidden states (B, T, D); None for
        none.

        Called once per forward pass. A model that returns one sets `supports_unpadding = False`.
        """
        return None

    def attention_inputs(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """What all layers get beside the hidden states (B, T, D): the mask in the form of the attention backend, and
        further arguments by name.

        Called once per forward pass, after packing: `position_ids` (1 or B, T) are those of the rows as they are now,
        None for 0 ... T-1. A model whose bias follows them keeps `supports_unpadding`.
        """
        bias = self.position_bias(hidden_states)
        if bias is None:
            return attention_mask, {}
        # a bias that requires grad makes sdpa leave its fused kernel, also where no gradient is wanted
        return attention_mask, {"position_bias": bias if torch.is_grad_enabled() else bias.detach()}

    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Encode `input_ids` (B, T) or `inputs_embeds` (B, T, E).

        `attention_mask` is (B, T) with 1 at real tokens, or a mask (B, 1, T, T), boolean (true = attend) or additive.

        Raises:
            ValueError: both or none of `input_ids` and `inputs_embeds`, a sequence longer than the position table, or
                a mask of another shape or type.
        """
        self.check_inputs(input_ids, inputs_embeds, position_ids)
        batch, length = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        packing = self.plan_unpadding(attention_mask, kwargs)
        if packing is not None:
            positions = torch.arange(length, device=attention_mask.device).expand(batch, length)
            position_ids = packing.pack(positions if position_ids is None else position_ids.expand(batch, length))
            input_ids, token_type_ids, inputs_embeds = (
                None if given is None else packing.pack(given) for given in (input_ids, token_type_ids, inputs_embeds)
            )
        hidden_states = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)  # (B, T, E)
        if self.config.embedding_size != self.config.hidden_size:
            hidden_states = self.embeddings_project(hidden_states)  # (B, T, D)
        if packing is not None:
            attention_mask = packing.attention_mask()  # (R, 1, L, L)
        attention_mask = self.pair_mask(attention_mask, hidden_states.dtype)
        mask = create_bidirectional_mask(self.config, hidden_states, attention_mask)
        mask, arguments = self.attention_inputs(hidden_states, mask, position_ids)
        hidden_states = self.encoder(hidden_states, mask, **arguments, **kwargs)
        if packing is not None:
            hidden_states = packing.unpack(hidden_states)
        pooled = None if self.pooler is None else self.pooler(hidden_states)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)

    def pair_mask(self, attention_mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
        """A mask for pairs of tokens, (B, 1 or H, T, T), as the attention backend wants it; others as they are.

        Raises:
            ValueError: a tensor that is neither (B, T) nor such a mask, or integers for pairs, which would be added to
                the scores.
        """
        if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() == 2:
            return attention_mask
        boolean = attention_mask.dtype == torch.bool
        if attention_mask.dim() != 4 or not (boolean or attention_mask.is_floating_point()):
            raise ValueError(
                f"{type(self).__name__}: attention_mask must be (batch, length), or (batch, 1 or heads, length, "
                f"length) boolean or additive, got {attention_mask.dtype} {list(attention_mask.shape)}; "
                "make 0 and 1 boolean."
            )
        if not boolean or self.config._attn_implementation != "eager":
            return attention_mask
        return additive_mask(attention_mask, dtype)  # eager adds it

    def plan_unpadding(self, attention_mask: torch.Tensor | None, recording: dict) -> PackedRows | None:
        """The packed rows of a batch that is to be run on its real tokens only, else None. `recording` are the
        keywords of the forward pass.
        """
        return plan_packing(attention_mask) if self._worth_unpadding(attention_mask, recording) else None

    def _worth_unpadding(self, attention_mask: torch.Tensor | None, recording: dict) -> bool:
        """Whether this batch is run on its real tokens only: wanted, possible, and nothing per position is
        recorded.
        """
        threshold = self.config.unpad_threshold
        if threshold is None or attention_mask is None or attention_mask.dim() != 2 or torch.compiler.is_compiling():
            return False
        recorded = any(
            recording.get(name, getattr(self.config, name)) for name in ("output_hidden_states", "output_attentions")
        )
        supported = self.supports_unpadding and self.config._attn_implementation in ("eager", "sdpa")
        return supported and not recorded and padding_share(attention_mask) > threshold
