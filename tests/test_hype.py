"""HyPe's models: the common suite, and the paper's checks on every layout of encoder."""

import copy
import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from suites.encoder_suite import gradients
from suites.wrapper_suite import WrapperSuite
from torch.testing import assert_close
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    DebertaConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    RobertaConfig,
    SqueezeBertConfig,
    XLMRobertaConfig,
    XLNetConfig,
)

from bestiary.configuration.configuration_bert import BertPretrainingConfig
from bestiary.configuration.configuration_hype import HypeConfig
from bestiary.modeling.layers.keyed_noise import keyed_normal, keyed_uniform
from bestiary.modeling.layers.wrapping import layer_list
from bestiary.modeling.modeling_hype import (
    HypeForMultipleChoice,
    HypeForSequenceClassification,
    HypeModel,
    Perturbation,
    perturbed,
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
DISTIL = {
    "vocab_size": 99,
    "dim": 24,
    "n_layers": 3,
    "n_heads": 2,
    "hidden_dim": 40,
    "max_position_embeddings": 20,
}
ENCODERS = {
    "bert": lambda: BertConfig(**TINY),
    "roberta": lambda: RobertaConfig(**TINY),
    "xlm-roberta": lambda: XLMRobertaConfig(**TINY),
    "electra": lambda: ElectraConfig(**TINY, embedding_size=16),
    "deberta": lambda: DebertaConfig(**TINY, **DISENTANGLED),
    "deberta-v2": lambda: DebertaV2Config(**TINY, **DISENTANGLED),
    "distilbert": lambda: DistilBertConfig(**DISTIL),
    "bestiary-bert": lambda: BertPretrainingConfig(**TINY),
}
WITHOUT_DROPOUT = {
    **TINY,
    "model_type": "bestiary-bert",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
DRY = {"noise_scale": 0.1, "noise": "normal"}


@pytest.fixture(params=ENCODERS)
def encoder(request):
    """Configuration of a tiny encoder of every layout."""
    return ENCODERS[request.param]()


def make(config, model_class=HypeForSequenceClassification, seed=0, **settings):
    """A model in training mode around fresh weights, without dropout unless `settings` say otherwise."""
    torch.manual_seed(seed)
    changes = {name: 0.0 for name in config.to_dict() if "drop" in name and config.to_dict()[name] is not None}
    changes |= settings.pop("encoder_config", {})
    settings = DRY | {"encoder_config": changes} | settings
    return model_class(HypeConfig.from_encoder(config, **settings)).train()


def batch(rows=4, length=9):
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 99, (rows, length), generator=draw)
    mask = torch.ones_like(ids)
    mask[-1, length // 2 :] = 0
    labels = torch.randint(0, 2, (rows,), generator=draw)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


SEEDS = torch.tensor([3, 14, 15, 92])


class TestHype(WrapperSuite):
    """Around every kind of encoder."""

    slug = "hype"
    settings = {"noise_scale": 0.1}
    neutral = True
    bad_settings = (
        ({"noise": "gaussian"}, "noise"),
        ({"noise_position": "output"}, "noise_position"),
        ({"noise_scale": -1e-5}, "HypeConfig.noise_scale must be finite and at least 0 .*got -1e-05"),
        ({"noise_scale": math.inf}, "noise_scale must be finite"),
        ({"noise_layers": [0, 2]}, r"noise_layers must be None or numbers from -2 to 1 .*2 layers.*got \[0, 2\]"),
        ({"noise_layers": [-3]}, "noise_layers must be None or numbers from -2 to 1"),
        ({"noise_layers": [1, -1]}, "noise_layers must be None .all. or different layers"),
        ({"noise_layers": []}, "at least one"),
        ({"official_uniform": True}, "official_uniform must be False where noise is 'normal'"),
    )


def test_is_bert_when_switched_off():
    """In training, too."""
    torch.manual_seed(0)
    model = HypeModel(HypeConfig(noise="none", encoder_config=WITHOUT_DROPOUT)).train()
    plain = BertModel(BertConfig(**TINY)).eval()
    plain.load_state_dict(model.to_base().state_dict())
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    real = inputs["attention_mask"].bool()
    ours, theirs = (part(**inputs).last_hidden_state[real] for part in (model, plain))
    assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


# ---- configuration


def test_layers_from_both_ends():
    config = HypeConfig(encoder_config=TINY, noise_layers=[-1, 0])
    assert config.perturbed_layers == [2, 0] and HypeConfig(encoder_config=TINY).perturbed_layers == [0, 1, 2]


def test_dropout_of_hidden_states_is_off(encoder):
    """As in the paper; the rest of dropout, a given rate, and plain fine-tuning stay as they are."""
    name = "dropout" if encoder.model_type == "distilbert" else "hidden_dropout_prob"
    attention = "attention_dropout" if name == "dropout" else "attention_probs_dropout_prob"
    found = HypeConfig.from_encoder(encoder).encoder_config
    assert getattr(found, name) == 0 and getattr(found, attention) == 0.1
    given = HypeConfig.from_encoder(encoder, encoder_config={name: 0.3}).encoder_config
    assert getattr(given, name) == 0.3
    assert getattr(HypeConfig.from_encoder(encoder, noise="none").encoder_config, name) == 0.1
    assert getattr(encoder, name) == 0.1


# ---- the noise itself


def test_statistics_of_the_draws():
    """About a million draws: moments to 5 standard errors, range, and no correlation of streams or seeds."""
    shape = (20, 100, 511)
    number = math.prod(shape)
    states = torch.zeros(shape)
    expected = {
        "normal": (0.0, 1.0, 3.0, (-6, 6)),
        "uniform": (0.0, 3**-0.5, 1.8, (-1, 1)),
        "official": (0.5, 12**-0.5, 1.8, (0, 1)),
    }
    for seeds in (None, torch.arange(20)):
        for name, (mean, std, kurtosis, (low, high)) in expected.items():
            noise = "uniform" if name == "official" else name
            config = HypeConfig(noise=noise, official_uniform=name == "official", noise_scale=1.0)
            perturbation = Perturbation(AutoModel.from_config(BertConfig(**TINY)), HypeConfig(noise="none"))
            perturbation.noise, perturbation.official_uniform = config.noise, config.official_uniform
            perturbation.seeds = seeds
            torch.manual_seed(0)
            found, other = perturbation.draw(states, 0), perturbation.draw(states, 1)
            assert found.shape == shape and found.dtype == torch.float32
            assert low <= found.min() and found.max() <= high and found.max() > 0.99 * min(high, 4.5)
            assert found.min() < (0.01 if low == 0 else -0.99 * min(-low, 4.5))
            values = found.double()
            assert abs(values.mean() - mean) < 5 * std / number**0.5
            assert abs(values.std() - std) < 5 * std * ((kurtosis - 1) / (4 * number)) ** 0.5
            centred = (values - mean) / std
            assert abs(centred.pow(4).mean() - kurtosis) < (0.05 if name == "normal" else 0.01)
            for second in (other, found.roll(1, 0), found.roll(1, 1), found.roll(1, 2), found.roll(256, 2)):
                correlation = (centred * (second.double() - mean) / std).mean()
                assert abs(correlation) < 5 / number**0.5


@pytest.mark.parametrize("draw", [keyed_uniform, keyed_normal])
def test_keyed_noise_is_that_of_the_example(draw):
    together = draw((4, 9, 7), SEEDS, 3)
    assert torch.equal(draw((2, 5, 7), SEEDS[2:], 3), together[2:, :5])
    choices = draw((8, 9, 7), SEEDS, 3)
    assert torch.equal(choices[::2], together) and torch.equal(draw((2, 9, 7), SEEDS[1:2], 3), choices[2:4])
    other = draw((4, 9, 7), SEEDS, 4)
    distinct = torch.cat([together.flatten(), choices[1::2].flatten(), other.flatten()])
    assert distinct.unique().numel() == distinct.numel()
    for seeds in (SEEDS[:3], SEEDS[:0], SEEDS.float(), SEEDS[:, None]):
        with pytest.raises(ValueError, match="one int64 seed per example: hidden states have 4 rows"):
            draw((4, 9, 7), seeds, 0)


def test_box_muller_by_hand(monkeypatch):
    """u1 = 1 - exp(-2), so that the radius is 2, and an angle of 1/12 of a turn: 2 cos 30, 2 sin 30."""
    uniform = torch.tensor([[1 - math.exp(-2), 1 / 12]], dtype=torch.float64)
    monkeypatch.setattr("bestiary.modeling.layers.keyed_noise.unit_float32", lambda keys, width: uniform.clone())
    found = keyed_normal((1, 1, 2), torch.tensor([5]), 0)
    assert_close(found, torch.tensor([[[3**0.5, 1.0]]], dtype=torch.float64))


# ---- where it goes in


@pytest.mark.parametrize(
    ("settings", "streams"),
    [
        ({}, [0, 2, 4]),
        ({"noise_position": "both"}, [0, 1, 2, 3, 4, 5]),
        ({"noise_position": "mid"}, [1, 3, 5]),
        ({"noise_layers": [1]}, [2]),
        ({"noise_layers": [-1, 0], "noise_position": "both"}, [0, 1, 4, 5]),
        ({"noise": "none"}, []),
        ({"noise_scale": 0}, []),
    ],
)
def test_number_of_draws(encoder, settings, streams, monkeypatch):
    """n, 2n, the number of chosen layers; none in evaluation."""
    seen = []
    monkeypatch.setattr(Perturbation, "draw", lambda self, h, stream: seen.append(stream) or torch.zeros_like(h))
    model = make(encoder, **settings)
    model(**batch())
    assert seen == streams
    model.eval()(**batch())
    assert seen == streams


@pytest.mark.parametrize("position", ["input", "mid"])
def test_what_carries_the_noise(encoder, position, monkeypatch):
    """Noise at one place only, against the layer computed by hand from its parts."""
    noise = torch.randn(4, 9, 24, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(Perturbation, "draw", lambda self, h, stream: noise)
    model = make(encoder, noise_layers=[1], noise_position=position)
    layer = layer_list(model.wrapped)[1]
    calls = []

    def keep(module, args, kwargs, output):
        calls.append((args, kwargs, output[0] if isinstance(output, tuple) else output))

    before = layer_list(model.wrapped)[0].register_forward_hook(keep, with_kwargs=True)
    after = layer.register_forward_hook(keep, with_kwargs=True)
    model(**batch())
    before.remove()
    after.remove()
    clean, (_, kwargs, found) = calls[0][2], calls[1]
    args = calls[1][0][1:]
    model.to_base()  # takes the hooks off
    if position == "input":
        expected = layer(clean + 0.1 * noise, *args, **kwargs)
        expected = expected[0] if isinstance(expected, tuple) else expected
        assert_close(calls[1][0][0], clean + 0.1 * noise)
    elif encoder.model_type == "distilbert":
        attended = layer.attention(clean, *args, **kwargs)[0]
        attended = layer.sa_layer_norm(attended + clean) + 0.1 * noise
        expected = layer.output_layer_norm(layer.ffn(attended) + attended)
    else:
        kwargs = {name: value for name, value in kwargs.items() if not name.startswith("encoder_")}
        attended = layer.attention(clean, *args[:1], **kwargs)[0] + 0.1 * noise
        expected = layer.output(layer.intermediate(attended), attended)
    assert_close(found, expected)


def test_noise_is_off_in_evaluation_and_at_scale_zero(encoder):
    """Bit for bit the plain model, dropout included; the number of parameters and the saved names are its own."""
    dropout = {"dropout": 0.1} if encoder.model_type == "distilbert" else {"hidden_dropout_prob": 0.1}
    model = make(encoder, noise_scale=0, encoder_config=dropout)
    plain = copy.deepcopy(model.to_base()).train()
    torch.manual_seed(5)
    expected = plain(**batch()).logits
    torch.manual_seed(5)
    assert torch.equal(model(**batch()).logits, expected)
    noisy = make(encoder)
    plain = copy.deepcopy(noisy.to_base()).eval()
    noisy(**batch())  # puts the hooks on again
    assert torch.equal(noisy.eval()(**batch()).logits, plain(**batch()).logits)
    assert {f"model.{name}" for name in plain.state_dict()} == set(noisy.state_dict())
    assert noisy.num_parameters() == plain.num_parameters()
    assert [name for name, _ in noisy.named_buffers()] == [f"model.{name}" for name, _ in plain.named_buffers()]


def test_first_order_in_the_scale(encoder):
    """logits(sigma) - logits(0) shrinks tenfold with sigma, in float64 with the same draws."""
    changes = []
    for scale in (0, 1e-3, 1e-4):
        model = make(encoder, noise_scale=scale, noise_position="both").double()
        with torch.no_grad():
            changes.append(model(**batch(), noise_seeds=SEEDS).logits)
    ratio = (changes[1] - changes[0]).norm() / (changes[2] - changes[0]).norm()
    assert ratio == pytest.approx(10, rel=0.02)


def test_seeds_make_the_noise_of_an_example_its_own(encoder):
    model = make(encoder, noise_position="both")
    inputs = batch() | {"noise_seeds": SEEDS}
    together = model(**inputs).logits
    alone = [model(**{name: value[row : row + 1] for name, value in inputs.items()}).logits for row in range(4)]
    assert_close(torch.cat(alone), together, rtol=1e-4, atol=1e-5)
    short = {name: value[-1:, :4] if value.dim() > 1 else value[-1:] for name, value in inputs.items()}
    assert_close(model(**short).logits, together[-1:], rtol=1e-4, atol=1e-5)  # without its padding
    others = model(**inputs | {"noise_seeds": SEEDS + 1}).logits
    assert ((others - together).abs().amax(1) > 1e-4).all()
    del inputs["noise_seeds"]
    first, second = model(**inputs).logits, model(**inputs).logits
    assert not torch.equal(first, second), "two steps have the same noise"


def test_choices_of_an_example_have_noise_of_their_own():
    model = make(BertConfig(**TINY), HypeForMultipleChoice)
    ids = batch()["input_ids"][:2, None].expand(2, 3, 9).contiguous()
    scores = model(input_ids=ids, noise_seeds=SEEDS[:2]).logits
    assert scores.unique().numel() == 6
    assert_close(model(input_ids=ids[1:], noise_seeds=SEEDS[1:2]).logits, scores[1:], rtol=1e-4, atol=1e-5)


# ---- activation checkpointing, compiling, half precision


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("position", ["input", "mid", "both"])
@pytest.mark.parametrize("seeds", [None, SEEDS])
def test_checkpointing_keeps_noise_and_gradients(encoder, position, seeds, reentrant, monkeypatch):
    """A hook on a layer is called once; one on its attention again in the backward pass, with the same draw."""
    calls = []
    add = Perturbation.add
    monkeypatch.setattr(Perturbation, "add", lambda self, h, stream: calls.append(stream) or add(self, h, stream))
    results, counts = [], []
    for enabled in (False, True):
        model = make(encoder, noise_position=position)
        if enabled:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(7)
        calls.clear()
        results.append(gradients(model, **batch(), noise_seeds=seeds))
        counts.append(len(calls))
    at_input, at_middle = 3 * (position != "mid"), 3 * (position != "input")
    assert counts == [at_input + at_middle, at_input + 2 * at_middle]
    assert_close(results[1], results[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("seeds", [None, SEEDS])
def test_compiles_into_one_graph(seeds):
    model = make(BertConfig(**TINY), noise_position="both")
    inputs = batch() | {"noise_seeds": seeds}
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for _ in range(2):  # other seeds are another input, no other graph
        torch.manual_seed(3)
        expected = model(**inputs).loss
        torch.manual_seed(3)
        assert_close(compiled(**inputs).loss, expected)
        inputs["noise_seeds"] = None if seeds is None else seeds + 1
    assert compiled.eval()(**inputs).loss == model(**inputs).loss
    torch._dynamo.reset()


@pytest.mark.parametrize("position", ["input", "mid"])
def test_autocast_keeps_small_noise(encoder, position):
    """The sum and the stream after it are float32, so that even 1e-5 arrives; the result of the layer shows it."""
    if encoder.model_type == "deberta":
        pytest.skip("transformers' DeBERTa (v1) does not run under bfloat16 autocast")
    model = make(encoder, noise_scale=1e-5, noise_position=position)
    kinds, noisy = [], []
    add = model.perturbation.add

    def spy(hidden, stream):
        result = add(hidden, stream)
        kinds.append(result.dtype)
        noisy.append((result - hidden.float()).abs())
        return result

    model.perturbation.add = spy
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch()).loss.backward()
    assert kinds == [torch.float32] * 3
    for change in noisy:
        assert (change > 0).float().mean() > 0.95 and change.mean().item() == pytest.approx(0.8e-5, rel=0.1)


@pytest.mark.parametrize(("dtype", "spacing"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_weights_in_half_precision(dtype, spacing):
    """A scale that the numbers can hold is added and rounded once; a smaller one is refused in training only."""
    model = make(BertConfig(**TINY), noise_scale=spacing / 2).to(dtype)
    with pytest.raises(ValueError, match=rf"noise_scale is {spacing / 2}, but {dtype} .* {spacing} apart.*bf16=True"):
        model(**batch())
    model.eval()(**batch())
    model = make(BertConfig(**TINY), noise_scale=spacing).to(dtype)
    hidden = torch.randn(4, 9, 24).to(dtype)
    model.perturbation.seeds = SEEDS
    noise = model.perturbation.draw(hidden, 0)
    assert noise.dtype == torch.float32
    assert torch.equal(model.perturbation.add(hidden, 0), (hidden.float() + spacing * noise).to(dtype))
    assert model(**batch()).loss.isfinite()


@pytest.mark.parametrize("position", ["input", "mid"])
@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_half_precision_weights_under_autocast(kind, position):
    """As without autocast: the layer cannot take float32 states, so the sum is rounded, or refused."""
    model = make(ENCODERS[kind](), noise_scale=2**-8, noise_position=position).to(torch.bfloat16)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match=r"noise_scale is 0.00390625, but torch.bfloat16 .*Keep float32 weights"),
    ):
        model(**batch())
    model = make(ENCODERS[kind](), noise_scale=2**-4, noise_position=position).to(torch.bfloat16)
    kinds = []
    add = model.perturbation.add
    model.perturbation.add = lambda hidden, stream: kinds.append(add(hidden, stream)) or kinds[-1]
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(**batch(), noise_seeds=SEEDS)
        other = model(**batch(), noise_seeds=SEEDS + 1)
    outputs.loss.backward()
    assert [states.dtype for states in kinds] == [torch.bfloat16] * 6
    assert outputs.loss.isfinite() and not torch.equal(outputs.logits, other.logits)


# ---- the plain model


def has_hooks(model):
    return any(part._forward_pre_hooks or part._forward_hooks for part in layer_list(model).modules())


def test_plain_model_has_no_trace(encoder, tmp_path):
    model = make(encoder, noise_position="both")
    assert has_hooks(model.wrapped)
    base = model.to_base()
    assert not has_hooks(base)
    base.save_pretrained(tmp_path)
    loaded, report = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()) and type(loaded) is type(base) and not has_hooks(loaded)
    assert loaded.config.model_type == encoder.model_type
    assert not [name for name in loaded.config.to_dict() if "noise" in name or "hype" in name]
    assert torch.equal(loaded(**batch()).logits, base.eval()(**batch()).logits)
    assert loaded(**batch()).logits.isfinite().all()
    model.train()(**batch())
    assert has_hooks(base), "training goes on with noise"


def test_copies_have_their_own_noise():
    model = make(BertConfig(**TINY), noise_position="both")
    copied = copy.deepcopy(model)
    inputs = batch() | {"noise_seeds": SEEDS}
    expected = model(**inputs).loss
    model.to_base()
    assert copied(**inputs).loss == expected and model(**inputs).loss == expected
    copied.to_base()
    assert not has_hooks(copied.wrapped) and has_hooks(model.wrapped)


def test_from_encoder_and_back(tmp_path):
    plain = AutoModelForSequenceClassification.from_config(BertConfig(**TINY, num_labels=3))
    plain.save_pretrained(tmp_path)
    model = HypeForSequenceClassification.from_encoder(str(tmp_path), noise="uniform", noise_layers=[-1])
    assert model.config.noise == "uniform" and model.config.num_labels == 3 and not model.training
    assert model.wrapped.config.hidden_dropout_prob == 0 and model.wrapped.dropout.p == 0
    assert_close(model.to_base().state_dict(), plain.state_dict(), rtol=0, atol=0)
    shared = HypeForSequenceClassification.from_encoder(plain)
    assert shared.to_base() is plain and shared.config.hidden_dropout_prob == 0.1  # built already


def test_context_leaves_nothing_behind(encoder):
    model = AutoModelForSequenceClassification.from_config(encoder).train()
    names = set(model.state_dict())
    with pytest.raises(KeyError), perturbed(model, noise_scale=0.1, noise_position="both") as perturbation:
        assert has_hooks(model)
        perturbation.seeds = SEEDS
        model(**batch())
        assert model(**batch()).loss.isfinite() and set(model.state_dict()) == names
        raise KeyError
    assert not has_hooks(model) and perturbation.seeds is None
    assert not [name for name in model.config.to_dict() if "noise" in name]


def test_context_gives_the_noise_of_the_pair(encoder):
    model = make(encoder, noise="uniform", noise_scale=0.1, noise_position="both")
    expected = model(**batch(), noise_seeds=SEEDS).logits
    with perturbed(model.to_base(), noise="uniform", noise_scale=0.1, noise_position="both") as perturbation:
        perturbation.seeds = SEEDS
        assert torch.equal(model.wrapped(**batch()).logits, expected)


def test_what_cannot_have_noise_is_refused():
    sizes = {name: value for name, value in TINY.items() if name != "pad_token_id"}
    with pytest.raises(ValueError, match="no lists of 3 layers"):
        make(AlbertConfig(**sizes, embedding_size=8), HypeModel)
    with pytest.raises(ValueError, match="not built for XLNet"):
        make(XLNetConfig(vocab_size=99, d_model=24, n_layer=3, n_head=2, d_inner=40), HypeModel)
    modern = ModernBertConfig(**TINY, bos_token_id=1, eos_token_id=2, cls_token_id=3, sep_token_id=4)
    with pytest.raises(ValueError, match="noise_position: ModernBertEncoderLayer has no known place .*'input'"):
        make(modern, HypeModel, noise_position="both")
    squeezed = SqueezeBertConfig(**TINY, embedding_size=24, **{f"{part}_groups": 1 for part in "qkv"})
    with pytest.raises(ValueError, match="SqueezeBertModule has no known place .*post_attention"):
        make(squeezed, HypeModel, noise_position="mid")
    model = make(modern, HypeModel)
    assert model(batch()["input_ids"]).last_hidden_state.isfinite().all()
    with pytest.raises(ValueError, match="HypeModel wraps a method already"), perturbed(model):
        pass
    with (
        pytest.raises((ValueError, StrictDataclassError), match="noise_layers"),
        perturbed(AutoModel.from_config(BertConfig(**TINY)), noise_layers=[3]),
    ):
        pass
