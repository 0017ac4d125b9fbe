"""The kernel of MiniLMv2's loss: the closed form of the paper note, the plain path, gradients, padding, blocks."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F
from torch.testing import assert_close

from bestiary.modeling.layers import relations
from bestiary.modeling.layers.relations import relation_losses


BATCH, LENGTH, HEADS, TEACHER, STUDENT = 3, 7, 4, 12, 8
LENGTHS = (7, 4, 2)
BLOCKS = (1, LENGTH, 3 * LENGTH, LENGTH**2, 3 * LENGTH**2, HEADS * LENGTH**2, 2 * HEADS * LENGTH**2, 10**6)
"""A row, a row, three rows, a head, three heads, a sequence, two sequences, everything."""


def vectors(width: int, seed: int, dtype: torch.dtype = torch.float64, grad: bool = False) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, LENGTH, width, generator=draw, dtype=torch.float64).to(dtype).requires_grad_(grad)


def padded() -> torch.Tensor:
    return (torch.arange(LENGTH) < torch.tensor(LENGTHS)[:, None]).long()


def by_definition(teacher, student, heads, mask) -> torch.Tensor:
    """Sequence by sequence, without padding; softmax, log-softmax and kl_div."""

    def scores(pair, row):
        left, right = (side[row][mask[row].bool()].unflatten(-1, (heads, -1)).transpose(0, 1) for side in pair)
        return left @ right.mT / left.shape[-1] ** 0.5  # (A, n, n)

    losses = []
    for row in range(len(mask)):
        theirs, ours = scores(teacher, row).softmax(-1), scores(student, row).log_softmax(-1)
        losses.append(F.kl_div(ours, theirs, reduction="sum") / (heads * mask[row].sum()))
    return torch.stack(losses)


def test_closed_form():
    """One head, two tokens: teacher the unit vectors of width 2, student 1 and 2 of width 1."""
    teacher = torch.eye(2)[None]
    student = torch.tensor([[[1.0], [2.0]]])
    for blocks in (0, 1, 100):
        found = relation_losses((teacher, teacher), (student, student), 1, block_scores=blocks)
        assert found.item() == pytest.approx((0.3487 + 0.1531) / 2, abs=1e-4)


@pytest.mark.parametrize("blocks", [0, *BLOCKS, None])
@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("with_mask", [True, False])
def test_values_and_gradients_are_those_of_the_definition(blocks, same, with_mask):
    teacher = (vectors(TEACHER, 0), vectors(TEACHER, 1))
    student = (vectors(STUDENT, 2, grad=True), vectors(STUDENT, 3, grad=True))
    if same:
        teacher, student = (teacher[0],) * 2, (student[0],) * 2
    mask = padded() if with_mask else torch.ones(BATCH, LENGTH).long()
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    leaves = student[:1] if same else student
    expected = by_definition(teacher, student, HEADS, mask)
    found = relation_losses(teacher, student, HEADS, mask if with_mask else None, block_scores=blocks)
    assert found.shape == (BATCH,) and (found > 0).all()
    assert_close(found, expected, rtol=1e-10, atol=1e-12)
    gradients, theirs = (torch.autograd.grad((each * weights).sum(), leaves) for each in (found, expected))
    assert_close(gradients, theirs, rtol=1e-8, atol=1e-10)
    if with_mask:
        assert not gradients[0][mask == 0].any()


@pytest.mark.parametrize("blocks", [3 * LENGTH, LENGTH**2])
def test_gradcheck(blocks):
    teacher = vectors(TEACHER, 0), vectors(TEACHER, 1)
    left, right = vectors(STUDENT, 2, grad=True), vectors(STUDENT, 3, grad=True)
    mask = padded()
    assert gradcheck(lambda x: relation_losses(teacher, (x, x), HEADS, mask, block_scores=blocks), (left,))
    assert gradcheck(lambda x, y: relation_losses(teacher, (x, y), HEADS, mask, block_scores=blocks), (left, right))


def test_only_one_side_may_need_a_gradient():
    teacher, right = (vectors(TEACHER, 0),) * 2, vectors(STUDENT, 3)
    for student in ((vectors(STUDENT, 2, grad=True), right), (right, vectors(STUDENT, 2, grad=True))):
        leaf = next(side for side in student if side.requires_grad)
        both = [torch.autograd.grad(relation_losses(teacher, student, HEADS, None, k).sum(), leaf) for k in (0, 50)]
        assert_close(*both)
        assert right.grad is None


def test_no_gradient_for_the_teacher_nor_without_grad_mode():
    teacher, student = vectors(TEACHER, 0, grad=True), vectors(STUDENT, 1, grad=True)
    for blocks in (0, None):
        relation_losses((teacher, teacher), (student, student), HEADS, block_scores=blocks).sum().backward()
        assert teacher.grad is None
        with torch.no_grad():
            assert not relation_losses(
                (teacher, teacher), (student, student), HEADS, block_scores=blocks
            ).requires_grad


def test_plain_path_can_be_differentiated_twice_and_the_fast_one_says_no():
    teacher, student = vectors(TEACHER, 0), vectors(STUDENT, 1, grad=True)

    def second(blocks):
        loss = relation_losses((teacher, teacher), (student, student), HEADS, block_scores=blocks).sum()
        (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), student)[0]

    assert second(0).any()
    with pytest.raises(RuntimeError, match="can be differentiated once.*block_scores=0"):
        second(None)


def test_equal_models_have_no_loss_and_no_basis():
    teacher = vectors(STUDENT, 0)
    assert relation_losses((teacher, teacher), (teacher, teacher), HEADS).abs().max() < 1e-12
    draw = torch.Generator().manual_seed(5)
    rotation = torch.linalg.qr(torch.randn(2, 2, generator=draw, dtype=torch.float64))[0]
    student = vectors(STUDENT, 1)
    rotated = (student.unflatten(-1, (HEADS, 2)) @ rotation).flatten(-2)
    before, after, scaled = (relation_losses((teacher,) * 2, (x, x), HEADS) for x in (student, rotated, 1.5 * student))
    assert_close(after, before, rtol=1e-9, atol=0)
    assert ((scaled - before).abs() > 1e-3).all()


def test_padding_and_order_of_tokens_do_not_matter():
    teacher, student, mask = vectors(TEACHER, 0), vectors(STUDENT, 1), padded()
    expected = relation_losses((teacher, teacher), (student, student), HEADS, mask)
    wild = [torch.where(mask[..., None].bool(), x, 1e4) for x in (teacher, student)]
    longer = [F.pad(x, (0, 0, 0, 5), value=3.0) for x in wild]
    found = relation_losses((longer[0],) * 2, (longer[1],) * 2, HEADS, F.pad(mask, (0, 5)))
    assert_close(found, expected)
    order = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(1))  # padding in between
    found = relation_losses((teacher[:, order],) * 2, (student[:, order],) * 2, HEADS, mask[:, order])
    assert_close(found, expected)


@pytest.mark.parametrize("blocks", [0, None])
def test_a_sequence_without_tokens_is_zero(blocks):
    student, mask = vectors(STUDENT, 1, torch.float32, grad=True), padded()
    mask[1] = 0
    teacher = vectors(TEACHER, 0, torch.float32)
    losses = relation_losses((teacher, teacher), (student, student), HEADS, mask, block_scores=blocks)
    losses.sum().backward()
    assert losses[1] == 0 and losses.isfinite().all() and student.grad.isfinite().all() and not student.grad[1].any()


@pytest.mark.parametrize("blocks", [0, None])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow(dtype, blocks):
    """Products of 300 with 300 over 3 numbers are beyond half precision; the loss is computed in float32."""
    teacher, student = 300 * vectors(TEACHER, 0, dtype), vectors(STUDENT, 1, dtype, grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = relation_losses((teacher, teacher), (student, student), HEADS, padded(), block_scores=blocks)
    exact = relation_losses((teacher.double(),) * 2, (student.double(),) * 2, HEADS, padded())
    assert found.dtype == torch.float32
    assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)
    found.sum().backward()
    assert student.grad.dtype == dtype and student.grad.isfinite().all()


def test_blocks_cover_every_score_once():
    for scores in BLOCKS:
        seen = torch.zeros(BATCH, HEADS, LENGTH)
        for block in relations._blocks(BATCH, HEADS, LENGTH, scores):
            seen[block] += 1
            assert seen[block].numel() * LENGTH <= max(scores, LENGTH)
        assert (seen == 1).all()


def test_compiled():
    teacher, student = vectors(TEACHER, 0), vectors(STUDENT, 1, grad=True)

    def loss(x):
        return relation_losses((teacher, teacher), (x, x), HEADS, padded()).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    assert_close(torch.autograd.grad(compiled(student), student), torch.autograd.grad(loss(student), student))
    torch._dynamo.reset()


def test_memory_of_one_group_of_heads():
    """No tensor of all heads' scores exists in either pass."""
    length, heads = 64, 16
    draw = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(2, length, 32, generator=draw) for _ in range(2))
    student.requires_grad_()
    whole = 2 * heads * length * length * 4
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        relation_losses((teacher,) * 2, (student,) * 2, heads, block_scores=2 * length**2).sum().backward()
    allocations = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert 0 < max(allocations) <= whole // 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_relation_heads": 5}, "num_relation_heads=5 must divide .* teacher's is 12"),
        ({"num_relation_heads": 6}, "num_relation_heads=6 must divide .* student's is 8"),
        ({"teacher": (torch.zeros(3, 6, 12),) * 2}, r"same batch and tokens, got \(3, 6, 12\)"),
        ({"student": (torch.zeros(3, 7, 8), torch.zeros(3, 7, 16))}, r"got \(3, 7, 8\) and \(3, 7, 16\)"),
        ({"mask": torch.ones(3, 1, 7)}, r"mask must be \(batch, tokens\) = \(3, 7\)"),
    ],
)
def test_refused(changes, message):
    given = {"teacher": (vectors(TEACHER, 0),) * 2, "student": (vectors(STUDENT, 1),) * 2, "num_relation_heads": 4}
    with pytest.raises(ValueError, match=message):
        relation_losses(**given | changes)
