"""T-TA: the common suite, that a token never reaches its own prediction, and what is left when there is no other."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from suites.encoder_suite import EncoderSuite
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import AutoModelForMaskedLM, AutoModelForPreTraining, AutoTokenizer

from bestiary.configuration.configuration_bert import BertPretrainingConfig
from bestiary.configuration.configuration_tta import TtaConfig
from bestiary.conversion import convert_checkpoint
from bestiary.conversion import tta as conversion
from bestiary.modeling import modeling_tta as tta
from bestiary.modeling.layers.encoder import EncoderLayer
from bestiary.modeling.modeling_bert import BertPretrainingForMaskedLM


TINY = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
    "num_labels": 3,
}
BACKENDS = ("eager", "sdpa")
PADDINGS = (None, "right", "left")


class TestTta(EncoderSuite):
    slug = "tta"
    config = TtaConfig(**TINY)
    base = tta.TtaModel
    heads = (
        tta.TtaForMaskedLM,
        tta.TtaForSequenceClassification,
        tta.TtaForTokenClassification,
        tta.TtaForQuestionAnswering,
        tta.TtaForMultipleChoice,
    )
    parameters = {
        "released": {tta.TtaModel: 24_643_072 + 262_656, tta.TtaForMaskedLM: 24_936_282},
        "base": {tta.TtaForMaskedLM: 109_514_298 - 2 * 768},  # BERT-base as a masked LM without token types
    }
    reduces_to_bert = None  # a query that knows its token is BERT's, and no setting of T-TA has one
    bad_config = (
        ({"num_attention_heads": 5}, "num_attention_heads must be a divisor of hidden_size=32, got 5"),
        ({"query_token_id": 99}, r"query_token_id must be in \[0, vocab_size=99\) or None .*, got 99"),
        ({"query_token_id": -1}, "query_token_id must be in"),
        ({"type_vocab_size": 2}, "type_vocab_size must be 1, since T-TA has no token types, got 2"),
        ({"hidden_dropout_prob": 1.0}, r"hidden_dropout_prob must be in \[0, 1\), got 1.0"),
        ({"unpad_threshold": 2}, r"unpad_threshold must be in \[0, 1\] or None, got 2"),
    )

    def zero_gradients(self, head):
        """A number that is added to the scores of all places of an answer changes nothing."""
        last = ("qa_outputs.bias",) if head is tta.TtaForQuestionAnswering else ()
        return super().zero_gradients(head) + last

    # ---- configuration

    def test_sizes(self):
        assert TtaConfig.from_size("released").to_dict() == TtaConfig().to_dict()
        with pytest.raises(ValueError, match="no size 'large'; there are released, base"):
            TtaConfig.from_size("large")

    def test_position_only_queries(self):
        """The paper's form: no word enters the query stream; everything else is the same."""
        with_mask, without = (self.build(self.base, self.make_config(query_token_id=id)) for id in (4, None))
        ids, places = self.inputs(self.base)["input_ids"], torch.arange(12)[None]
        expected = with_mask.embeddings.LayerNorm(with_mask.embeddings.position_embeddings(places))
        assert_close(without.embeddings.queries(places, None, 1), expected)
        with torch.no_grad():
            changes = []
            for model in (with_mask, without):
                before = model(ids).last_hidden_state
                model.embeddings.word_embeddings.weight[4, :9] += 1  # of [MASK], which the text does not have
                changes.append((model(ids).last_hidden_state - before).abs().max().item())
        assert changes[0] > 1e-2 and changes[1] == 0

    # ---- a token never reaches its own prediction

    @pytest.mark.parametrize("query", [4, None])
    @pytest.mark.parametrize("padding", PADDINGS)
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_the_gradient_of_its_own_token_is_zero(self, backend, padding, query):
        """d log p(x_i | others) / d E[x_i] is 0, to the bit, and that of every other real token is not."""
        model = self.build(tta.TtaForMaskedLM, self.make_config(query_token_id=query, num_hidden_layers=3))
        self.switch(model, backend)
        inputs = self.inputs(tta.TtaForMaskedLM, padding)
        ids = inputs.pop("input_ids")
        real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        words = model.get_input_embeddings()(ids).detach().requires_grad_()
        chosen = model(inputs_embeds=words, **inputs).logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        for place in range(ids.shape[1]):
            (grad,) = torch.autograd.grad(chosen[:, place].sum(), words, retain_graph=True)
            assert grad.isfinite().all()
            assert torch.equal(grad[:, place], torch.zeros_like(grad[:, place]))
            size = grad.abs().amax(-1)  # (B, T)
            assert not size[~real].any(), "padding was seen"
            others = real.clone()
            others[:, place] = False
            assert (size[others] > 0).all(), "a token was not seen"

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_the_prediction_of_a_token_does_not_change_with_it(self, backend):
        model = self.build(tta.TtaForMaskedLM)
        self.switch(model, backend)
        inputs = self.inputs(tta.TtaForMaskedLM)
        before = model(**inputs).logits
        for place in (0, 5, 11):
            ids = inputs["input_ids"].clone()
            ids[:, place] = 3
            after = model(**inputs | {"input_ids": ids}).logits
            same = (before == after).all(-1).all(0)  # (T,)
            assert same.tolist() == [other == place for other in range(12)]

    def test_content_is_the_same_in_every_layer(self):
        """Input isolation: with the previous layer's states as keys and values, tokens would leak."""
        model = self.build(self.base)
        seen = []
        for layer in model.encoder.layer:
            layer.attention.self.key.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
            layer.attention.self.value.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        content = model(**self.inputs(self.base)).content_states
        assert len(seen) == 4 and all(torch.equal(each, content) for each in seen)

    def test_one_layer_by_hand(self):
        """One BERT layer whose queries and residual are the [MASK] embedding at each position."""
        model = self.build(self.base, self.make_config(num_hidden_layers=1))
        ids = self.inputs(self.base)["input_ids"]
        parts = model.embeddings
        with torch.no_grad():
            places = parts.position_embeddings.weight[:12]
            content = F.layer_norm(parts.word_embeddings(ids) + places, (32,), *_norm(parts.LayerNorm))
            query = F.layer_norm(parts.word_embeddings.weight[4] + places, (32,), *_norm(parts.LayerNorm))
            attention, layer = model.encoder.layer[0].attention, model.encoder.layer[0]
            q, k, v = (
                projection(states).unflatten(-1, (4, 8)).transpose(-3, -2)
                for projection, states in (
                    (attention.self.query, query.expand(4, -1, -1)),
                    (attention.self.key, content),
                    (attention.self.value, content),
                )
            )
            scores = q @ k.mT / math.sqrt(8)
            shares = scores.masked_fill(torch.eye(12).bool(), -math.inf).softmax(-1)
            context = (shares @ v).transpose(1, 2).flatten(2)
            states = attention.output.LayerNorm(attention.output.dense(context) + query)
            inner = F.gelu(layer.intermediate.dense(states))
            states = layer.output.LayerNorm(layer.output.dense(inner) + states)
            found = model(ids)
        assert_close(found.last_hidden_state, states, rtol=1e-4, atol=1e-5)
        assert_close(found.content_states, content)

    def test_a_layer_that_may_see_its_own_token_is_berts(self):
        """The same parts in another order: with content as query and no diagonal, a layer is that of BERT."""
        model = self.build(self.base)
        layer = model.encoder.layer[0]
        plain = EncoderLayer(BertPretrainingConfig(**TINY, attn_implementation="sdpa"), 0).eval()
        plain.load_state_dict(layer.state_dict())
        states = torch.randn(2, 6, 32)
        everything = torch.ones(1, 1, 6, 6, dtype=torch.bool)
        assert_close(layer(states, states, everything, None), plain(states, everything))

    # ---- nothing to see

    @pytest.mark.parametrize("length", [1, 3])
    @pytest.mark.parametrize("padding", ["right", "left"])
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_a_token_alone_is_described_by_its_position(self, backend, padding, length):
        """Attention over nothing is zero, in eager too, where a finite mask would let the token see itself."""
        model = self.build(tta.TtaForMaskedLM)
        self.switch(model, backend)
        place = 0 if padding == "right" else length - 1
        mask = torch.zeros(2, length).long()
        mask[0], mask[1, place] = 1, 1  # beside a full sequence
        ids = torch.arange(6, 6 + 2 * length).view(2, length)
        words = model.get_input_embeddings()(ids).detach().requires_grad_()
        for given in [mask] + [None] * (length == 1):
            logits = model(inputs_embeds=words, attention_mask=given).logits
            (grad,) = torch.autograd.grad(logits[1, place].logsumexp(-1), words, retain_graph=True)
            assert logits.isfinite().all() and not grad.any()
        logits.sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), name

        other = ids.clone()
        other[1] += 20
        first, second = (model(each, attention_mask=mask).logits[1, place] for each in (ids, other))
        assert torch.equal(first, second)
        context = []
        model.bert.encoder.layer[0].attention.output.register_forward_pre_hook(lambda m, args: context.append(args[0]))
        model(ids, attention_mask=mask)
        assert not context[0][1, place].any()
        assert context[0][0].any() == (length > 1)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_a_sequence_of_padding_only_does_no_harm(self, backend):
        model = self.build(tta.TtaForMaskedLM)
        self.switch(model, backend)
        ids = torch.arange(6, 14).view(2, 4)
        mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])
        outputs = model(ids, attention_mask=mask).logits
        assert outputs.isfinite().all()
        outputs[0].sum().backward()
        assert all(value.grad is None or value.grad.isfinite().all() for value in model.parameters())

    def test_packed_rows_keep_single_tokens_apart(self):
        ids, mask = torch.arange(6, 18).view(3, 4), torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0], [0, 1, 0, 0]])
        for backend in BACKENDS:
            results = []
            for threshold in (None, 0.0):
                model = self.build(self.base, self.make_config(unpad_threshold=threshold))
                self.switch(model, backend)
                results.append(model(ids, attention_mask=mask).last_hidden_state[mask.bool()])
            assert_close(*results, rtol=1e-4, atol=1e-5)

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:_compile flag:DeprecationWarning")
    def test_a_token_alone_in_flex_attention(self):
        ids, mask = torch.arange(6, 14).view(2, 4), torch.tensor([[1, 1, 1, 1], [0, 1, 0, 0]])
        model = self.build(self.base)
        results = []
        for backend in ("sdpa", "flex_attention"):
            self.switch(model, backend)
            with torch.no_grad():
                results.append(model(ids, attention_mask=mask).last_hidden_state[mask.bool()])
        assert_close(*results, rtol=1e-4, atol=1e-5)

    # ---- masks that a user gives

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("kind", ["boolean", "additive", "infinite"])
    def test_masks_per_pair_of_tokens(self, backend, kind):
        """The diagonal is left out of them too."""
        model = self.build(self.base)
        self.switch(model, backend)
        inputs = self.inputs(self.base, "right")
        mask = inputs["attention_mask"].bool()
        expected = model(**inputs).last_hidden_state[mask]
        pairs = mask[:, None, None, :].expand(-1, 1, 12, -1)
        low = {"additive": torch.finfo(torch.float32).min, "infinite": -math.inf}
        given = pairs if kind == "boolean" else torch.where(pairs, 0.0, low[kind])
        found = model(**inputs | {"attention_mask": given}).last_hidden_state[mask]
        assert_close(found, expected, rtol=1e-4, atol=1e-5)

    def test_other_masks_are_refused(self):
        model = self.build(self.base)
        for mask, kind in ((torch.ones(2, 4, 4), r"float32 \[2, 4, 4\]"), (torch.ones(2, 1, 4, 4).long(), "int64")):
            with pytest.raises(ValueError, match=f"attention_mask must be a tensor .*, got torch.{kind}"):
                model(torch.ones(2, 4).long(), attention_mask=mask)

    def test_token_types_are_ignored(self):
        model = self.build(self.base)
        inputs = self.inputs(self.base)
        types = inputs.pop("token_type_ids")
        assert torch.equal(model(**inputs).last_hidden_state, model(**inputs, token_type_ids=types).last_hidden_state)

    # ---- heads

    def test_heads_on_tokens_see_the_token(self):
        """q^L + C; the state alone would leave out what is to be judged."""
        for head in (tta.TtaForTokenClassification, tta.TtaForQuestionAnswering):
            model = self.build(head)
            inputs = self.inputs(head)
            encoded = model.bert(**inputs)
            states = encoded.last_hidden_state + encoded.content_states
            layer = model.classifier if head is tta.TtaForTokenClassification else model.qa_outputs
            outputs = model(**inputs)
            found = outputs.get("logits")
            found = torch.stack([outputs.start_logits, outputs.end_logits], -1) if found is None else found
            assert_close(found, layer(states))

    def test_pre_training_and_masked_lm_are_one_class(self, tmp_path):
        model = self.build(tta.TtaForMaskedLM)
        model.save_pretrained(tmp_path)
        for auto_class in (AutoModelForMaskedLM, AutoModelForPreTraining):
            assert type(auto_class.from_pretrained(tmp_path)) is tta.TtaForMaskedLM

    @pytest.mark.parametrize("chunk", [1, 10**9])
    def test_token_log_likelihoods(self, chunk, monkeypatch):
        monkeypatch.setattr(tta, "CHUNK_LOGITS", chunk * TINY["vocab_size"])
        model = self.build(tta.TtaForMaskedLM)
        inputs = self.inputs(tta.TtaForMaskedLM, "right")
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        with torch.no_grad():
            expected = model(ids, mask).logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
            assert_close(model.token_log_likelihoods(ids, mask), expected * mask)
            some = mask * (ids % 2)
            assert_close(model.token_log_likelihoods(ids, mask, some), expected * some)
            assert_close(model.token_log_likelihoods(ids[:1]), model.token_log_likelihoods(ids[:1], mask[:1]))
            nothing = model.token_log_likelihoods(ids, mask, torch.zeros_like(mask))
            assert nothing.shape == ids.shape and not nothing.any()
        assert model.token_log_likelihoods(ids, mask).requires_grad

    def test_tables_narrower_than_the_states(self):
        """Both streams pass the same map."""
        model = self.build(tta.TtaForMaskedLM, self.make_config(embedding_size=20))
        calls = []
        model.bert.embeddings_project.register_forward_hook(lambda module, args, output: calls.append(output.shape))
        ids = self.inputs(tta.TtaForMaskedLM)["input_ids"]
        other = ids.clone()
        other[:, 3] = 5
        first, second = model(ids).logits, model(other).logits
        assert calls == [(4, 12, 32)] * 4
        assert torch.equal(first[:, 3], second[:, 3]) and not torch.equal(first[:, 4], second[:, 4])

    def test_initialisation_is_a_normal_cut_at_two_deviations(self):
        torch.manual_seed(0)
        model = tta.TtaForMaskedLM(self.make_config(initializer_range=0.1))
        values = torch.cat([value.flatten() for value in model.parameters() if value.dim() == 2])
        assert 0.19 < values.abs().max() <= 0.2


def _norm(layer):
    return layer.weight, layer.bias, layer.eps


# ---- official checkpoints


SIZES = {name: value for name, value in TINY.items() if name != "num_labels"}
PIECES = ["[PAD]", "[EOS]", "[UNK]", "[SOS]", "[MASK]", "[CLS]", "[SEP]", "the", "cat", "##s"]


def official() -> dict[str, torch.Tensor]:
    """Tensors of the official layout, pooler included."""
    torch.manual_seed(0)
    model = tta.TtaForMaskedLM(TtaConfig(**SIZES))
    state = {}
    for name, value in model.state_dict().items():
        if name not in model.all_tied_weights_keys:
            theirs = conversion.official_name(name)
            state[theirs] = value.T.contiguous() if theirs.endswith("/kernel") else value
    return state | {"bert/pooler/dense/kernel": torch.zeros(32, 32), "bert/pooler/dense/bias": torch.zeros(32)}


def test_conversion_of_a_folder(tmp_path):
    """Weights, and a tokenizer with the paper's boundary tokens."""
    source = tmp_path / "official"
    source.mkdir()
    save_file(official(), source / "model.safetensors")
    (source / "bert_config.json").write_text('{"num_attention_heads": 4, "type_vocab_size": 2}', encoding="utf-8")
    (source / "vocab.txt").write_text("\n".join(PIECES), encoding="utf-8")
    out = convert_checkpoint("tta", source, tmp_path / "out")
    model = AutoModelForMaskedLM.from_pretrained(out)
    assert type(model) is tta.TtaForMaskedLM and model.config.query_token_id == 4
    torch.manual_seed(0)
    expected = tta.TtaForMaskedLM(TtaConfig(**SIZES)).eval()
    ids = torch.arange(5, 12)[None]
    assert torch.equal(model(ids).logits, expected(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("the cats").input_ids == [3, 7, 8, 9, 1] and tokenizer.mask_token_id == 4


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({"bert/embeddings/token_type_embeddings": torch.zeros(2, 32)}, {}, "but of BERT, since it has bert/embed"),
        ({"cls/seq_relationship/output_bias": torch.zeros(2)}, {}, "Use `bestiary convert bert`"),
        ({"bert/embeddings/position_embeddings": None}, {}, "1 missing: bert/embeddings/position_embeddings"),
        ({"bert/encoder/layer_0/adapter/kernel": torch.zeros(1)}, {}, "1 extra: bert/encoder/layer_0/adapter/kernel"),
        ({}, {"num_hidden_layers": 3}, "num_hidden_layers is 3 in the configuration and 2 in the tensors"),
        ({}, {"num_attention_heads": None}, "num_attention_heads is not given"),
        ({}, {"model_type": "bert"}, "has the model_type 'bert'"),
    ],
)
def test_checkpoints_that_do_not_fit(change, config, message):
    state = {name: value for name, value in (official() | change).items() if value is not None}
    settings = {name: value for name, value in ({"num_attention_heads": 4} | config).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        conversion.convert(state, settings)


def test_ids_of_another_vocabulary():
    ids = {"[PAD]": 7, "[MASK]": 8}
    model = conversion.convert(official(), {"config": SIZES, "special_token_ids": ids})
    assert (model.config.pad_token_id, model.config.query_token_id) == (7, 8)


def test_a_bert_is_not_taken_for_it(tmp_path):
    """The names are the same: only the configuration's type keeps the two apart."""
    BertPretrainingForMaskedLM(BertPretrainingConfig(**SIZES)).save_pretrained(tmp_path)
    assert type(AutoModelForMaskedLM.from_pretrained(Path(tmp_path))) is BertPretrainingForMaskedLM
