"""TUPE's models: the common suite and the paper's own checks."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from suites.encoder_suite import EncoderSuite, at_real_tokens, gradients
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import AutoModelForPreTraining, BertConfig, BertModel

from bestiary.configuration.configuration_electra import ElectraJointConfig
from bestiary.configuration.configuration_tupe import TupeConfig
from bestiary.flops import count_flops
from bestiary.modeling import modeling_tupe as tupe
from bestiary.modeling.modeling_electra import ElectraJointForMaskedLM, ElectraJointForPreTraining


TINY = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 6,
    "num_labels": 3,
}


class TupeSuite(EncoderSuite):
    slug = "tupe"
    base = tupe.TupeModel
    heads = (
        tupe.TupeForPreTraining,
        tupe.TupeForMaskedLM,
        tupe.TupeForSequenceClassification,
        tupe.TupeForTokenClassification,
        tupe.TupeForQuestionAnswering,
        tupe.TupeForMultipleChoice,
    )
    reduces_to_bert = None  # BERT adds positions to its input, TUPE in no setting; without any positions: see below

    def pretraining_targets(self, labels, real):
        if not self.config.next_sentence_prediction:
            return {}, {"mlm": int((labels != -100).sum())}
        return {"next_sentence_label": torch.tensor([0, 1, 1, 0])}, {"mlm": int((labels != -100).sum()), "sentence": 4}


class TestTupeR(TupeSuite):
    config = TupeConfig(**TINY)
    parameters = {
        "base": {tupe.TupeModel: 111_799_692 + 590_592, tupe.TupeForMaskedLM: 111_799_692 + 624_897},
        "large": {tupe.TupeForMaskedLM: 338_493_968 + 1_084_417},
    }
    bad_config = (
        ({"relative_attention_num_buckets": 7}, "relative_attention_num_buckets must be even and at least 4, got 7"),
        ({"relative_attention_max_distance": 2}, "relative_attention_max_distance must be above 2, a quarter"),
        ({"attn_scale_factor": 0}, "attn_scale_factor must be above 0, got 0"),
        ({"num_attention_heads": 5}, "num_attention_heads must be a divisor of hidden_size=32, got 5"),
    )


class TestTupeA(TupeSuite):
    """The other variant, with sentence pairs; only what differs from TUPE-R is run on it."""

    config = TupeConfig(**TINY, use_relative_bias=False, next_sentence_prediction=True)
    heads = (tupe.TupeForPreTraining,)
    test_heads_are_the_registered_ones = None
    test_config_refuses_a_misspelt_field = None


class TestPreNorm(TupeSuite):
    """The unused variant of the official code."""

    config = TupeConfig(**TINY, normalize_before=True, embedding_layer_norm=False, untie_cls=False)
    heads = (tupe.TupeForMaskedLM,)
    test_heads_are_the_registered_ones = None
    test_config_refuses_a_misspelt_field = None


def build(model_class=tupe.TupeModel, scale=0.3, **fields):
    torch.manual_seed(0)
    model = model_class(TupeConfig(**TINY | fields)).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value), alpha=scale)
    return model


IDS = torch.randint(5, 99, (3, 12), generator=torch.Generator().manual_seed(1))
PLACES = torch.arange(12).unsqueeze(0)


# ------------------------------------------------------------------------------------------------------------- scores


def test_published_number_of_parameters_without_relative_bias():
    with torch.device("meta"):
        model = tupe.TupeModel(TupeConfig(use_relative_bias=False), add_pooling_layer=False)
    assert sum(value.numel() for value in model.parameters()) == 111_799_296


def test_buckets_of_distances():
    """The examples of the official code at its settings, 32 buckets up to 128."""
    known = {0: 0, -1: 1, 1: 17, -7: 7, 7: 23, -8: 8, -11: 8, -12: 9, -16: 10, -32: 12, -46: 13, -64: 14, -91: 15}
    known |= {-500: 15, 128: 31}
    found = tupe.relative_buckets(torch.tensor(list(known)), 32, 128)
    assert found.tolist() == list(known.values())
    assert 16 not in tupe.relative_buckets(torch.arange(-600, 600), 32, 128)


def test_scores_by_hand():
    """v_ij = (LN(p_i) U_Q)(LN(p_j) U_K)^T / sqrt(2d) + b, with the two resets, one head, numbers written out."""
    config = TupeConfig(
        vocab_size=9,
        hidden_size=2,
        num_attention_heads=1,
        num_hidden_layers=1,
        intermediate_size=2,
        max_position_embeddings=3,
        relative_attention_num_buckets=4,
        relative_attention_max_distance=2,
        layer_norm_eps=1e-12,
    )
    positions = tupe.UntiedPositions(config)
    with torch.no_grad():
        positions.table.weight.copy_(torch.tensor([[1.0, 3], [5, 1], [0, 2], [4, 0]]))  # LN: (-1, 1), (1, -1), ...
        positions.query.weight.copy_(torch.tensor([[1.0, 0], [0, 2]]))
        positions.query.bias.copy_(torch.tensor([0.0, 1]))
        positions.key.weight.copy_(torch.eye(2))
        positions.key.bias.copy_(torch.tensor([1.0, 0]))
        positions.relative.weight.copy_(torch.tensor([[10.0], [20], [30], [40], [50]]))
    # queries (-1, 3), (1, -1), (-1, 3), (1, -1) and keys (0, 1), (2, -1), (0, 1), (2, -1) of the four rows; / sqrt(4)
    theta_1, theta_2 = 3 / 2, 3 / 2
    known = [
        [theta_1 + 30, theta_1 + 30, theta_1 + 30],
        [theta_2 + 50, 3 / 2 + 10, -5 / 2 + 40],
        [theta_2 + 50, -1 / 2 + 20, 3 / 2 + 10],
    ]
    assert_close(positions(torch.arange(3).unsqueeze(0))[0, 0], torch.tensor(known))


@pytest.mark.parametrize("relative", [True, False])
def test_scores_from_and_to_cls(relative):
    for untied in (True, False):
        scores = build(use_relative_bias=relative, untie_cls=untied).positions(PLACES)[0]  # (H, T, T)
        for line in (scores[:, 0, :], scores[:, 1:, 0]):
            assert (line.std(1) < 1e-6).all() == untied
            assert untied or (line.std(1) > 0.1).all()


def test_row_1_gives_only_theta_2_and_later_rows_nothing():
    model = build()
    scores = model.positions(PLACES[:, :5])
    rows = model.positions.table.weight
    scores[0, :, 1:, 0].sum().backward(retain_graph=True)
    assert rows.grad[1].any() and not rows.grad[[0, *range(2, 17)]].any()
    rows.grad = None
    scores[0, :, 1:, 1:].square().sum().backward()
    assert rows.grad[2:6].any() and not rows.grad[[0, 1, *range(6, 17)]].any()


def test_gradient_of_buckets():
    model = build()
    scores = model.positions(PLACES[:, :3])  # distances -1, 0, 1 between tokens that are not [CLS]
    (scores * torch.rand(scores.shape)).sum().backward()
    used = model.positions.relative.weight.grad.any(1).nonzero().flatten().tolist()
    assert used == [0, 1, 4, 5, 8]  # 4 from [CLS], 8 to [CLS]
    model.zero_grad()
    model.positions(PLACES[:, :3])[:, :, 0].sum().backward()
    assert model.positions.relative.weight.grad.any(1).nonzero().flatten().tolist() == [4]


def test_scores_are_made_once_and_are_the_same_in_all_layers():
    model = build(num_hidden_layers=3)
    calls, masks = [], []
    model.positions.register_forward_hook(lambda *_: calls.append(1))
    for layer in model.encoder.layer:
        layer.attention.self.register_forward_pre_hook(lambda module, inputs: masks.append(inputs[1]))
    model(IDS)
    assert len(calls) == 1 and len(masks) == 3 and all(mask is masks[0] for mask in masks)
    assert_close(masks[0], model.positions(PLACES))


def test_half_precision_scores_are_made_in_float32():
    model = build()
    expected = model.positions(PLACES)
    rounded = copy.deepcopy(model.positions).bfloat16()
    assert rounded(PLACES).dtype == torch.float32
    exact = copy.deepcopy(rounded).float()(PLACES)
    assert_close(rounded(PLACES), exact, rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(model.positions(PLACES), expected, rtol=0, atol=0)


def test_without_position_scores_words_are_a_set():
    """Then a permutation of the tokens after [CLS] permutes the output; with any position part it does not."""
    order = torch.tensor([0, 5, 3, 1, 2, 4, 11, 9, 10, 6, 7, 8])
    model = build()

    def moved():
        return (model(IDS).last_hidden_state[:, order] - model(IDS[:, order]).last_hidden_state).abs().max()

    assert moved() > 0.1
    with torch.no_grad():
        relative = model.positions.relative.weight.clone()
        for value in (model.positions.query.weight, model.positions.query.bias, model.positions.relative.weight):
            value.zero_()
        assert moved() < 1e-5
        model.positions.relative.weight.copy_(relative)
        assert moved() > 0.1


def test_without_positions_and_scale_it_is_bert_without_positions():
    model = build(attn_scale_factor=1, vocab_size=99)
    with torch.no_grad():
        for name, value in model.positions.named_parameters():
            if not name.startswith("LayerNorm"):
                value.zero_()
    known = BertConfig().to_dict().keys() - {"model_type"}
    sizes = {name: value for name, value in model.config.to_dict().items() if name in known}
    stock = BertModel(BertConfig(**sizes)).eval()
    missing = stock.load_state_dict(model.state_dict(), strict=False).missing_keys
    assert set(missing) == {f"embeddings.{name}_embeddings.weight" for name in ("position", "token_type")}
    with torch.no_grad():
        stock.embeddings.position_embeddings.weight.zero_()
        stock.embeddings.token_type_embeddings.weight.zero_()
    mask = torch.ones_like(IDS)
    mask[1, 7:] = 0
    ours, theirs = (at_real_tokens(each(IDS, attention_mask=mask), mask) for each in (model, stock))
    assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_segments_are_not_used():
    model = build()
    assert torch.equal(model(IDS).last_hidden_state, model(IDS, token_type_ids=IDS % 2).last_hidden_state)


def test_initialisation_is_an_uncut_normal_and_the_padding_row_is_zero():
    torch.manual_seed(0)
    model = tupe.TupeModel(TupeConfig(**TINY, initializer_range=0.1))
    values = torch.cat([value.flatten() for value in model.parameters() if value.dim() == 2])
    assert values.abs().max() > 0.3 and abs(values.std().item() - 0.1) < 0.002
    assert not model.embeddings.word_embeddings.weight[1].any()


# --------------------------------------------------------------------------------------------------------- evaluation


@pytest.fixture
def counted():
    """A model in evaluation mode, and a list that grows with every computation of position scores."""
    model = build()
    calls = []
    model.positions.register_forward_hook(lambda *_: calls.append(1))
    return model, calls


@torch.no_grad()
def test_evaluation_keeps_the_scores(counted):
    model, calls = counted
    long = model(IDS).last_hidden_state
    short = model(IDS[:, :7]).last_hidden_state
    assert len(calls) == 1 and torch.equal(model(IDS).last_hidden_state, long)
    with torch.enable_grad():
        assert_close(model(IDS[:, :7]).last_hidden_state, short, rtol=1e-4, atol=1e-5)
        assert len(calls) == 2


def fused_step(model):
    """An optimizer step in evaluation mode, that torch's version counters do not show."""
    with torch.enable_grad():
        loss = model(IDS).last_hidden_state.square().sum()
    with torch.no_grad():
        model(IDS)  # keeps the scores after the pass whose gradient is used
    loss.backward()
    torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step()


CHANGES = {
    "in place": lambda model: model.positions.query.weight.mul_(2),
    "loading": lambda model: model.load_state_dict({k: 2 * v for k, v in model.state_dict().items()}),
    "fused step": fused_step,
    "another parameter": lambda model: setattr(
        model.positions.query, "weight", torch.nn.Parameter(model.positions.query.weight * 2)
    ),
    "data": lambda model: model.positions.relative.weight.data.mul_(-2),
    "other data": lambda model: setattr(model.positions.key.weight, "data", 2 * model.positions.key.weight),
    "one number": lambda model: model.positions.relative.weight.data[0].add_(0.01),
    "another type": lambda model: model.bfloat16(),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_kept_scores_are_never_stale(change, counted):
    model, calls = counted
    before = model.positions.of_first(12)
    CHANGES[change](model)
    after = model.positions.of_first(12)
    assert_close(after, model.positions(PLACES), rtol=0, atol=0)
    assert (before - after).abs().max() > 1e-3


def test_scores_kept_in_inference_mode_and_in_copies(counted):
    model, calls = counted
    with torch.inference_mode():
        expected = model(IDS).last_hidden_state.clone()
    model.positions.requires_grad_(False)
    found = model(IDS).last_hidden_state  # tensors of inference mode cannot be saved for its backward pass
    found.sum().backward()
    assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        model(IDS)
        other = copy.deepcopy(model)
        assert_close(other(IDS).last_hidden_state, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_no_gradient_means_the_fused_kernel():
    """A mask that requires grad would cost it even here."""
    model = build()
    with torch.profiler.profile() as profile:
        model(IDS)
    names = {event.name for event in profile.events()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in names


# ------------------------------------------------------------------------------------------- padding and packed rows


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("head", [tupe.TupeForSequenceClassification, tupe.TupeForTokenClassification])
def test_left_padding_is_right_padding(head, given, backend):
    """Without position_ids too, and [CLS] is what is pooled."""
    model = build(head)
    model.set_attn_implementation(backend)
    lengths = torch.tensor([12, 5, 8])
    right = PLACES < lengths[:, None]
    left = right.flip(1)
    results = []
    for real in (right, left):
        ids = torch.ones_like(IDS).masked_scatter(real, IDS[right])
        positions = {"position_ids": (real.cumsum(1) - 1).clamp(min=0)} if given else {}
        logits = model(ids, attention_mask=real.long(), **positions).logits
        results.append(logits[real] if logits.dim() == 3 else logits)
    assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("untied", [True, False])
def test_packed_rows_are_rows_of_their_own(backend, untied):
    model = build(untie_cls=untied)
    model.set_attn_implementation(backend)
    sentence = torch.tensor([0] * 4 + [1] * 8)
    positions = torch.cat([torch.arange(4), torch.arange(8)]).unsqueeze(0)
    mask = (sentence[:, None] == sentence)[None, None]
    if backend == "eager":
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    together = model(IDS[:1], attention_mask=mask, position_ids=positions).last_hidden_state
    apart = [model(part).last_hidden_state for part in (IDS[:1, :4], IDS[:1, 4:])]
    assert_close(together, torch.cat(apart, 1), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"TupeModel got an attention_mask of shape \(1, 1, 12, 12\).*position_ids"):
        model(IDS[:1], attention_mask=mask)


def test_many_rows_project_the_table_once():
    """The two ways to the projected positions give the same scores and gradients."""
    model = build()
    rows = torch.stack([PLACES[0], PLACES[0].flip(0)])  # 24 positions, more than the table has
    draw = torch.rand(2, 4, 12, 12, generator=torch.Generator().manual_seed(0))
    results = []
    for scores in (model.positions(rows), torch.cat([model.positions(row.unsqueeze(0)) for row in rows])):
        model.zero_grad()
        (scores * draw).sum().backward()
        results.append((scores, {name: value.grad for name, value in model.positions.named_parameters()}))
    assert_close(*results, rtol=1e-4, atol=1e-5)


def test_compiled_left_padding_is_refused():
    model = torch.compile(build(), fullgraph=True, backend="eager")
    mask = torch.ones_like(IDS)
    model(IDS, attention_mask=mask)
    mask[0, 0] = 0
    with pytest.raises(RuntimeError, match="need position_ids under torch.compile"):
        model(IDS, attention_mask=mask)
    torch._dynamo.reset()


@pytest.mark.parametrize("masked", [True, False])
def test_the_token_at_position_0_is_pooled(masked):
    """Wherever it stands; with or without a mask, the words are the same set."""
    model = build(tupe.TupeForSequenceClassification)
    mask = {"attention_mask": torch.ones_like(IDS)} if masked else {}
    moved = model(IDS.roll(3, 1), position_ids=PLACES.roll(3, 1), **mask).logits
    assert_close(moved, model(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shift", [-1, 5])
def test_positions_out_of_range_are_refused(shift):
    """Below 0 the table has numbers too, those of [CLS]."""
    with pytest.raises(ValueError, match=rf"position_ids must be in \[0, 16\), got {shift} to {11 + shift}"):
        build()(IDS, position_ids=PLACES + shift)


def test_masks_of_integers_are_refused():
    with pytest.raises(ValueError, match=r"TupeModel: attention_mask must be .*, got torch.int64 \[3, 1, 12, 12\]"):
        build()(IDS, attention_mask=torch.ones(3, 1, 12, 12).long(), position_ids=PLACES)


# ----------------------------------------------------------------------------------------------------- other settings


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft reads it
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_on_the_projections_of_positions(dtype):
    """`target_modules=["query"]` means them too: they learn, can be switched, and merge into the same model."""
    model = build(tupe.TupeForSequenceClassification).to(dtype)
    torch.manual_seed(0)
    tuned = get_peft_model(model, LoraConfig(target_modules=["query", "key"], init_lora_weights=False)).eval()
    tuned(IDS).logits.float().square().sum().backward()
    found = {name: value.grad for name, value in tuned.named_parameters() if ".positions." in name and "lora" in name}
    assert len(found) == 4 and all(grad.any() for grad in found.values())
    with torch.no_grad():
        for rows in (PLACES, PLACES.expand(3, -1)):  # some rows, or the whole table
            scores = model.tupe.positions(rows)
            with tuned.disable_adapter():
                assert (model.tupe.positions(rows) - scores).abs().max() > 0.1
                assert torch.equal(model.tupe.positions.of_first(12), model.tupe.positions(PLACES))
            assert torch.equal(model.tupe.positions.of_first(12), model.tupe.positions(PLACES))
        expected = tuned(IDS).logits
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}
        assert_close(tuned.merge_and_unload()(IDS).logits, expected, **tolerance)


def test_dropout_of_attention_keeps_the_mean():
    """The path for scores with a gradient drops probabilities, and only in training."""
    model = build(attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0, num_hidden_layers=1)
    attention = model.encoder.layer[0].attention.self
    states = model.embeddings(IDS, None, None, None)
    mask = model.positions(PLACES)
    assert mask.requires_grad
    expected, _ = attention(states, mask)
    torch.manual_seed(0)
    drawn = torch.stack([attention.train()(states, mask)[0] for _ in range(400)])
    assert drawn.std(0).mean() > 0.1
    assert (drawn.mean(0) - expected).abs().mean() < 0.1 * drawn.std(0).mean()


def test_operations_are_counted():
    """The position scores cost their two projections and one product, once, and the layers what BERT's cost."""
    width, length, inner, layers = 32, 12, 24, 2
    model = build()
    for parameter in model.positions.parameters():
        parameter.requires_grad_(False)
    projections = 2 * 2 * (length + 2) * width * width
    scores = 2 * length * length * width
    layer = 2 * length * (4 * width * width + 2 * width * inner) + 2 * scores
    pooler = 2 * width * width
    expected = projections + scores + layers * layer + pooler
    with torch.no_grad():
        assert count_flops(lambda: model.train()(IDS[:1])) == expected
    assert count_flops(lambda: build().train()(IDS[:1])) == expected  # the path with gradients


# ------------------------------------------------------------------------------------------------------------ ELECTRA


def electra(**fields):
    body = {"model_type": "bestiary-tupe", **TINY, "hidden_size": 128, "num_attention_heads": 2, **fields}
    del body["num_labels"]
    torch.manual_seed(0)
    config = ElectraJointConfig(
        discriminator_config=body, generator_size_fraction=0.5, sampling="inverse_cdf", tie_generator_embeddings=True
    )
    return ElectraJointForPreTraining(config)


@pytest.mark.parametrize("relative", [True, False])
def test_electra_takes_tupe_for_both_networks(relative, tmp_path):
    model = electra(use_relative_bias=relative, embedding_size=64)
    assert type(model.electra) is type(model.generator) is tupe.TupeModel
    assert model.generator.config.hidden_size == 64 and model.generator.config.num_attention_heads == 1
    assert model.generator.config.use_relative_bias == model.electra.config.use_relative_bias == relative
    assert model.generator.embeddings.word_embeddings.weight is model.electra.embeddings.word_embeddings.weight
    assert model.generator.positions is not model.electra.positions
    labels = torch.where(IDS % 3 == 0, IDS, -100)
    mask = torch.ones_like(IDS)
    mask[1, 7:] = 0
    labels[1, 7:] = -100
    inputs = {"input_ids": IDS, "attention_mask": mask, "labels": labels, "sampling_seeds": torch.arange(3)}
    found = gradients(model.train(), **inputs)
    for network in ("electra", "generator"):
        names = [name for name in found if name.startswith(f"{network}.positions.")]
        assert len(names) == 7 + relative
        assert all(found[name].any() for name in names if not name.endswith("key.bias"))
    model.eval().save_pretrained(tmp_path)
    loaded = AutoModelForPreTraining.from_pretrained(tmp_path)
    outputs = [each(**inputs) for each in (model, loaded)]
    assert outputs[0].loss == outputs[1].loss and torch.equal(outputs[0].logits, outputs[1].logits)
    generator, report = ElectraJointForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    rows = generator(IDS, attention_mask=mask).logits[labels != -100]
    assert_close(F.cross_entropy(rows, labels[labels != -100]), outputs[0].mlm_loss)
