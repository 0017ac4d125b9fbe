"""What the shared encoder offers to papers and none has switched on yet: hooks, pre-norm layers, other masks."""

import pytest
import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.testing import assert_close

from bestiary.configuration.configuration_core import EncoderConfig
from bestiary.modeling.layers import encoder
from bestiary.modeling.layers.attention import EncoderSelfAttention, additive_mask
from bestiary.modeling.layers.heads import MaskedLMHead, SequenceClassificationHead
from bestiary.modeling.modeling_bert import BertPretrainingModel


@strict
class ProbeConfig(EncoderConfig):
    """A paper's configuration."""

    model_type = "test-probe"


class ProbePreTrainedModel(encoder.EncoderPreTrainedModel):
    config: ProbeConfig

    def build_encoder(self, add_pooling_layer):
        return BiasedModel(self.config, add_pooling_layer)


class PreNormModel(encoder.EncoderModel, ProbePreTrainedModel):
    layer_class = encoder.PreNormEncoderLayer
    encoder_class = encoder.PreNormEncoder


class BiasedModel(encoder.EncoderModel, ProbePreTrainedModel):
    """Adds a learned number per head and distance to the scores."""

    supports_unpadding = False

    def __init__(self, config, add_pooling_layer=True):
        super().__init__(config, add_pooling_layer)
        self.distances = nn.Embedding(2 * config.max_position_embeddings, config.num_attention_heads)
        self.post_init()

    def position_bias(self, hidden_states):
        places = torch.arange(hidden_states.shape[1])
        distances = places[:, None] - places + self.config.max_position_embeddings  # (T, T)
        return self.distances(distances).permute(2, 0, 1).unsqueeze(0)  # (1, H, T, T)


class BiasedForMaskedLM(MaskedLMHead, ProbePreTrainedModel):
    pass


class BiasedForSequenceClassification(SequenceClassificationHead, ProbePreTrainedModel):
    pass


TINY = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 10,
}
IDS = torch.arange(20).view(2, 10) + 7
MASK = torch.tensor([[1] * 10, [1] * 6 + [0] * 4])


def build(model_class, **fields):
    torch.manual_seed(0)
    model = model_class(ProbeConfig(**TINY | fields)).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value), alpha=0.3)
    return model


def test_pre_norm_layers_follow_their_formula():
    """x + attention(LN(x)), then x + feed_forward(LN(x)), and a LayerNorm at the end."""
    model = build(PreNormModel)
    outputs = model(IDS, output_hidden_states=True)
    x = model.embeddings(IDS, None, None, None)
    assert_close(outputs.hidden_states[0], x)
    for layer in model.encoder.layer:
        attention = layer.attention
        context, _ = attention.self(attention.LayerNorm(x))
        x = x + attention.output.dense(context)
        x = x + layer.output.dense(layer.intermediate(layer.LayerNorm(x)))
    assert_close(outputs.last_hidden_state, model.encoder.LayerNorm(x))
    assert len(outputs.hidden_states) == 3
    assert model._no_split_modules == {"PreNormEncoderLayer"}


@pytest.mark.parametrize("mask", [None, MASK])
def test_position_bias_enters_the_scores_of_every_backend(mask):
    model = build(BiasedForMaskedLM)
    kept = torch.ones_like(IDS) if mask is None else mask
    labels = torch.where((IDS % 3 == 0) & (kept == 1), IDS, -100)
    losses, gradients, states = [], [], []
    for backend in ("eager", "sdpa"):
        model.set_attn_implementation(backend)
        model.zero_grad()
        loss = model(IDS, attention_mask=mask, labels=labels).loss
        loss.backward()
        losses.append(loss)
        gradients.append(model.bert.distances.weight.grad.clone())
        with torch.no_grad():
            states.append(model.bert(IDS, attention_mask=mask).last_hidden_state[kept == 1])
    assert_close(*losses)
    assert gradients[0].any()
    assert_close(*gradients, rtol=1e-4, atol=1e-6)
    assert_close(*states, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        model.bert.distances.weight.zero_()
        assert not torch.allclose(model.bert(IDS, attention_mask=mask).last_hidden_state[kept == 1], states[1])


def test_a_bias_between_positions_is_never_packed(monkeypatch):
    monkeypatch.setattr(encoder, "plan_packing", lambda mask: pytest.fail("the batch was packed"))
    build(BiasedModel, unpad_threshold=0.0)(IDS, attention_mask=MASK)


def test_score_scale_and_parts_are_class_attributes():
    class Cold(EncoderSelfAttention):
        def score_scale(self):
            return 0.0

    class ColdAttention(encoder.EncoderAttention):
        self_class = Cold

    class ColdLayer(encoder.EncoderLayer):
        attention_class = ColdAttention

    class ColdModel(encoder.EncoderModel, ProbePreTrainedModel):
        layer_class = ColdLayer

    model = build(ColdModel)
    model.set_attn_implementation("eager")
    for shares in model(IDS, output_attentions=True).attentions:
        assert_close(shares, torch.full_like(shares, 0.1))
    assert model._no_split_modules == {"ColdLayer"}


def test_sequence_head_reads_the_pooled_first_token():
    model = build(BiasedForSequenceClassification, num_labels=4)
    first = model.bert(IDS).last_hidden_state[:, 0]
    pooled = torch.tanh(first @ model.bert.pooler.dense.weight.T + model.bert.pooler.dense.bias)
    assert_close(model(IDS).logits, pooled @ model.classifier.weight.T + model.classifier.bias)


def test_narrow_embeddings_are_projected():
    model = build(BiasedForMaskedLM, embedding_size=6)
    assert model.bert.embeddings.word_embeddings.weight.shape == (50, 6)
    assert model.bert.embeddings_project.weight.shape == (16, 6)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert model(IDS).logits.shape == (2, 10, 50)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_mask_per_query_and_key(backend):
    """Two sentences in one row that do not see each other are two rows."""
    torch.manual_seed(0)
    model = build(BertPretrainingModel)
    model.set_attn_implementation(backend)
    row = IDS[:1]
    sentence = torch.tensor([0] * 4 + [1] * 6)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    mask = (sentence[:, None] == sentence)[None, None]  # (1, 1, T, T)
    if backend == "eager":
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    together = model(row, attention_mask=mask, position_ids=positions).last_hidden_state
    apart = [model(part).last_hidden_state for part in (row[:, :4], row[:, 4:])]
    assert_close(together, torch.cat(apart, 1), rtol=1e-4, atol=1e-5)


def test_no_layers():
    model = build(BertPretrainingModel, num_hidden_layers=0)
    assert_close(model(IDS).last_hidden_state, model.embeddings(IDS, None, None, None))


def test_base_without_an_encoder_says_so():
    class Unfinished(MaskedLMHead, encoder.EncoderPreTrainedModel):
        config: ProbeConfig

    with pytest.raises(NotImplementedError, match="Unfinished must say which base model"):
        Unfinished(ProbeConfig(**TINY))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_masks_are_the_smallest_number_of_any_type(dtype):
    found = additive_mask(torch.tensor([[True, False]]), dtype)
    assert found.tolist() == [[0.0, torch.finfo(dtype).min]] and found.dtype == dtype
