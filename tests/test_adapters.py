"""Bottleneck adapters as models: the common suite, and the paper's checks on every layout of encoder."""

import copy

import pytest
import torch
from suites.encoder_suite import gradients, poisoned_memory
from suites.wrapper_suite import WrapperSuite
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DebertaConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

from bestiary import adapters_off
from bestiary.configuration.configuration_adapters import AdaptersConfig
from bestiary.configuration.configuration_bert import BertPretrainingConfig
from bestiary.modeling.layers.bottleneck import Bottleneck, adapter_sites, build_activation, is_layer_norm
from bestiary.modeling.modeling_adapters import (
    AdaptersForSequenceClassification,
    AdaptersForTokenClassification,
    AdaptersModel,
)


TINY = {
    "vocab_size": 99,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 20,
    "pad_token_id": 0,
}
DISENTANGLED = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
DISTIL = {"vocab_size": 99, "dim": 24, "n_layers": 3, "n_heads": 2, "hidden_dim": 40, "max_position_embeddings": 20}
ENCODERS = {
    "bert": lambda **more: BertConfig(**TINY, **more),
    "roberta": lambda **more: RobertaConfig(**TINY, **more),
    "xlm-roberta": lambda **more: XLMRobertaConfig(**TINY, **more),
    "electra": lambda **more: ElectraConfig(**TINY, embedding_size=16, **more),
    "deberta": lambda **more: DebertaConfig(**TINY, **DISENTANGLED, **more),
    "deberta-v2": lambda **more: DebertaV2Config(
        **TINY, **DISENTANGLED, norm_rel_ebd="layer_norm", conv_kernel_size=3, **more
    ),
    "distilbert": lambda **more: DistilBertConfig(**DISTIL, **more),
    "bestiary-bert": lambda **more: BertPretrainingConfig(**TINY, **more),
}
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
HEADS = {"classifier", "pre_classifier", "pooler"}


@pytest.fixture(params=ENCODERS)
def encoder(request):
    """Configuration of a tiny encoder of every layout."""
    return ENCODERS[request.param]()


def batch(rows=4, length=9):
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 99, (rows, length), generator=draw)
    mask = torch.ones_like(ids)
    mask[-1, length // 2 :] = 0
    labels = torch.randint(0, 2, (rows,), generator=draw)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def stock(config, seed=0):
    """A plain model all of whose parameters are away from their initial values."""
    torch.manual_seed(seed)
    return stir(AutoModelForSequenceClassification.from_config(config).eval())


def stir(model, amount=0.1):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=amount)
    return model


def wrap(model, model_class=AdaptersForSequenceClassification, **settings):
    return model_class.from_encoder(model, **{"adapter_size": 5} | settings)


class TestAdapters(WrapperSuite):
    """Over all types of encoder."""

    slug = "adapters"
    settings = {"adapter_size": 5}
    neutral = False  # adapters start near the identity, not at it
    plain_result = False  # the plain model has no adapters
    bad_settings = (
        ({"adapter_size": 0}, "adapter_size must be at least 1; got 0"),
        ({"adapter_act": "gellu"}, "adapter_act must be one of .*gelu_new"),
        ({"adapter_init_std": 0.0}, "adapter_init_std must be a finite number above 0"),
        ({"adapter_init_std": float("nan")}, "adapter_init_std must be a finite number above 0"),
        ({"adapter_locations": ["atention"]}, "adapter_locations must be one or both of attention, output"),
        ({"adapter_locations": []}, "adapter_locations must be one or both"),
        ({"adapter_locations": ["output", "output"]}, "each once"),
    )


# -------------------------------------------------------------------------------------------------- the adapter itself


def test_formula():
    """x + W2 f(W1 x + b1) + b2 with numbers that can be checked by hand."""
    adapter = Bottleneck(2, 1, "relu", 1e-2)
    with torch.no_grad():
        adapter.down.weight.copy_(torch.tensor([[1.0, -2.0]]))
        adapter.down.bias.fill_(0.5)
        adapter.up.weight.copy_(torch.tensor([[3.0], [-1.0]]))
        adapter.up.bias.copy_(torch.tensor([10.0, 20.0]))
    # W1 x + b1 = 4 - 2 + 0.5 = 2.5, and for the second row -2 + 0.5 < 0
    found = adapter(torch.tensor([[4.0, 1.0], [0.0, 1.0]]))
    assert_close(found, torch.tensor([[4 + 7.5 + 10, 1 - 2.5 + 20], [10.0, 21.0]]))
    states = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert_close(build_activation("gelu_new")(states), F.gelu(states, approximate="tanh"))


@pytest.mark.parametrize("std", [1e-2, 1e-3])
def test_initial_values(std, tmp_path):
    torch.manual_seed(0)
    config = BertConfig(**TINY | {"hidden_size": 400, "num_attention_heads": 2, "num_hidden_layers": 1})
    settings = {"adapter_size": 300, "adapter_init_std": std}
    fresh = AdaptersModel(AdaptersConfig(encoder_config=config, **settings))
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    models = [fresh, AdaptersModel.from_encoder(tmp_path, **settings)]
    with poisoned_memory():  # a plain checkpoint has no adapters: they are missing
        models.append(
            AdaptersModel.from_pretrained(tmp_path, config=AdaptersConfig(encoder_config=config, **settings))
        )
    parts = [part for model in models for part in model.modules() if isinstance(part, Bottleneck)]
    assert len(parts) == 6
    for adapter in parts:
        for linear in (adapter.down, adapter.up):
            assert not linear.bias.any()
            assert linear.weight.abs().max() <= 2 * std  # of 120,000 draws thousands would lie beyond
            assert linear.weight.std().item() == pytest.approx(0.8796 * std, rel=0.02)  # of a normal cut at 2


def test_position_of_the_adapters():
    """Behind the dropout, before the residual, in both halves of a layer, by a layer written out."""
    model = wrap(
        stock(BertConfig(**TINY, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.0)), adapter_act="relu"
    )
    stir(model).train()
    layer = model.wrapped.bert.encoder.layer[1]
    states = torch.randn(2, 4, 24, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(7)
    found = layer(states)

    def sublayer(output, inner, residual):
        dropped = F.dropout(output.dense(inner), 0.5)
        return output.LayerNorm(output.dropout.adapter(dropped) + residual)

    torch.manual_seed(7)
    context, _ = layer.attention.self(states)
    middle = sublayer(layer.attention.output, context, states)
    expected = sublayer(layer.output, layer.intermediate(middle), middle)
    assert_close(found[0] if isinstance(found, tuple) else found, expected)


# --------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("size", "encoder", "adapters_only", "share"),
    [
        (2, BASE, 92_208, 0.084),
        (8, BASE, 313_536, 0.286),
        (64, BASE, 2_379_264, 2.173),
        (256, BASE, 9_461_760, 8.642),
        (2, LARGE, 245_856, 0.073),
        (8, LARGE, 835_968, 0.249),
        (64, LARGE, 6_343_680, 1.893),
        (256, LARGE, 25_227_264, 7.527),
    ],
)
def test_published_sizes(size, encoder, adapters_only, share):
    with torch.device("meta"):
        model = AdaptersForSequenceClassification(AdaptersConfig(encoder_config=encoder, adapter_size=size))
    whole = sum(parameter.numel() for parameter in model.wrapped.base_model.parameters())
    added = sum(p.numel() for part in model.modules() if isinstance(part, Bottleneck) for p in part.parameters())
    assert added == adapters_only
    assert whole - added == {768: 109_482_240, 1024: 335_141_888}[encoder["hidden_size"]]
    assert round(100 * added / (whole - added), 3) == share
    norms = {768: 38_400, 1024: 100_352}[encoder["hidden_size"]]
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == added + norms + 2 * encoder["hidden_size"] + 2
    if (size, encoder) == (64, BASE):
        assert trained == 2_419_202


# ------------------------------------------------------------------------------------------------- what is trained


def check_trained(model, train_layer_norm=True):
    """Trained are adapters, LayerNorms of the encoder and the head, and nothing else."""
    inner, encoder = model.wrapped, model.wrapped.base_model
    expected = {id(parameter) for name in HEADS for parameter in getattr(inner, name, torch.nn.Module()).parameters()}
    for part in encoder.modules():
        if isinstance(part, Bottleneck) or (train_layer_norm and is_layer_norm(part)):
            expected |= {id(parameter) for parameter in part.parameters()}
    assert {id(parameter) for parameter in model.parameters() if parameter.requires_grad} == expected
    norms = sum(is_layer_norm(part) for part in encoder.modules())
    assert norms >= 2 * model.config.num_hidden_layers + 1
    assert sum(isinstance(part, Bottleneck) for part in encoder.modules()) == 2 * model.config.num_hidden_layers
    return norms


def test_what_is_trained_in_every_layout(encoder, tmp_path):
    model = wrap(stock(encoder))
    norms = check_trained(model)
    if encoder.model_type == "deberta-v2":
        assert norms == 2 * 3 + 3  # embeddings, relative positions, convolution
    inner = model.wrapped
    assert {name for name, part in inner.named_children() if next(part.parameters(), None) is not None} == {
        inner.base_model_prefix,
        *({"classifier", "pooler"} if encoder.model_type.startswith("deberta") else {"classifier"}),
        *({"pre_classifier"} if encoder.model_type == "distilbert" else ()),
    }
    model.save_pretrained(tmp_path)
    check_trained(AutoModelForSequenceClassification.from_pretrained(tmp_path))  # loading makes parameters trainable
    loaded, _ = AdaptersForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    check_trained(loaded)
    encoder_alone = AutoModel.from_pretrained(tmp_path)
    assert not any(part.requires_grad for part in encoder_alone.get_input_embeddings().parameters())


def test_from_pretrained_finds_what_a_checkpoint_lacked_as_from_encoder_does(tmp_path):
    """A masked language model has no pooler, and a tagger neither; an encoder alone has other names."""
    encoder = ENCODERS["bert"]()
    BertForMaskedLM(encoder).save_pretrained(tmp_path / "masked")
    wrap(tmp_path / "masked", AdaptersForTokenClassification).save_pretrained(tmp_path / "tagger")
    stock(encoder).save_pretrained(tmp_path / "classifier")
    stock(encoder).bert.save_pretrained(tmp_path / "encoder")
    given = AdaptersConfig(encoder_config=encoder, adapter_size=5)
    AdaptersForSequenceClassification(given)  # sets `new_modules`, which must not hide what is found later

    def poolers(model):
        return [name for name, part in model.named_parameters() if part.requires_grad and "pooler" in name]

    for folder, config, lacked in (
        ("masked", given, ["pooler"]),
        ("tagger", None, ["pooler"]),
        ("classifier", given, []),
    ):
        config = {} if config is None else {"config": config}
        model = AdaptersForSequenceClassification.from_pretrained(tmp_path / folder, **config)
        assert model.config.new_modules == lacked and len(poolers(model)) == 2 * len(lacked), folder
        model.save_pretrained(tmp_path / "again")
        assert poolers(AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")) == poolers(model)
    from_encoder = AdaptersForSequenceClassification.from_encoder(tmp_path / "masked", given)
    assert from_encoder.config.new_modules == ["pooler"] and len(poolers(from_encoder)) == 2
    with pytest.raises(ValueError, match="encoder' has no weight of a BertModel.*Classification.from_encoder"):
        AdaptersForSequenceClassification.from_pretrained(tmp_path / "encoder", config=given)


def test_layer_norms_can_be_left_frozen():
    check_trained(wrap(stock(ENCODERS["bert"]()), train_layer_norm=False), train_layer_norm=False)


def test_one_step_leaves_what_is_frozen_bit_for_bit(encoder):
    model = stir(wrap(stock(encoder))).train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1, weight_decay=0.1)
    model(**batch()).loss.backward()
    optimizer.step()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, value in model.state_dict().items():
        same = torch.equal(value, before[name])
        unused = "rel" in name or "key" in name
        assert same is (name not in trained) or unused, name


def test_adapters_of_zeros_are_the_encoder_and_learn_from_above(encoder):
    model = stock(encoder)
    inputs = batch()
    expected = model(**inputs).logits
    wrapped = wrap(model)
    assert not torch.equal(wrapped(**inputs).logits, expected)
    parts = [part for part in wrapped.modules() if isinstance(part, Bottleneck)]
    for part in parts:
        torch.nn.init.zeros_(part.up.weight)
    assert torch.equal(wrapped(**inputs).logits, expected)
    gradients(wrapped, **inputs)
    for part in parts:
        assert not part.down.weight.grad.any() and not part.down.bias.grad.any()
    last = parts[-1]
    assert last.up.weight.grad.any() and parts[0].up.weight.grad.any()


# -------------------------------------------------------------------------------------------------------- off and out


def test_switching_off_by_layer(encoder):
    model = stir(wrap(stock(encoder)))
    inputs = batch()
    everything = model(**inputs).logits
    base = model.to_base()
    with model.adapters_off():
        assert torch.equal(model(**inputs).logits, base(**inputs).logits)
        with model.adapters_off(layers=[0]):
            pass
        assert torch.equal(model(**inputs).logits, base(**inputs).logits), "an inner block switched one on again"
    assert torch.equal(model(**inputs).logits, everything)
    spans = []
    for layers in (range(1), range(2), [2]):
        with model.adapters_off(layers=layers):
            spans.append(model(**inputs).logits)
        other = copy.deepcopy(model)
        for number, part in enumerate(part for part in other.modules() if isinstance(part, Bottleneck)):
            if number // 2 in layers:
                torch.nn.init.zeros_(part.up.weight)
                torch.nn.init.zeros_(part.up.bias)
        assert_close(spans[-1], other(**inputs).logits)
    assert len({tuple(span.flatten().tolist()) for span in (everything, *spans)}) == 4
    with pytest.raises(RuntimeError), model.adapters_off():
        raise RuntimeError
    assert torch.equal(model(**inputs).logits, everything)


def test_switching_off_what_is_not_there():
    model = wrap(stock(ENCODERS["bert"]()))
    with pytest.raises(ValueError, match="has no layer 3, 4; its layers are 0 to 2"), model.adapters_off(range(1, 5)):
        pass
    with pytest.raises(ValueError, match="BertForSequenceClassification has no bottleneck adapters"):
        with adapters_off(stock(ENCODERS["bert"]())):
            pass


def test_back_to_the_plain_model(encoder, tmp_path):
    plain = stock(encoder)
    names, kinds = list(plain.state_dict()), [type(part) for part in plain.modules()]
    model = stir(wrap(plain))
    base = model.to_base()
    assert list(base.state_dict()) == names and [type(part) for part in base.modules()] == kinds
    assert not any(part._forward_hooks for part in base.modules())
    own = dict(model.wrapped.named_parameters())
    assert all(parameter is own[name] for name, parameter in base.named_parameters())
    assert sum(isinstance(part, Bottleneck) for part in model.modules()) == 6, "the model lost its adapters"
    base.save_pretrained(tmp_path)
    assert "bestiary" not in (tmp_path / "config.json").read_text() or encoder.model_type == "bestiary-bert"
    again = wrap(AutoModelForSequenceClassification.from_pretrained(tmp_path))
    assert_close(again.to_base().state_dict(), base.state_dict())


def test_one_place_only():
    model = wrap(stock(ENCODERS["roberta"]()), adapter_locations=["output"])
    names = [name for name, part in model.named_modules() if isinstance(part, Bottleneck)]
    assert names == [f"model.roberta.encoder.layer.{number}.output.dropout.adapter" for number in range(3)]


def test_adapters_stay_in_float32(tmp_path):
    """W1 and W2 of 1e-2 with updates of 1e-4 are below what bfloat16 resolves."""
    plain = stock(ENCODERS["bert"]()).bfloat16()
    model = stir(wrap(plain))
    inputs = batch()
    model.save_pretrained(tmp_path)
    loaded = AdaptersForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for each in (model, loaded):
        for name, parameter in each.named_parameters():
            assert parameter.dtype == (torch.float32 if ".adapter." in name else torch.bfloat16), name
        assert each(**inputs).logits.dtype == torch.bfloat16
        each(**inputs).loss.backward()
    assert_close(loaded(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)


def test_refusals():
    with pytest.raises(ValueError, match="AlbertForSequenceClassification has .* lists of 3 layers"):
        wrap(stock(AlbertConfig(**TINY, embedding_size=16)))
    model = stock(ENCODERS["bert"]())
    wrap(model)
    with pytest.raises(ValueError, match="this BertForSequenceClassification has adapters already"):
        wrap(model)
    assert sum(isinstance(part, Bottleneck) for part in model.modules()) == 6
    odd = stock(ENCODERS["bert"]())
    for layer in odd.bert.encoder.layer:
        layer.attention.output.drop = layer.attention.output.__dict__["_modules"].pop("dropout")
    with pytest.raises(ValueError, match="none of the modules attention.output.dropout, attention.out_lin"):
        adapter_sites(odd, ["attention"])


def test_compiled_and_copied():
    model = stir(wrap(BertForSequenceClassification(BertConfig(**TINY)))).eval()
    inputs = batch()
    expected = model(**inputs).logits
    assert torch.equal(copy.deepcopy(model)(**inputs).logits, expected)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(compiled(**inputs).logits, expected)
    with model.adapters_off():
        assert_close(compiled(**inputs).logits, model(**inputs).logits)
    torch._dynamo.reset()
