"""Loss of MiniLMv2 between relations of two models: KL of masked softmaxes over X Yᵀ, summed over relation heads.

Plain path: both relation matrices of all heads at once, by softmax and log-softmax. Fast path: the same numbers block
by block, a block being about a megabyte of scores (some heads of some sequences, or some rows of one head). The
gradient is made in the forward pass while a block's probabilities are in the cache, so that no more than one group of
heads is alive on each side and nothing of size N x N is kept for the backward pass.

Of a row with scores t (teacher) and s (student), KL = p . (t - s) - logsumexp(t) + logsumexp(s) with p = softmax(t),
and its gradient with respect to s is softmax(s) - p. Both sides of the product belong to the student, so the gradient
reaches both; in a relation of a projection with itself it enters twice.
"""

import torch


BLOCK_SCORES = 2**18
"""Scores of one model in a block on a CPU: 1 MB in float32, 16 heads at 128 tokens or 1 head at 512."""
BLOCK_SCORES_ON_DEVICE = 2**25
"""The same on an accelerator, where a small block would not fill it."""


def relation_losses(
    teacher: tuple[torch.Tensor, torch.Tensor],
    student: tuple[torch.Tensor, torch.Tensor],
    num_relation_heads: int,
    mask: torch.Tensor | None = None,
    block_scores: int | None = None,
) -> torch.Tensor:
    """For every sequence, the mean over relation heads a and its n real rows of
    `KL(softmax(X_a Y_aᵀ / sqrt(d)) of the teacher || the same of the student)`, with d = width / heads of each model.

    Args:
        teacher: X and Y of the teacher, (B, N, D_T) each. No gradient reaches them.
        student: X and Y of the student, (B, N, D_S) each; one tensor twice for a relation of a projection with itself.
        num_relation_heads: A; divides both widths.
        mask: (B, N), non-zero at real tokens; None for no padding. Padding is neither a row nor a column.
        block_scores: size of a block, None chooses by device; 0 takes the plain path.

    Returns:
        (B,) in float32 (float64 if the student is), also under autocast: the products are taken in float32 of vectors
        divided by d^(1/4), so that no half precision can overflow. A sequence without a real token gives 0. The fast
        path can be differentiated once. The plain path can be differentiated again, and is what `torch.compile` always
        gets, since it would unroll the blocks.

    Raises:
        ValueError: the heads do not divide a width, or shapes do not fit.
    """
    _check(teacher, student, num_relation_heads, mask)
    plain = block_scores == 0 or torch.compiler.is_compiling()
    if block_scores is None:
        block_scores = BLOCK_SCORES if student[0].device.type == "cpu" else BLOCK_SCORES_ON_DEVICE
    with torch.autocast(student[0].device.type, enabled=False):
        if plain:
            return _plain(teacher, student, num_relation_heads, mask)
        same = student[0] is student[1]
        return _Blockwise.apply(
            student[0],
            None if same else student[1],
            teacher[0].detach(),
            None if teacher[0] is teacher[1] else teacher[1].detach(),
            mask,
            num_relation_heads,
            block_scores,
            torch.is_grad_enabled(),
        )


def _check(
    teacher: tuple[torch.Tensor, torch.Tensor],
    student: tuple[torch.Tensor, torch.Tensor],
    heads: int,
    mask: torch.Tensor | None,
) -> None:
    for name, pair in (("teacher", teacher), ("student", student)):
        width = pair[0].shape[-1]
        if width % heads:
            raise ValueError(
                f"relation_losses: num_relation_heads={heads} must divide the width of both models, but the {name}'s "
                f"is {width}."
            )
        if pair[0].shape != pair[1].shape or pair[0].shape[:2] != student[0].shape[:2] or pair[0].dim() != 3:
            raise ValueError(
                f"relation_losses: vectors must be (batch, tokens, width) with the same batch and tokens, got "
                f"{tuple(pair[0].shape)} and {tuple(pair[1].shape)} of the {name}, {tuple(student[0].shape)} of the "
                "student."
            )
    if mask is not None and mask.shape != student[0].shape[:2]:
        raise ValueError(
            f"relation_losses: mask must be (batch, tokens) = {tuple(student[0].shape[:2])}, got {tuple(mask.shape)}."
        )


def _row_weights(mask: torch.Tensor | None, vectors: torch.Tensor, heads: int, dtype: torch.dtype) -> torch.Tensor:
    """1 / (heads * real tokens of the sequence) at real rows, 0 at padding: (B, N)."""
    if mask is None:
        return torch.full(vectors.shape[:2], 1 / (heads * vectors.shape[1]), dtype=dtype, device=vectors.device)
    real = (mask != 0).to(dtype)
    return real / (heads * real.sum(1, keepdim=True).clamp(min=1))


def _heads_first(vectors: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, N, D) -> (B, A, N, d), a view."""
    return vectors.unflatten(-1, (heads, -1)).transpose(1, 2)


def _plain(
    teacher: tuple[torch.Tensor, torch.Tensor],
    student: tuple[torch.Tensor, torch.Tensor],
    heads: int,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    dtype = torch.float64 if student[0].dtype == torch.float64 else torch.float32

    def log_relation(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        left, right = (_heads_first(side.to(dtype), heads) for side in (left, right))
        scale = left.shape[-1] ** -0.25
        scores = (left * scale) @ (right * scale).mT  # (B, A, N, N)
        if mask is not None:
            scores = scores.masked_fill((mask == 0)[:, None, None, :], torch.finfo(dtype).min)
        return scores.log_softmax(-1)

    ours, theirs = log_relation(*student), log_relation(*(side.detach() for side in teacher))
    rows = (theirs.exp() * (theirs - ours)).sum(-1).sum(1)  # (B, N)
    return (rows * _row_weights(mask, student[0], heads, dtype)).sum(1)


def _blocks(batch: int, heads: int, length: int, scores: int) -> list[tuple[slice, slice, slice]]:
    """Slices of sequences, heads and rows whose relation matrices have at most `scores` entries, or one row's."""
    matrices = max(1, scores // (length * length))
    sequences, group = max(1, matrices // heads), min(heads, matrices)
    rows = min(length, max(1, scores // length))
    return [
        (slice(b, b + sequences), slice(a, a + group), slice(r, min(r + rows, length)))
        for b in range(0, batch, sequences)
        for a in range(0, heads, group)
        for r in range(0, length, rows)
    ]


class _Blockwise(torch.autograd.Function):
    """The fast path."""

    @staticmethod
    def forward(ctx, left, right, teacher_left, teacher_right, mask, heads, block_scores, grad_enabled):
        dtype = torch.float64 if left.dtype == torch.float64 else torch.float32
        batch, length = left.shape[:2]
        # needs_input_grad ignores no_grad, and grad mode is always off in here: the caller tells.
        needs_left, needs_right = (grad_enabled and need for need in ctx.needs_input_grad[:2])
        if right is None:
            right, needs_right = left, needs_left
        if teacher_right is None:
            teacher_right = teacher_left
        weights = _row_weights(mask, left, heads, dtype)  # (B, N)
        bias = None  # (B, N), the smallest number at padding
        if mask is not None and not bool((mask != 0).all()):
            bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
                mask == 0, torch.finfo(dtype).min
            )
        losses = torch.zeros(batch, dtype=dtype, device=left.device)
        grad_left = torch.zeros(left.shape, dtype=dtype, device=left.device) if needs_left else None
        shared = right is left
        grad_right = grad_left if shared else torch.zeros_like(right, dtype=dtype) if needs_right else None

        def part(vectors, sequences, group, rows):
            block = _heads_first(vectors, heads)[sequences, group, rows].to(dtype)
            return (block * block.shape[-1] ** -0.25).flatten(0, 1)  # (M, R, d), contiguous

        def pair(one, other, sequences, group, rows):  # (M, R, d), (M, N, d)
            first = part(one, sequences, group, rows)
            again = one is other and first.shape[1] == length
            return first, first if again else part(other, sequences, group, slice(None))

        def add(total, gradient, sequences, group, rows):
            block = _heads_first(total, heads)[sequences, group, rows]  # (b, a, R, d)
            block.add_(gradient.mT.view(block.shape), alpha=block.shape[-1] ** -0.25)

        for sequences, group, rows in _blocks(batch, heads, length, block_scores):
            places = (sequences, group)
            ours, theirs = pair(left, right, *places, rows), pair(teacher_left, teacher_right, *places, rows)
            s, t = (torch.bmm(one, other.mT) for one, other in (ours, theirs))  # (M, R, N)
            row_weights = weights[sequences, rows]  # (b, R)
            shape = (row_weights.shape[0], -1, *s.shape[1:])  # (b, a, R, N)
            if bias is not None:
                for scores in (s, t):
                    scores.view(shape).add_(bias[sequences, None, None, :])
            p, q = t.softmax(-1), s.softmax(-1)
            # logsumexp is the largest score less the logarithm of its probability, which is at least 1 / N; that score
            # is taken off first, since the difference of two large sums would be lost in rounding
            for scores in (s, t):
                scores.sub_(scores.amax(-1, keepdim=True))
            divergence = t.sub_(s).mul_(p).sum(-1)  # (M, R)
            divergence += p.amax(-1).log_() - q.amax(-1).log_()
            losses[sequences] += (divergence.view(shape[:3]) * row_weights[:, None]).sum((1, 2))
            if needs_left or needs_right:
                gradient = q.sub_(p)  # (M, R, N), the rows' weights still to come
                flat = row_weights[:, None].expand(shape[0], s.shape[0] // shape[0], -1).flatten(0, 1)[:, None]
                if needs_left:  # transposed products: the thin matrix on the left is several times faster
                    add(grad_left, torch.bmm(ours[1].mT, gradient.mT) * flat, *places, rows)
                if needs_right:
                    add(grad_right, torch.bmm(ours[0].mT * flat, gradient), *places, slice(None))
                del gradient
            del s, t, p, q  # before the next block's are made
        ctx.dtype = left.dtype
        ctx.save_for_backward(grad_left, None if shared else grad_right)
        return losses

    @staticmethod
    def backward(ctx, grad_losses):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "relation_losses: the fast path can be differentiated once, but create_graph=True asks for more; take "
                "the plain path, block_scores=0."
            )
        # Out of place: the saved gradients serve again if the graph is kept.
        grads = (
            None if grad is None else (grad * grad_losses[:, None, None]).to(ctx.dtype) for grad in ctx.saved_tensors
        )
        return *grads, None, None, None, None, None, None
