"""The kernels of modeling/layers against plain references: chunked cross-entropy, dropout, sampling, packing."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

from bestiary.modeling.layers import linear_cross_entropy as lce
from bestiary.modeling.layers import sampling
from bestiary.modeling.layers.dropout import Dropout, dropout
from bestiary.modeling.layers.linear_cross_entropy import linear_cross_entropy_sum
from bestiary.modeling.layers.sampling import gumbel_argmax, sample_categorical, slot_keys
from bestiary.modeling.layers.unpadding import padding_share, plan_packing


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def electra_record(parity_dir):
    """Generator logits, uniform noise and samples that ELECTRA's official code recorded."""
    record = load_file(parity_dir("electra") / "outputs.safetensors")
    temperature = json.loads((parity_dir("electra") / "config.json").read_text())["temperature"]
    logits, uniform = (record[name].flatten(0, 1) for name in ("generator_logits", "sampling_uniform"))
    return logits, uniform, temperature, record["sampled_ids"].flatten()


class TestLinearCrossEntropy:
    rows, width, vocabulary = 13, 8, 50

    def inputs(self, bias=True, dtype=torch.float32):
        draw = seeded()
        hidden = torch.randn(self.rows, self.width, generator=draw).to(dtype).requires_grad_()
        weight = torch.randn(self.vocabulary, self.width, generator=draw).to(dtype).requires_grad_()
        offset = torch.randn(self.vocabulary, generator=draw).to(dtype).requires_grad_() if bias else None
        labels = torch.randint(0, self.vocabulary, (self.rows,), generator=draw)
        labels[[2, 7]] = -100
        return hidden, weight, offset, labels

    @staticmethod
    def reference(hidden, weight, bias, labels):
        logits = hidden @ weight.T + (0 if bias is None else bias)
        kept = labels != -100
        return -logits.log_softmax(1)[kept, labels[kept]].sum()

    @pytest.mark.parametrize("chunk_rows", [None, 1, 5, 100])
    @pytest.mark.parametrize("bias", [True, False])
    def test_equals_the_formula_forward_and_backward(self, chunk_rows, bias):
        *leaves, labels = self.inputs(bias, torch.float64)
        given = [leaf for leaf in leaves if leaf is not None]
        expected = self.reference(*leaves, labels)
        loss = linear_cross_entropy_sum(*leaves, labels, chunk_rows=chunk_rows)
        torch.testing.assert_close(loss, expected)
        # a factor behind the loss, as gradient accumulation has it
        for ours, theirs in zip(torch.autograd.grad(loss * 3, given), torch.autograd.grad(expected * 3, given)):
            torch.testing.assert_close(ours, theirs)

    @pytest.mark.parametrize("chunk_rows", [None, 4])
    def test_large_logits(self, chunk_rows):
        hidden, weight, bias, labels = self.inputs()
        hidden = (hidden * 1000).detach().requires_grad_()
        loss = linear_cross_entropy_sum(hidden, weight, bias, labels, chunk_rows=chunk_rows)
        expected = self.reference(hidden, weight, bias, labels)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, weight), torch.autograd.grad(expected, weight))

    def test_path_follows_the_number_of_logits(self, monkeypatch):
        *leaves, labels = self.inputs()
        names = [type(linear_cross_entropy_sum(*leaves, labels).grad_fn).__name__]
        monkeypatch.setattr(lce, "PLAIN_LOGITS", self.rows * self.vocabulary - 1)
        monkeypatch.setattr(lce, "CHUNK_LOGITS", 4 * self.vocabulary)
        names.append(type(linear_cross_entropy_sum(*leaves, labels).grad_fn).__name__)
        assert names == ["NllLossBackward0", "_ChunkedLinearCrossEntropyBackward"]

    @pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
    def test_gradient_of_some_inputs_only(self, needs):
        hidden, weight, bias, labels = self.inputs()
        leaves = [leaf.detach().requires_grad_(need) for leaf, need in zip((hidden, weight, bias), needs)]
        linear_cross_entropy_sum(*leaves, labels, chunk_rows=4).backward()
        self.reference(hidden, weight, bias, labels).backward()
        for leaf, full, need in zip(leaves, (hidden, weight, bias), needs):
            assert (leaf.grad is not None) == need
            if need:
                torch.testing.assert_close(leaf.grad, full.grad)

    def test_no_gradient_work_under_no_grad(self, monkeypatch):
        *leaves, labels = self.inputs()
        with torch.no_grad():
            expected = self.reference(*leaves, labels)
            monkeypatch.setattr(torch.Tensor, "scatter_add_", None)  # the first step of the gradient
            loss = linear_cross_entropy_sum(*leaves, labels, chunk_rows=4)
        assert not loss.requires_grad
        torch.testing.assert_close(loss, expected)

    def test_twice_in_one_graph_and_graph_kept(self):
        hidden, weight, bias, labels = self.inputs(dtype=torch.float64)
        loss = linear_cross_entropy_sum(hidden, weight, bias, labels, chunk_rows=4)
        loss = loss + 2 * linear_cross_entropy_sum(hidden * 2, weight, bias, labels, chunk_rows=5)
        expected = self.reference(hidden, weight, bias, labels) + 2 * self.reference(hidden * 2, weight, bias, labels)
        (wanted,) = torch.autograd.grad(expected, weight)
        for _ in range(2):
            torch.testing.assert_close(torch.autograd.grad(loss, weight, retain_graph=True)[0], wanted)

    @pytest.mark.parametrize("chunk_rows", [None, 4])
    @pytest.mark.parametrize("rows", [0, 6])
    def test_nothing_kept_gives_zero_and_zero_gradients(self, chunk_rows, rows):
        hidden, weight, bias, labels = self.inputs()
        loss = linear_cross_entropy_sum(hidden[:rows], weight, bias, torch.full((rows,), -100), chunk_rows=chunk_rows)
        loss.backward()
        assert loss.item() == 0
        for leaf in (hidden, weight, bias):
            assert leaf.grad is not None and leaf.grad.abs().sum() == 0

    @pytest.mark.parametrize("chunk_rows", [None, 4])
    def test_bf16_autocast(self, chunk_rows):
        hidden, weight, bias, labels = self.inputs()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = F.linear(hidden, weight, bias)
            loss = linear_cross_entropy_sum(hidden, weight, bias, labels, chunk_rows=chunk_rows)
        assert loss.dtype == torch.float32 and logits.dtype == torch.bfloat16
        torch.testing.assert_close(loss, F.cross_entropy(logits.float(), labels, reduction="sum"), rtol=1e-6, atol=0)
        grads = torch.autograd.grad(loss, (hidden, weight, bias))
        exact = torch.autograd.grad(self.reference(hidden, weight, bias, labels), (hidden, weight, bias))
        for ours, theirs in zip(grads, exact):
            assert ours.dtype == torch.float32
            assert (ours - theirs).norm() < 0.02 * theirs.norm()

    def test_chunks_are_summed_in_float32_when_the_weights_are_bf16(self):
        """600 equal gradients of 0.5: a running bf16 sum would stop growing at 128."""
        weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
        hidden = torch.ones(600, 1, dtype=torch.bfloat16)
        loss = linear_cross_entropy_sum(hidden, weight, None, torch.zeros(600, dtype=torch.int64), chunk_rows=1)
        loss.backward()
        assert weight.grad.dtype == torch.bfloat16
        torch.testing.assert_close(weight.grad.float(), torch.tensor([[-300.0], [300.0]]))
        torch.testing.assert_close(loss, torch.tensor(600 * math.log(2)), rtol=1e-5, atol=0)

    @pytest.mark.parametrize("wrong", [50, -1])
    def test_label_out_of_range(self, wrong):
        hidden, weight, bias, labels = self.inputs()
        labels[4] = wrong
        with pytest.raises(ValueError, match=rf"\[0, 50\).*got {wrong};"):
            linear_cross_entropy_sum(hidden, weight, bias, labels)

    def test_compiles_into_one_graph(self):
        *leaves, labels = self.inputs()
        compiled = torch.compile(linear_cross_entropy_sum, fullgraph=True, backend="aot_eager")
        loss = compiled(*leaves, labels)
        expected = self.reference(*leaves, labels)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves))


class TestDropout:
    @pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
    def test_rate_scale_and_gradient(self, p):
        torch.manual_seed(0)
        values = torch.ones(400_001, requires_grad=True)  # no multiple of four
        out = dropout(values, p)
        kept = out != 0
        assert abs(kept.float().mean().item() - (1 - p)) < 4 * math.sqrt(p * (1 - p) / 400_001)
        torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / (1 - p)), rtol=1e-3, atol=0)
        out.backward(torch.full_like(out, 2.0))
        torch.testing.assert_close(values.grad, 2 * out.detach())

    def test_expectation_is_exact_for_the_rounded_probability(self):
        """p = 0.1 becomes 6554 / 65536; the scale must be that of the rounded value."""
        torch.manual_seed(0)
        out = dropout(torch.ones(1000, dtype=torch.float64), 0.1)
        torch.testing.assert_close(
            out.max(), torch.tensor(65536 / (65536 - 6554), dtype=torch.float64), rtol=1e-12, atol=0
        )

    def test_all_four_draws_of_a_word_are_uniform(self):
        """The top bit of a word must be random: with `random_()` it is always 0 and every fourth value never dropped
        below p = .5."""
        torch.manual_seed(0)
        kept = (dropout(torch.ones(100_000, 4), 0.25) != 0).float().mean(0)
        torch.testing.assert_close(kept, torch.full((4,), 0.75), rtol=0, atol=0.006)

    def test_neighbours_are_independent(self):
        torch.manual_seed(0)
        dropped = (dropout(torch.ones(400_000), 0.3) == 0).double()
        for lag in (1, 2, 3, 4):
            both = (dropped[lag:] * dropped[:-lag]).mean().item()
            assert abs(both - 0.09) < 0.003

    def test_reproducible_and_different_each_time(self):
        layer = Dropout(0.5)
        values = torch.ones(64)
        torch.manual_seed(3)
        first, second = layer(values), layer(values)
        torch.manual_seed(3)
        assert torch.equal(first, layer(values))
        assert not torch.equal(first, second)

    def test_identity_in_evaluation_and_at_zero(self):
        values = torch.ones(8)
        assert Dropout(0.5).eval()(values) is values
        assert Dropout(0.0)(values) is values

    @pytest.mark.parametrize("p", [-0.1, 1.0, 1.5])
    def test_probability_out_of_range(self, p):
        with pytest.raises(ValueError, match=r"\[0, 1\)"):
            Dropout(p)

    def test_probability_just_below_one_stays_finite(self):
        torch.manual_seed(0)
        assert dropout(torch.ones(1000), 1 - 1e-9).isfinite().all()

    def test_activation_checkpointing_sees_the_same_mask(self):
        layer = Dropout(0.5)
        values = torch.ones(256, requires_grad=True)
        torch.manual_seed(0)
        out = checkpoint(lambda x: layer(x) * x, values, use_reentrant=False)
        out.sum().backward()
        torch.testing.assert_close(values.grad, 2 * out.detach())

    def test_differentiable_twice(self):
        torch.manual_seed(0)
        values = torch.ones(64, dtype=torch.float64, requires_grad=True)
        out = dropout(values, 0.5)
        (slope,) = torch.autograd.grad((out**2).sum(), values, create_graph=True)  # 2 x (mask * scale)^2
        (curve,) = torch.autograd.grad(slope.sum(), values)
        torch.testing.assert_close(curve, 2 * out.detach() ** 2)

    def test_saves_one_byte_per_value(self):
        saved = []
        values = torch.ones(4096, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
            dropout(values, 0.1)
        assert sum(saved) <= 4096 + 16

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_other_types_and_strides(self, dtype):
        torch.manual_seed(0)
        values = torch.ones(6, 5, dtype=dtype).T
        out = dropout(values, 0.5)
        assert out.dtype == dtype and out.shape == (5, 6)
        assert set(out.unique().tolist()) == {0.0, 2.0}

    def test_compile_and_functional_transforms_take_the_library_path(self):
        values = torch.ones(512)
        torch.manual_seed(0)
        out = torch.compile(dropout, fullgraph=True, backend="aot_eager")(values, 0.5)
        assert set(out.unique().tolist()) == {0.0, 2.0}
        per_row = torch.func.vmap(lambda row: dropout(row, 0.5), randomness="different")(values.view(2, 256))
        assert not torch.equal(per_row[0], per_row[1])


def chi_square_is_plausible(samples, probabilities):
    counts = torch.bincount(samples, minlength=len(probabilities)).double()
    expected = probabilities.double() * len(samples)
    assert expected.min() > 5
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    freedom = len(probabilities) - 1
    return abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)  # four standard deviations


@pytest.mark.parametrize("method", sampling.METHODS)
class TestSampling:
    draws = 20_000

    def test_distribution(self, method):
        logits = torch.randn(600, generator=seeded(1)) * 0.5
        rows = logits.expand(self.draws, -1)
        samples = sample_categorical(rows, method=method, temperature=2.0, generator=seeded(2))
        assert chi_square_is_plausible(samples, (logits / 2).softmax(0))

    def test_distribution_of_hashed_draws(self, method):
        """Consecutive seeds and positions, the worst case for a weak hash."""
        logits = torch.randn(600, generator=seeded(1)) * 0.5
        rows = logits.expand(self.draws, -1)
        slots = torch.arange(self.draws)
        samples = sample_categorical(rows, method=method, seeds=torch.arange(200), rows=(slots // 100, slots % 100))
        assert chi_square_is_plausible(samples, logits.softmax(0))
        # neighbouring slots are independent: pairs of tokens of a coarser alphabet
        coarse = samples % 8
        shares = torch.zeros(8).index_add_(0, torch.arange(600) % 8, logits.softmax(0))
        assert chi_square_is_plausible(coarse[::2] * 8 + coarse[1::2], torch.outer(shares, shares).flatten())

    def test_draw_depends_on_slot_only(self, method):
        logits = torch.randn(7, 1000, generator=seeded())
        seeds = torch.tensor([11, -5, 2**62])
        example, position = torch.tensor([0, 0, 0, 1, 1, 2, 2]), torch.tensor([1, 4, 9, 0, 1, 3, 4])
        together = sample_categorical(logits, method=method, seeds=seeds, rows=(example, position))
        order = torch.tensor([6, 2, 0, 4, 1])
        others = sample_categorical(
            logits[order], method=method, seeds=seeds.flip(0), rows=(2 - example[order], position[order])
        )
        assert torch.equal(together[order], others)
        assert len(together.unique()) > 4  # not one draw for all
        elsewhere = sample_categorical(logits, method=method, seeds=seeds + 1, rows=(example, position))
        assert not torch.equal(together, elsewhere)

    def test_chunks_do_not_matter(self, method, monkeypatch):
        logits = torch.randn(9, 700, generator=seeded())
        slots = (torch.zeros(9, dtype=torch.int64), torch.arange(9))
        arguments = [{"generator": seeded(5)}, {"seeds": torch.tensor([3]), "rows": slots}]
        whole = [sample_categorical(logits, method=method, **given) for given in arguments]
        monkeypatch.setattr(sampling, "CPU_CHUNK", 2 * 700)
        arguments[0]["generator"] = seeded(5)
        assert torch.equal(
            torch.stack(whole), torch.stack([sample_categorical(logits, method=method, **a) for a in arguments])
        )

    def test_extreme_logits(self, method):
        logits = torch.full((4, 1030), -torch.inf)
        logits[0, 1029] = 0  # one token possible, in the short last block
        logits[1] = torch.zeros(1030).index_fill(0, torch.tensor([300]), 1e4)
        logits[2, [5, 700]] = torch.tensor([-1e4, -1e4])
        logits[3, 0] = 1e30
        for seed in range(50):
            samples = sample_categorical(logits, method=method, generator=seeded(seed))
            assert samples[0] == 1029 and samples[1] == 300 and samples[2] in (5, 700) and samples[3] == 0

    @pytest.mark.parametrize("vocabulary", [1, 5, 256, 257])
    def test_small_vocabularies_and_no_rows(self, method, vocabulary):
        samples = sample_categorical(torch.zeros(500, vocabulary), method=method, generator=seeded())
        assert set(samples.tolist()) <= set(range(vocabulary))
        assert samples.max() >= 0.9 * (vocabulary - 1)
        none = sample_categorical(torch.zeros(0, vocabulary), method=method)
        assert none.shape == (0,) and none.dtype == torch.int64

    def test_low_precision_logits_and_no_gradient(self, method):
        logits = torch.randn(3, 400, generator=seeded()).bfloat16().requires_grad_()
        samples = sample_categorical(logits, method=method, generator=seeded(1))
        assert torch.equal(samples, sample_categorical(logits.float(), method=method, generator=seeded(1)))

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
            ({"seeds": torch.tensor([1])}, "seeds and rows together"),
            (
                {"seeds": torch.tensor([1]), "rows": (torch.tensor([0]),) * 2, "generator": seeded()},
                "without a generator",
            ),
        ],
    )
    def test_wrong_arguments(self, method, arguments, message):
        with pytest.raises(ValueError, match=message):
            sample_categorical(torch.zeros(1, 4), method=method, **arguments)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_rows_without_a_finite_maximum(self, method, value):
        logits = torch.zeros(3, 40)
        logits[1] = value
        with pytest.raises(ValueError, match="no finite maximum"):
            sample_categorical(logits, method=method)

    def test_compiles_into_one_graph(self, method):
        logits = torch.randn(5, 600, generator=seeded())
        slots = (torch.zeros(5, dtype=torch.int64), torch.arange(5))

        def draw(logits, seeds):
            return sample_categorical(logits, method=method, seeds=seeds, rows=slots)

        compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(logits, torch.tensor([9])), draw(logits, torch.tensor([9])))

    @pytest.mark.slow
    @pytest.mark.parametrize("vocabulary", [16, 99])
    def test_compiled_code_equals_eager(self, method, vocabulary):
        """With the slots counted inside the graph: a counter times a hash constant once crashed the generated code."""

        def draw(logits, seeds):
            slots = torch.arange(32)
            return sample_categorical(logits, method=method, seeds=seeds, rows=(slots // 16, slots % 16))

        logits, seeds = torch.randn(32, vocabulary, generator=seeded()), torch.tensor([9, 2**62])
        compiled = torch.compile(draw, fullgraph=True, dynamic=False)
        assert torch.equal(compiled(logits, seeds), draw(logits, seeds))


class TestSamplingParts:
    def test_unknown_method(self):
        with pytest.raises(ValueError, match="'gumbel', 'inverse_cdf'.*got 'argmax'"):
            sample_categorical(torch.zeros(1, 4), method="argmax")

    def test_gumbel_formula(self):
        logits = torch.tensor([[0.0, 1.0, 0.5], [2.0, 0.0, 0.0]])
        uniform = torch.tensor([[0.9, 0.2, 0.5], [0.0, 0.99, 0.5]])
        noise = [[-math.log(-math.log(u + 1e-9) + 1e-9) for u in row] for row in uniform.tolist()]
        for temperature in (1.0, 0.1):
            best = (logits.double() / temperature + torch.tensor(noise, dtype=torch.float64)).argmax(1)
            assert torch.equal(gumbel_argmax(logits, uniform, temperature), best)
        assert torch.equal(gumbel_argmax(logits, uniform), torch.tensor([0, 1]))
        assert uniform[0, 0] == torch.tensor(0.9)  # left as it was

    def test_inverse_cdf_at_the_edges(self):
        """u = 0 gives the first possible token, u = 1 the last one, at any rounding of the sums."""
        logits = torch.randn(64, 30_522, generator=seeded())
        logits[:, :300] = -torch.inf
        logits[:, 30_000:] = -torch.inf
        logits[:, 29_999] = -30.0  # a last token whose share vanishes beside the sum
        low = sampling._inverse_cdf(logits, torch.zeros(64, dtype=torch.float64))
        high = sampling._inverse_cdf(logits, torch.ones(64, dtype=torch.float64))
        assert (low == 300).all()
        possible = logits.softmax(1).gather(1, high[:, None]).squeeze(1)
        assert (possible > 0).all() and (high >= 29_900).all()

    def test_inverse_cdf_against_the_plain_sum(self):
        logits = torch.randn(200, 3000, generator=seeded()) * 2
        uniform = torch.rand(200, dtype=torch.float64, generator=seeded(1))
        plain = torch.searchsorted(logits.double().softmax(1).cumsum(1), uniform[:, None], right=True).squeeze(1)
        assert (sampling._inverse_cdf(logits, uniform) == plain).float().mean() > 0.99  # neighbours at a rounding

    def test_recorded_draws_of_the_official_code(self, electra_record):
        logits, uniform, temperature, samples = electra_record
        assert torch.equal(gumbel_argmax(logits, uniform, temperature), samples)

    def test_keys_are_splitmix64(self):
        """First outputs of the published generator for state 0 and 1."""
        first = sampling._mix64(torch.tensor([0, 1]) + sampling._GOLDEN)
        assert [value % 2**64 for value in first.tolist()] == [0xE220A8397B1DCDAF, 0x910A2DEC89025CC1]

    def test_hashed_uniform_numbers(self):
        keys = slot_keys(torch.arange(4), torch.arange(4).repeat_interleave(16), torch.arange(16).repeat(4))
        uniform = sampling.unit_float32(keys, 5000)
        assert uniform.min() >= 0 and uniform.max() < 1 and uniform.dtype == torch.float32
        counts = torch.histc(uniform, 64, 0, 1)
        assert chi_square_is_plausible((uniform * 64).long().flatten(), torch.full((64,), 1 / 64))
        assert counts.sum() == uniform.numel()
        both_halves = sampling.unit_float32(torch.tensor([7, 7 + 2**40]), 100)
        assert not torch.equal(both_halves[0], both_halves[1])
        table = torch.corrcoef(uniform)
        assert (table - torch.eye(64)).abs().max() < 5 / math.sqrt(5000)


class TestUnpadding:
    masks = {
        "right": [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]],
        "left": [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1], [0, 0, 1, 1, 1]],
        "holes": [[1, 0, 1, 0, 1], [0, 1, 0, 1, 0], [1, 1, 0, 1, 1]],
        "an empty sequence": [[1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]],
        "nothing": [[0, 0], [0, 0]],
    }

    @pytest.mark.parametrize("name", masks)
    def test_round_trip_and_gradient(self, name):
        mask = torch.tensor(self.masks[name])
        packing = plan_packing(mask)
        values = torch.randn(*mask.shape, 3, generator=seeded(), requires_grad=True)
        weight = torch.randn(*mask.shape, 3, generator=seeded(1))
        packed = packing.pack(values)
        assert packed.shape == (*packing.index.shape, 3)
        back = packing.unpack(packed)
        torch.testing.assert_close(back, values * mask[..., None])
        (back * weight).sum().backward()
        torch.testing.assert_close(values.grad, weight * mask[..., None])

    def test_rows_are_filled_first_fit_decreasing(self):
        lengths = torch.tensor([2, 7, 3, 5, 3])
        mask = (torch.arange(10) < lengths[:, None]).long()
        packing = plan_packing(mask)
        rows = [row[row >= 0].unique_consecutive().tolist() for row in packing.sequence_ids]
        assert rows == [[1, 2], [3, 4, 0]]
        assert packing.index.shape == (2, 10)
        assert padding_share(mask) == pytest.approx(1 - 20 / 50)

    def test_rows_are_cut_to_the_fullest(self):
        assert plan_packing(torch.tensor([[1, 1, 0, 0, 0, 0]])).index.shape == (1, 2)

    def test_labels_are_not_copied_into_empty_slots(self):
        packing = plan_packing(torch.tensor([[1, 1, 0], [1, 1, 0]]))
        packed = packing.pack(torch.tensor([[7, 8, 9], [4, 5, 6]]), fill=-100)
        assert packed.tolist() == [[7, 8], [4, 5]]
        packing = plan_packing(torch.tensor([[1, 1, 1], [1, 1, 0]]))
        packed = packing.pack(torch.tensor([[7, 8, 9], [4, 5, 6]]), fill=-100)
        assert packed.tolist() == [[7, 8, 9], [4, 5, -100]]
        assert packing.pack(torch.ones(2, 3, dtype=torch.bool)).dtype == torch.bool

    @pytest.mark.parametrize("name", ["right", "left", "holes", "an empty sequence"])
    def test_attention_in_packed_rows_is_attention_in_padded_rows(self, name):
        mask = torch.tensor(self.masks[name])
        batch, width = mask.shape
        values = torch.randn(batch, width, 4, generator=seeded(), dtype=torch.float64)
        packing = plan_packing(mask)

        def attend(x, allowed):
            x = x[:, None]
            return F.scaled_dot_product_attention(x, x * 2, x + 1, attn_mask=allowed).squeeze(1)

        padded = attend(values, mask.bool()[:, None, None, :] | ~mask.bool().any(1)[:, None, None, None])
        packed = attend(packing.pack(values), packing.attention_mask())
        assert packed.isfinite().all()
        torch.testing.assert_close(packing.unpack(packed), padded * mask[..., None])

    def test_mask_of_another_shape(self):
        with pytest.raises(ValueError, match=r"two axes.*\(2, 1, 3, 3\)"):
            plan_packing(torch.ones(2, 1, 3, 3))
