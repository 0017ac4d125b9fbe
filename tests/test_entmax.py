"""alpha-entmax and its losses against hand-computed values, the package of the authors, and finite differences."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from bestiary.modeling.layers.entmax import (
    METHODS,
    LearnedAlpha,
    entmax,
    entmax15,
    entmax_loss,
    entmax_losses,
    sparsemax,
)


INF = math.inf
EXACT = ("newton", "sort", "topk")
ALPHAS = (1.0, 1.2, 1.5, 1.75, 2.0, 3.0)


@pytest.fixture(scope="module")
def package():
    """The authors' package, where it is installed."""
    return pytest.importorskip("entmax")


def normal(*shape, scale=1.5, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype) * scale


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (1, (0.524185, 0.317934, 0.157881)),
        (1.1, (0.544979, 0.315710, 0.139311)),
        (1.25, (0.579959, 0.312490, 0.107551)),
        (1.5, (0.649015, 0.308708, 0.042277)),
        (1.75, (0.708212, 0.291788, 0)),
        (2, (0.75, 0.25, 0)),
        (3, (1, 0, 0)),
    ],
)
def test_values(alpha, expected):
    logits = torch.tensor([1, 0.5, -0.2])
    assert_close(entmax(logits, alpha), torch.tensor(expected).float(), rtol=0, atol=1e-6)
    assert_close(entmax(logits, torch.tensor(float(alpha))), torch.tensor(expected).float(), rtol=0, atol=1e-6)


def test_values_of_both_names():
    logits = torch.tensor([-2, 0, 0.5])
    assert_close(sparsemax(logits), torch.tensor([0, 0.25, 0.75]))
    assert_close(entmax15(logits), torch.tensor([0, 0.3260, 0.6740]), rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("logits", "losses"),
    [
        ((2, 0, 0), (0, 0, 0.043552, 0.239545)),
        ((1, 0, 0), (0.099578, 0, 0.257971, 0.551445)),
        ((0, 0, 0), (0.563533, 0.333333, 0.768526, 1.098612)),
        ((1, 0.5, -0.2), (0.190818, 0.0625, 0.350399, 0.645911)),
    ],
)
def test_values_of_losses(logits, losses):
    for alpha, expected in zip((1.5, 2, 1.25, 1), losses):
        loss = entmax_loss(torch.tensor([logits]).float(), torch.tensor([0]), alpha).item()
        assert loss == pytest.approx(expected, abs=1e-6) and (expected != 0 or loss == 0)


@pytest.mark.parametrize("alpha", [1.5, 2.0])
@pytest.mark.parametrize("scale", [10, 1.5, 0.1, 1e-4])
@pytest.mark.parametrize("width", [1, 7, 128, 2000])
def test_methods_agree_with_each_other_and_with_the_package(alpha, scale, width, package):
    logits = normal(40, width, scale=scale)
    peer = package.entmax15 if alpha == 1.5 else package.sparsemax
    expected = peer(logits.double(), -1)
    for method in METHODS:
        found = entmax(logits, alpha, method=method, topk=3)
        assert_close(found.double(), expected, rtol=0, atol=1e-6)
        assert_close(found.sum(-1), torch.ones(40), rtol=0, atol=1e-6)


@pytest.mark.parametrize("alpha", [1.2, 1.75, 3.0])
def test_bisection_is_that_of_the_package(alpha, package):
    logits = normal(20, 50, dtype=torch.float64)
    assert_close(entmax(logits, alpha), package.entmax_bisect(logits, alpha), rtol=0, atol=1e-9)
    assert_close(entmax(logits.float(), alpha).double(), entmax(logits, alpha), rtol=0, atol=1e-6)


@pytest.mark.parametrize("alpha", [1.1, 2.0, 3.0, 5.0, 10.0])
@pytest.mark.parametrize("small", [1e-2, 1e-5])
def test_a_probability_near_the_edge(alpha, small):
    """Above alpha 2 a small probability changes by much between neighbouring thresholds, and its gradient is large."""
    p = torch.tensor([[1 - small, small], [small, 1 - small]], dtype=torch.float64)
    logits = ((p ** (alpha - 1) - 1) / (alpha - 1)).float()
    grad = torch.tensor([[0.3, -1.2], [2.0, 0.7]])
    for given in (alpha, torch.tensor(alpha)):
        leaf = logits.clone().requires_grad_()
        found = entmax(leaf, given, method="bisection")
        assert_close(found.double(), p, rtol=0, atol=2e-7)
        weights = found.detach().double() ** (2 - alpha)
        wanted = (weights.prod(1) / weights.sum(1) * (grad[:, 0] - grad[:, 1])).float()
        (of_logits,) = torch.autograd.grad(found, leaf, grad)
        assert_close(of_logits, torch.stack([wanted, -wanted], 1), rtol=1e-5, atol=1e-6)


def test_gradients_are_finite_however_large_alpha():
    p = torch.rand(20, 6, generator=torch.Generator().manual_seed(0))
    alpha = torch.full((20, 1), 50.0, requires_grad=True)
    logits = (((p / p.sum(1, keepdim=True)) ** 49 - 1) / 49).requires_grad_()
    for given in (50.0, alpha):
        probabilities = entmax(logits, given)
        assert (probabilities < 0.4).any()
        grads = torch.autograd.grad(probabilities.square().sum(), (logits, alpha), allow_unused=True)
        assert all(grad.isfinite().all() for grad in grads if grad is not None)


def test_blocks_of_rows_change_nothing(monkeypatch):
    logits = normal(64, 30)
    grad = normal(64, 30, seed=1)
    results = []
    for size in (30, 200, 2**17):
        monkeypatch.setattr("bestiary.modeling.layers.entmax.BLOCK", size)
        leaf = logits.clone().requires_grad_()
        p = entmax(leaf)
        losses = entmax_losses(leaf, torch.arange(64) % 30).losses
        results.append((p, *torch.autograd.grad(p, leaf, grad), *torch.autograd.grad(losses.sum(), leaf)))
    for other in results[1:]:
        assert_close(other, results[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_gradients_are_those_of_finite_differences(alpha, dim):
    logits = normal(2, 3, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: entmax(z, alpha, dim, n_iter=60), logits)
    methods = EXACT if alpha in (1.5, 2.0) else ()
    grad = normal(2, 3, 4, seed=1, dtype=torch.float64)
    plain = torch.autograd.grad(entmax(logits, alpha, dim), logits, grad)
    for method in methods:
        assert_close(torch.autograd.grad(entmax(logits, alpha, dim, method), logits, grad), plain)


def test_gradient_by_alpha():
    logits = normal(2, 3, 2, 4, dtype=torch.float64).requires_grad_()
    alpha = torch.tensor([1.00003, 1.0002, 1.7], dtype=torch.float64).view(3, 1, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda z, a: entmax(z, a, n_iter=60), (logits, alpha), eps=1e-5, atol=1e-4)
    for shape, dim in (((), -1), ((2, 1), -1), ((2, 1, 2, 4), 1)):
        alpha = torch.full(shape, 1.4, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(lambda z, a, dim=dim: entmax(z, a, dim, n_iter=60), (logits, alpha))
    tops = entmax(logits, torch.tensor([1.0, 1.5, 2.0]).view(3, 1, 1))
    for head, value in enumerate((1.0, 1.5, 2.0)):
        assert_close(tops[:, head], entmax(logits[:, head], value))


def test_the_jacobian_is_symmetric_and_its_rows_sum_to_zero():
    for alpha in ALPHAS:
        logits = normal(6, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(lambda z, alpha=alpha: entmax(z, alpha), logits)
        assert_close(jacobian, jacobian.T)
        assert_close(jacobian.sum(1), torch.zeros(6, dtype=torch.float64))
        off = entmax(logits, alpha) == 0
        assert not jacobian[off].any() and (off.any() or alpha < 1.5)


def test_shifts_permutations_and_the_limit_of_softmax():
    logits = normal(5, 20)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(2))
    for alpha in ALPHAS:
        p = entmax(logits, alpha)
        assert_close(entmax(logits + 3, alpha), p, rtol=0, atol=1e-6)
        assert_close(entmax(logits[:, order], alpha), p[:, order], rtol=0, atol=1e-6)
    for alpha, error in ((1 + 1e-3, 5e-3), (1 + 1e-6, 1e-5)):
        assert_close(entmax(logits, alpha), logits.softmax(-1), rtol=0, atol=error)
        assert_close(entmax(logits, torch.tensor(alpha)), logits.softmax(-1), rtol=0, atol=error)


# --------------------------------------------------------------------------------------------------- hostile numbers


@pytest.mark.parametrize("alpha", ALPHAS)
def test_rows_of_infinities(alpha):
    smallest = torch.finfo(torch.float32).min
    rows = [[-INF] * 3, [0.0, -INF, 1.0], [smallest] * 3, [0.0, smallest, 1.0], [-1e4, -1e4, 3.0]]
    logits = torch.tensor(rows, requires_grad=True)
    for method in METHODS if alpha in (1.5, 2.0) else ("bisection",):
        p = entmax(logits, alpha, method=method)
        assert p[0].tolist() == [0, 0, 0]
        assert_close(p[2], torch.full((3,), 1 / 3))
        assert_close(p[1], p[3]) and p[1, 1] == 0
        assert_close(p[1, [0, 2]], entmax(torch.tensor([0.0, 1.0]), alpha))
        assert p[4].tolist() == [0, 0, 1]
        (grad,) = torch.autograd.grad(p.square().sum(), logits)
        assert grad.isfinite().all() and not grad[0].any()
    bad = torch.tensor([[math.nan, 0, 1], [INF, 0, 1], [0, 0, 1]])
    assert entmax(bad, alpha)[:2].isnan().all()
    assert_close(entmax(bad, alpha)[2], entmax(bad[2], alpha))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_losses_of_infinities(alpha):
    logits = torch.tensor([[0.3, -INF, 1.0], [0.3, -INF, 1.0], [-INF] * 3], requires_grad=True)
    losses = entmax_losses(logits, torch.tensor([0, 1, 2]), alpha).losses
    expected = entmax_losses(torch.tensor([[0.3, 1.0]]), torch.tensor([0]), alpha).losses
    assert_close(losses[:1], expected)
    assert losses[1:].tolist() == [INF, INF]
    (grad,) = torch.autograd.grad(losses[0], logits)
    assert grad.isfinite().all() and grad[0, 1] == 0 and not grad[1:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_half_precision_is_float32_rounded_once(dtype, alpha):
    logits = normal(30, 200).to(dtype).requires_grad_()
    p = entmax(logits, alpha)
    assert p.dtype == dtype and torch.equal(p, entmax(logits.float(), alpha).to(dtype))
    loss = entmax_loss(logits, torch.arange(30), alpha)
    assert loss.dtype == torch.float32
    assert_close(loss, entmax_loss(logits.float(), torch.arange(30), alpha))
    assert torch.autograd.grad(loss, logits)[0].dtype == dtype


# ------------------------------------------------------------------------------------------------------------ losses


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_gradient_of_the_loss_is_p_minus_one_hot(alpha):
    logits = normal(6, 9, dtype=torch.float64).requires_grad_()
    labels = torch.tensor([0, 8, 3, -100, 4, 4])
    assert torch.autograd.gradcheck(lambda z: entmax_losses(z, labels, alpha, n_iter=60).losses, logits)
    parts = entmax_losses(logits, labels, alpha)
    (grad,) = torch.autograd.grad(parts.losses.sum(), logits)
    p = entmax(logits, alpha).detach()
    kept = labels != -100
    one_hot = torch.nn.functional.one_hot(labels.clamp(min=0), 9)
    assert_close(grad, (p - one_hot) * kept.unsqueeze(1))
    assert_close(parts.gold, (p * one_hot).sum(1) * kept)
    assert torch.equal(parts.support, (p > 0).sum(1) * kept)
    assert parts.losses[3] == 0 and (parts.losses >= 0).all()


@pytest.mark.parametrize("method", EXACT)
def test_losses_of_the_package(method, package):
    logits, labels = normal(20, 300), torch.arange(20)
    for alpha, peer in ((1.5, package.entmax15_loss), (2.0, package.sparsemax_loss)):
        assert_close(entmax_losses(logits, labels, alpha, method).losses, peer(logits, labels), rtol=1e-5, atol=1e-6)
    expected = package.entmax_bisect_loss(logits, labels, 1.3)
    assert_close(entmax_losses(logits, labels, 1.3).losses, expected, rtol=1e-5, atol=1e-6)


def test_losses_at_the_margin():
    for alpha in (1.25, 1.5, 2.0, 3.0):
        margin = 1 / (alpha - 1)
        rows = [[margin + 1e-3, 0, 0], [margin - 1e-2, 0, 0]]
        logits = torch.tensor(rows, dtype=torch.float64, requires_grad=True)
        losses = entmax_losses(logits, torch.zeros(2, dtype=torch.int64), alpha).losses
        assert losses[0] == 0 and losses[1] > 0
        assert not torch.autograd.grad(losses[0], logits, retain_graph=True)[0].any()
        assert torch.autograd.grad(losses[1], logits)[0][1].any()


def test_reductions():
    logits, labels = normal(2, 3, 5), torch.tensor([[1, -100, 2], [-100, 0, 4]])
    rows = entmax_losses(logits, labels).losses
    assert rows.shape == (2, 3)
    assert_close(entmax_loss(logits, labels), rows.sum() / 4)
    assert_close(entmax_loss(logits, labels, num_items_in_batch=10), rows.sum() / 10)
    nothing = entmax_loss(logits.requires_grad_(), torch.full((2, 3), -100))
    assert nothing == 0 and not torch.autograd.grad(nothing, logits)[0].any()


# ------------------------------------------------------------------------------------------------------------- others


def test_only_the_probabilities_are_kept_for_the_gradient():
    logits = normal(4, 7).requires_grad_()
    for function in (entmax, lambda z: entmax_losses(z, torch.arange(4)).losses):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            function(logits)
        assert [tuple(each.shape) for each in kept] == [(4, 7)]


@pytest.mark.parametrize(("alpha", "method"), [(1.5, None), (2.0, "topk"), (1.3, None), (1, None)])
def test_compiles_into_one_graph(alpha, method):
    logits, labels = normal(4, 7).requires_grad_(), torch.arange(4)

    def both(z):
        losses = entmax_losses(z, labels, alpha, method=method, n_iter=10).losses
        return entmax(z, alpha, method=method, n_iter=10), losses

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    assert_close(compiled(logits), both(logits), rtol=1e-5, atol=1e-6)
    grads = [
        torch.autograd.grad(sum(part.square().sum() for part in function(logits)), logits)
        for function in (compiled, both)
    ]
    assert_close(*grads, rtol=1e-5, atol=1e-6)


def test_learned_alpha():
    alpha = LearnedAlpha(3, 1.2)
    assert_close(alpha(), torch.full((3,), 1.2))
    with torch.no_grad():
        alpha.logit.copy_(torch.tensor([-20.0, 0, 20]))
    assert_close(alpha(), torch.tensor([1, 1.5, 2.0]))
    with pytest.raises(ValueError, match="between 1 and 2, both excluded, got initial=2"):
        LearnedAlpha(1, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z: entmax(z.long()), "floating-point numbers, got torch.int64"),
        (lambda z: entmax_losses(z.long(), torch.zeros(2).long()), "floating-point numbers, got torch.int64"),
        (lambda z: entmax(z, 0.9), "alpha must be a finite number, at least 1 .*got 0.9"),
        (lambda z: entmax(z, torch.tensor(0.5)), "every alpha must be at least 1, got 0.5"),
        (lambda z: entmax(z, torch.ones(3)), r"broadcasts to \[2, 1\].* got torch.float32 of shape \[3\]"),
        (lambda z: entmax(z, 1.3, method="sort"), "'sort' exists for alpha 1.5 and 2, got 1.3"),
        (lambda z: entmax(z, torch.tensor(1.5), method="newton"), "'newton' exists for alpha 1.5 and 2, got a tensor"),
        (lambda z: entmax(z, method="fast"), "one of newton, sort, topk, bisection or None, got 'fast'"),
        (lambda z: entmax(z, topk=0), "topk and n_iter must be at least 1, got 0 and 50"),
        (lambda z: entmax_losses(z, torch.tensor([0, 3])), r"in \[0, 3\) or -100"),
        (lambda z: entmax_losses(z, torch.tensor([0, 1]), torch.tensor(1.5)), "alpha must be a number, got a tensor"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 3))


def test_empty_and_single():
    for shape, alpha in itertools.product(((0, 4), (3, 0, 4), (3, 0), (0,), (1,)), (1.5, 1.3, torch.tensor(1.3))):
        assert entmax(torch.zeros(shape), alpha).shape == shape
    assert entmax(torch.tensor([2.0])).item() == 1
