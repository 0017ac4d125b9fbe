"""alpha-entmax: maps from logits to probabilities that may be exactly zero, and the losses that belong to them.

alpha-entmax(z) = argmax over distributions p of p.z + H(p) with Tsallis' entropy H(p) = sum_j (p_j - p_j^alpha) /
(alpha (alpha - 1)). Its solution is p_j = [(alpha - 1) z_j - tau]_+^(1 / (alpha - 1)) with the tau that makes the sum
1: softmax at alpha 1, 1.5-entmax, sparsemax at 2. Martins & Astudillo, 2016, arXiv 1602.02068 (sparsemax); Peters,
Niculae, Martins, 2019, arXiv 1905.05702 (entmax, sorting, losses); Correia, Niculae, Martins, 2019, arXiv 1909.00015
(bisection, gradient by alpha). The package of the authors is deep-spin/entmax (MIT).

How tau is found (`method`):
* "newton" (alpha 1.5 and 2): the norm of [z - tau]_+ is convex and falls with tau, so Newton's steps from below rise
  to the root. A row stops when the norm is right to the last digits, never after a fixed number of steps; blocks of
  rows stay in the cache. No sorting; as good for flat rows as for peaked ones;
* "sort" and "topk" (alpha 1.5 and 2): the exact algorithms; "topk" sorts the `topk` largest logits and goes on with
  twice as many where all of them have a probability;
* "bisection": any alpha, also a tensor of them. Written in the distance of the logits from the largest one, so that
  nothing cancels however near alpha is to 1, where softmax comes out. Above alpha 2, where a small probability jumps
  between neighbouring thresholds, the two that enclose the root are mixed.

Decisions, and differences from the package:
* a row of nothing but -inf gives zeros and no gradient (the package: an error or nan); of equal numbers, were they the
  smallest of their type, the uniform distribution. -inf beside other logits is a probability of 0;
* all is computed in float32 at least and rounded once at the end;
* probabilities are divided by their sum, and all gradients are those of these probabilities, the only tensor saved;
  they are closed forms, with no derivative of their own;
* the loss of a row with -inf among its logits is finite unless the gold class is there; then, or if the whole row is
  -inf, it is inf;
* any `dim` works with any method; under torch.compile "sort" takes the place of the methods that look at numbers.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .losses import IGNORE, LossSum, check_labels, mean_loss


METHODS = ("newton", "sort", "topk", "bisection")
BLOCK = 2**17
"""Numbers in a block of rows on CPU: 0.5 MB in float32."""
NEARLY_ZERO = -60.0
"""Logarithm of a probability that is lost in any sum beside 1."""
LARGEST_NEWTON_COUNT = 100
"""More steps than any row was seen to need (15)."""
LARGEST_WEIGHT = 1e18
"""Of a probability near 0 in the gradient above alpha 2; its products stay finite in float32."""


# ------------------------------------------------------------------------------------------------------------ the maps


def entmax(
    logits: torch.Tensor,
    alpha: float | torch.Tensor = 1.5,
    dim: int = -1,
    method: str | None = None,
    topk: int = 100,
    n_iter: int = 50,
) -> torch.Tensor:
    """alpha-entmax along one dimension, of the type and shape of `logits`.

    Args:
        logits: floating point, any shape.
        alpha: at least 1. A tensor of them must broadcast to `logits` and have size 1 at `dim`: one for each row or
            head. Then `method` is "bisection", and alpha gets a gradient.
        dim: dimension of the distributions.
        method: see above; None is "newton" for 1.5 and 2, "bisection" for the rest. At alpha 1 nothing is solved.
        topk: logits sorted first by "topk".
        n_iter: halvings by "bisection"; in float32 no more than 30 change anything.

    Raises:
        ValueError: integers, an alpha below 1 or of a wrong shape, a method that alpha does not have, or a number
            below 1.
    """
    if not logits.is_floating_point():
        raise ValueError(f"entmax: logits must be floating-point numbers, got {logits.dtype}; use .float().")
    per_row = isinstance(alpha, torch.Tensor)
    if per_row:
        alpha = _alpha_like(alpha, logits, dim)
    method = _method(alpha, method, topk, n_iter)
    return _Entmax.apply(logits, alpha, dim, method, topk, n_iter)


def sparsemax(logits: torch.Tensor, dim: int = -1, method: str | None = None, topk: int = 100) -> torch.Tensor:
    """Euclidean projection onto the distributions: `entmax` with alpha 2."""
    return entmax(logits, 2.0, dim, method, topk)


def entmax15(logits: torch.Tensor, dim: int = -1, method: str | None = None, topk: int = 100) -> torch.Tensor:
    """`entmax` with alpha 1.5."""
    return entmax(logits, 1.5, dim, method, topk)


class LearnedAlpha(nn.Module):
    """alpha in (1, 2), one number for each of `heads`: 1 + sigmoid(logit) (Correia et al., 2019, section 3.1).

    Args:
        heads: how many.
        initial: where they start; 1.5 is a logit of 0.
    """

    def __init__(self, heads: int, initial: float = 1.5):
        super().__init__()
        if not 1 < initial < 2:
            raise ValueError(f"LearnedAlpha: alpha is learned between 1 and 2, both excluded, got initial={initial}.")
        self.initial_logit = math.log((initial - 1) / (2 - initial))
        self.logit = nn.Parameter(torch.full((heads,), self.initial_logit))

    def forward(self) -> torch.Tensor:
        """(heads,) in float32."""
        return 1 + self.logit.float().sigmoid()


# ---------------------------------------------------------------------------------------------------------- the losses


class EntmaxLosses(NamedTuple):
    """What `entmax_losses` gives for rows of logits (..., C).

    losses (...): L >= 0, 0 at ignored rows. support (...) int64: how many classes have a probability. gold (...): the
    probability of the label. The last two carry no gradient and are 0 at ignored rows.
    """

    losses: torch.Tensor
    support: torch.Tensor
    gold: torch.Tensor


def entmax_losses(
    logits: torch.Tensor,
    labels: torch.Tensor,
    alpha: float = 1.5,
    method: str | None = None,
    topk: int = 100,
    n_iter: int = 50,
) -> EntmaxLosses:
    """The Fenchel-Young loss of alpha-entmax in every row: L = H(p) + p.z - z_y with p = entmax(z).

    dL/dz = p - e_y. L is exactly 0 where p_y is 1, that is z_y >= z_j + 1 / (alpha - 1) for all other j. At alpha 1 it
    is cross-entropy. In float32, or float64 for float64 logits.

    Args:
        logits: (..., C).
        labels: (...) int64, -100 at rows to leave out.
        alpha: a number, at least 1. The loss is not a function to learn alpha by, so a tensor is refused.
        method: as in `entmax`; so are `topk` and `n_iter`.

    Raises:
        ValueError: what `entmax` refuses, a tensor for alpha, or a label outside [0, C).
    """
    if isinstance(alpha, torch.Tensor):
        raise ValueError("entmax_losses: alpha must be a number, got a tensor; a loss cannot be learned by itself.")
    if not logits.is_floating_point():
        raise ValueError(f"entmax_losses: logits must be floating-point numbers, got {logits.dtype}.")
    check_labels("entmax_losses", labels, logits.shape[-1])
    method = _method(alpha, method, topk, n_iter)
    rows, targets = logits.reshape(-1, logits.shape[-1]), labels.flatten()
    parts = _EntmaxLoss.apply(rows, targets, alpha, method, topk, n_iter)
    return EntmaxLosses(*(part.view(labels.shape) for part in parts))


def entmax_loss_sum(logits: torch.Tensor, labels: torch.Tensor, alpha: float = 1.5, **options) -> LossSum:
    """Sum of `entmax_losses` over the labels that are not -100, and their number."""
    return entmax_losses(logits, labels, alpha, **options).losses.sum(), (labels != IGNORE).sum()


def entmax_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    alpha: float = 1.5,
    num_items_in_batch: torch.Tensor | int | None = None,
    **options,
) -> torch.Tensor:
    """Mean of `entmax_losses` over the labels that are not -100, or their sum divided by `num_items_in_batch`.

    `options` are `method`, `topk` and `n_iter`.
    """
    return mean_loss(entmax_loss_sum(logits, labels, alpha, **options), num_items_in_batch)


# ------------------------------------------------------------------------------------------------------------- choices


def _alpha_like(alpha: torch.Tensor, logits: torch.Tensor, dim: int) -> torch.Tensor:
    """alpha with as many dimensions as the logits."""
    wanted = list(logits.shape)
    wanted[dim] = 1
    padded = alpha.view((1,) * (logits.dim() - alpha.dim()) + alpha.shape) if alpha.dim() <= logits.dim() else alpha
    fits = padded.dim() == logits.dim() and all(have in (1, want) for have, want in zip(padded.shape, wanted))
    if not fits or not alpha.is_floating_point():
        raise ValueError(
            f"entmax: alpha must be a floating-point tensor that broadcasts to {wanted}, one number for each "
            f"distribution, got {alpha.dtype} of shape {list(alpha.shape)}."
        )
    if alpha.device.type == "cpu" and not torch.compiler.is_compiling() and not bool((alpha >= 1).all()):
        raise ValueError(f"entmax: every alpha must be at least 1, got {alpha.min().item()}.")
    return padded


def _method(alpha: float | torch.Tensor, method: str | None, topk: int, n_iter: int) -> str:
    per_row = isinstance(alpha, torch.Tensor)
    if not per_row and not 1 <= alpha < math.inf:
        raise ValueError(f"entmax: alpha must be a finite number, at least 1 (softmax), got {alpha}.")
    if method is not None and method not in METHODS:
        raise ValueError(f"entmax: method must be one of {', '.join(METHODS)} or None, got {method!r}.")
    if topk < 1 or n_iter < 1:
        raise ValueError(f"entmax: topk and n_iter must be at least 1, got {topk} and {n_iter}.")
    has_exact = not per_row and alpha in (1.5, 2)
    if method is None:
        method = "newton" if has_exact else "bisection"
    elif method != "bisection" and not has_exact and (per_row or alpha != 1):
        shown = "a tensor" if per_row else alpha
        raise ValueError(f"entmax: method {method!r} exists for alpha 1.5 and 2, got {shown}; use 'bisection'.")
    if torch.compiler.is_compiling() and method in ("newton", "topk"):
        return "sort"
    return method


def _blocks(rows: torch.Tensor) -> Iterator[slice]:
    """Rows that are worked on at a time: as many as stay in the cache on CPU, else all."""
    count, width = rows.shape
    whole = rows.device.type != "cpu" or torch.compiler.is_compiling()
    size = max(1, count) if whole else max(1, BLOCK // max(1, width))
    return (slice(start, start + size) for start in range(0, count, size))


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


# ------------------------------------------------------------------------------------------------------------- solving


def _solve(
    logits: torch.Tensor,
    alpha: float | torch.Tensor,
    method: str,
    topk: int,
    n_iter: int,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Probabilities (R, n) of logits (R, n), the largest logit m (R, 1), and delta (R, 1) in units of the logits, with
    p_j = [1 + (alpha - 1) (z_j - m - delta)]_+^(1 / (alpha - 1)); at alpha 1 m + delta is log-sum-exp.

    The probabilities are written to `out`, which must not share memory with `logits`.
    """
    highest = logits.amax(-1, keepdim=True)
    dead = ~highest.isfinite()  # a row of -inf alone, or with nan or inf
    is_whole = not torch.compiler.is_compiling() and not bool(dead.any())
    if not is_whole:
        logits = logits.masked_fill(dead, 0.0)
    distances = torch.sub(logits, highest if is_whole else highest.masked_fill(dead, 0.0), out=out)  # at most 0
    if isinstance(alpha, torch.Tensor) or method == "bisection" or alpha == 1:
        p, delta = _bisection(distances, alpha, n_iter)
    elif method == "newton":
        p, delta = _newton(distances, alpha)
    else:
        count = distances.shape[-1] if method == "sort" else topk
        p, delta = _sorting(distances, alpha, count)
    if not is_whole:
        p = torch.where(dead, torch.where(highest == -math.inf, 0.0, math.nan), p)
    if out is not None and p is not out:
        out.copy_(p)
    return p, highest, delta


def _newton(distances: torch.Tensor, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities, in the memory of the distances, and delta by Newton's method."""
    power = alpha - 1
    enough = 8 * torch.finfo(distances.dtype).eps
    rest = torch.empty_like(distances)
    ones = torch.empty_like(distances) if alpha == 2 else None
    # With threshold = delta - 1 / power the equation is |rest| = 1 / power in the norm of order 1 / power, which is
    # convex in the threshold. By Jensen's inequality the root is not below mean - n^-power / power, nor is it below
    # -1 / power, where the largest logit alone gives 1.
    start = distances.shape[-1] ** -power / power
    threshold = distances.mean(-1, keepdim=True).sub_(start).clamp_(min=-1 / power)  # (R, 1)
    for _ in range(LARGEST_NEWTON_COUNT):
        torch.sub(distances, threshold, out=rest).clamp_(min=0)
        total = norm = rest.sum(-1, keepdim=True)
        if alpha == 2:
            slope = torch.sign(rest, out=ones).sum(-1, keepdim=True)
        else:
            norm = torch.linalg.vector_norm(rest, dim=-1, keepdim=True)
            slope = total.div_(norm)
        excess = norm - 1 / power
        if bool(excess.amax() <= enough):
            break
        # near the root of a flat row the norm jumps by more than `enough` between neighbouring numbers
        risen = threshold + excess.div_(slope).clamp_(min=0)
        if torch.equal(risen, threshold):
            break
        threshold = risen
    if alpha != 2:
        torch.mul(rest, rest, out=distances).div_(norm.square_())
    else:
        torch.div(rest, norm, out=distances)
    return distances, threshold + 1 / power


def _sorting(distances: torch.Tensor, alpha: float, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and delta from the `count` largest of each row, and from twice as many in rows where these do not
    suffice.
    """
    width, power = distances.shape[-1], alpha - 1
    x = distances * power
    count = min(count, width)
    tau, support = _tau_of_sorted(x.sort(-1, descending=True)[0] if count == width else x.topk(count)[0], alpha)
    while count < width:
        unfinished = (support == count).squeeze(-1).nonzero().squeeze(-1)
        if not len(unfinished):
            break
        count = min(2 * count, width)
        tau[unfinished], support[unfinished] = _tau_of_sorted(x[unfinished].topk(count)[0], alpha)
    p = x.sub_(tau).clamp_(min=0)
    return _normalised(p if alpha == 2 else p.square_()), (tau + 1) / power


def _tau_of_sorted(x: torch.Tensor, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    """tau (R, 1) if the support is among the given numbers (R, k), which fall; and its size (R, 1)."""
    count = torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=x.dtype)
    if alpha == 2:
        sums = x.cumsum(-1) - 1
        inside, taus = count * x > sums, sums / count
    else:
        mean = x.cumsum(-1) / count
        spread = count * (x.square().cumsum(-1) / count - mean.square())
        taus = mean - ((1 - spread) / count).clamp_(min=0).sqrt_()
        inside = taus <= x  # false where -inf makes nan
    support = inside.sum(-1, keepdim=True)
    return taus.gather(-1, support - 1), support


def _normalised(p: torch.Tensor) -> torch.Tensor:
    return p.div_(p.sum(-1, keepdim=True))


def _bisection(distances: torch.Tensor, alpha: float | torch.Tensor, n_iter: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and delta; `distances` from the largest logit."""
    power = alpha - 1
    if not isinstance(alpha, torch.Tensor) and alpha == 1:
        return distances.softmax(-1), distances.logsumexp(-1, keepdim=True)
    is_softmax = power == 0
    if isinstance(power, torch.Tensor):
        safe = power.masked_fill(is_softmax, 1.0)

    def probabilities(delta: torch.Tensor, least: float = NEARLY_ZERO) -> torch.Tensor:
        """At `delta`; in the search with something tiny for zero, since exp(-inf) takes five times as long on CPU."""
        shifted = distances - delta
        if not isinstance(power, torch.Tensor):
            return shifted.mul_(power).clamp_(min=-1.0).log1p_().div_(power).clamp_(min=least).exp_()
        curved = (shifted * power).clamp_(min=-1.0).log1p_().div_(safe)
        return torch.where(is_softmax, shifted, curved).clamp_(min=least).exp_()

    width = math.log(distances.shape[-1])
    if isinstance(power, torch.Tensor):  # delta of a row of equal logits, the largest that there is
        span = torch.where(is_softmax, width, -torch.expm1(-power * width) / safe)
    else:
        span = torch.full_like(distances[..., :1], -math.expm1(-power * width) / power)
    high = span.expand(distances[..., :1].shape)
    low = torch.zeros_like(high)
    for _ in range(n_iter if distances.dtype == torch.float64 else min(n_iter, 30)):
        middle = (low + high) / 2
        is_low = probabilities(middle).sum(-1, keepdim=True) >= 1
        low, high = torch.where(is_low, middle, low), torch.where(is_low, high, middle)
    # Above alpha 2 a probability may jump between neighbouring deltas; only their mixture of sum 1 is right then.
    more, less = probabilities(low, -math.inf), probabilities(high, -math.inf)
    excess, gap = more.sum(-1, keepdim=True) - 1, (more - less).sum(-1, keepdim=True)
    share = (excess / gap.clamp(min=torch.finfo(gap.dtype).tiny)).clamp(0, 1)
    return _normalised(more.lerp_(less, share)), low


# ----------------------------------------------------------------------------------------------------------- gradients


class _Entmax(torch.autograd.Function):
    """With s_j = p_j^(2 - alpha) on the support: dz = s (g - (s.g) / sum(s))."""

    @staticmethod
    def forward(ctx, logits, alpha, dim, method, topk, n_iter):
        per_row = isinstance(alpha, torch.Tensor)
        moved = logits.movedim(dim, -1) if logits.dim() else logits.reshape(1)
        rows = moved.unsqueeze(0).flatten(0, -2)
        alphas = _alphas(alpha, moved, dim) if per_row else alpha
        p = torch.empty_like(rows, memory_format=torch.contiguous_format)
        for block in _blocks(rows) if rows.numel() else ():
            own, chosen = _at_least_float32(rows[block]), alphas[block] if per_row else alpha
            if own.dtype == p.dtype and not torch.compiler.is_compiling():
                _solve(own, chosen, method, topk, n_iter, out=p[block])
            else:
                p[block] = _solve(own, chosen, method, topk, n_iter)[0]
        ctx.dim, ctx.alpha = dim, None if per_row else alpha
        ctx.save_for_backward(p, alpha if per_row else None)
        return p.view(moved.shape).movedim(-1, dim) if logits.dim() else p.view(())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        p, alpha = ctx.saved_tensors
        moved = grad.movedim(ctx.dim, -1) if grad.dim() else grad.reshape(1)
        grads = moved.reshape(p.shape)
        alphas = ctx.alpha if alpha is None else _alphas(alpha, moved, ctx.dim)
        wants_alpha = ctx.needs_input_grad[1]
        grad_logits = torch.empty_like(p)
        grad_alpha = p.new_empty(p.shape[0], 1, dtype=torch.float64) if wants_alpha else None
        for block in _blocks(p) if p.numel() else ():
            own, outer = _at_least_float32(p[block]), _at_least_float32(grads[block])
            chosen = ctx.alpha if alpha is None else alphas[block]
            weights = _weights(own, chosen)
            if alpha is not None or ctx.alpha > 2:  # a weight may be so large that the difference below is lost
                outer = outer - outer.gather(-1, weights.argmax(-1, keepdim=True))
            same = own.dtype == p.dtype and not torch.compiler.is_compiling()
            weighted = torch.mul(weights, outer, out=grad_logits[block]) if same else weights * outer
            total = weights.sum(-1, keepdim=True).clamp_(min=torch.finfo(own.dtype).tiny)
            weighted.addcmul_(weights, weighted.sum(-1, keepdim=True).div_(total), value=-1)
            if not same:
                grad_logits[block] = weighted
            if wants_alpha:
                grad_alpha[block] = (_by_alpha(own.double(), chosen.double()) * outer.double()).sum(-1, keepdim=True)
        grad_logits = grad_logits.view(moved.shape).movedim(-1, ctx.dim) if grad.dim() else grad_logits.view(())
        if wants_alpha:
            grad_alpha = grad_alpha.view(*moved.shape[:-1], 1).movedim(-1, ctx.dim)
            grad_alpha = grad_alpha.sum_to_size(alpha.shape).to(alpha.dtype)
        return grad_logits, grad_alpha, None, None, None, None


def _alphas(alpha: torch.Tensor, moved: torch.Tensor, dim: int) -> torch.Tensor:
    """One alpha (R, 1) for each row of the logits, whose last dimension was `dim`."""
    alpha = _at_least_float32(alpha).movedim(dim, -1)
    return alpha.expand(*moved.shape[:-1], 1).reshape(-1, 1)


def _weights(p: torch.Tensor, alpha: float | torch.Tensor) -> torch.Tensor:
    """s = p^(2 - alpha) on the support, 0 elsewhere."""
    if not isinstance(alpha, torch.Tensor):
        if alpha == 1:
            return p
        if alpha == 1.5:  # a square root of exact zeros takes ten times as long on CPU
            return p.clamp(min=torch.finfo(p.dtype).tiny).rsqrt_().mul_(p)
        if alpha == 2:
            return p.sign()
    return p.clamp(min=torch.finfo(p.dtype).tiny).pow(2 - alpha).clamp_(max=LARGEST_WEIGHT).masked_fill_(p == 0, 0.0)


def _by_alpha(p: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """dp/dalpha in float64 (Correia et al., 2019, proposition 1, and its limit at alpha 1)."""
    p = p / p.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
    surprise = torch.xlogy(p, p)  # p log p
    power = alpha - 1
    near = power < 1e-4
    weights = _weights(p, alpha)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
    power = power.masked_fill(near, 1.0)
    far_off = (p - weights) / power**2 - (surprise - weights * surprise.sum(-1, keepdim=True)) / power
    squares = torch.xlogy(surprise, p)  # p log^2 p
    return torch.where(near, -0.5 * (squares - p * squares.sum(-1, keepdim=True)), far_off)


class _EntmaxLoss(torch.autograd.Function):
    """With m the largest logit: L = delta + (1 - 1 / alpha) E + m - z_y, where E = (sum p^alpha - 1) / (alpha - 1).

    It is H(p) + p.z - z_y: on the support z = m + delta + (p^(alpha - 1) - 1) / (alpha - 1). No logit off the support
    enters, so -inf there does no harm.
    """

    @staticmethod
    def forward(ctx, logits, labels, alpha, method, topk, n_iter):
        kept = labels != IGNORE
        targets = labels.masked_fill(~kept, 0).unsqueeze(-1)  # (R, 1)
        count = len(labels)
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        residual = torch.empty(logits.shape, dtype=dtype, device=logits.device)  # p - e_y
        losses = torch.empty(count, dtype=dtype, device=logits.device)
        gold = torch.empty_like(losses)
        support = torch.empty(count, dtype=torch.int64, device=logits.device)
        for block in _blocks(logits) if logits.numel() else ():
            own, target, keep = _at_least_float32(logits[block]), targets[block], kept[block].unsqueeze(-1)
            out = None if torch.compiler.is_compiling() else residual[block]
            p, highest, delta = _solve(own, alpha, method, topk, n_iter, out)
            chosen = own.gather(-1, target)
            p_gold = p.gather(-1, target)
            loss = delta + _entropy_term(p, alpha) + (highest - chosen)
            loss = loss.clamp_(min=0)
            if alpha > 1:
                loss = loss.masked_fill_(p_gold == 1, 0.0)
            loss = loss.masked_fill_(chosen == -math.inf, math.inf)
            losses[block] = loss.masked_fill_(~keep, 0.0).squeeze(-1)
            gold[block] = p_gold.masked_fill(~keep, 0.0).squeeze(-1)
            support[block] = p.sign().sum(-1).masked_fill_(~keep.squeeze(-1), 0.0)
            if out is None:
                residual[block] = p
            residual[block].scatter_add_(-1, target, torch.full_like(chosen, -1.0))
        if not torch.compiler.is_compiling() and bool(kept.all()):
            kept = None
        ctx.save_for_backward(residual, kept)
        ctx.dtype = logits.dtype
        ctx.mark_non_differentiable(support, gold)
        return losses, support, gold

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        residual, kept = ctx.saved_tensors
        factor = grad.unsqueeze(-1)
        if kept is not None:
            factor = factor.masked_fill(~kept.unsqueeze(-1), 0.0)
        return (residual * factor).to(ctx.dtype), None, None, None, None, None


def _entropy_term(p: torch.Tensor, alpha: float) -> torch.Tensor:
    """(1 - 1 / alpha) (sum p^alpha - 1) / (alpha - 1), (R, 1)."""
    if alpha == 1:
        return p.new_zeros(())
    if alpha == 1.5:
        return (_weights(p, alpha).mul_(p).sum(-1, keepdim=True) - 1) * (2 / 3)
    if alpha == 2:
        return (p.square().sum(-1, keepdim=True) - 1) / 2
    logs = p.clamp(min=torch.finfo(p.dtype).tiny).log_()
    bent = logs.mul_(alpha - 1).expm1_().mul_(p)  # p^alpha - p; 0 where p is 0
    return bent.sum(-1, keepdim=True) / alpha
