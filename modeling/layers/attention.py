"""Multi-head self-attention through transformers' attention interface (eager, sdpa, flex), with an optional additive
position bias.
"""

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .feed_forward import ResidualOutput


def additive_mask(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where allowed, else the smallest number of `dtype`: bool -> `dtype`, of any shape."""
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    position_bias: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention, the reference of every other backend and the one that returns probabilities.

    query, key, value (B, H, T, d); `attention_mask` additive (B, 1, T, T); `position_bias` additive, broadcastable to
    (B, H, T, T). Returns context (B, T, H, d) and probabilities (B, H, T, T).
    """
    scores = query @ key.mT * scaling  # (B, H, T, T)
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = nn.functional.softmax(scores, dim=-1)
    probabilities = nn.functional.dropout(probabilities, p=dropout, training=module.training)
    return (probabilities @ value).transpose(1, 2), probabilities


class EncoderSelfAttention(nn.Module):
    """softmax(q k^T * scale + position bias + mask) v over all heads. A paper overrides `score_scale` or `project`."""

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = False  # sdpa reads this with default True, and is then causal on every batch without padding
        self.num_attention_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout_prob = config.attention_probs_dropout_prob

    def score_scale(self) -> float:
        """Factor on the raw scores."""
        return self.head_dim**-0.5

    def split_heads(self, states: torch.Tensor) -> torch.Tensor:
        """(..., T, H * d) -> (..., H, T, d)."""
        return states.unflatten(-1, (self.num_attention_heads, self.head_dim)).transpose(-3, -2)

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, each (B, H, T, d), of hidden states (B, T, D)."""
        return (
            self.split_heads(self.query(hidden_states)),
            self.split_heads(self.key(hidden_states)),
            self.split_heads(self.value(hidden_states)),
        )

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the context (B, T, D) and, from the eager backend, the probabilities (B, H, T, T)."""
        query, key, value = self.project(hidden_states)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        context, probabilities = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.dropout_prob if self.training else 0.0,
            scaling=self.score_scale(),
            **kwargs,
        )
        return context.flatten(-2), probabilities  # (B, T, H, d) -> (B, T, D)


class EncoderAttention(nn.Module):
    """Self-attention, output projection and residual, normalised afterwards (post-norm)."""

    self_class: type[nn.Module] = EncoderSelfAttention

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.self = self.self_class(config, layer_idx)
        self.output = ResidualOutput(config, config.hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T, D) -> (B, T, D), and the probabilities if the backend gives them."""
        context, probabilities = self.self(hidden_states, attention_mask, **kwargs)
        return self.output(context, hidden_states), probabilities
