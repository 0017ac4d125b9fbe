"""Random features of the softmax kernel (Choromanski et al., 2021, arXiv 2009.14794), and the projections they need.

    exp(q . k / sqrt(d)) = E_w[phi(q) . phi(k)],  phi(x) = m^(-1/2) exp(W c x - |c x|^2 / 2),  c = d^(-1/4)

W (m, d) has normal rows, orthogonal within blocks of d. The plain path, `positive_features`, forms phi (B, H, T, m);
the fast paths on CPU, `positive_attention` and `causal_positive_attention`, never do: they form a block, use it while
it is in cache and form it again in backward. That takes no more time than fetching it, and memory in O(T d).
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch.autograd.function import once_differentiable


BLOCK = 2**18
"""Feature values held at a time: 1 MB in float32."""


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
        top = size.detach().amax(-2, keepdim=True)
        size = size - top.clamp(min=torch.finfo(top.dtype).min)  # -inf where a row has no token
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


def _d_states(
    block: torch.Tensor, d_features: torch.Tensor, states: torch.Tensor, back: torch.Tensor, half: float
) -> torch.Tensor:
    """Gradient of x with features E, in `block`, from that of E; `back` is c W for each head. Overwrites `block`."""
    block.mul_(d_features)
    total = block.sum(-1, keepdim=True)
    return torch.bmm(block, back[: len(block)]).addcmul_(states, total, value=-2 * half)


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

        for group, rows in _blocks(heads, length, width):
            q, g = query[group, rows], grad[group, rows]
            block = torch.bmm(q, into[group]).sub_(query_offset[group, rows]).exp_()
            d_state[group].baddbmm_(block.mT, g)
            d_query[group, rows] = _d_states(block, torch.bmm(g, state[group].mT), q, back, ctx.half)
        for group, rows in _blocks(heads, length, width):
            k, v = key[group, rows], value[group, rows]
            block = torch.bmm(k, into[group]).sub_(key_offset[group, rows]).exp_()
            d_value[group, rows] = torch.bmm(block, d_state[group])
            d_key[group, rows] = _d_states(block, torch.bmm(v, d_state[group].mT), k, back, ctx.half)
        d_value += d_state.sum(1, keepdim=True).mul_(ctx.epsilon)
        return d_query, d_key, d_value, None, None, None, None, None


def causal_positive_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    projection: torch.Tensor,
    scale: float,
    epsilon: float,
    chunk_size: int,
    state: torch.Tensor,
    key_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """phi(q_i) . (S + sum_{j <= i} phi(k_j) v_j^T), (B, H, T, e), and the sum over all j: `causal_product` of
    `positive_features` that are never all in memory.

    Arguments as in `positive_attention`, where queries subtract the maximum of their row and keys nothing; state S
    (B, H, m, e) of earlier tokens, through which no gradient flows.
    """
    heads = query.shape[:2]
    mask = None if key_mask is None else key_mask.expand(*heads, -1, 1).flatten(0, 1)
    flat = (part.flatten(0, 1) for part in (query, key, value, state.detach()))
    results = _CausalPositiveAttention.apply(*flat, projection * scale, mask, scale * scale / 2, epsilon, chunk_size)
    out, state = (part.unflatten(0, heads) for part in results)
    return out, state


class _CausalPositiveAttention(torch.autograd.Function):
    """`causal_positive_attention` chunk after chunk, on G heads as in `_PositiveAttention`. Backward runs through the
    chunks forwards for the queries and backwards for keys and values, as in `causal_product`.
    """

    @staticmethod
    def forward(ctx, query, key, value, state, weight, mask, half, epsilon, chunk_size):
        epsilon = epsilon * len(weight) ** -0.5
        into = weight.T.expand(len(query), -1, -1)  # (G, d, m)
        query_offset, key_offset = (
            part.square().sum(-1, keepdim=True).mul_(half).add_(0.5 * math.log(len(weight))) for part in (query, key)
        )  # (G, T, 1)
        if mask is not None:
            key_offset.masked_fill_(~mask, torch.inf)
        out = torch.empty_like(value)
        initial, state = state, state.clone(memory_format=torch.contiguous_format)
        chunks = [slice(start, start + chunk_size) for start in range(0, query.shape[1], chunk_size)]
        for at in chunks:
            q, v = torch.bmm(query[:, at], into), value[:, at]
            query_offset[:, at] += q.amax(-1, keepdim=True)
            q.sub_(query_offset[:, at]).exp_().add_(epsilon)
            k = torch.bmm(key[:, at], into).sub_(key_offset[:, at]).exp_().add_(epsilon)
            out[:, at] = torch.bmm(torch.bmm(q, k.mT).tril_(), v).baddbmm_(q, state)
            state.baddbmm_(k.mT, v)
        ctx.save_for_backward(query, key, value, initial, weight, query_offset, key_offset)
        ctx.half, ctx.epsilon, ctx.chunks = half, epsilon, chunks
        ctx.mark_non_differentiable(state)
        return out, state

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        query, key, value, state, weight, query_offset, key_offset = ctx.saved_tensors
        into, back = weight.T.expand(len(query), -1, -1), weight.expand(len(query), -1, -1)
        d_query, d_key, d_value = map(torch.empty_like, (query, key, value))
        state = state.clone(memory_format=torch.contiguous_format)

        def exponentials(states: torch.Tensor, offset: torch.Tensor, at: slice) -> torch.Tensor:
            return torch.bmm(states[:, at], into).sub_(offset[:, at]).exp_()

        for at in ctx.chunks:
            v, g = value[:, at], grad[:, at]
            block, k = exponentials(query, query_offset, at), exponentials(key, key_offset, at).add_(ctx.epsilon)
            d_features = torch.bmm(torch.bmm(g, v.mT).tril_(), k).baddbmm_(g, state.mT)
            d_query[:, at] = _d_states(block, d_features, query[:, at], back, ctx.half)
            state.baddbmm_(k.mT, v)
        state.zero_()  # from here on sum_{j > chunk} phi(q_j) grad_j^T
        for at in reversed(ctx.chunks):
            v, g = value[:, at], grad[:, at]
            q, block = exponentials(query, query_offset, at).add_(ctx.epsilon), exponentials(key, key_offset, at)
            k = block + ctx.epsilon
            d_value[:, at] = torch.bmm(torch.bmm(q, k.mT).tril_().mT, g).baddbmm_(k, state)
            d_features = torch.bmm(torch.bmm(g, v.mT).tril_().mT, q).baddbmm_(v, state.mT)
            d_key[:, at] = _d_states(block, d_features, key[:, at], back, ctx.half)
            state.baddbmm_(q.mT, g)
        return d_query, d_key, d_value, None, None, None, None, None, None
