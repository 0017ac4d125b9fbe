"""The Performer's models: the common suites and the paper's own checks."""

import pytest
import torch
from suites.causal_suite import CausalSuite
from suites.encoder_suite import EncoderSuite, at_real_tokens
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, BertConfig, BertForMaskedLM

from bestiary.configuration.configuration_performer import FUNCTIONS, PerformerConfig
from bestiary.modeling import modeling_performer as performer
from bestiary.modeling.layers import random_features
from bestiary.modeling.layers.kernel_attention import KernelCache


TINY = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
    "num_labels": 3,
    "num_random_features": 24,
    "chunk_size": 4,
}


class TestPerformer(CausalSuite, EncoderSuite):
    slug = "performer"
    config = PerformerConfig(**TINY)
    base = performer.PerformerModel
    heads = (
        performer.PerformerForPreTraining,
        performer.PerformerForMaskedLM,
        performer.PerformerForCausalLM,
        performer.PerformerForSequenceClassification,
        performer.PerformerForTokenClassification,
        performer.PerformerForQuestionAnswering,
        performer.PerformerForMultipleChoice,
    )
    causal_class = performer.PerformerForCausalLM
    pretraining_class = performer.PerformerForPreTraining
    masked_class = performer.PerformerForMaskedLM
    causal_variants = (
        {},
        {"attention_kernel": "generalized_relu"},
        {"attention_kernel": "generalized_relu", "use_projection": True},
        {"position_embedding_type": "rotary", "layer_norm_position": "pre"},
    )
    # a Transformer's numbers: the projections are buffers
    parameters = {"bert_base": {performer.PerformerModel: 109_482_240 + (8192 - 512) * 768}}
    reduces_to_bert = None  # random features only estimate softmax attention
    can_unpad = False
    bad_config = (
        ({"attention_kernel": "softmax"}, "attention_kernel must be one of softmax_positive, .*got 'softmax'"),
        ({"num_random_features": 0}, "num_random_features must be at least 1, got 0"),
        ({"feature_redraw_interval": 0}, "feature_redraw_interval must be at least 1, or None"),
        ({"ortho_scaling": 2}, "ortho_scaling must be one of 0, 1, got 2"),
        ({"key_stabilizer": "row"}, "key_stabilizer must be one of None, sequence, none, got 'row'"),
        ({"use_projection": False}, "use_projection must be True or None for the softmax kernels"),
        ({"kernel_epsilon": -1e-6}, "kernel_epsilon must be at least 0"),
        ({"unpad_threshold": 0.1}, "unpad_threshold must be None"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"position_embedding_type": "relative"}, "position_embedding_type must be one of absolute, rotary"),
        ({"layer_norm_position": "sandwich"}, "layer_norm_position must be one of post, pre"),
        ({"hidden_size": 12, "position_embedding_type": "rotary"}, "heads of odd width"),
    )

    # ------------------------------------------------------------------------------------------------------- features

    @pytest.mark.parametrize(
        "changes",
        [
            {"attention_kernel": "softmax_trig", "initializer_range": 0.01},
            *({"attention_kernel": f"generalized_{name}"} for name in FUNCTIONS if name not in ("gelu", "identity")),
            {"attention_kernel": "generalized_relu", "use_projection": True, "normalize_data": True},
            {"ortho_scaling": 1},
            {"orthogonal_features": False},
            {"orthogonal_sign_fix": False},
            {"key_stabilizer": "none"},
            {"kernel_epsilon": 1e-4},
            {"renormalize_attention": False},
            {"denominator_guard": 1e-2},
        ],
        ids=lambda changes: "-".join(map(str, changes.values())),
    )
    @torch.no_grad()
    def test_kernels_and_ablations(self, changes):
        """Backends agree and the choice matters."""
        inputs = self.inputs(self.base, "right")
        model = self.build(self.base, self.make_config(**changes))
        outputs = []
        for backend in ("eager", "sdpa"):
            self.switch(model, backend)
            outputs.append(at_real_tokens(model(**inputs), inputs["attention_mask"]))
        assert_close(*outputs, rtol=1e-3, atol=1e-4)
        plain = at_real_tokens(self.build(self.base)(**inputs), inputs["attention_mask"])
        assert not torch.equal(plain["last_hidden_state"], outputs[0]["last_hidden_state"])

    def test_the_fast_path_runs_where_it_can(self, monkeypatch):
        calls = []
        original = random_features._PositiveAttention.apply
        monkeypatch.setattr(random_features._PositiveAttention, "apply", lambda *a: calls.append(1) or original(*a))
        self.build(self.base)(**self.inputs(self.base))
        assert len(calls) == 2
        streamed = []
        causal = random_features._CausalPositiveAttention.apply
        monkeypatch.setattr(
            random_features._CausalPositiveAttention, "apply", lambda *a: streamed.append(1) or causal(*a)
        )
        self.decoder()(**self.prompt())
        assert len(streamed) == 2

    def test_projections_are_saved_drawn_by_seed_and_layer_and_not_trained(self, tmp_path):
        models = [
            self.build(self.base, self.make_config(feature_seed=seed), seed=n) for n, seed in enumerate((0, 0, 1))
        ]
        layers = [[layer.attention.self.projection_matrix for layer in model.encoder.layer] for model in models]
        assert torch.equal(layers[0][0], layers[1][0]) and not torch.equal(layers[0][0], layers[2][0])
        assert not torch.equal(*layers[0])
        model = models[0]
        model.redraw_projections(5, 7)
        drawn = model.encoder.layer[1].attention.self.projection_matrix
        assert torch.equal(drawn, layers[0][1]), "replaced, not written in place"
        assert torch.equal(drawn, model.encoder.layer[1].attention.self.new_projection(5, 7))
        model.save_pretrained(tmp_path)
        loaded = self.base.from_pretrained(tmp_path)
        assert torch.equal(loaded.encoder.layer[1].attention.self.projection_matrix, drawn)
        assert not any("projection" in name for name, _ in model.named_parameters())
        without = self.build(self.base, self.make_config(attention_kernel="generalized_relu"))
        assert not any("projection_matrix" in name for name in without.state_dict())

    def test_evaluation_twice_is_the_same(self):
        model = self.build(self.base)
        inputs = self.inputs(self.base)
        assert torch.equal(model(**inputs).last_hidden_state, model(**inputs).last_hidden_state)

    # ----------------------------------------------------------------------------------------------------------- BERT

    @pytest.mark.parametrize("target", ["masked", "causal"])
    def test_weights_of_a_stock_bert(self, target, tmp_path):
        """All of them are loaded, projections are drawn, and with many features the estimate is near BERT's output."""
        sizes = {name: value for name, value in TINY.items() if name not in ("num_random_features", "chunk_size")}
        torch.manual_seed(0)
        stock = BertForMaskedLM(BertConfig(**sizes)).eval()
        stock.save_pretrained(tmp_path)
        model_class = self.masked_class if target == "masked" else self.causal_class
        config = PerformerConfig.from_stock(BertConfig.from_pretrained(tmp_path), num_random_features=4096)
        model, report = model_class.from_pretrained(tmp_path, config=config, output_loading_info=True)
        assert {name.rsplit(".", 1)[1] for name in report["missing_keys"]} == {"projection_matrix"}
        assert not report["unexpected_keys"] and not report["mismatched_keys"]
        state = model.state_dict()
        for name, value in stock.state_dict().items():
            assert torch.equal(state[name], value), name
        for layer in model.bert.encoder.layer:
            found = layer.attention.self
            assert torch.equal(found.projection_matrix, found.new_projection(config.feature_seed, 0))
        assert model.config.model_type == "bestiary-performer"
        inputs = self.inputs(self.masked_class, "right")
        if target == "masked":
            kept = inputs["attention_mask"].bool()
            assert_close(model(**inputs).logits[kept], stock(**inputs).logits[kept], rtol=0, atol=5e-3)
        inputs["labels"] = inputs["input_ids"]
        before = model.train()(**inputs).loss
        torch.optim.SGD(model.parameters(), 0.5).step(lambda: before.backward())
        assert model(**inputs).loss < before

    def test_the_folder_of_a_stock_bert_needs_no_configuration(self, tmp_path):
        """Sizes come from it, its type does not: what is saved is a Performer with its code."""
        sizes = {name: value for name, value in TINY.items() if name not in ("num_random_features", "chunk_size")}
        BertForMaskedLM(BertConfig(**sizes)).save_pretrained(tmp_path / "bert")
        model = self.masked_class.from_pretrained(tmp_path / "bert")
        assert (model.config.model_type, model.config.hidden_size) == ("bestiary-performer", 32)
        model.save_pretrained(tmp_path / "ours")
        assert (tmp_path / "ours" / "modeling_performer.py").is_file()
        loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "ours")
        assert type(loaded) is self.masked_class
        assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)

    # ----------------------------------------------------------------------------------------------------- generation

    def test_stabilising_over_the_sequence_cannot_decode(self):
        model = self.decoder(key_stabilizer="sequence")
        inputs = self.prompt()
        with pytest.raises(ValueError, match="set key_stabilizer='none', or generate with use_cache=False"):
            model.generate(**inputs, max_new_tokens=2, do_sample=False, pad_token_id=0)
        with pytest.raises(ValueError, match="set key_stabilizer='none'"):
            model(**inputs, past_key_values=KernelCache(2))
        found = model.generate(**inputs, max_new_tokens=2, do_sample=False, use_cache=False, pad_token_id=0)
        assert found.shape == (3, 9)

    def test_auto_class(self, tmp_path):
        self.decoder().save_pretrained(tmp_path)
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is self.causal_class

    def test_sizes(self):
        assert PerformerConfig.from_size("trembl").num_hidden_layers == 36
        with pytest.raises(ValueError, match="no size 'huge'; there are regular, trembl, bert_base"):
            PerformerConfig.from_size("huge")
