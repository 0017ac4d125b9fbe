"""RealFormer's models: the common suite and the paper's own checks."""

import json

import pytest
import torch
from suites.encoder_suite import EncoderSuite, gradients
from torch.testing import assert_close
from transformers import BertConfig, BertForPreTraining, BertModel

from bestiary.configuration.configuration_bert import BertPretrainingConfig
from bestiary.configuration.configuration_realformer import RealformerConfig
from bestiary.flops import count_flops
from bestiary.modeling import modeling_realformer as realformer
from bestiary.modeling.layers import scores as layers
from bestiary.modeling.layers.scores import accumulate_scores
from bestiary.modeling.modeling_bert import BertPretrainingForPreTraining, BertPretrainingModel


TINY = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
    "num_labels": 3,
}


class RealformerSuite(EncoderSuite):
    slug = "realformer"
    base = realformer.RealformerModel
    heads = (
        realformer.RealformerForPreTraining,
        realformer.RealformerForMaskedLM,
        realformer.RealformerForNextSentencePrediction,
        realformer.RealformerForSequenceClassification,
        realformer.RealformerForTokenClassification,
        realformer.RealformerForQuestionAnswering,
        realformer.RealformerForMultipleChoice,
    )
    reduces_to_bert = {"residual_attention": False}

    def pretraining_targets(self, labels, real):
        return {"next_sentence_label": torch.tensor([0, 1, 1, 0])}, {"mlm": int((labels != -100).sum()), "sentence": 4}


class TestRealformer(RealformerSuite):
    config = RealformerConfig(**TINY)
    parameters = {
        "small": {realformer.RealformerModel: 28_763_648},
        "base": {realformer.RealformerModel: 109_482_240, realformer.RealformerForPreTraining: 110_106_428},
        "large": {realformer.RealformerModel: 335_141_888},
        "xlarge": {realformer.RealformerModel: 1_069_969_920},
    }
    bad_config = (
        ({"num_attention_heads": 5}, "num_attention_heads must be a divisor of hidden_size=32, got 5"),
        ({"use_running_mean": 2}, "use_running_mean.*expected bool"),
    )


class TestRunningMean(RealformerSuite):
    config = RealformerConfig(**TINY, use_running_mean=True)
    heads = (realformer.RealformerForPreTraining,)
    test_heads_are_the_registered_ones = None
    test_config_refuses_a_misspelt_field = None


class TestPreNorm(RealformerSuite):
    """Not in the paper."""

    config = RealformerConfig(**TINY, normalize_before=True)
    heads = (realformer.RealformerForMaskedLM,)
    reduces_to_bert = None  # BERT has post-norm layers
    test_heads_are_the_registered_ones = None
    test_config_refuses_a_misspelt_field = None


BACKENDS = pytest.mark.parametrize("backend", ["eager", "sdpa"])
MEAN = pytest.mark.parametrize("mean", [False, True], ids=["sum", "mean"])
IDS = torch.randint(5, 99, (2, 12), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1] * 12, [1] * 7 + [0] * 5])


def build(model_class=realformer.RealformerModel, backend="sdpa", scale=0.3, **fields):
    torch.manual_seed(0)
    model = model_class(RealformerConfig(**TINY | fields)).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value), alpha=scale)
    model.set_attn_implementation(backend)
    return model


def raw_scores(model, mask=None):
    """q k^T / sqrt(d) of every layer (B, H, T, T), computed from the recorded hidden states alone."""
    states = model(IDS, attention_mask=mask, output_hidden_states=True).hidden_states
    scores = []
    for layer, state in zip(model.encoder.layer, states):
        query, key, _ = layer.attention.self.project(state)
        scores.append(query @ key.mT * query.shape[-1] ** -0.5)
    return scores


# ------------------------------------------------------------------------------------------------------ the residual


@BACKENDS
@MEAN
@pytest.mark.parametrize("mask", [None, MASK], ids=["full", "padded"])
@pytest.mark.parametrize("grad", [False, True])
def test_probabilities_are_those_of_all_scores_so_far(backend, mean, mask, grad):
    """softmax(sum_{k <= l} q_k k_k^T / sqrt(d) [/ (l + 1)]), zero on padding."""
    model = build(backend=backend, use_running_mean=mean)
    with torch.set_grad_enabled(grad):
        found = model(IDS, attention_mask=mask, output_attentions=True).attentions
        scores = raw_scores(model, mask)
    real = torch.ones_like(IDS) if mask is None else mask
    assert len(found) == 3
    for layer, shares in enumerate(found):
        logits = sum(scores[: layer + 1]) / (layer + 1 if mean else 1)
        expected = logits.masked_fill(real[:, None, None, :] == 0, -torch.inf).softmax(-1)
        assert_close(shares, expected, rtol=1e-4, atol=1e-6)
        assert not shares[real[:, None, None, :].expand_as(shares) == 0].any()
        assert_close(shares.sum(-1), torch.ones(2, 4, 12))


@pytest.mark.parametrize("mean, known", [(False, [0.952574, 0.047426]), (True, [0.817574, 0.182426])])
@BACKENDS
def test_two_scores_by_hand(mean, known, backend):
    """raw_0 = [2, 0] and raw_1 = [1, 0]: softmax([3, 0]), or of the mean softmax([1.5, 0])."""
    model = build(
        backend=backend,
        use_running_mean=mean,
        num_hidden_layers=2,
        num_attention_heads=1,
        hidden_size=1,
        intermediate_size=1,
    )
    key, value = torch.tensor([[[[1.0], [0.0]]]]), torch.zeros(1, 1, 2, 1)
    state = None
    for layer, query in zip(model.encoder.layer, (2.0, 1.0)):
        attention = layer.attention.self
        attention.project = lambda states, query=query: (torch.full((1, 1, 2, 1), query), key, value)
        _, shares, state = attention(torch.zeros(1, 2, 1), None, state)
    assert_close(shares[0, 0, 0], torch.tensor(known), rtol=0, atol=1e-6)


@MEAN
def test_one_product_of_all_heads_joined(mean):
    """Logits of layer l = [q_0; ...; q_l] [k_0; ...; k_l]^T / sqrt(d) (/ (l + 1)); to 1e-12 in float64."""
    model = build(use_running_mean=mean).double()
    handed = []
    for layer in model.encoder.layer:
        layer.register_forward_hook(lambda module, inputs, outputs: handed.append(outputs[1]))
    states = model(IDS, output_hidden_states=True).hidden_states
    parts = [layer.attention.self.project(state)[:2] for layer, state in zip(model.encoder.layer, states)]
    for depth, scores in enumerate(handed, 1):
        query, key = (torch.cat(each, -1) for each in zip(*parts[:depth]))
        joined = query @ key.mT * 8**-0.5 / (depth if mean else 1)
        assert scores.dtype == torch.float64
        assert_close(scores, joined, rtol=0, atol=1e-12)


@BACKENDS
@MEAN
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("shape", [(2, 1, 12, 12), (2, 4, 12, 12)])
def test_masks_of_pairs(backend, mean, grad, shape):
    """A bias counts the same in every layer, also with the mean, and is not written to."""
    model = build(backend=backend, use_running_mean=mean)
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    before = bias.clone()
    with torch.set_grad_enabled(grad):
        found = model(IDS, attention_mask=bias, output_attentions=True)
        states = model(IDS, attention_mask=bias, output_hidden_states=True).hidden_states
    assert torch.equal(bias, before)
    scores = 0
    for depth, (layer, state, shares) in enumerate(zip(model.encoder.layer, states, found.attentions), 1):
        query, key, _ = layer.attention.self.project(state)
        scores = scores + query @ key.mT * 8**-0.5
        assert_close(shares, (scores / (depth if mean else 1) + bias).softmax(-1), rtol=1e-4, atol=1e-6)
    assert torch.equal(found.last_hidden_state, states[-1])

    expected = model(IDS, attention_mask=MASK).last_hidden_state[MASK == 1]
    pairs = (MASK == 1)[:, None, None, :].expand(shape)
    for given in (pairs, torch.where(pairs, 0.0, -torch.inf)):
        with torch.set_grad_enabled(grad):
            masked = model(IDS, attention_mask=given).last_hidden_state[MASK == 1]
            assert (
                model(IDS, attention_mask=given & False if given is pairs else given - torch.inf)[0].isfinite().all()
            )
        assert_close(masked, expected, rtol=1e-4, atol=1e-5)
    for wrong in (pairs.long(), pairs[:, 0]):
        with pytest.raises(
            ValueError, match=r"RealformerModel: attention_mask must be .*, got torch\.(int64|bool) \["
        ):
            model(IDS, attention_mask=wrong)


@BACKENDS
@MEAN
def test_layers_without_queries_attend_as_the_first(backend, mean):
    model = build(backend=backend, use_running_mean=mean)
    with torch.no_grad():
        for layer in model.encoder.layer[1:]:
            layer.attention.self.query.weight.zero_()
            layer.attention.self.query.bias.zero_()
    first, *others = model(IDS, output_attentions=True).attentions
    for depth, shares in enumerate(others, 2):
        expected = (first.log() / depth).softmax(-1) if mean else first
        assert_close(shares, expected, rtol=1e-4, atol=1e-6)


@BACKENDS
@MEAN
@pytest.mark.parametrize("pre", [False, True], ids=["post-norm", "pre-norm"])
def test_gradient_through_the_scores_alone(backend, mean, pre):
    """Layer 0 hands on nothing else when its values and its output projection are zero."""
    model = build(backend=backend, use_running_mean=mean, normalize_before=pre)
    first = model.encoder.layer[0].attention
    with torch.no_grad():
        for part in (first.self.value, first.output.dense):
            part.weight.zero_()
            part.bias.zero_()
    model(IDS).last_hidden_state.square().sum().backward()
    assert first.self.key.weight.grad.abs().max() > 1e-4
    assert first.self.query.weight.grad.abs().max() > 1e-4


@BACKENDS
@MEAN
def test_one_layer_is_bert_bit_for_bit(backend, mean):
    model = build(backend=backend, use_running_mean=mean, num_hidden_layers=1)
    fields = {name: value for name, value in TINY.items() if name != "num_hidden_layers"}
    bert = BertPretrainingModel(BertPretrainingConfig(**fields, num_hidden_layers=1, hidden_act="gelu_new")).eval()
    bert.load_state_dict(model.state_dict())
    stock = BertModel(BertConfig(**fields, num_hidden_layers=1, hidden_act="gelu_new")).eval()
    stock.load_state_dict(model.state_dict())
    for other in (bert, stock):
        other.set_attn_implementation(backend)
        for mask in (None, MASK):
            ours, theirs = (each(IDS, attention_mask=mask).last_hidden_state for each in (model, other))
            real = torch.ones_like(IDS) if mask is None else mask
            assert torch.equal(ours[real == 1], theirs[real == 1])


def test_stock_bert_becomes_a_realformer(tmp_path):
    """By its own configuration; and what is saved is of our type, with code."""
    BertForPreTraining(BertConfig(**TINY)).save_pretrained(tmp_path / "bert")
    model, report = realformer.RealformerForPreTraining.from_pretrained(tmp_path / "bert", output_loading_info=True)
    assert not any(report.values()) and model.config.residual_attention and model.config.hidden_act == "gelu"
    model.save_pretrained(tmp_path / "ours")
    saved = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert saved["model_type"] == "bestiary-realformer" and "AutoModel" in saved["auto_map"]
    assert (tmp_path / "ours" / "modeling_realformer.py").is_file()


def test_bert_checkpoint_loads_as_it_is(tmp_path):
    config = BertPretrainingConfig(**TINY)
    BertPretrainingForPreTraining(config).save_pretrained(tmp_path)
    for head in (realformer.RealformerForPreTraining, realformer.RealformerModel):
        model, report = head.from_pretrained(tmp_path, config=RealformerConfig(**TINY), output_loading_info=True)
        assert not report["missing_keys"] and not report["mismatched_keys"]
        assert all(name.startswith("cls.") for name in report["unexpected_keys"])


# ------------------------------------------------------------------------------------------------- memory, precision


def sized(model_class=realformer.RealformerModel, **fields):
    """Narrow and long, so that the scores outweigh the rest."""
    narrow = {"hidden_size": 8, "intermediate_size": 8, "max_position_embeddings": 256}
    return build(model_class, **narrow | fields)


LONG = torch.arange(256).unsqueeze(0) % 90 + 5
SCORES = 4 * 256 * 256 * 4  # bytes of (1, 4, 256, 256)


def score_tensors(function):
    """Most tensors of the size of the scores that were held at once."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    del kept
    return most / SCORES


@MEAN
@pytest.mark.parametrize("mask", [None, torch.tensor([[1] * 12, [1] * 7 + [0] * 5])], ids=["full", "padded"])
def test_long_sequences_give_the_same(mean, mask, monkeypatch):
    """Without gradients, block by block; and with probabilities if they are asked for."""
    model = build(use_running_mean=mean)
    real = torch.ones_like(IDS) if mask is None else mask
    with torch.no_grad():
        expected = model(IDS, attention_mask=mask).last_hidden_state
        monkeypatch.setattr(realformer, "LONG", 12)
        monkeypatch.setattr(layers, "BLOCK", 36)
        handed = []
        hook = model.encoder.layer[0].attention.self.register_forward_hook(
            lambda m, i, outputs: handed.append(outputs)
        )
        found = model(IDS, attention_mask=mask).last_hidden_state
        hook.remove()
        assert_close(found[real == 1], expected[real == 1], rtol=1e-4, atol=1e-5)
        assert handed[0][1] is None and len(model(IDS, output_attentions=True).attentions) == 3


@pytest.mark.parametrize("depth", [2, 6])
@pytest.mark.parametrize("length, most", [(256, 2.5), (512, 1.6)])
@MEAN
def test_one_score_tensor_runs_through_the_layers(depth, length, most, mean):
    """Scores and the probabilities of one layer, long ones without these; whatever the number of layers."""
    model = sized(num_hidden_layers=depth, use_running_mean=mean, max_position_embeddings=length)
    ids = torch.arange(length).unsqueeze(0) % 90 + 5
    mask = torch.ones_like(ids)
    mask[0, 60:] = 0
    with torch.no_grad():
        for inputs in ({}, {"attention_mask": mask}):
            model(ids, **inputs)
            assert score_tensors(lambda inputs=inputs: model(ids, **inputs)) * (256 / length) ** 2 < most


def test_training_keeps_one_tensor_a_layer():
    """The probabilities; not the scores, their mean, or a mask."""
    for mean in (False, True):
        model = sized(num_hidden_layers=6, use_running_mean=mean)
        model(LONG)
        assert 5.5 < score_tensors(lambda model=model: model(LONG).last_hidden_state) < 10


@pytest.mark.parametrize("autocast", [True, False])
@MEAN
def test_scores_are_float32_in_half_precision(autocast, mean):
    model = build(use_running_mean=mean)
    exact = model(IDS, attention_mask=MASK).last_hidden_state
    handed = []
    for layer in model.encoder.layer:
        layer.register_forward_hook(lambda module, inputs, outputs: handed.append(outputs[1]))
    if not autocast:
        model.bfloat16()
    for backend in ("eager", "sdpa"):
        model.set_attn_implementation(backend)
        handed.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            states = model(IDS, attention_mask=MASK).last_hidden_state
            model(IDS)
        assert len(handed) == 6 and {scores.dtype for scores in handed} == {torch.float32}
        assert (states[MASK == 1] - exact[MASK == 1]).abs().mean() < 0.05


def test_padding_does_not_reach_later_layers():
    """However far the batch is padded; and many layers do not add up the mask."""
    model = build(num_hidden_layers=12, scale=0.1)
    alone = model(IDS[1:, :7]).last_hidden_state
    padded = model(IDS, attention_mask=MASK).last_hidden_state
    assert padded.isfinite().all()
    assert_close(padded[1:, :7], alone, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert_close(model(IDS, attention_mask=MASK).last_hidden_state, padded, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start_shape", [None, (2, 1, 5, 5), (1, 3, 5, 5), (2, 3, 5, 5)])
def test_accumulated_scores(start_shape, monkeypatch):
    """keep * start + scale q k^T, values and gradients, and in place only into a tensor of the full shape."""
    draw = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 3, 5, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    start = None if start_shape is None else torch.randn(start_shape, generator=draw, dtype=torch.float64)
    inputs = [value.requires_grad_() for value in (query, key, start) if value is not None]
    found = accumulate_scores(start, query, key, 0.5, 0.75)
    expected = 0.5 * query @ key.mT + (0 if start is None else 0.75 * start)
    assert_close(found, expected)
    weight = torch.randn(found.shape, generator=draw, dtype=torch.float64)
    assert_close(*(torch.autograd.grad((each * weight).sum(), inputs) for each in (found, expected)))
    with torch.no_grad():
        kept = None if start is None else start.clone()
        again = accumulate_scores(kept, query, key, 0.5, 0.75, in_place=True)
        assert_close(again, expected)
        if start is not None:
            written = start_shape == found.shape
            assert (again.data_ptr() == kept.data_ptr()) == written and torch.equal(start, kept) != written
        value = torch.randn(2, 3, 5, 4, generator=draw, dtype=torch.float64)
        for block in (1, 7, 10, 2**18):  # scores: one row, one row, two rows, all rows
            monkeypatch.setattr(layers, "BLOCK", block)
            kept = None if start is None else start.clone()
            context, again = layers.attend_in_blocks(kept, query, key, value, 0.5, 0.75)
            assert_close(again, expected)
            assert_close(context, (expected.softmax(-1) @ value).transpose(1, 2))


def test_checkpointing_that_runs_without_gradients_first():
    """Reentrant checkpoints keep their inputs, so nothing may be written into the scores."""
    labels = torch.where(IDS % 3 == 0, IDS, -100)
    results = []
    for reentrant in (None, True):
        model = build(
            realformer.RealformerForMaskedLM, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        ).train()
        if reentrant:
            model.activation_checkpointing_enable({"use_reentrant": True})
        results.append(gradients(model, input_ids=IDS, attention_mask=MASK, labels=labels))
    assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


def test_dropout_does_not_touch_what_goes_on():
    model = build(attention_probs_dropout_prob=0.9, hidden_dropout_prob=0.0).train()
    for backend in ("eager", "sdpa"):
        model.set_attn_implementation(backend)
        handed = []
        hook = model.encoder.layer[0].register_forward_hook(lambda m, i, outputs: handed.append(outputs[1]))  # noqa: B023
        torch.manual_seed(0)
        first = model(IDS).last_hidden_state
        second = model(IDS).last_hidden_state
        hook.remove()
        assert torch.equal(*handed) and not torch.equal(first, second)


def test_flex_attention_is_refused():
    with pytest.raises(ValueError, match="(?i)flex"):
        realformer.RealformerModel._from_config(RealformerConfig(**TINY), attn_implementation="flex_attention")


def test_operations_are_those_of_bert():
    """The counter of `bestiary compare` sees the products that are added in place."""
    counts = []
    for residual in (True, False):
        model = build(residual_attention=residual)
        with torch.no_grad():
            counts.append(count_flops(lambda model=model: model(IDS)))
            counts.append(count_flops(lambda model=model: model(IDS, attention_mask=MASK)))
        counts.append(count_flops(lambda model=model: model(IDS, attention_mask=MASK)))
    assert len(set(counts)) == 1
