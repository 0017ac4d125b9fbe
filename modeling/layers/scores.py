"""Attention whose scores start from something that needs a gradient: a learned bias, or the scores of other layers.

On a CPU the fused kernel is lost as soon as the additive mask requires grad. What then costs time is not the products
but the passes over the (T, T) scores, so here a product is added to its start while it is written, and only the
probabilities are kept for backward.
"""

import torch

from .dropout import dropout


BLOCK = 2**18
"""Scores in a block, 1 MB in float32."""


def accumulate_scores(
    start: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    keep: float = 1.0,
    in_place: bool = False,
) -> torch.Tensor:
    """keep * start + scale * query key^T, (B, H, T, T).

    Args:
        start: broadcastable to (B, H, T, T), in float32 or wider; None is 0. In half precision only the product is
            rounded, the sum is not.
        query, key: (B, H, T, d).
        scale, keep: factors.
        in_place: write into `start` if it has the full shape; only where no gradient is recorded.
    """
    shape = (*query.shape[:-1], key.shape[-2])
    if start is None:
        product = (query * scale) @ key.mT
        return product.to(torch.promote_types(product.dtype, torch.float32))
    if start.dtype != query.dtype:
        return torch.add(start if keep == 1 else keep * start, query @ key.mT, alpha=scale)
    if start.shape != shape:
        return ((query * scale) @ key.mT).add_(start, alpha=keep)
    left, right = query.reshape(-1, *query.shape[-2:]), key.reshape(-1, *key.shape[-2:]).mT
    flat = start.view(-1, *shape[-2:])  # (B * H, T, T)
    if in_place:
        return flat.baddbmm_(left, right, beta=keep, alpha=scale).view(shape)
    return torch.baddbmm(flat, left, right, beta=keep, alpha=scale).view(shape)


def attend(
    scores: torch.Tensor, value: torch.Tensor, dropout_prob: float, training: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scores) value, with dropout on the probabilities.

    scores (B, H, T, T), value (B, H, T, d). Returns the context (B, T, H, d) and the probabilities (B, H, T, T).
    """
    probabilities = torch.softmax(scores, dim=-1).to(value.dtype)
    return (dropout(probabilities, dropout_prob, training) @ value).transpose(1, 2), probabilities


@torch.no_grad()
def attend_in_blocks(
    start: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    keep: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`accumulate_scores` in place, then `attend`, by blocks of rows that stay in the cache: no probabilities of full
    size, and one pass over the scores. For long sequences on a CPU, without gradients.

    Returns the context (B, T, H, d) and the scores (B, H, T, T).
    """
    shape = (*query.shape[:-1], key.shape[-2])
    if start is None or start.shape != shape:
        scores = query.new_zeros(shape) if start is None else start.expand(shape).contiguous()
    else:
        scores = start
    batch, heads, length, columns = shape
    context = value.new_empty(batch, length, heads, value.shape[-1])
    rows = max(1, BLOCK // columns)
    for row in range(batch):
        for head in range(heads):
            right, values = key[row, head].mT, value[row, head]
            for first in range(0, length, rows):
                part = slice(first, first + rows)
                block = scores[row, head, part]  # (rows, T)
                block.addmm_(query[row, head, part], right, beta=keep, alpha=scale)
                torch.mm(torch.softmax(block, -1), values, out=context[row, part, head])
    return context, scores
