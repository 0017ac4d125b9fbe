"""Dropout from cheap random words on CPU.

Drawing one Bernoulli number per value costs torch as much as half a matrix product on the same tensor. Here one 64-bit
word of the generator decides for four values, 16 bits each: independent decisions, probability exact to 1/65536, a
third of the time.
"""

import torch
import torch.nn.functional as F
from torch import nn


LEVELS = 2**16


class Dropout(nn.Dropout):
    """`nn.Dropout(p)` with the kernel of `dropout`. Raises ValueError for p outside [0, 1)."""

    def __init__(self, p: float = 0.5):
        _check_probability(p)
        super().__init__(p)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return dropout(input, self.p, self.training)


def dropout(input: torch.Tensor, p: float, training: bool = True) -> torch.Tensor:
    """Zero each value with probability p and divide the others by the probability to stay.

    On CPU p is rounded to a multiple of 1/65536 and the scale is that of the rounded p, so the expectation is exact;
    the draws come from the global CPU generator (`torch.manual_seed`; restored by activation checkpointing) but differ
    from those of `F.dropout`. One byte per value is kept for backward. On other devices, under `torch.compile` and
    inside `torch.func` transforms this is `F.dropout`.

    Args:
        input: any shape, floating point.
        p: in [0, 1).
        training: False makes this the identity.
    """
    _check_probability(p)
    if not training or p == 0:
        return input
    if input.device.type != "cpu" or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return F.dropout(input, p)
    dropped = min(round(p * LEVELS), LEVELS - 1)
    words = torch.empty((input.numel() + 3) // 4, dtype=torch.int64)
    words.random_(-(2**63), None)  # without bounds the top bit would always be 0
    draws = words.view(torch.int16)[: input.numel()].view(input.shape)  # uniform on [-32768, 32768)
    return _MaskAndScale.apply(input, draws >= dropped - LEVELS // 2, LEVELS / (LEVELS - dropped))


class _MaskAndScale(torch.autograd.Function):
    """input * mask * scale, which keeps the mask in bytes for backward and not as floating-point numbers."""

    @staticmethod
    def forward(ctx, input, mask, scale):
        ctx.save_for_backward(mask)
        ctx.scale = scale
        # A cast from bytes is several times faster than one from bool, and than torch.where on a random mask.
        return mask.view(torch.uint8).to(input.dtype).mul_(input).mul_(scale)

    @staticmethod
    def backward(ctx, grad):
        (mask,) = ctx.saved_tensors
        return _MaskAndScale.apply(grad, mask, ctx.scale), None, None


def _check_probability(p: float) -> None:
    if not 0 <= p < 1:
        raise ValueError(f"Dropout.p must lie in [0, 1), got {p}; 0 switches dropout off.")
