"""The feed-forward half of a layer, and the projection with residual that ends both halves."""

import torch
from torch import nn
from transformers.activations import ACT2FN

from .dropout import Dropout


class Intermediate(nn.Module):
    """Linear map to the inner width, then the activation: (..., D) -> (..., F)."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.activation(self.dense(hidden_states))


class ResidualOutput(nn.Module):
    """LayerNorm(residual + dropout(W x + b)): (..., input_size), (..., D) -> (..., D)."""

    def __init__(self, config, input_size: int):
        super().__init__()
        self.dense = nn.Linear(input_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + residual)


class PreNormOutput(nn.Module):
    """residual + dropout(W x + b), the output part of a pre-norm sub-layer: (..., input_size), (..., D) -> (...,
    D).
    """

    def __init__(self, config, input_size: int):
        super().__init__()
        self.dense = nn.Linear(input_size, config.hidden_size)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.dense(hidden_states)) + residual
