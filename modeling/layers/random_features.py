"""Random features of the softmax kernel (Choromanski et al., 2021, arXiv 2009.14794), and the projections they need.

    exp(q . k / sqrt(d)) = E_w[phi(q) . phi(k)],  phi(x) = m^(-1/2) exp(W c x - |c x|^2 / 2),  c = d^(-1/4)

W (m, d) has normal rows, orthogonal within blocks of d. The plain path, `positive_features`, forms phi (B, H, T, m);
the fast path on CPU, `positive_attention`, never does: it forms a block of about a megabyte, uses it while it is in
cache and forms it again in backward, which takes less time than fetching it and memory in O(T d), not O(T m).
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


BLOCK = 2**18
"""Feature values held at a time: 1 MB in float32."""

FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "elu": lambda x: F.elu(x) + 1,
    "exp": torch.exp,
    "sigmoid": torch.sigmoid,
    "abs": torch.abs,
    "gelu": F.gelu,
    "identity": lambda x: x,
}
"""f of the generalised features f(W x). "gelu" and "identity" are not positive, so their denominators may vanish."""


def projection_generator(seed: int, draw: int, layer: int) -> torch.Generator:
    """Generator of the projection that layer number `layer` gets at the `draw`-th drawing, equal on all processes."""
    state = int(np.random.SeedSequence([seed, draw, layer]).generate_state(1, dtype=np.uint64)[0] >> np.uint64(1))
    return torch.Generator(device="cpu").manual_seed(state)


def draw_projection(
    rows: int,
    columns: int,
    generator: torch.Generator,
    orthogonal: bool = True,
    scaling: int = 0,
    sign_fix: bool = True,
) -> torch.Tensor:
    """W (rows, columns) in float32 on the CPU.

    Orthogonal: blocks of `columns` rows, each the transpose of Q of the QR decomposition of a normal matrix, the last
    one cut off; rows are then multiplied by the length of a normal vector (scaling 0) or by sqrt(columns) (scaling 1).

    Args:
        rows: m, number of features.
        columns: d, width of a head.
        generator: of all draws.
        orthogonal: False gives independent normal rows (scaling 0) or such rows of length sqrt(columns) (scaling 1).
        scaling: 0 or 1.
        sign_fix: multiply the columns of Q by the signs of R's diagonal, which makes Q uniform among rotations and the
            features unbiased. The official code does not, and is off by some per cent.
    """

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)

    if orthogonal:
        blocks = []
        for _ in range(-(-rows // columns)):
            q, r = torch.linalg.qr(normal(columns, columns))
            blocks.append((q * r.diagonal().sign() if sign_fix else q).T)
        directions = torch.cat(blocks)[:rows]
        lengths = normal(rows, columns).norm(dim=1)
    else:
        directions = normal(rows, columns)
        lengths = directions.norm(dim=1)
        directions = directions / lengths[:, None]
    return directions * (lengths[:, None] if scaling == 0 else math.sqrt(columns))


def positive_features(
    states: torch.Tensor,
    projection: torch.Tensor,
    scale: float,
    epsilon: float,
    maximum: str,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """m^(-1/2) (exp(W c x - |c x|^2 / 2 - max) + epsilon), (B, H, T, m), of states x (B, H, T, d).

    Args:
        projection: W (m, d).
        scale: c.
        maximum: what is subtracted, as a constant: "row", the largest entry of W c x at each position; "sequence", at
            all positions that `key_mask` (B, 1, T, 1) keeps; "none", nothing.
    """
    projected = states @ (projection * scale).T  # (B, H, T, m)
    offset = states.square().sum(-1, keepdim=True) * (scale * scale / 2)  # (B, H, T, 1)
    if maximum != "none":
        top = projected.detach().amax(-1, keepdim=True)
        if maximum == "sequence":
            top = top if key_mask is None else top.masked_fill(~key_mask, torch.finfo(top.dtype).min)
            top = top.amax(-2, keepdim=True)
        offset = offset + top
    if key_mask is not None:
        offset = offset.masked_fill(~key_mask, torch.inf)  # whatever stands there, no feature overflows
    return (torch.exp(projected - offset) + epsilon) * projection.shape[0] ** -0.5


def trigonometric_features(
    states: torch.Tensor,
    projection: torch.Tensor,
    scale: float,
    maximum: str,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """m^(-1/2) [cos(W c x), sin(W c x)] exp(|c x|^2 / 2 - max), (B, H, T, 2m): unbiased too, but of any sign.

    Arguments as in `positive_features`; the maximum is that of |c x|^2 / 2.
    """
    projected = states @ (projection * scale).T  # (B, H, T, m)
    size = states.square().sum(-1, keepdim=True) * (scale * scale / 2)  # (B, H, T, 1)
    if key_mask is not None:
        size = size.masked_fill(~key_mask, -torch.inf)
    if maximum == "row":
        size = torch.zeros_like(size)  # a factor of each query cancels
    elif maximum == "sequence":
        size = size - size.detach().amax(-2, keepdim=True)
    both = torch.cat((projected.cos(), projected.sin()), -1)
    return both * size.exp() * projection.shape[0] ** -0.5


def positive_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    projection: torch.Tensor,
    scale: float,
    epsilon: float,
    maximum: str,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """sum_j phi(q_i) . phi(k_j) v_j, (B, H, T, e), with `positive_features` that are never all in memory.

    query, key (B, H, T, d), value (B, H, T, e) with zeros at padding. Queries subtract the maximum of their row, keys
    `maximum` ("sequence" or "none"). For CPU; differentiable once, the projection not at all.
    """
    heads = query.shape[:2]
    mask = None
    if key_mask is not None:
        mask = key_mask.expand(*heads, -1, 1).flatten(0, 1)
    flat = (part.flatten(0, 1) for part in (query, key, value))
    out = _PositiveAttention.apply(*flat, projection * scale, mask, scale * scale / 2, epsilon, maximum == "sequence")
    return out.unflatten(0, heads)


def _blocks(heads: int, length: int, width: int) -> Iterator[tuple[slice, slice]]:
    """Slices of heads and of positions with about `BLOCK` features each; all positions of a head follow each other."""
    rows = max(1, BLOCK // width)
    group = max(1, rows // length)
    for first in range(0, heads, group):
        for start in range(0, length, rows):
            yield slice(first, min(first + group, heads)), slice(start, min(start + rows, length))


class _PositiveAttention(torch.autograd.Function):
    """`positive_attention` of G heads: query, key (G, T, d), value (G, T, e), weight c W (m, d).

    With E = exp(...) / sqrt(m) and epsilon / sqrt(m) added to every feature only in the small sums: the state is
    sum_j E_j v_j^T + epsilon sum_j v_j^T, found in one pass, in which it is rescaled when the maximum grows.
    """

    @staticmethod
    def forward(ctx, query, key, value, weight, mask, half, epsilon, subtract_maximum):
        (heads, length, _), width = query.shape, weight.shape[0]
        epsilon = epsilon * width**-0.5
        into = weight.T.expand(heads, -1, -1)  # (G, d, m)
        query_offset, key_offset = (
            part.square().sum(-1, keepdim=True).mul_(half).add_(0.5 * math.log(width)) for part in (query, key)
        )  # (G, T, 1)
        if mask is not None:
            key_offset.masked_fill_(~mask, torch.inf)
        lowest = torch.finfo(query.dtype).min if subtract_maximum else 0.0
        top = query.new_full((heads, 1, 1), lowest)
        state = query.new_zeros(heads, width, value.shape[-1])
        for group, rows in _blocks(heads, length, width):
            block = torch.bmm(key[group, rows], into[group])
            if subtract_maximum:
                largest = block.amax(-1, keepdim=True)
                if mask is not None:
                    largest.masked_fill_(~mask[group, rows], lowest)
                largest = torch.maximum(top[group], largest.amax(1, keepdim=True))
                state[group] *= (top[group] - largest).exp_()
                top[group] = largest
            block.sub_(key_offset[group, rows] + top[group]).exp_()
            state[group].baddbmm_(block.mT, value[group, rows])
        key_offset += top
        state += value.sum(1, keepdim=True).mul_(epsilon)
        constant = state.sum(1, keepdim=True).mul_(epsilon)  # what epsilon adds to every query
        out = torch.empty_like(value)
        for group, rows in _blocks(heads, length, width):
            block = torch.bmm(query[group, rows], into[group])
            query_offset[group, rows] += block.amax(-1, keepdim=True)
            block.sub_(query_offset[group, rows]).exp_()
            out[group, rows] = torch.baddbmm(constant[group], block, state[group])
        ctx.save_for_backward(query, key, value, weight, state, query_offset, key_offset)
        ctx.half, ctx.epsilon = half, epsilon
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, value, weight, state, query_offset, key_offset = ctx.saved_tensors
        (heads, length, _), width = query.shape, weight.shape[0]
        into, back = weight.T.expand(heads, -1, -1), weight.expand(heads, -1, -1)
        d_query, d_key, d_value = map(torch.empty_like, (query, key, value))
        d_state = grad.sum(1, keepdim=True).mul_(ctx.epsilon).expand_as(state).contiguous()

        def d_states(block: torch.Tensor, states: torch.Tensor, outer: torch.Tensor, inner: torch.Tensor):
            """Gradient of x with features E, in `block`, when that of E is outer @ inner^T. Overwrites `block`."""
            block.mul_(torch.bmm(outer, inner.mT))
            total = block.sum(-1, keepdim=True)
            return torch.bmm(block, back[: len(block)]).addcmul_(states, total, value=-2 * ctx.half)

        for group, rows in _blocks(heads, length, width):
            q, g = query[group, rows], grad[group, rows]
            block = torch.bmm(q, into[group]).sub_(query_offset[group, rows]).exp_()
            d_state[group].baddbmm_(block.mT, g)
            d_query[group, rows] = d_states(block, q, g, state[group])
        for group, rows in _blocks(heads, length, width):
            k, v = key[group, rows], value[group, rows]
            block = torch.bmm(k, into[group]).sub_(key_offset[group, rows]).exp_()
            d_value[group, rows] = torch.bmm(block, d_state[group])
            d_key[group, rows] = d_states(block, k, v, d_state[group])
        d_value += d_state.sum(1, keepdim=True).mul_(ctx.epsilon)
        return d_query, d_key, d_value, None, None, None, None, None
