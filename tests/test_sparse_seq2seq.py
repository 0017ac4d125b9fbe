"""The sparse LSTM encoder-decoder, how it generates, and the Transformer encoder with sparse attention."""

import itertools
import math

import pytest
import torch
from suites.encoder_suite import EncoderSuite, settings
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, GenerationConfig

from bestiary.configuration.configuration_sparse_seq2seq import SparseSeq2seqConfig, SparseTransformerConfig
from bestiary.modeling.layers.entmax import entmax, entmax_loss
from bestiary.modeling.modeling_sparse_seq2seq import (
    SparseSeq2seqCache,
    SparseSeq2seqForConditionalGeneration,
    SparseSeq2seqModel,
    SparseTransformerForMaskedLM,
    SparseTransformerForMultipleChoice,
    SparseTransformerForQuestionAnswering,
    SparseTransformerForSequenceClassification,
    SparseTransformerForTokenClassification,
    SparseTransformerModel,
)
from bestiary.registry import paper_of


TINY = {
    "src_vocab_size": 13,
    "tgt_vocab_size": 11,
    "embedding_size": 6,
    "hidden_size": 8,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "init_range": 1.0,
}
VARIANTS = [
    {},
    {"attention_score": "dot"},
    {"attention_score": "mlp"},
    {"input_feed": False},
    {"bidirectional_encoder": False, "num_decoder_layers": 1},
    {"attention_alpha": 2.0, "output_alpha": 1.0},
    {"attention_alpha": 1.3, "output_alpha": 1.3},
    {"learn_attention_alpha": True},
    {"entmax_method": "topk", "entmax_topk": 2},
]


def build(seed=0, **changes):
    torch.manual_seed(seed)
    return SparseSeq2seqForConditionalGeneration(SparseSeq2seqConfig(**TINY | changes)).eval()


def pairs(rows=4, source=7, target=5):
    """Sources padded on the right, and labels."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 13, (rows, source), generator=draw)
    mask = (torch.arange(source) < torch.tensor([7, 4, 6, 1])[:rows, None]).long()
    labels = torch.randint(4, 11, (rows, target), generator=draw)
    labels[0, 3:] = -100
    labels[:, -1] = torch.where(labels[:, -1] == -100, -100, 3)
    return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask, "labels": labels}


@pytest.fixture(params=VARIANTS, ids=lambda changes: "-".join(map(str, changes.values())) or "plain")
def variant(request):
    return request.param


# ----------------------------------------------------------------------------------------------------- configuration


def test_number_of_parameters():
    with torch.device("meta"):
        model = SparseSeq2seqForConditionalGeneration(SparseSeq2seqConfig(vocab_size=32000))
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_modules()}
    assert model.num_parameters() == 56_798_000
    assert parts["model.encoder.lstm"] == 3_008_000 and parts["model.decoder.layers"] == 5_008_000
    assert parts["model.decoder.attention"] == 750_000 and parts["lm_head"] == 16_032_000
    assert parts["model.encoder.embed_tokens"] == parts["model.decoder.embed_tokens"] == 16_000_000


def test_config():
    config = SparseSeq2seqConfig(vocab_size=40, bos_token_id=7)
    assert (config.src_vocab_size, config.tgt_vocab_size, config.vocab_size) == (40, 40, 40)
    assert config.decoder_start_token_id == 7 and config.is_encoder_decoder
    again = SparseSeq2seqConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"hiden_size": 4}, "did you mean 'hidden_size'"),
        ({"attention_alpha": 0.5}, "attention_alpha must be at least 1 .* got 0.5"),
        ({"output_alpha": math.inf}, "output_alpha must be at least 1 .* got inf"),
        ({"attention_score": "sum"}, "attention_score must be one of general, dot, mlp, got 'sum'"),
        ({"learn_attention_alpha": True, "attention_alpha": 2.0}, "between 1 and 2, both excluded"),
        ({"entmax_method": "fast"}, "entmax_method must be one of newton, sort, topk, bisection or None"),
        ({"entmax_method": "sort", "output_alpha": 1.3}, "None or 'bisection' for the alphas 1.5, 1.3, got 'sort'"),
        ({"num_decoder_layers": 3}, "at most num_encoder_layers=2, got 3"),
        ({"hidden_size": 9}, "hidden_size must be even"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"eos_token_id": 11}, r"eos_token_id must be in \[0, 11\), got 11"),
        ({"src_vocab_size": 1}, r"pad_token_id must be in \[0, 1\)"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings must be False"),
        ({"bos_token_id": None}, "decoder_start_token_id must be a token"),
        ({"entmax_topk": 0}, "entmax_topk must be at least 1"),
        ({"init_range": 0.0}, "init_range must be above 0"),
    ],
)
def test_config_refuses(keywords, message):
    with pytest.raises(Exception, match=message):
        SparseSeq2seqConfig(**TINY | keywords)


# --------------------------------------------------------------------------------------------------------------- model


def test_save_and_load(variant, tmp_path):
    model, inputs = build(**variant), pairs()
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model) and not any(report.values()), report
    assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert_close(loaded(**inputs).loss, model(**inputs).loss)
    body = AutoModel.from_pretrained(tmp_path)
    assert type(body) is SparseSeq2seqModel
    assert_close(body.state_dict(), model.model.state_dict(), rtol=0, atol=0)


def test_initial_values():
    model = build(init_range=0.1, learn_attention_alpha=True, attention_alpha=1.2, hidden_size=40)
    for name, parameter in model.named_parameters():
        if name.endswith("alpha.logit"):
            assert_close(1 + parameter.sigmoid(), torch.tensor([1.2]))
        else:
            assert parameter.abs().max() <= 0.1 and (parameter.numel() < 40 or parameter.std() > 0.04), name


def test_loss_is_that_of_the_logits(variant):
    model, inputs = build(**variant), pairs()
    labels = inputs["labels"]
    kept = labels != -100
    outputs = model(**inputs, output_attentions=True)
    start = model.prepare_decoder_input_ids_from_labels(labels)
    assert start[:, 0].eq(2).all() and start[0, 4:].eq(1).all() and torch.equal(start[1, 1:], labels[1, :-1])
    plain = model(inputs["input_ids"], inputs["attention_mask"], decoder_input_ids=start)
    assert outputs.logits is None and plain.loss is None and plain.cross_attentions is None
    expected = entmax_loss(plain.logits, labels, model.config.output_alpha)
    assert_close(outputs.loss, expected)
    assert_close(model(**inputs, num_items_in_batch=3).loss, expected * kept.sum() / 3)
    p = entmax(plain.logits, model.config.output_alpha)[kept]
    gold = p.gather(1, labels[kept].unsqueeze(1))
    attention = outputs.cross_attentions[0][:, 0]
    assert outputs.output_support == (p > 0).sum() and outputs.zero_gold == (gold == 0).sum()
    assert outputs.attention_support == (attention[kept] > 0).sum()
    assert outputs.zero_loss == (gold == 1).sum()
    assert_close(outputs.sequence_losses.sum() / kept.sum(), outputs.loss)
    alone = model(**{name: part[1:2] for name, part in inputs.items()}, num_items_in_batch=1)
    assert_close(outputs.sequence_losses[1], alone.loss)
    assert_close(model(**inputs, log_probabilities=True, use_cache=False).loss, expected)


def test_sparsity():
    model, inputs = build(init_range=2.0), pairs()
    attention = model(**inputs, output_attentions=True).cross_attentions[0]
    real = inputs["attention_mask"].bool()[:, None, None].expand_as(attention)
    assert not attention[~real].any()
    assert (attention[real] == 0).any()
    assert_close(attention.sum(-1), torch.ones(4, 1, 5))
    dense = build(init_range=2.0, attention_alpha=1.0)(**inputs, output_attentions=True).cross_attentions[0]
    assert (dense[real] > 0).all() and not dense[~real].any()


def test_no_gradient_off_the_support():
    """Through the context a source position outside every support is not heard; 'dot' has no other path from it."""
    model, inputs = build(init_range=2.0, attention_score="dot"), pairs()
    encoded = model.get_encoder()(inputs["input_ids"], inputs["attention_mask"])
    memory = encoded.last_hidden_state.detach().requires_grad_()
    encoded = type(encoded)(memory, encoded.hidden.detach(), encoded.cell.detach())
    outputs = model(**inputs, encoder_outputs=encoded, output_attentions=True)
    (grad,) = torch.autograd.grad(outputs.loss, memory)
    heard = (outputs.cross_attentions[0][:, 0] > 0).any(1)
    assert not heard.all() and not grad[~heard].any() and (grad[heard].abs().amax(-1) > 0).any()


def test_every_parameter_gets_a_gradient(variant):
    model = build(**variant).train()
    model(**pairs()).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


@torch.no_grad()
def test_padding_and_batch_change_nothing(variant):
    model, inputs = build(**variant), pairs()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    start = model.prepare_decoder_input_ids_from_labels(inputs["labels"])
    whole = model(ids, mask, decoder_input_ids=start).logits
    for row, length in enumerate(mask.sum(1)):
        alone = model(ids[row : row + 1, :length], decoder_input_ids=start[row : row + 1]).logits
        assert_close(alone[0], whole[row], rtol=1e-4, atol=1e-5)
    left = torch.stack([row.roll(int(7 - length)) for row, length in zip(ids, mask.sum(1))])
    assert_close(model(left, mask.flip(1), decoder_input_ids=start).logits, whole, rtol=1e-4, atol=1e-5)
    other = torch.where(mask == 0, 5, ids)
    assert torch.equal(model(other, mask, decoder_input_ids=start).logits, whole)


def test_the_decoder_does_not_see_later_symbols(variant):
    model, inputs = build(**variant), pairs()
    start = model.prepare_decoder_input_ids_from_labels(inputs["labels"])
    other = start.clone()
    other[:, 3] = (other[:, 3] + 1) % 11
    first, second = (model(inputs["input_ids"], decoder_input_ids=ids).logits for ids in (start, other))
    assert torch.equal(first[:, :3], second[:, :3]) and (first[:, 3:] - second[:, 3:]).abs().amax(-1).gt(1e-6).all()


def test_input_feeding_and_dropout():
    """The last attentional vector changes the next state only with input feeding; dropout acts in training."""
    for input_feed in (True, False):
        model, inputs = build(input_feed=input_feed), pairs()
        encoded = model.get_encoder()(inputs["input_ids"], inputs["attention_mask"])
        state = {"hidden": encoded.hidden, "cell": encoded.cell, "keys": encoded.last_hidden_state}
        tops = []
        for feed in (0.0, 1.0):
            given = state | {"feed": torch.full((4, 8), feed)}
            tops.append(model.get_decoder()(torch.full((4, 1), 2), encoded.last_hidden_state, None, given)[0])
        assert torch.equal(*tops) != input_feed
        assert not torch.equal(model.train()(**inputs).loss, model(**inputs).loss)


def test_bfloat16_and_autocast():
    model, inputs = build(), pairs()
    expected = model(**inputs).loss
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(model(**inputs).loss, expected, rtol=0.1, atol=0)
    loss = model.bfloat16()(**inputs).loss
    assert loss.dtype == torch.float32
    assert_close(loss, expected, rtol=0.1, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_mask": torch.zeros(4, 7)}, "row 0 has no real token"),
        ({"attention_mask": torch.ones(3, 7)}, r"attention_mask must be \[4, 7\] as the source, got \[3, 7\]"),
        ({"inputs_embeds": torch.zeros(4, 7, 6)}, "exactly one of input_ids and inputs_embeds"),
        ({"labels": torch.full((4, 5), 11)}, r"labels must be in \[0, 11\)"),
        ({"decoder_attention_mask": torch.tensor([[0, 1, 1, 1, 1]])}, "padding on the right alone"),
        ({"past_key_values": object()}, "SparseSeq2seqCache, got a object"),
        ({"encoder_outputs": (torch.zeros(4, 7, 8),)}, r"what get_encoder\(\) gives"),
    ],
)
def test_mistakes(changes, message):
    with pytest.raises(ValueError, match=message):
        build()(**pairs() | changes)
    with pytest.raises(ValueError, match="src_vocab_size and tgt_vocab_size"):
        build().resize_token_embeddings(20)


# ---------------------------------------------------------------------------------------------------------- generation


def sources(rows=4):
    inputs = pairs(rows)
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


@torch.no_grad()
def hypotheses(model, ids, mask, longest):
    """All target sequences of non-zero probability and their log p, by enumeration; ended, or `longest` long."""
    open_ones, done = [((2,), 0.0)], []
    for _ in range(longest):
        grown = []
        for sequence, score in open_ones:
            logits = model(ids, mask, decoder_input_ids=torch.tensor([sequence]), use_cache=False).logits[0, -1]
            p = model.probabilities(logits)
            for token in p.nonzero().flatten().tolist():
                longer = ((*sequence, token), score + math.log(p[token]))
                (done if token == 3 else grown).append(longer)
        open_ones = grown
    return sorted(done + open_ones, key=lambda pair: -pair[1])


def trimmed(row):
    """A sequence up to its end."""
    row = row.tolist()
    return tuple(row[: row.index(3) + 1] if 3 in row else row)


@torch.no_grad()
def test_the_state_decodes_what_the_whole_pass_does(variant):
    model, inputs = build(**variant), sources()
    target = model.prepare_decoder_input_ids_from_labels(pairs()["labels"])
    whole = model(**inputs, decoder_input_ids=target).logits
    cache, parts, sizes = None, [], set()
    for start, stop in ((0, 2), (2, 3), (3, 5)):
        outputs = model(**inputs, decoder_input_ids=target[:, start:stop], past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        parts.append(outputs.logits)
        sizes.add(sum(part.numel() for part in cache.layers[0].tensors.values()))
        assert isinstance(cache, SparseSeq2seqCache) and cache.get_seq_length() == stop
    assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    assert len(sizes) == 1, "the state grows"


@torch.no_grad()
def test_greedy(variant):
    model, inputs = build(**variant, seed=3), sources()
    found = model.generate(**inputs, max_new_tokens=6)
    for row in range(4):
        ids, mask = (part[row : row + 1] for part in inputs.values())
        sequence = [2]
        while len(sequence) < 7 and sequence[-1] != 3:
            logits = model(ids, mask, decoder_input_ids=torch.tensor([sequence]), use_cache=False).logits
            sequence.append(int(logits[0, -1].argmax()))
        assert trimmed(found[row]) == tuple(sequence)
    assert torch.equal(model.generate(**inputs, max_new_tokens=6, use_cache=False), found)


@torch.no_grad()
def test_the_source_is_read_once(monkeypatch):
    model = build()
    calls = []
    model.get_encoder().register_forward_hook(lambda *_: calls.append("read"))
    model.model.register_forward_hook(
        lambda module, args, outputs: calls.append(args[2].shape[1]),
    )
    model.generate(**sources(), max_new_tokens=4, min_new_tokens=1, num_beams=2, eos_token_id=None)
    assert calls == ["read", 1, 1, 1, 1]


def prob_bias(model, factor):
    """Sharper or flatter outputs."""
    with torch.no_grad():
        model.lm_head.weight *= factor
        model.lm_head.bias *= factor
    return model


@pytest.mark.parametrize(("seed", "alpha"), [(0, 1.5), (1, 1.5), (2, 2.0), (4, 2.0)])
def test_beam_search_is_exact_where_the_beam_holds_all_hypotheses(seed, alpha):
    model = prob_bias(build(seed, output_alpha=alpha), 2.0)
    inputs = sources()
    longest = 4
    expected = [
        hypotheses(model, inputs["input_ids"][row : row + 1], inputs["attention_mask"][row : row + 1], longest)
        for row in range(4)
    ]
    beams = max(map(len, expected))
    assert 1 < max(map(len, expected)) <= 200, "too dense, or too sparse to show anything"
    found = model.generate(
        **inputs,
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=longest,
        return_dict_in_generate=True,
        output_scores=True,
    )
    rows = found.sequences.unflatten(0, (4, beams))
    scores = found.sequences_scores.unflatten(0, (4, beams))
    for row, wanted in enumerate(expected):
        count = len(wanted)
        assert_close(scores[row, :count], torch.tensor([score for _, score in wanted]), rtol=1e-4, atol=1e-4)
        assert {trimmed(each) for each in rows[row, :count]} == {sequence for sequence, _ in wanted}
        assert (scores[row, count:] < -1e8).all(), "a finished or impossible beam came back"
    best = model.generate(**inputs, num_beams=beams, max_new_tokens=longest)
    assert [trimmed(row) for row in best] == [wanted[0][0] for wanted in expected]


@torch.no_grad()
def test_without_our_limit_finished_beams_come_back(monkeypatch):
    """What transformers does by itself. Divided by a length, -1e9 is above an empty place of the results."""
    model, inputs = prob_bias(build(2, output_alpha=2.0), 2.0), sources()
    options = {"num_beams": 90, "num_return_sequences": 90, "max_new_tokens": 4, "length_penalty": 1.0}

    def hypotheses_found():
        found = model.generate(**inputs, **options, return_dict_in_generate=True, output_scores=True)
        return (found.sequences_scores > -9e8).unflatten(0, (4, 90)).sum(1)

    real = hypotheses_found()
    monkeypatch.setattr("bestiary.modeling.modeling_sparse_seq2seq.LOST", -math.inf)
    assert (hypotheses_found() > real).any()


@torch.no_grad()
def test_samples_have_a_probability():
    model, inputs = prob_bias(build(1), 2.0), sources()
    choices = ({}, {"temperature": 3.0}, {"top_p": 0.9}, {"top_k": 3}, {"typical_p": 0.8}, {"epsilon_cutoff": 0.01})
    allowed = [
        {sequence for sequence, _ in hypotheses(model, *(part[row : row + 1] for part in inputs.values()), 3)}
        for row in range(4)
    ]
    for options in choices:
        torch.manual_seed(0)
        found = model.generate(**inputs, do_sample=True, num_return_sequences=20, max_new_tokens=3, **options)
        for number, row in enumerate(found):
            assert trimmed(row) in allowed[number // 20]


@torch.no_grad()
def test_the_frequencies_of_samples_are_the_sparse_probabilities():
    model, inputs = build(1), {name: part[:1] for name, part in sources().items()}
    p = model.probabilities(model(**inputs).logits[0, 0])
    assert (p == 0).any()
    torch.manual_seed(0)
    first = model.generate(**inputs, do_sample=True, num_return_sequences=4000, max_new_tokens=1, top_k=0)[:, 1]
    shares = torch.bincount(first, minlength=11) / 4000
    assert_close(shares, p, rtol=0, atol=0.03)
    assert not shares[p == 0].any()


def test_settings_that_leave_no_token():
    model = build()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.zero_()
        model.lm_head.bias[3] = 9.0
    assert model.generate(**sources(), max_new_tokens=3).tolist() == [[2, 3]] * 4
    assert model.generate(**sources(), max_new_tokens=3, num_beams=3).tolist() == [[2, 3]] * 4
    kinds = ({}, {"do_sample": True}, {"num_beams": 2})
    others = ({}, {"renormalize_logits": True}, {"remove_invalid_values": True})
    for kind, other in itertools.product(kinds, others):
        with pytest.raises(ValueError, match="all tokens that the model gives row 0 at step 0 are excluded"):
            model.generate(**sources(), max_new_tokens=3, min_new_tokens=2, **kind, **other)
    with pytest.raises(ValueError, match="beams cannot be sampled"):
        model.generate(**sources(), max_new_tokens=3, num_beams=2, do_sample=True)


@torch.no_grad()
def test_length_penalty_and_user_configuration():
    model, inputs = build(1), sources()
    plain = {"num_beams": 3, "max_new_tokens": 5, "return_dict_in_generate": True, "output_scores": True}
    sums = model.generate(**inputs, **plain)
    total = model.compute_transition_scores(sums.sequences, sums.scores, sums.beam_indices).sum(1)
    assert_close(sums.sequences_scores, total, rtol=1e-4, atol=1e-5)
    given = model.generate(
        **inputs,
        generation_config=GenerationConfig(
            **plain, length_penalty=0.0, eos_token_id=3, pad_token_id=1, decoder_start_token_id=2
        ),
    )
    assert torch.equal(given.sequences, sums.sequences)
    model.generation_config.num_beams = 3
    options = {name: value for name, value in plain.items() if name != "num_beams"}
    merged = model.generate(**inputs, generation_config=GenerationConfig(**options))
    assert_close(merged.sequences_scores, sums.sequences_scores)
    means = model.generate(**inputs, **plain, length_penalty=1.0)
    lengths = (means.beam_indices >= 0).sum(1)
    total = model.compute_transition_scores(means.sequences, means.scores, means.beam_indices).sum(1)
    assert_close(means.sequences_scores, total / lengths, rtol=1e-4, atol=1e-5)


def test_a_cache_is_cut_and_repeated_but_not_cropped():
    model, inputs = build(), sources()
    cache = model(**inputs).past_key_values
    before = {name: part.clone() for name, part in cache.layers[0].tensors.items()}
    cache.reorder_cache(torch.tensor([1, 1, 0, 3]))
    for name, part in cache.layers[0].tensors.items():
        assert torch.equal(part, before[name][[1, 1, 0, 3]])
    cache.batch_select_indices(torch.tensor([2]))
    cache.batch_repeat_interleave(3)
    assert {len(part) for part in cache.layers[0].tensors.values()} == {3}
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(1)
    cache.reset()
    assert cache.get_seq_length() == 0 and not cache.layers[0].tensors


# ------------------------------------------------------------------------------------- the extension: a sparse encoder


class TestSparseTransformer(EncoderSuite):
    slug = "sparse_seq2seq"
    config = SparseTransformerConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=24,
        initializer_range=0.2,
        learn_attention_alpha=True,
        entmax_n_iter=12,
    )
    base = SparseTransformerModel
    heads = (
        SparseTransformerForMaskedLM,
        SparseTransformerForSequenceClassification,
        SparseTransformerForTokenClassification,
        SparseTransformerForQuestionAnswering,
        SparseTransformerForMultipleChoice,
    )
    reduces_to_bert = {"attention_alpha": 1.0, "learn_attention_alpha": False}
    bad_config = (
        ({"attention_alpha": 2.5}, "between 1 and 2, both excluded"),
        ({"attention_alpha": 0.5, "learn_attention_alpha": False}, "attention_alpha must be at least 1"),
        ({"entmax_n_iter": 0}, "entmax_n_iter must be at least 1"),
    )
    backends = ()

    def auto_name(self, model_class):
        models = paper_of(self.config).models
        return next(name for name, model in models.items() if model is model_class)

    def zero_gradients(self, head):
        shared = ("qa_outputs.bias",) if head is SparseTransformerForQuestionAnswering else ()  # all scores alike
        return (*super().zero_gradients(head), *shared)

    def test_config_round_trip(self, tmp_path):
        self.config.save_pretrained(tmp_path)
        loaded = AutoConfig.from_pretrained(tmp_path)
        assert type(loaded) is SparseTransformerConfig and loaded.model_type == self.config.model_type
        assert settings(loaded) == settings(self.config)

    def test_unpadding_changes_nothing(self, packed_class, monkeypatch):
        super().test_unpadding_changes_nothing(packed_class, "eager", monkeypatch)

    def test_heads_are_the_registered_ones(self):
        assert set(paper_of(self.config).models.values()) == {self.base, *self.heads}
        assert paper_of(self.config).arxiv == "1909.00015" and paper_of(self.config).slug == self.slug
        assert isinstance(AutoConfig.for_model("bestiary-sparse-seq2seq-transformer"), SparseTransformerConfig)

    @pytest.mark.parametrize("alpha", [1.5, 2.0, 1.3])
    def test_attention_is_entmax_of_the_scores(self, alpha):
        config = self.make_config(attention_alpha=alpha, learn_attention_alpha=False, entmax_n_iter=50)
        model = self.build(self.base, config)
        inputs = self.inputs(self.base, "right")
        outputs = model(**inputs, output_attentions=True, output_hidden_states=True)
        layer = model.encoder.layer[0].attention.self
        query, key, _ = layer.project(outputs.hidden_states[0])
        scores = query @ key.mT / layer.head_dim**0.5
        scores = scores.masked_fill(inputs["attention_mask"][:, None, None] == 0, -math.inf)
        assert_close(outputs.attentions[0], entmax(scores, alpha), rtol=1e-4, atol=1e-5)
        assert (outputs.attentions[0] == 0).any()

    def test_every_head_has_an_alpha(self):
        model = self.build(self.base)
        logits = [layer.attention.self.alpha.logit for layer in model.encoder.layer]
        assert [each.shape for each in logits] == [(2,), (2,)]
        with torch.no_grad():
            for each in logits:
                each.copy_(torch.tensor([-6.0, 6.0]))
        outputs = model(**self.inputs(self.base), output_attentions=True)
        supports = torch.stack([(p > 0).float().mean((0, 2, 3)) for p in outputs.attentions])
        assert (supports[:, 0] > supports[:, 1]).all()


def test_sequences_of_variants_differ():
    """Every option is another function of the same source."""
    inputs = pairs()
    losses = [build(**changes)(**inputs).loss.item() for changes in VARIANTS[:7]]
    assert all(abs(a - b) > 1e-4 for a, b in itertools.combinations(losses, 2))
