"""BERT-of-Theseus' models: the common suite of wrappers, and the paper's own checks on every layout of encoder."""

import copy
import itertools

import pytest
import torch
from suites.encoder_suite import gradients
from suites.wrapper_suite import WrapperSuite
from torch import nn
from torch.testing import assert_close
from transformers import (
    AlbertConfig,
    AutoConfig,
    AutoModel,
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DebertaConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    LongformerConfig,
    ModernBertConfig,
    MPNetConfig,
    RobertaConfig,
    XLMRobertaConfig,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from bestiary.configuration.configuration_bert import BertPretrainingConfig
from bestiary.configuration.configuration_theseus import TheseusConfig
from bestiary.conversion import convert_checkpoint
from bestiary.conversion import theseus as conversion
from bestiary.export import run_without_package
from bestiary.modeling import modeling_theseus as theseus
from bestiary.modeling.modeling_theseus import TheseusForSequenceClassification, TheseusModel


TINY = {
    "vocab_size": 99,
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 20,
    "pad_token_id": 0,
}
DISENTANGLED = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
DISTIL = {"vocab_size": 99, "dim": 24, "n_layers": 4, "n_heads": 2, "hidden_dim": 40, "max_position_embeddings": 20}
MODERN = {
    "global_attn_every_n_layers": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "local_attention": 4,
}
ENCODERS = {
    "bert": lambda: BertConfig(**TINY),
    "roberta": lambda: RobertaConfig(**TINY),
    "xlm-roberta": lambda: XLMRobertaConfig(**TINY),
    "electra": lambda: ElectraConfig(**TINY, embedding_size=16),
    "deberta": lambda: DebertaConfig(**TINY, **DISENTANGLED),
    "deberta-v2": lambda: DebertaV2Config(**TINY, **DISENTANGLED, conv_kernel_size=3),
    "distilbert": lambda: DistilBertConfig(**DISTIL),
    "mpnet": lambda: MPNetConfig(**TINY),
    "modernbert": lambda: ModernBertConfig(**TINY, **MODERN),
    "bestiary-bert": lambda: BertPretrainingConfig(**TINY),
}
NAN, INFINITE = float("nan"), float("inf")
PATTERNS = tuple(itertools.product((0, 1), repeat=2))


@pytest.fixture(params=ENCODERS)
def predecessor(request):
    """A classifier of every layout, without dropout, away from its initial values."""
    return make_predecessor(ENCODERS[request.param]())


def make_predecessor(config, auto_class=AutoModelForSequenceClassification, seed=0):
    torch.manual_seed(seed)
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    model = auto_class.from_config(config).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value), alpha=0.1)
    return model


def compress(predecessor, model_class=TheseusForSequenceClassification, **settings):
    """A pair whose successor differs from the predecessor, in training mode; the predecessor is not touched."""
    model = model_class.from_encoder(copy.deepcopy(predecessor), **{"successor_num_hidden_layers": 2} | settings)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in model.successor.parameters():
            value.add_(torch.randn(value.shape, generator=draw), alpha=0.1)
    return model.train()


def batch(rows=4, length=9):
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 99, (rows, length), generator=draw)
    mask = torch.ones_like(ids)
    mask[-1, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(0, 2, (rows,), generator=draw)}


def layers_of(model):
    """The list of a plain model's layers."""
    return max((part for part in model.modules() if isinstance(part, nn.ModuleList)), key=len)


class TestTheseus(WrapperSuite):
    """One module of two layers; what trains runs the successor."""

    slug = "theseus"
    settings = {"successor_num_hidden_layers": 1}
    neutral = False
    bad_settings = (
        ({"successor_num_hidden_layers": 3}, "Config.successor_num_hidden_layers must be a divisor .*=2, got 3"),
        ({"successor_num_hidden_layers": 0}, "successor_num_hidden_layers must be a divisor"),
        ({"replacing_rate": 0}, r"replacing_rate must be in \(0, 1\], got 0"),
        ({"replacing_rate": 1.1}, r"replacing_rate must be in \(0, 1\], got 1.1"),
        ({"replacing_scheduler": "cosine"}, "replacing_scheduler"),
        ({"replacing_k": 0}, "replacing_k must be above 0"),
        ({"replacing_k": 0.1, "replacing_scheduler": "constant"}, "replacing_k must be None with .*'constant'"),
        ({"replacing_k": 0.1, "steps_for_replacing": 5}, "replacing_k must be None where steps_for_replacing"),
        ({"steps_for_replacing": 0}, "steps_for_replacing must be above 0"),
        ({"steps_for_replacing": 2.5}, "steps_for_replacing must be a whole number .* got 2.5"),
        ({"replacing_rate": NAN}, r"replacing_rate must be in \(0, 1\], got nan"),
        ({"replacing_k": NAN}, "replacing_k must be above 0 and finite, got nan"),
        ({"replacing_k": INFINITE}, "replacing_k must be above 0 and finite, got inf"),
        ({"steps_for_replacing": NAN}, "steps_for_replacing must be above 0 and finite .* got nan"),
        ({"steps_for_replacing": INFINITE}, "steps_for_replacing must be above 0 and finite .* got inf"),
        ({"successor_init": "last"}, "successor_init"),
        ({"successor_init": "random", "successor_from": "x"}, "successor_from must be None with .*random"),
    )

    def build(self, model_class, encoder="bert", **changes):
        model = super().build(model_class, encoder, **changes)
        model.set_pattern([1] * len(model.successor))
        return model


def test_probabilities_of_the_successor_are_recorded(predecessor):
    """Its layers follow a change of the attention backend, and are hooked like the predecessor's."""
    model = compress(predecessor)
    model.set_attn_implementation("eager")
    inputs = batch()
    for pattern in (*PATTERNS, None):
        if pattern is not None:
            model.set_pattern(pattern)
        outputs = model.train(pattern is not None)(**inputs, output_attentions=True, output_hidden_states=True)
        number = 2 if pattern is None else 4 - sum(pattern)
        assert len(outputs.attentions) == number and len(outputs.hidden_states) == number + 1


# ---- sizes


@pytest.mark.parametrize(("kept", "size"), [(12, 109_482_240), (6, 66_955_008), (4, 52_779_264), (3, 45_691_392)])
def test_parameters_of_the_published_sizes(kept, size):
    config = TheseusConfig(successor_num_hidden_layers=kept, num_labels=3)
    with torch.device("meta"):
        model = TheseusForSequenceClassification(config)
        result = model.to_base()
    assert sum(value.numel() for value in result.parameters()) == size + 2_307
    both = 109_482_240 + 2_307 + sum(value.numel() for value in model.successor.parameters())
    assert sum(value.numel() for value in model.parameters()) == both
    assert TheseusConfig().successor_num_hidden_layers == 6 and TheseusConfig().num_hidden_layers == 12


# ---- what runs


def test_patterns_are_chains_of_the_two_stacks(predecessor):
    """Against a plain model of the predecessor's type whose list of layers is put together by hand."""
    model, inputs = compress(predecessor), batch()
    own = layers_of(predecessor)
    for pattern in PATTERNS:
        plain = copy.deepcopy(predecessor)
        chain = []
        for index, replaced in enumerate(pattern):
            chain += [model.successor[index]] if replaced else list(own[2 * index : 2 * index + 2])
        layers_of(plain).__init__(copy.deepcopy(chain))  # not shared: models hook their layers
        expected = plain.train()(**inputs, output_hidden_states=True)
        model.set_pattern(pattern)
        found = model(**inputs, output_hidden_states=True)
        assert_close(found.logits, expected.logits, rtol=0, atol=0)
        assert_close(found.loss, expected.loss, rtol=0, atol=0)
        assert len(found.hidden_states) == 1 + 2 * 2 - sum(pattern)
    untouched = predecessor.train()(**inputs)
    model.set_pattern((0, 0))
    assert_close(model(**inputs).logits, untouched.logits, rtol=0, atol=0)


def test_evaluation_is_the_successor_whatever_the_rate(predecessor):
    model, inputs = compress(predecessor), batch()
    model.set_pattern((1, 1))
    trained = model(**inputs).logits
    model.eval()
    for pattern in PATTERNS:
        model.set_pattern(pattern)
        assert_close(model(**inputs).logits, trained, rtol=0, atol=0)
    model.set_rate(0.01)
    assert_close(model(**inputs).logits, trained, rtol=0, atol=0)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradients_are_those_of_drawn_modules_only(predecessor, pattern):
    model, inputs = compress(predecessor), batch()
    model.set_pattern(pattern)
    found = gradients(model, **inputs)
    names = {f"{theseus.SUCCESSOR}.{index}." for index, replaced in enumerate(pattern) if replaced}
    trained = {name for name in dict(model.named_parameters()) if any(part in name for part in names)}
    assert set(found) == trained and bool(trained) == any(pattern)
    # and they are the gradients of the chain in which everything is trained
    model.requires_grad_(True)
    everything = gradients(model, **inputs)
    assert_close(found, {name: everything[name] for name in found}, rtol=1e-5, atol=1e-7)
    assert len(everything) > len(found)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("pattern", [(0, 1), (1, 0)])
def test_nothing_before_the_first_drawn_layer_has_a_graph(predecessor, checkpointing, pattern):
    """Not even where inputs are made to require gradients, as for adapters with gradient checkpointing."""
    if checkpointing and not any(isinstance(part, GradientCheckpointingLayer) for part in predecessor.modules()):
        pytest.skip("this type has no gradient checkpointing")
    model, inputs = compress(predecessor), batch()
    model.set_pattern(pattern)
    expected = gradients(model, **inputs)
    if checkpointing:
        model.activation_checkpointing_enable()
    model.enable_input_require_grads()
    outputs = model(**inputs, output_hidden_states=True)
    graphs = [state.requires_grad for state in outputs.hidden_states[2:]]  # what the second layer gives, and on
    assert graphs == ([False, True] if pattern == (0, 1) else [True, True])
    assert_close(gradients(model, **inputs), expected, rtol=1e-5, atol=1e-7)


def test_who_trains_more_gets_gradients():
    """The prefix keeps its graph where something in it is trained, or the user's embeddings ask for gradients."""
    model, inputs = compress(make_predecessor(BertConfig(**TINY))), batch()
    model.set_pattern((0, 1))
    embeddings = model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
    model(inputs_embeds=embeddings, **inputs).loss.backward()
    assert embeddings.grad.any()
    model.get_input_embeddings().requires_grad_(True)
    found = gradients(model, **batch())
    assert found["model.bert.embeddings.word_embeddings.weight"].any()


def test_reentrant_checkpointing_is_refused():
    model = compress(make_predecessor(BertConfig(**TINY)))
    with pytest.raises(ValueError, match="cannot use reentrant checkpointing.*set use_reentrant to False"):
        model.activation_checkpointing_enable({"use_reentrant": True})
    model.activation_checkpointing_enable({"use_reentrant": False})


def test_only_the_successor_is_trained(tmp_path):
    model = compress(make_predecessor(BertConfig(**TINY)))
    for part in (model, TheseusForSequenceClassification(model.config)):
        trained = {name for name, value in part.named_parameters() if value.requires_grad}
        assert trained == {name for name in part.state_dict() if f".{theseus.SUCCESSOR}." in name}
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)  # which makes everything trainable by itself
    assert {name for name, value in loaded.named_parameters() if value.requires_grad} == trained
    before = copy.deepcopy(model.state_dict())
    model.set_pattern((0, 1))
    optimizer = torch.optim.AdamW((value for value in model.parameters() if value.requires_grad), lr=0.1)
    for _ in range(2):
        model(**batch()).loss.backward()
        optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(f".{theseus.SUCCESSOR}.1." in name for name in changed)


def test_a_model_without_a_pattern_draws_at_its_rate():
    """What a plain trainer gets: once per forward pass, independently per module, from a generator of its own."""
    config = BertConfig(**TINY | {"num_hidden_layers": 4})
    model = compress(make_predecessor(config), successor_num_hidden_layers=4, replacing_rate=0.3)
    inputs = batch(rows=1, length=3)
    state = torch.get_rng_state()
    drawn = []
    with torch.no_grad():
        for _ in range(1000):
            model(**inputs)
            drawn.append(model.layers.pattern)
    assert torch.equal(torch.get_rng_state(), state)
    drawn = torch.tensor(drawn, dtype=torch.float)
    assert (drawn.mean(0) - 0.3).abs().max() < 5 * (0.3 * 0.7 / 1000) ** 0.5
    correlations = torch.corrcoef(drawn.T) - torch.eye(4)
    assert correlations.abs().max() < 5 / 1000**0.5
    model.set_rate(1.0)
    model(**inputs)
    assert model.layers.pattern == (1, 1, 1, 1)
    with pytest.raises(ValueError, match=r"set_rate: rate must be in \(0, 1\], got 0"):
        model.set_rate(0)
    model.set_pattern((0, 0, 0, 0))
    model(**inputs).loss.backward()  # nothing to train, and no error in another trainer's loop
    model.set_pattern(None)
    model(**inputs)
    assert len(set(model.layers.pattern)) <= 2 and model.layers.rate == 0.3
    for wrong in ((1, 0), (1, 0, 2, 1)):
        with pytest.raises(ValueError, match="set_pattern needs 4 numbers 0 or 1"):
            model.set_pattern(wrong)


def test_copies_are_independent():
    model, inputs = compress(make_predecessor(BertConfig(**TINY))), batch()
    twin = copy.deepcopy(model)
    twin.set_pattern((0, 1))
    model.set_pattern((1, 0))
    assert twin.layers.pattern == (0, 1)
    with torch.no_grad():
        for value in twin.successor.parameters():
            value.zero_()
    expected = model.eval()(**inputs).logits
    assert not torch.equal(twin.eval()(**inputs).logits, expected)


# ---- where the successor starts


@pytest.mark.parametrize(
    ("start", "places"), [("first", [0, 1]), ("top", [2, 3]), ("interleaved", [1, 3]), ("random", None)]
)
def test_initialisation(start, places):
    predecessor = make_predecessor(BertConfig(**TINY))
    model = TheseusForSequenceClassification.from_encoder(
        copy.deepcopy(predecessor), successor_num_hidden_layers=2, successor_init=start
    )
    for index, layer in enumerate(model.successor):
        own = layer.state_dict()
        if places is not None:
            assert_close(own, predecessor.bert.encoder.layer[places[index]].state_dict(), rtol=0, atol=0)
        else:
            assert 0.01 < own["intermediate.dense.weight"].std() < 0.03 and not own["intermediate.dense.bias"].any()
            assert (own["output.LayerNorm.weight"] == 1).all()
        assert layer.attention.self.layer_idx == index
    assert_close(model.model.bert.embeddings.state_dict(), predecessor.bert.embeddings.state_dict(), rtol=0, atol=0)


def test_initialisation_from_another_checkpoint(tmp_path):
    predecessor, other = make_predecessor(BertConfig(**TINY)), make_predecessor(BertConfig(**TINY), AutoModel, seed=5)
    other.save_pretrained(tmp_path / "other")
    predecessor.save_pretrained(tmp_path / "tuned")
    settings = {"successor_num_hidden_layers": 2, "successor_from": str(tmp_path / "other"), "successor_init": "top"}
    model = TheseusForSequenceClassification.from_encoder(tmp_path / "tuned", **settings)
    assert_close(model.successor[0].state_dict(), other.encoder.layer[2].state_dict(), rtol=0, atol=0)
    assert_close(
        model.model.bert.encoder.get_submodule("layer.2").state_dict(),
        predecessor.bert.encoder.layer[2].state_dict(),
        rtol=0,
        atol=0,
    )
    make_predecessor(BertConfig(**TINY | {"intermediate_size": 16}), AutoModel).save_pretrained(tmp_path / "narrow")
    make_predecessor(ElectraConfig(**TINY), AutoModel).save_pretrained(tmp_path / "electra")
    for folder in ("narrow", "electra"):
        with pytest.raises(ValueError, match=rf"successor_from=.*{folder}.*cannot become layer 0 of the successor"):
            TheseusForSequenceClassification.from_encoder(
                tmp_path / "tuned", **settings | {"successor_from": str(tmp_path / folder)}
            )


def test_another_checkpoint_must_have_the_layers(tmp_path):
    predecessor = make_predecessor(BertConfig(**TINY))
    make_predecessor(BertConfig(**TINY | {"num_hidden_layers": 3}), AutoModel).save_pretrained(tmp_path)
    make, settings = TheseusForSequenceClassification.from_encoder, {"successor_from": str(tmp_path)}
    for start in ("first", "top"):
        with pytest.raises(ValueError, match=f"hidden_layers=4 .*'{start}' needs at least as many .* has 3"):
            make(copy.deepcopy(predecessor), successor_num_hidden_layers=4, successor_init=start, **settings)
    with pytest.raises(ValueError, match="hidden_layers=2 with .*'interleaved' needs a multiple .* has 3"):
        make(copy.deepcopy(predecessor), successor_num_hidden_layers=2, successor_init="interleaved", **settings)
    make(copy.deepcopy(predecessor), successor_num_hidden_layers=2, successor_init="top", **settings)


def test_another_checkpoint_is_loaded_from_where_the_first_is(tmp_path, monkeypatch):
    predecessor, given = make_predecessor(BertConfig(**TINY)), {}
    predecessor.save_pretrained(tmp_path)

    class Noted:
        @staticmethod
        def from_pretrained(name, **keywords):
            given[name] = keywords
            return copy.deepcopy(predecessor.base_model)

    monkeypatch.setattr(theseus, "AutoModel", Noted)
    where = {"token": False, "cache_dir": str(tmp_path), "local_files_only": True, "trust_remote_code": False}
    TheseusForSequenceClassification.from_encoder(
        tmp_path, successor_num_hidden_layers=2, successor_from="other", dtype=torch.float32, revision="main", **where
    )
    assert given == {"other": where}


# ---- which predecessors are taken


def test_a_checkpoint_without_the_tasks_head_is_refused(tmp_path):
    make_predecessor(BertConfig(**TINY), AutoModel).save_pretrained(tmp_path)
    message = "lacks classifier.bias, classifier.weight of a BertForSequence.*finetune.py --config finetune_classif"
    with pytest.raises(ValueError, match=message):
        TheseusForSequenceClassification.from_encoder(tmp_path, successor_num_hidden_layers=2)
    TheseusModel.from_encoder(tmp_path, successor_num_hidden_layers=2)


def test_a_checkpoint_of_another_number_of_labels_is_refused(tmp_path):
    make_predecessor(BertConfig(**TINY)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has 2 labels, but num_labels is 3 \(classifier.bias is \[2\], not \[3\]"):
        TheseusForSequenceClassification.from_encoder(tmp_path, successor_num_hidden_layers=2, num_labels=3)
    changes = {"encoder_config": {"vocab_size": 100}}
    with pytest.raises(ValueError, match=r"has parameters of other sizes \(bert.embeddings.word.* is \[99, 24\], not"):
        TheseusForSequenceClassification.from_encoder(tmp_path, successor_num_hidden_layers=2, **changes)


@pytest.mark.parametrize("auto_class", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_labels_keep_the_predecessors_names_and_order(auto_class, tmp_path):
    kind = next(each for each in TheseusModel.__base__.__subclasses__() if each.wrapped_auto_class is auto_class)
    names = {0: "no", 1: "yes"}
    make_predecessor(BertConfig(**TINY, id2label=names), auto_class).save_pretrained(tmp_path / "named")
    make_predecessor(BertConfig(**TINY), auto_class).save_pretrained(tmp_path / "numbered")
    for other in ({0: "yes", 1: "no"}, {0: "no", 1: "maybe"}):
        with pytest.raises(ValueError, match=rf"labels \['no', 'yes'\], but id2label is \['{other[0]}', '{other[1]}'"):
            kind.from_encoder(tmp_path / "named", successor_num_hidden_layers=2, id2label=other)
    for folder, wanted in (("named", None), ("named", names), ("numbered", names)):
        settings = {} if wanted is None else {"id2label": wanted}
        model = kind.from_encoder(tmp_path / folder, successor_num_hidden_layers=2, **settings)
        assert model.config.id2label == names


def test_layers_that_differ_are_not_exchanged():
    """ModernBERT's first layer has no norm, and local and global layers alternate."""
    predecessor = make_predecessor(ENCODERS["modernbert"]())
    compress(predecessor)
    for start in ("top", "interleaved"):
        with pytest.raises(ValueError, match=f"successor_init='{start}'.* cannot become layer 0"):
            compress(predecessor, successor_init=start)
    compress(predecessor, successor_init="random")


def test_models_without_a_list_of_layers_are_refused():
    albert = AutoModelForSequenceClassification.from_config(AlbertConfig(**TINY, embedding_size=8))
    with pytest.raises(ValueError, match="Albert.* has no lists of 4 layers"):
        TheseusForSequenceClassification.from_encoder(albert, successor_num_hidden_layers=2)


# ---- the result

LOAD_STOCK = """
import sys, torch
from transformers import AutoModelForSequenceClassification
model, report = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], output_loading_info=True)
if any(report.values()):
    sys.exit(str(report))
torch.save(model(**torch.load(sys.argv[2])).logits, sys.argv[3])
"""


def test_result_is_a_plain_small_model(predecessor, tmp_path):
    model, inputs = compress(predecessor).eval(), batch()
    result = model.to_base()
    assert type(result) is type(predecessor) and result.config.num_hidden_layers == 2
    assert len(layers_of(result)) == 2 and all(value.requires_grad for value in result.parameters())
    assert not any("scc" in name for name in result.state_dict())
    expected = model(**inputs)
    assert_close(result(**inputs).logits, expected.logits, rtol=0, atol=0)
    result.save_pretrained(tmp_path)
    loaded, report = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(predecessor) and not any(report.values()), report
    assert loaded.config.num_hidden_layers == 2
    assert_close(loaded(**inputs).logits, expected.logits, rtol=0, atol=0)
    with torch.no_grad():
        next(model.successor.parameters()).add_(1.0)  # the memory is shared
    assert_close(result(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trained and all(theseus.SUCCESSOR in name for name in trained)


def test_result_loads_where_bestiary_is_not(tmp_path):
    model, inputs = compress(make_predecessor(BertConfig(**TINY))).eval(), batch()
    model.to_base().save_pretrained(tmp_path / "small")
    torch.save(inputs, tmp_path / "inputs.pt")
    run = run_without_package(LOAD_STOCK, tmp_path / "small", tmp_path / "inputs.pt", tmp_path / "logits.pt")
    assert run.returncode == 0, run.stderr
    assert_close(torch.load(tmp_path / "logits.pt"), model(**inputs).logits, rtol=0, atol=0)


def test_settings_per_layer_are_those_of_the_successor(tmp_path):
    """The second layer of this ModernBERT is local, and stays so."""
    predecessor = make_predecessor(ENCODERS["modernbert"]())
    kinds = predecessor.config.layer_types
    assert len(kinds) == 4 and kinds[0] != kinds[1]
    result = compress(predecessor).to_base()
    result.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).layer_types == kinds[:2]


def test_windows_per_layer_are_those_of_the_successor(tmp_path, monkeypatch):
    """Longformer builds with one window per layer and no other number of them."""
    config = LongformerConfig(
        **TINY | {"max_position_embeddings": 34, "pad_token_id": 1}, attention_window=[4, 8, 4, 4]
    )
    predecessor, inputs = make_predecessor(config), batch()
    model = compress(predecessor).eval()
    assert theseus.per_layer_settings(config) == {"attention_window": [4, 8, 4, 4]}
    model.to_base().save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config.attention_window == [4, 8] and loaded.config.num_hidden_layers == 2
    assert_close(loaded(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="successor_init='top'.* cannot become layer 1"):
        compress(predecessor, successor_init="top")
    monkeypatch.setattr(theseus, "per_layer_settings", lambda config: {})
    with pytest.raises(ValueError, match="no LongformerForSequenceClassification of 2 layers can be .*Expected 2"):
        compress(predecessor)


def test_fields_of_as_many_values_by_chance_are_left_alone():
    config = DebertaV2Config(**TINY | {"num_hidden_layers": 2}, **DISENTANGLED)
    result = compress(make_predecessor(config), successor_num_hidden_layers=1).to_base()
    assert result.config.pos_att_type == ["c2p", "p2c"]


def test_result_of_other_heads_and_without_a_pooler():
    choices = make_predecessor(BertConfig(**TINY), AutoModelForMultipleChoice)
    model = compress(choices, theseus.TheseusForMultipleChoice).eval()
    ids = batch()["input_ids"].view(2, 2, -1)
    assert_close(model.to_base()(ids).logits, model(ids).logits, rtol=0, atol=0)
    bare = BertModel(BertConfig(**TINY), add_pooling_layer=False).eval()
    result = compress(bare, TheseusModel).eval().to_base()
    assert type(result) is BertModel and result.pooler is None


# ---- without the predecessor


def test_dropping_the_predecessor(predecessor, tmp_path):
    model, inputs = compress(predecessor), batch()
    model.save_pretrained(tmp_path / "before")
    model.set_pattern((1, 1))
    expected = gradients(model, **inputs), model(**inputs).logits
    size = sum(value.numel() for value in model.parameters())
    model.drop_predecessor()
    left = sum(value.numel() for value in model.parameters())
    assert left == sum(value.numel() for value in model.to_base().parameters()) < size
    for pattern in (None, (1, 1)):
        model.set_pattern(pattern)
        assert_close((gradients(model, **inputs), model(**inputs).logits), expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="the predecessor was dropped, so the pattern .0, 1. cannot run"):
        model.set_pattern((0, 1))
    model.save_pretrained(tmp_path / "after")
    loaded, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "after", output_loading_info=True)
    assert not any(report.values()) and not loaded.config.has_predecessor
    assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert_close(loaded(**inputs).logits, model.eval()(**inputs).logits, rtol=0, atol=0)
    # states of either kind go into models of either kind
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "before")
    state = whole.state_dict()
    assert len(state) > len(loaded.state_dict())
    report = loaded.load_state_dict(state)
    assert not report.missing_keys and not report.unexpected_keys
    whole.load_state_dict(loaded.state_dict())
    assert not whole.config.has_predecessor and whole.state_dict().keys() == loaded.state_dict().keys()


# ---- the schedule


def rates(total=100, **fields):
    config = TheseusConfig(encoder_config=TINY, successor_num_hidden_layers=2, **fields)
    return [config.rate_at(step, total) for step in range(total)], config


def test_linear_schedule():
    """The paper's: b 0.3, k 0.0006 by default."""
    found, config = rates(2000)
    assert found[0] == 0.3 and found[500] == pytest.approx(0.6) and found[1166] < 1
    assert set(found[1167:]) == {1.0} and found == sorted(found)
    assert not config.is_replaced_at(1166, 2000) and config.is_replaced_at(1167, 2000)


@pytest.mark.parametrize(("length", "reached"), [(40, 40), (0.25, 25), (0.001, 1)])
def test_linear_schedule_by_its_length(length, reached):
    found, _ = rates(replacing_rate=0.2, steps_for_replacing=length)
    assert found[0] == 0.2 and all(rate < 1 for rate in found[:reached]) and set(found[reached:]) == {1.0}
    assert found[reached // 2] == pytest.approx(0.2 + 0.8 * (reached // 2) / reached)


def test_constant_schedule():
    """Without a length it stays, where the official command line switches after one update."""
    found, config = rates(replacing_scheduler="constant", replacing_rate=0.5)
    assert set(found) == {0.5} and not config.is_replaced_at(99, 100)
    for length in (20, 0.2):
        found, config = rates(replacing_scheduler="constant", replacing_rate=0.5, steps_for_replacing=length)
        assert found == [0.5] * 20 + [1.0] * 80
        assert [config.is_replaced_at(step, 100) for step in (19, 20)] == [False, True]
    assert rates(replacing_scheduler="constant", replacing_rate=1)[1].is_replaced_at(0, 100)


def test_anti_curriculum():
    found, config = rates(replacing_scheduler="anti_curriculum", replacing_rate=0.4, steps_for_replacing=0.5)
    assert found[0] == 1 and found[25] == pytest.approx(0.7) and set(found[50:]) == {0.4}
    assert not config.is_replaced_at(0, 100)
    found, _ = rates(replacing_scheduler="anti_curriculum", replacing_rate=0.4, replacing_k=0.1)
    assert found[:3] == pytest.approx([1, 0.9, 0.8]) and found[99] == 0.4


def test_defaults_are_the_papers():
    config = TheseusConfig()
    assert (config.replacing_rate, config.replacing_scheduler, config.successor_init) == (0.3, "linear", "first")
    assert config.rate_at(1, 10) == pytest.approx(0.3006) and config.steps_for_replacing is None
    assert isinstance(config.encoder_config, BertConfig)
    assert BertForSequenceClassification.config_class is type(config.encoder_config)


# ---- official checkpoints


def official(model):
    """State of a pair by official names."""
    return {conversion.official_name(name): value.contiguous() for name, value in model.state_dict().items()}


def test_official_checkpoint_to_pair_and_to_the_small_model(tmp_path):
    """By the command line's function, with BERT's own configuration beside the weights."""
    predecessor = make_predecessor(BertConfig(**TINY, num_labels=3))
    model, inputs = compress(predecessor).eval(), batch()
    state = official(model)
    assert {"bert.encoder.layer.3.output.dense.weight", "bert.encoder.scc_layer.1.output.dense.bias"} <= set(state)
    (tmp_path / "run").mkdir()
    torch.save(state, tmp_path / "run/pytorch_model.bin")
    predecessor.config.save_pretrained(tmp_path / "run")
    convert_checkpoint("theseus", tmp_path / "run", tmp_path / "out")
    pair, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(pair) is TheseusForSequenceClassification and not any(report.values())
    assert_close(pair.state_dict(), model.state_dict(), rtol=0, atol=0)
    pair.to_base().save_pretrained(tmp_path / "small")
    small = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")
    assert type(small) is BertForSequenceClassification and small.config.num_labels == 3
    assert_close(small(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)


def test_checkpoints_that_do_not_fit_are_refused():
    predecessor = make_predecessor(BertConfig(**TINY))
    state, settings = official(compress(predecessor)), {"num_attention_heads": 2, "hidden_act": "relu"}
    pair = conversion.convert(state, settings)
    assert pair.config.encoder_config.hidden_act == "relu" and pair.config.successor_num_hidden_layers == 2
    assert all(theseus.SUCCESSOR in name for name, value in pair.named_parameters() if value.requires_grad)
    with pytest.raises(ValueError, match="theseus: num_attention_heads is not given"):
        conversion.convert(state, {})
    with pytest.raises(ValueError, match="no official checkpoint of the paper 'theseus'; it looks like .*'bert'"):
        conversion.convert(predecessor.state_dict(), settings)
    gone = "bert.encoder.scc_layer.0.output.dense.bias"
    broken = {name: value for name, value in state.items() if name != gone} | {"cls.bias": torch.zeros(2)}
    with pytest.raises(ValueError, match=rf"1 missing: {gone}.*\n1 extra: cls.bias"):
        conversion.convert(broken, settings)
    with pytest.raises(ValueError, match="intermediate_size is 9 in the configuration and 40 in the tensors"):
        conversion.convert(state, settings | {"intermediate_size": 9})
