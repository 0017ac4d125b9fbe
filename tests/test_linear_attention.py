"""Models with linear attention: the common suites and the checks of their papers."""

import pytest
import torch
from suites.causal_suite import CausalSuite
from suites.encoder_suite import EncoderSuite, at_real_tokens
from torch.testing import assert_close
from transformers import BertConfig, BertForMaskedLM

from bestiary.configuration.configuration_linear_attention import KERNELS, LinearAttentionConfig
from bestiary.modeling import modeling_linear_attention as linear


TINY = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
    "num_labels": 3,
    "chunk_size": 4,
}


class TestLinearAttention(CausalSuite, EncoderSuite):
    slug = "linear_attention"
    config = LinearAttentionConfig(**TINY)
    base = linear.LinearAttentionModel
    heads = (
        linear.LinearAttentionForPreTraining,
        linear.LinearAttentionForMaskedLM,
        linear.LinearAttentionForCausalLM,
        linear.LinearAttentionForSequenceClassification,
        linear.LinearAttentionForTokenClassification,
        linear.LinearAttentionForQuestionAnswering,
        linear.LinearAttentionForMultipleChoice,
    )
    causal_class = linear.LinearAttentionForCausalLM
    pretraining_class = linear.LinearAttentionForPreTraining
    masked_class = linear.LinearAttentionForMaskedLM
    causal_variants = (
        {},
        {"attention_kernel": "double_softmax"},
        {"attention_kernel": "double_softmax", "causal_double_softmax": "shared_denominator"},
        {"attention_kernel": "cosine"},
    )
    parameters = {"base": {linear.LinearAttentionModel: 109_482_240 + (8192 - 512) * 768}}
    reduces_to_bert = None  # no kernel is that of softmax
    can_unpad = False
    bad_config = (
        ({"attention_kernel": "softmax"}, "attention_kernel must be one of elu, double_softmax, .*got 'softmax'"),
        ({"causal_double_softmax": "bucket"}, "causal_double_softmax must be one of prefix, shared_denominator"),
        ({"denominator_eps": -1.0}, "denominator_eps must be at least 0"),
        ({"qk_scale": 0.0}, "qk_scale must be above 0"),
        ({"attention_kernel": "scaling", "is_decoder": True}, "attention_kernel must be another one for a decoder"),
    )

    @pytest.mark.parametrize("kernel", KERNELS)
    @pytest.mark.parametrize("padding", ["left", "right"])
    @torch.no_grad()
    def test_kernels(self, kernel, padding):
        """Backends agree, and each is a function of its own."""
        inputs = self.inputs(self.base, padding)
        outputs = {}
        for name in {kernel, "elu"}:
            model = self.build(self.base, self.make_config(attention_kernel=name, qk_scale=0.5))
            for backend in ("eager", "sdpa"):
                self.switch(model, backend)
                outputs[name, backend] = at_real_tokens(model(**inputs), inputs["attention_mask"])
            assert_close(outputs[name, "sdpa"], outputs[name, "eager"], rtol=1e-4, atol=1e-5)
        if kernel != "elu":
            first, second = (outputs[name, "sdpa"]["last_hidden_state"] for name in (kernel, "elu"))
            assert (first - second).abs().max() > 1e-3

    def test_the_scale_of_queries_and_keys(self):
        """It is before the features; normalised vectors do not notice it."""
        inputs = self.inputs(self.base)
        for kernel, matters in (("elu", True), ("cosine", False)):
            first, second = (
                self.build(self.base, self.make_config(attention_kernel=kernel, qk_scale=scale))(**inputs)
                for scale in (1.0, 0.25)
            )
            change = (first.last_hidden_state - second.last_hidden_state).abs().max()
            assert (change > 1e-3) == matters

    def test_weights_of_a_stock_bert(self, tmp_path):
        """They load without a missing key, since nothing is added."""
        sizes = {name: value for name, value in TINY.items() if name != "chunk_size"}
        stock = BertForMaskedLM(BertConfig(**sizes))
        stock.save_pretrained(tmp_path)
        config = LinearAttentionConfig.from_stock(BertConfig.from_pretrained(tmp_path))
        for model_class in (self.masked_class, self.causal_class):
            model, report = model_class.from_pretrained(tmp_path, config=config, output_loading_info=True)
            assert not any(report.values()), report
            assert_close(model.state_dict(), stock.state_dict(), rtol=0, atol=0)

    def test_sizes(self):
        assert LinearAttentionConfig.from_size("mnist").hidden_size == 256
        with pytest.raises(ValueError, match="no size 'huge'; there are copy, mnist, base"):
            LinearAttentionConfig.from_size("huge")
