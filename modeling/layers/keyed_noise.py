"""Noise for hidden states that is drawn per example: the same for a row however the batch is split or padded.

The numbers come from the counter-based hash of `sampling.py`, keyed by seed of the example, stream, choice, position.
No generator holds a state, so that they are the same when activation checkpointing computes a layer twice. On CPU
uniform numbers cost less than torch's own, normal ones 1.4 times as much.
"""

import math

import torch

from .sampling import slot_keys, unit_float32


POSITION_BITS, CHOICE_BITS = 20, 12


@torch.no_grad()
def keyed_uniform(shape: tuple[int, int, int], seeds: torch.Tensor, stream: int) -> torch.Tensor:
    """Numbers k / 2^24 of U[0, 1).

    Args:
        shape: (N, T, D); N is a multiple of B, with the rows of one example (choices) next to each other.
        seeds: (B,) int64.
        stream: number of the draw, from 0; other streams are independent.

    Returns:
        (N, T, D) float32 on the device of `seeds`.

    Raises:
        ValueError: N is no multiple of B, or `seeds` are no (B,) integers.
    """
    return unit_float32(_token_keys(shape, seeds, stream), shape[2]).view(shape)


@torch.no_grad()
def keyed_normal(shape: tuple[int, int, int], seeds: torch.Tensor, stream: int) -> torch.Tensor:
    """Numbers of N(0, 1) by Box and Muller, two from two uniform ones; arguments as `keyed_uniform`."""
    half = (shape[2] + 1) // 2
    uniform = unit_float32(_token_keys(shape, seeds, stream), 2 * half)  # (N T, 2 half)
    radius = uniform[:, :half].neg().add_(1).log_().mul_(-2).sqrt_()  # of 1 - u, which is never 0
    angle = uniform[:, half:].mul(2 * math.pi)
    normal = torch.cat([angle.cos().mul_(radius), angle.sin().mul_(radius)], 1)
    return normal[:, : shape[2]].reshape(shape)


def _token_keys(shape: tuple[int, int, int], seeds: torch.Tensor, stream: int) -> torch.Tensor:
    """One key per token, (N T,) int64."""
    rows, length, _ = shape
    if seeds.dim() != 1 or seeds.dtype != torch.int64 or len(seeds) == 0 or rows % len(seeds):
        raise ValueError(
            f"keyed noise needs one int64 seed per example: hidden states have {rows} rows, but the seeds are "
            f"{tuple(seeds.shape)} of {seeds.dtype}. Packed rows (unpad_threshold) have no examples of their own."
        )
    choices = rows // len(seeds)
    row = torch.arange(rows, device=seeds.device).repeat_interleave(length)
    position = torch.arange(length, device=seeds.device).repeat(rows)
    counter = position | ((row % choices) << POSITION_BITS) | (stream << (POSITION_BITS + CHOICE_BITS))
    return slot_keys(seeds, row // choices, counter)
