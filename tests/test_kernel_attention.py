"""Attention in linear time: causal sums, states, features and projections against explicit formulas."""

import math

import pytest
import torch
from torch.testing import assert_close

from bestiary.configuration.configuration_linear_attention import LinearAttentionConfig
from bestiary.configuration.configuration_performer import PerformerConfig
from bestiary.modeling.layers import random_features
from bestiary.modeling.layers.kernel_attention import (
    KernelCache,
    KernelStateLayer,
    causal_product,
    causal_product_by_chunks,
    rotate,
)
from bestiary.modeling.layers.random_features import (
    causal_positive_attention,
    draw_projection,
    positive_attention,
    positive_features,
    projection_generator,
    trigonometric_features,
)
from bestiary.modeling.modeling_linear_attention import LinearSelfAttention
from bestiary.modeling.modeling_performer import PerformerSelfAttention


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def leaves(*tensors):
    return [tensor.clone().requires_grad_() for tensor in tensors]


# ------------------------------------------------------------------------------------------------------- causal sums


@pytest.mark.parametrize("length, chunk", [(1, 4), (4, 4), (11, 4), (9, 64), (70, 64)])
@pytest.mark.parametrize("with_state", [False, True])
def test_causal_product(length, chunk, with_state):
    """Both paths, values, states and gradients, against the masked (T, T) product."""
    query, key, value = (normal(2, 3, length, width, seed=s, dtype=torch.float64) for s, width in enumerate((5, 5, 4)))
    state = normal(2, 3, 5, 4, seed=3, dtype=torch.float64) if with_state else None
    weights = normal(2, 3, length, 4, seed=4, dtype=torch.float64)
    start = torch.zeros(2, 3, 5, 4, dtype=torch.float64) if state is None else state

    def explicit(q, k, v):
        return (q @ k.mT).tril() @ v + q @ start, start + k.mT @ v

    found = []
    for function in (
        explicit,
        lambda q, k, v: causal_product(q, k, v, chunk, state),
        lambda q, k, v: causal_product_by_chunks(q, k, v, chunk, start),
    ):
        inputs = leaves(query, key, value)
        out, final = function(*inputs)
        gradients = torch.autograd.grad((out * weights).sum(), inputs)
        found.append((out, final.detach(), gradients))
    for each in found[1:]:
        assert_close(each, found[0], rtol=1e-12, atol=1e-12)


def test_causal_product_takes_rows_that_are_no_contiguous_memory():
    query, key, value = (normal(2, 7, 3, 5, seed=s).transpose(1, 2) for s in range(3))
    expected = (query @ key.mT).tril() @ value
    assert_close(causal_product(query, key, value, 4)[0], expected)


def test_causal_product_is_strict_where_the_future_is_huge():
    """Products of later keys overflow; they are not added and multiplied by zero."""
    query, key, value = (normal(1, 1, 6, 3, seed=s) for s in range(3))
    before, _ = causal_product(query, key, value, 4)
    changed = [part.clone() for part in (query, key, value)]
    changed[1][:, :, 3:] = 3e38
    after, _ = causal_product(query, changed[1], value, 4)
    assert torch.equal(after[:, :, :3], before[:, :, :3])


@torch.no_grad()
def test_state_after_pieces_is_state_of_the_whole():
    query, key, value = (normal(2, 2, 13, 4, seed=s) for s in range(3))
    whole, final = causal_product(query, key, value, 4)
    state, parts = None, []
    for piece in (slice(0, 6), slice(6, 7), slice(7, 8), slice(8, 13)):
        out, state = causal_product(query[:, :, piece], key[:, :, piece], value[:, :, piece], 4, state)
        parts.append(out)
    assert_close(torch.cat(parts, 2), whole)
    assert_close(state, final)


def test_gradients_of_the_loops_are_right():
    inputs = leaves(*(normal(1, 2, 7, 3, seed=s, dtype=torch.float64) for s in range(3)))
    assert torch.autograd.gradcheck(lambda *parts: causal_product(*parts, 3)[0], inputs)


# --------------------------------------------------------------------------------------------------- random features


@pytest.mark.parametrize("maximum", ["sequence", "none"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("block", [2**18, 24, 6])
def test_positive_attention_equals_its_features(maximum, masked, block, monkeypatch):
    """Blocks of many heads, one head and part of a head; values and gradients."""
    monkeypatch.setattr(random_features, "BLOCK", block)
    query, key, value = (normal(2, 3, 5, 4, seed=s, dtype=torch.float64) for s in range(3))
    mask = (torch.arange(5) < torch.tensor([5, 3])[:, None])[:, None, :, None] if masked else None
    if masked:
        value = value * mask
        key = torch.where(mask, key, 50.0)  # far above every real one
    weight, scale, epsilon = normal(6, 4, seed=5, dtype=torch.float64), 4**-0.25, 1e-2
    grad = normal(2, 3, 5, 4, seed=6, dtype=torch.float64)

    def plain(q, k, v):
        ours = positive_features(q, weight, scale, epsilon, "row")
        theirs = positive_features(k, weight, scale, epsilon, maximum, mask)
        return ours @ (theirs.mT @ v)

    results = []
    for function in (plain, lambda q, k, v: positive_attention(q, k, v, weight, scale, epsilon, maximum, mask)):
        inputs = leaves(query, key, value)
        out = function(*inputs)
        results.append((out, torch.autograd.grad(out, inputs, grad)))
    assert all(part.isfinite().all() for part in (results[1][0], *results[1][1]))
    assert_close(results[1], results[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chunk", [2, 5, 64])
def test_causal_positive_attention_equals_its_features(masked, chunk):
    """Values, state and gradients, from a state that is not zero."""
    query, key, value = (normal(2, 3, 5, 4, seed=s, dtype=torch.float64) for s in range(3))
    mask = (torch.arange(5) < torch.tensor([5, 3])[:, None])[:, None, :, None] if masked else None
    if masked:
        value = value * mask
        key = torch.where(mask, key, 50.0)
    weight, scale, epsilon = normal(6, 4, seed=5, dtype=torch.float64), 4**-0.25, 1e-2
    state, grad = (normal(2, 3, rows, 4, seed=s, dtype=torch.float64) for rows, s in ((6, 7), (5, 6)))

    def plain(q, k, v):
        ours = positive_features(q, weight, scale, epsilon, "row")
        theirs = positive_features(k, weight, scale, epsilon, "none", mask)
        return (ours @ theirs.mT).tril() @ v + ours @ state, state + theirs.mT @ v

    def streamed(q, k, v):
        return causal_positive_attention(q, k, v, weight, scale, epsilon, chunk, state, mask)

    results = []
    for function in (plain, streamed):
        inputs = leaves(query, key, value)
        out, final = function(*inputs)
        results.append((out, final.detach(), torch.autograd.grad(out, inputs, grad)))
    assert all(part.isfinite().all() for part in (*results[1][:2], *results[1][2]))
    assert_close(results[1], results[0], rtol=1e-9, atol=1e-12)


def test_positive_features_are_the_formula():
    states, weight = normal(1, 2, 3, 4), normal(6, 4, seed=1)
    scaled = states * 4**-0.25
    exponent = scaled @ weight.T
    half = scaled.square().sum(-1, keepdim=True) / 2
    for maximum, top in (("none", 0.0), ("row", exponent.amax(-1, True)), ("sequence", exponent.amax((-1, -2), True))):
        expected = ((exponent - half - top).exp() + 0.25) / math.sqrt(6)
        assert_close(positive_features(states, weight, 4**-0.25, 0.25, maximum), expected)
    largest = half.amax(-2, keepdim=True)
    expected = torch.cat((exponent.cos(), exponent.sin()), -1) * (half - largest).exp() / math.sqrt(6)
    assert_close(trigonometric_features(states, weight, 4**-0.25, "sequence"), expected)


@pytest.mark.parametrize("rows, columns", [(8, 4), (10, 4), (3, 4)])
@pytest.mark.parametrize("sign_fix", [True, False])
def test_orthogonal_blocks(rows, columns, sign_fix):
    generator = projection_generator(0, 0, 0)
    weight = draw_projection(rows, columns, generator, scaling=1, sign_fix=sign_fix)
    assert weight.shape == (rows, columns)
    assert_close(weight.norm(dim=1), torch.full((rows,), math.sqrt(columns)))
    for start in range(0, rows, columns):
        block = weight[start : start + columns]
        assert_close(block @ block.T, columns * torch.eye(len(block)), rtol=0, atol=1e-5)
    lengths = draw_projection(4000, columns, generator).norm(dim=1)
    assert abs(lengths.square().mean().item() - columns) < 0.25 and lengths.std() > 0.3  # chi, not constant


def test_projections_depend_on_seed_drawing_and_layer():
    def draw(*key, **options):
        return draw_projection(6, 4, projection_generator(*key), **options)

    first = draw(1, 2, 3)
    assert torch.equal(first, draw(1, 2, 3))
    torch.manual_seed(5)
    assert torch.equal(first, draw(1, 2, 3)), "the global generator matters"
    for key in ((0, 2, 3), (1, 0, 3), (1, 2, 0)):
        assert not torch.equal(first, draw(*key))
    independent = draw(1, 2, 3, orthogonal=False)
    assert (independent @ independent.T)[:4, :4].tril(-1).abs().max() > 0.1
    assert_close(draw(1, 2, 3, orthogonal=False, scaling=1).norm(dim=1), torch.full((6,), 2.0))


@pytest.mark.parametrize(
    "orthogonal, sign_fix, unbiased", [(False, True, True), (True, True, True), (True, False, False)]
)
def test_the_estimate_of_the_softmax_kernel_is_unbiased(orthogonal, sign_fix, unbiased):
    """Within 4 standard errors of exp(q . k / sqrt(d)); the official orthogonal sampling is not."""
    draws, width = 16_000, 8
    query, key = (0.8 * normal(1, 1, 1, width, seed=s) for s in (1, 9))
    generator = torch.Generator().manual_seed(0)
    if orthogonal:  # many blocks at once: the same formulas as draw_projection, which loops
        q, r = torch.linalg.qr(torch.randn(draws, width, width, generator=generator))
        if sign_fix:
            q = q * r.diagonal(dim1=1, dim2=2).sign()[:, None]
        weight = q.mT * torch.randn(draws, width, width, generator=generator).norm(dim=2, keepdim=True)
        one = draw_projection(width, width, torch.Generator().manual_seed(4), sign_fix=sign_fix)
        again = torch.Generator().manual_seed(4)
        q, r = torch.linalg.qr(torch.randn(width, width, generator=again))
        q = q * r.diagonal().sign() if sign_fix else q
        assert_close(one, q.T * torch.randn(width, width, generator=again).norm(dim=1, keepdim=True))
    else:
        weight = draw_projection(draws * width, width, generator, orthogonal=False).view(draws, width, width)
    flat = weight.flatten(0, 1)
    ours, theirs = (positive_features(x, flat, width**-0.25, 0.0, "none") for x in (query, key))
    # one estimate per drawing of a whole block, since the rows of a block are not independent
    estimates = (ours * theirs).view(draws, width).sum(1) * draws
    true = (query * key).sum().div(math.sqrt(width)).exp().item()
    error = (estimates.mean().item() - true) / (estimates.std().item() / math.sqrt(draws))
    assert (abs(error) < 4) == unbiased, f"{error} standard errors from {true}"


# ----------------------------------------------------------------------------------------------------------- modules


def heads_of(module, query, key, value, mask=None, backend="sdpa", cache=None):
    """Context (B, H, T, d) and weights of a self-attention module on given queries, keys and values."""
    module.config._attn_implementation = backend
    module.project = lambda hidden: (query, key, value)
    hidden = query.new_zeros(query.shape[0], query.shape[2], 1)
    context, weights = module(hidden, mask, past_key_values=cache)
    return context.unflatten(-1, (query.shape[1], -1)).transpose(1, 2), weights


def attention(kernel, causal=False, heads=1, width=2, **options):
    """A module whose heads have some width."""
    sizes = {"hidden_size": heads * width, "num_attention_heads": heads, "is_decoder": causal, "chunk_size": 4}
    if kernel in (*LINEAR, "scaling"):
        return LinearSelfAttention(LinearAttentionConfig(attention_kernel=kernel, **sizes, **options), 0)
    module = PerformerSelfAttention(PerformerConfig(attention_kernel=kernel, **sizes, **options), 0)
    if module.config.projects:
        module.projection_matrix.copy_(module.new_projection(0, 0))
    return module


LINEAR = ("elu", "double_softmax", "cosine", "relu", "sigmoid", "exp", "square")
RANDOM = (
    "softmax_positive",
    "generalized_relu",
    "generalized_exp",
    "generalized_sigmoid",
    "generalized_abs",
    "generalized_elu",
)
AVERAGES = (*LINEAR, *RANDOM)
"""Kernels whose result is a weighted average of the values."""


def given_numbers(*rows):
    return torch.tensor(rows)[None, None]


@pytest.mark.parametrize(
    "kernel, expected",
    [
        ("elu", [2.650708, 2.779668]),
        ("cosine", [2.637334, 2.736156]),
        ("double_softmax", [2.859567, 3.173285]),
    ],
)
def test_closed_forms_of_linear_attention(kernel, expected):
    query, key = given_numbers([0.0, 1], [-1, 2]), given_numbers([1.0, 0], [-1, 1], [0, 2])
    value = given_numbers([1.0], [2], [4]).expand(-1, -1, -1, 2)
    module = attention(kernel, denominator_eps=0.0)
    context, _ = heads_of(module, torch.cat((query, query[:, :, :1]), 2), key, value)
    assert_close(context[0, 0, :2, 0], torch.tensor(expected), rtol=0, atol=1e-5)


def test_weights_of_linear_attention():
    """The worked example's weights, before and after normalisation."""
    query, key = given_numbers([0.0, 1], [-1, 2], [0, 1]), given_numbers([1.0, 0], [-1, 1], [0, 2])
    worked = {
        "elu": [[4, 4.367879, 7], [3.735759, 6.135335, 9.367880]],
        "cosine": [[1, 1.707107, 2], [0.552786, 1.948683, 1.894427]],
        "double_softmax": [[0.244728, 0.203124, 0.552148], [0.117310, 0.237392, 0.645298]],
    }
    for kernel, rows in worked.items():
        ours, theirs = attention(kernel).features(query, key, None, None)
        assert_close((ours @ theirs.mT)[0, 0, :2], torch.tensor(rows), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "epsilon, expected", [(0.0, [2.027036, 2.166363]), (1e-6, [2.027035, 2.166360]), (1e-4, [2.027003, 2.166065])]
)
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_closed_form_of_random_features(epsilon, expected, backend):
    module = attention("softmax_positive", num_random_features=3, kernel_epsilon=epsilon)
    module.projection_matrix.copy_(torch.tensor([[1.0, 0], [0, 2], [1, -1]]))
    query, key = given_numbers([1.0, 0], [0.5, -1]), given_numbers([0.0, 1], [1, 1])
    value = given_numbers([1.0], [3]).expand(-1, -1, -1, 2)
    context, _ = heads_of(module, query, key, value, backend=backend)
    assert_close(context[0, 0, :, 0], torch.tensor(expected), rtol=0, atol=2e-6)


def batch(heads=2, length=9, width=4, dtype=torch.float32, scale=1.0):
    return [scale * normal(2, heads, length, width, seed=s, dtype=dtype) for s in (11, 12, 13)]


def mask_of(*lengths, total=9, left=False):
    kept = torch.arange(total) < torch.tensor(lengths)[:, None]
    return (kept.flip(1) if left else kept)[:, None, :, None]


@pytest.mark.parametrize("kernel", (*AVERAGES, "softmax_trig", "scaling"))
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("mask", [None, mask_of(9, 6), mask_of(9, 6, left=True)], ids=["whole", "right", "left"])
def test_linear_form_is_the_explicit_form(kernel, causal, dtype, tolerance, mask):
    if kernel == "scaling" and causal:
        pytest.skip("not defined")
    module = attention(kernel, causal, 2, 4)
    inputs = batch(dtype=dtype, scale=0.3 if kernel == "softmax_trig" else 1.0)
    linear, _ = heads_of(module, *inputs, mask)
    explicit, weights = heads_of(module, *inputs, mask, backend="eager")
    assert_close(linear, explicit, rtol=10 * tolerance, atol=tolerance)
    if kernel == "scaling":
        return
    kept = torch.ones(2, 1, 9, 1, dtype=torch.bool) if mask is None else mask
    rows = kept if causal else torch.ones_like(kept)
    sums = weights.sum(-1)[rows.squeeze(-1).expand(-1, 2, -1)]
    sums = sums[sums != 0] if kernel == "relu" else sums  # whose features may all be 0
    assert_close(sums, torch.ones_like(sums), rtol=1e-4, atol=1e-4)
    assert not (weights * ~kept.mT).any()
    if causal:
        assert not weights.triu(1).any()


@pytest.mark.parametrize("kernel", AVERAGES)
@pytest.mark.parametrize("causal", [False, True])
def test_result_is_an_average_of_the_values(kernel, causal):
    query, key, value = batch()
    module = attention(kernel, causal, 2, 4, **({"denominator_eps": 0.0} if kernel in LINEAR else {}))
    context, _ = heads_of(module, query, key, value)
    low, high = value.amin(2, keepdim=True), value.amax(2, keepdim=True)
    assert (context >= low - 1e-5).all() and (context <= high + 1e-5).all()
    constant, _ = heads_of(module, query, key, torch.full_like(value, 3.0))
    some = constant[constant != 0]  # relu features may see no key at all
    assert_close(some, torch.full_like(some, 3.0))


@pytest.mark.parametrize("kernel", AVERAGES)
def test_order_of_the_keys_does_not_matter(kernel):
    query, key, value = batch()
    module = attention(kernel, False, 2, 4)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    first, second = (heads_of(module, query, key[:, :, o], value[:, :, o])[0] for o in (torch.arange(9), order))
    assert_close(second, first, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kernel", (*AVERAGES, "softmax_trig"))
@pytest.mark.parametrize("left", [False, True])
def test_padding_is_in_no_sum(kernel, left):
    """A padded batch is the rows alone, whatever stands in the padding, however large."""
    query, key, value = batch(scale=0.5)
    module = attention(kernel, False, 2, 4)
    mask = mask_of(9, 6, left=left)
    key, value = (torch.where(mask, part, 40.0) for part in (key, value))
    context, _ = heads_of(module, query, key, value, mask)
    kept = slice(3, 9) if left else slice(0, 6)
    alone, _ = heads_of(module, *(part[1:, :, kept] for part in (query, key, value)))
    assert_close(context[1:, :, kept], alone, rtol=1e-4, atol=1e-6)
    quirk = attention(kernel, False, 2, 4)
    quirk.mask_values_only = True
    if quirk.has_denominator:
        context, _ = heads_of(quirk, query, torch.where(mask, key, 1.0), value, mask)
        assert (context[1:, :, kept] - alone).abs().max() > 1e-3


@pytest.mark.parametrize("kernel", (*AVERAGES, "softmax_trig", "scaling"))
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_row_without_tokens_is_finite(kernel, backend):
    """And so are its gradients; other rows are as without it."""
    module = attention(kernel, False, 2, 4)
    inputs = leaves(*batch(scale=0.5))
    context, _ = heads_of(module, *inputs, mask_of(9, 0), backend)
    context.sum().backward()
    assert context.isfinite().all() and all(part.grad.isfinite().all() for part in inputs)
    assert_close(context[:1], heads_of(module, *(part[:1] for part in inputs), backend=backend)[0])


@pytest.mark.parametrize("kernel", (*AVERAGES, "softmax_trig"))
def test_causal_form_is_every_prefix(kernel):
    """Row i is the last row of the bidirectional form of the first i + 1 tokens, and later tokens change nothing."""
    query, key, value = batch(scale=0.5)
    options = {"key_stabilizer": "none", "kernel_epsilon": 1e-6} if kernel not in LINEAR else {}
    module, both = attention(kernel, True, 2, 4, **options), attention(kernel, False, 2, 4, **options)
    context, _ = heads_of(module, query, key, value)
    for last in range(9):
        part = [states[:, :, : last + 1] for states in (query, key, value)]
        assert_close(context[:, :, last], heads_of(both, *part)[0][:, :, -1], rtol=1e-4, atol=1e-5)
        assert_close(context[:, :, : last + 1], heads_of(module, *part)[0], rtol=1e-5, atol=1e-6)
    later = [torch.cat((states[:, :, :5], 30 * states[:, :, 5:]), 2) for states in (query, key, value)]
    assert torch.equal(heads_of(module, *later)[0][:, :, :5], context[:, :, :5])


def test_stabilising_over_the_sequence_looks_ahead():
    """Why it is off by default for decoders: a large later key flushes earlier features to epsilon."""
    query, key, value = batch(scale=0.5)
    later = [torch.cat((states[:, :, :5], 30 * states[:, :, 5:]), 2) for states in (query, key, value)]
    module = attention("softmax_positive", True, 2, 4, key_stabilizer="sequence")
    before, after = (heads_of(module, *inputs)[0][:, :, :5] for inputs in ((query, key, value), later))
    assert (before - after).abs().max() > 1e-3


@pytest.mark.parametrize("form", ["prefix", "shared_denominator"])
def test_causal_double_softmax(form):
    query, key, value = batch(dtype=torch.float64)
    module = attention("double_softmax", True, 2, 4, causal_double_softmax=form, denominator_eps=0.0)
    ours = query.softmax(-1)
    rows = []
    for i in range(9):
        now, seen = ours[:, :, i, None], key[:, :, : i + 1].exp()
        if form == "prefix":
            weights = now @ (seen / seen.sum(2, keepdim=True)).mT
        else:
            weights = now @ seen.mT
            weights = weights / weights.sum(-1, keepdim=True)
        rows.append(weights @ value[:, :, : i + 1])
    context, _ = heads_of(module, query, key, value)
    assert_close(context, torch.cat(rows, 2), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kernel", ["double_softmax", "exp", "generalized_exp"])
@pytest.mark.parametrize("causal", [False, True])
def test_exponents_are_cut_where_float32_ends(kernel, causal):
    query, key, value = batch()
    module = attention(kernel, causal, 2, 4)
    inputs = leaves(200 * query, 200 * key, value)
    context, _ = heads_of(module, *inputs)
    context.sum().backward()
    assert context.isfinite().all() and all(part.grad.isfinite().all() for part in inputs)


def test_cosine_identities():
    query, key, value = batch(dtype=torch.float64)
    module = attention("cosine", False, 2, 4, denominator_eps=0.0)
    sums = [module.features(sign * query, key, None, None) for sign in (1, -1)]
    plus, minus = (ours @ theirs.mT for ours, theirs in sums)
    assert_close(plus + minus, torch.full_like(plus, 2.0))
    assert_close(heads_of(module, query, key * 7, value)[0], heads_of(module, query, key, value)[0])
    assert heads_of(module, query * 0, key * 0, value)[0].isfinite().all()


def test_small_elu_features_give_zero_and_not_nan():
    query, key, value = batch()
    context, _ = heads_of(attention("elu", False, 2, 4), query - 200, key - 200, value)
    assert not context.any()


@torch.no_grad()
@pytest.mark.parametrize("kernel", (*AVERAGES, "softmax_trig"))
@pytest.mark.parametrize("left", [False, True])
def test_decoding_is_the_parallel_form(kernel, left):
    """A prompt, then pieces of 1, 2 and 1 tokens; states of constant size; padding on the left."""
    query, key, value = batch(scale=0.5)
    mask = mask_of(9, 6, left=True) if left else None
    module = attention(kernel, True, 2, 4)
    expected, _ = heads_of(module, query, key, value, mask)
    cache, parts, sizes = KernelCache(1), [], set()
    for piece in (slice(0, 5), slice(5, 6), slice(6, 8), slice(8, 9)):
        own = None if mask is None else mask[:, :, piece]
        context, _ = heads_of(module, *(part[:, :, piece] for part in (query, key, value)), own, cache=cache)
        parts.append(context)
        sizes.add(cache.layers[0].state.shape)
    assert_close(torch.cat(parts, 2), expected, rtol=1e-4, atol=1e-6)
    assert len(sizes) == 1 and cache.get_seq_length() == 9
    assert cache.layers[0].state.dtype == torch.float32


@pytest.mark.parametrize("kernel", ["elu", "softmax_positive", "double_softmax"])
@pytest.mark.parametrize("causal", [False, True])
def test_sums_are_in_float32_under_lower_precision(kernel, causal):
    """500 tokens of bfloat16: sums in bfloat16 would stop growing at 256 keys."""
    query, key, value = batch(length=500)
    module = attention(kernel, causal, 2, 4)
    exact, _ = heads_of(module, *(part.bfloat16().float() for part in (query, key, value)))
    with torch.autocast("cpu", torch.bfloat16):
        context, _ = heads_of(module, *(part.bfloat16() for part in (query, key, value)))
    assert context.dtype == torch.bfloat16
    assert_close(context.float(), exact, rtol=1e-2, atol=1e-3)


def test_the_error_of_random_features_falls_with_their_number():
    """About as m^(-1/2) at small norms; for unit-normal queries and keys the estimate is not good at all."""
    query, key, value = (normal(1, 4, 64, 16, seed=s) for s in (1, 2, 3))

    def error(features, scale):
        exact = ((scale**2 * query @ key.mT) / 4).softmax(-1) @ value
        total = 0.0
        for seed in range(8):
            module = attention("softmax_positive", False, 4, 16, num_random_features=features, feature_seed=seed)
            module.projection_matrix.copy_(module.new_projection(seed, 0))
            total += (heads_of(module, scale * query, scale * key, value)[0] - exact).square().mean().item()
        return math.sqrt(total / 8 / exact.square().mean().item())

    errors = [error(features, 0.5) for features in (64, 256, 1024)]
    assert 1.5 < errors[0] / errors[1] < 2.7 and 1.5 < errors[1] / errors[2] < 2.7, errors
    assert error(256, 2.0) > 5 * errors[1]


# ------------------------------------------------------------------------------------------------------ cache, rotary


def test_cache_rows_are_reordered_repeated_and_forgotten():
    cache = KernelCache(2)
    for layer in cache.layers:
        layer.advance(torch.arange(3.0).view(3, 1, 1, 1), 4)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert cache.layers[1].state.flatten().tolist() == [2, 0, 0]
    cache.batch_repeat_interleave(2)
    assert cache.layers[0].state.flatten().tolist() == [2, 2, 0, 0, 0, 0]
    cache.batch_select_indices(torch.tensor([0, 5]))
    assert cache.layers[0].state.flatten().tolist() == [2, 0] and cache.get_seq_length() == 4
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="no keys and values"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.layers[0].state is None
    assert isinstance(cache.layers[0], KernelStateLayer)


def test_rotation_keeps_lengths_and_depends_on_distance():
    states = normal(1, 1, 1, 6).expand(1, 1, 8, 6)
    angles = torch.arange(8.0)[None, None, :, None] * 10000.0 ** -(torch.arange(0, 6, 2) / 6)
    turned = rotate(states, (angles.cos(), angles.sin()))
    assert_close(turned.norm(dim=-1), states.norm(dim=-1))
    products = turned[0, 0] @ turned[0, 0].T
    for distance in range(8):
        diagonal = products.diagonal(distance)
        assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert_close(
        turned[0, 0, 1, :2],
        torch.stack(
            (
                states[0, 0, 0, 0] * math.cos(1) - states[0, 0, 0, 1] * math.sin(1),
                states[0, 0, 0, 1] * math.cos(1) + states[0, 0, 0, 0] * math.sin(1),
            )
        ),
    )
