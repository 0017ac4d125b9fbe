"""MiniLMv2's models: the common suite, encoders of all layouts as teacher and student, what is frozen and refused."""

import copy

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from suites.encoder_suite import EncoderSuite, gradients
from suites.wrapper_suite import WrapperSuite
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, BertConfig, BertModel, RobertaConfig

from bestiary import get_paper, list_papers
from bestiary.configuration.configuration_core import WrapperConfig
from bestiary.configuration.configuration_minilmv2 import PAIRS, MiniLMv2Config, longest_input, paper_teacher_layer
from bestiary.modeling import modeling_minilmv2 as minilmv2
from bestiary.modeling.layers.projections import LayerProjections, can_probe, probe, project_at
from bestiary.modeling.layers.wrapping import layer_list
from bestiary.modeling.modeling_minilmv2 import MiniLMv2ForPreTraining, MiniLMv2Model


SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
COMMON = {"vocab_size": 99, "max_position_embeddings": 18, "pad_token_id": 0}
STUDENT = SIZES | COMMON | {"model_type": "bert", "max_position_embeddings": 16}
TEACHER_WIDTH, HEADS = 48, 12
TYPES = {
    "bert": {},
    "roberta": {"pad_token_id": 1, "type_vocab_size": 1},
    "xlm-roberta": {"pad_token_id": 1, "type_vocab_size": 1},
    "electra": {"embedding_size": 16},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0},
    "deberta-v2": {
        "relative_attention": True,
        "position_buckets": 4,
        "pos_att_type": ["c2p", "p2c"],
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "type_vocab_size": 0,
        "conv_kernel_size": 3,
        "conv_act": "gelu",
    },
    "distilbert": {},
    "bestiary-bert": {"unpad_threshold": 0.0},
    "roberta-prelayernorm": {"pad_token_id": 1, "type_vocab_size": 1},
    "bestiary-tupe": {},
    "bestiary-performer": {},
    "bestiary-linear-attention": {},
    "bestiary-realformer": {},
    "bestiary-unilm": {},
    "bestiary-sparse-seq2seq-transformer": {},
}
REFUSED = ("bestiary-tta", "roformer", "esm", "megatron-bert", "xlm-roberta-xl", "longformer")
DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout")


def encoder_config(model_type: str, layers: int = 2, width: int = 24, dropout: float = 0.0):
    sizes = SIZES | {"num_hidden_layers": layers, "hidden_size": width}
    if model_type == "distilbert":
        sizes["hidden_dim"] = sizes.pop("intermediate_size")
    config = AutoConfig.for_model(model_type, **COMMON | sizes | TYPES.get(model_type, {}))
    for name in DROPOUT:
        if name in config.to_dict():
            setattr(config, name, dropout)
    return config


def encoder(model_type: str, layers: int = 2, width: int = 24, seed: int = 0):
    """In evaluation mode, with parameters far enough from their start for attention to matter."""
    torch.manual_seed(seed)
    model = AutoModel.from_config(encoder_config(model_type, layers, width)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def text(rows: int = 3, length: int = 9):
    draw = torch.Generator().manual_seed(4)
    ids = torch.randint(5, 99, (rows, length), generator=draw)
    mask = (torch.arange(length) < torch.tensor([length, 5, 3][:rows])[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask}


class TestMiniLMv2(EncoderSuite):
    """The loss against given projections of a teacher."""

    slug = "minilmv2"
    config = MiniLMv2Config(encoder_config=STUDENT, num_relation_heads=HEADS, relation_weights={"qq": 1, "kv": 0.5})
    base = MiniLMv2Model
    heads = (MiniLMv2ForPreTraining,)
    can_unpad = False  # test_layouts has a student whose own setting would
    sequence_limit = False  # is the student's affair
    reduces_to_bert = None  # the student is BERT, or any other encoder, always
    parameters = {
        "bert-L6-H384": {MiniLMv2Model: 22_713_216},
        "bert-L6-H768": {MiniLMv2Model: 66_955_008},
        "roberta-L6-H384": {MiniLMv2Model: 30_294_912},
        "roberta-L12-H384": {MiniLMv2Model: 40_941_696},
        "roberta-L6-H768": {MiniLMv2Model: 82_118_400},
        "xlm-roberta-L6-H384": {MiniLMv2Model: 106_993_920},
        "xlm-roberta-L12-H384": {MiniLMv2Model: 117_640_704},
    }
    bad_config = (
        ({"num_relation_heads": 5}, "num_relation_heads must be a divisor of the student's hidden_size=24, got 5"),
        ({"num_relation_heads": 0}, "num_relation_heads must be at least 1"),
        ({"relation_weights": {"qz": 1}}, "relation_weights must be weights of at least 0 for some of qq, kk"),
        ({"relation_weights": {"qq": 0}}, "relation_weights must be .*one of them above 0"),
        ({"relation_weights": {"qq": -1}}, "relation_weights must be"),
        ({"student_layer": 3}, r"student_layer must be in 1..2"),
        ({"student_layer": 0}, r"student_layer must be in 1..2"),
        ({"teacher_layer": 0}, "teacher_layer must be at least 1"),
        ({"student_init": "last_layers"}, "student_init"),
    )

    def with_encoder(self, **changes):
        return self.make_config(encoder_config=self.config.encoder_config.to_dict() | changes, student_layer=None)

    def labelled(self, head, padding=None):
        """Text with a teacher's projections, equal at equal places of all batches."""
        inputs = self.inputs(head, padding)
        draw = torch.Generator().manual_seed(6)
        rows, length = inputs["input_ids"].shape
        vectors = torch.randn(3, rows, length, TEACHER_WIDTH, generator=draw)
        names = ("teacher_query", "teacher_key", "teacher_value")
        return inputs | dict(zip(names, vectors)), dict.fromkeys(self.config.active_relations, rows)

    def test_ties_hold_after_loading_and_resizing(self, model_class, tmp_path):
        """Nothing is tied; the table of the student gets its new size."""
        model = self.build(model_class)
        model.resize_token_embeddings(self.config.vocab_size + 5, mean_resizing=False)
        model.save_pretrained(tmp_path)
        loaded, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report.values()) and loaded.config.vocab_size == self.config.vocab_size + 5
        assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)

    def recorded_encoder(self, model_class):
        return self.config.encoder_config

    def test_loss_is_a_sum_over_a_count(self, head):
        model = self.build(head)
        inputs, counts = self.labelled(head, "right")
        whole = model(**inputs).loss
        assert_close(model(**inputs, num_items_in_batch=counts).loss, whole)
        expected = gradients(model, **inputs)
        model.zero_grad(set_to_none=True)
        for rows in (slice(0, 1), slice(1, None)):  # each padded to its own longest sequence only
            longest = int(inputs["attention_mask"][rows].sum(-1).max())
            part = {name: value[rows, :longest] for name, value in inputs.items()}
            model(**part, num_items_in_batch=counts).loss.backward()
        found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        assert_close(found, expected, rtol=1e-4, atol=1e-6)
        parts = model(**inputs, num_items_in_batch={"qq": 2, "kv": 8})
        once = model(**inputs)
        assert_close(parts.loss, 2 * once.qq_loss + 0.5 * 0.5 * once.kv_loss)
        assert_close(once.sequence_losses.mean(), once.loss)


class TestMiniLMv2Wrapping(WrapperSuite):
    """Over all types of encoder."""

    slug = "minilmv2"
    settings = {"num_relation_heads": 4}
    neutral = True

    def labelled(self, head):
        """Text with a teacher's projections."""
        inputs = self.inputs(head)
        vectors = torch.randn(3, *inputs["input_ids"].shape, 24, generator=torch.Generator().manual_seed(6))
        return inputs | dict(zip(("teacher_query", "teacher_key", "teacher_value"), vectors))


# ---- layouts


@pytest.mark.parametrize("model_type", TYPES)
def test_projections_are_what_the_layer_computes(model_type):
    """Against hooks on the linear maps in a whole forward pass."""
    model = encoder(model_type, layers=3)
    inputs = text()
    for number in (1, 2, 3):
        projections = LayerProjections(layer_list(model)[number - 1])
        seen, hooks = [], []
        for linear in projections.linears:
            hooks.append(linear.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out)))
        whole = model(**inputs, output_hidden_states=True).last_hidden_state
        for hook in hooks:
            hook.remove()
        found = project_at(model, number, "qkv", inputs)
        assert list(found) == ["q", "k", "v"]
        if len(seen) == 1:  # fused: heads of 3 x 12, then the biases of queries and values
            fused = seen[0].unflatten(-1, (2, 36))
            seen = [fused[..., 12 * place : 12 * place + 12].flatten(-2) for place in range(3)]
            seen = [seen[0] + projections.owner.q_bias, seen[1], seen[2] + projections.owner.v_bias]
        mask = inputs["attention_mask"].bool()
        for ours, theirs in zip(found.values(), seen):
            assert_close(ours[mask], theirs[mask], rtol=1e-5, atol=1e-6)
        again = model(**inputs, output_hidden_states=True).last_hidden_state
        assert torch.equal(again, whole), "the encoder is not what it was"


def test_every_encoder_of_ours_is_decided_on():
    configs = {get_paper(slug).config for slug in list_papers()}
    own = {config.model_type for config in configs if not issubclass(config, WrapperConfig)} - {
        "bestiary-electra",  # two encoders; the result is stock ELECTRA
        "bestiary-sparse-seq2seq",  # an LSTM; its extension is an encoder
    }
    assert own and own <= {*TYPES, *REFUSED}


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("model_type", REFUSED)
def test_refused_types(model_type, layer):
    """Whatever they would do otherwise: crash, or imitate what the layer does not compute."""
    model = encoder(model_type)
    with pytest.raises(
        ValueError, match=f"{type(model).__name__} does not project .* Projections are found in encoders such as"
    ):
        MiniLMv2ForPreTraining.from_encoder(model, num_relation_heads=4, student_layer=layer)
    student = MiniLMv2ForPreTraining.from_encoder(encoder("bert"), num_relation_heads=4, teacher_layer=layer)
    with pytest.raises(ValueError, match=f"{type(model).__name__} does not project"):
        student.attach_teacher(model)


def test_realformer_of_both_kinds_of_layer():
    config = encoder_config("bestiary-realformer", layers=3)
    for pre_norm in (False, True):
        config.pre_norm = pre_norm
        model = AutoModel.from_config(config)
        for layer in (1, 2, 3):
            assert probe(model, layer, gradients=True)


def test_probe_leaves_no_trace():
    model = encoder("bert").train()
    model.encoder.layer[0].eval()
    model.pooler.requires_grad_(False)
    model.config._attn_implementation = "flash_attention_2"  # does not run here
    modes = [part.training for part in model.modules()]
    flags = [value.requires_grad for value in model.parameters()]
    state = torch.get_rng_state()
    probe(model, 2, "qv", gradients=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in model.modules()] == modes
    assert [value.requires_grad for value in model.parameters()] == flags
    assert all(value.grad is None for value in model.parameters())
    assert model.config._attn_implementation == "flash_attention_2"
    assert not any(part._forward_hooks for part in model.modules())
    with torch.device("meta"):
        assert not can_probe(AutoModel.from_config(encoder_config("bert")))
    assert can_probe(model)


def test_forward_of_an_instance_is_kept():
    """As accelerate's hooks set it, on the layer whose output is replaced too."""
    model = encoder("bert", layers=3)
    calls = []
    for place in (1, 2):
        layer = layer_list(model)[place]
        plain = layer.forward
        layer.forward = lambda *args, plain=plain, place=place, **kw: calls.append(place) or plain(*args, **kw)
    project_at(model, 2, "q", text())
    assert not calls
    model(**text())
    assert calls == [1, 2]


@pytest.mark.parametrize("model_type", TYPES)
def test_layouts(model_type):
    """As teacher and as student: gradients reach what is not frozen and nothing else."""
    torch.manual_seed(0)
    teacher = encoder(model_type, layers=3, width=TEACHER_WIDTH)
    state = copy.deepcopy(teacher.state_dict())
    model = MiniLMv2ForPreTraining.from_teacher(
        teacher, encoder_config=dict(SIZES) if model_type != "distilbert" else _renamed(), num_relation_heads=HEADS
    )
    assert type(model.wrapped) is type(teacher) and model.config.teacher_layer == 3
    outputs = model(**text())
    outputs.loss.backward()
    assert outputs.loss > 0 and set(outputs) == {"loss", "qq_loss", "kk_loss", "vv_loss", "sequence_losses"}
    for name, parameter in model.wrapped.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        zero = ("key.bias", "k_lin.bias", "key_proj.bias")  # of lower layers: softmax does not see them
        assert parameter.grad is None or parameter.grad.any() or name.endswith(zero), name
    frozen = [name for name, value in model.wrapped.named_parameters() if not value.requires_grad]
    assert frozen and all("layer.1." in n or n.startswith(("pooler.", "LayerNorm.")) for n in frozen)
    assert all(value.grad is None for value in teacher.parameters())
    assert_close(teacher.state_dict(), state, rtol=0, atol=0)
    assert len(layer_list(teacher)) == 3, "the teacher that was given is copied"


def _renamed():
    return {name: value for name, value in SIZES.items() if name != "intermediate_size"} | {"hidden_dim": 20}


@pytest.mark.parametrize("student_type", ["bestiary-bert", "electra", "roberta", "distilbert"])
def test_student_of_another_family(student_type):
    """The same ids mean the same tokens; positions behind the padding id are made up for."""
    teacher = encoder("bert", width=TEACHER_WIDTH)
    sizes = _renamed() if student_type == "distilbert" else SIZES
    model = MiniLMv2ForPreTraining.from_teacher(
        teacher, encoder_config=sizes | {"model_type": student_type}, num_relation_heads=HEADS
    )
    theirs = model.config.encoder_config
    assert (theirs.model_type, theirs.vocab_size, theirs.pad_token_id) == (student_type, 99, 0)
    assert longest_input(theirs) == longest_input(teacher.config) == 18
    ids = torch.full((1, 18), 7)
    assert model(input_ids=ids).loss.isfinite()


def test_loss_is_zero_for_the_teacher_itself():
    teacher = encoder("bert", layers=3)
    for layer in (1, 2, 3):
        model = MiniLMv2ForPreTraining.from_encoder(
            copy.deepcopy(teacher), num_relation_heads=HEADS, student_layer=layer, teacher_layer=layer
        ).eval()
        model.attach_teacher(teacher)
        assert model(**text()).loss.abs() < 1e-6
        model.attach_teacher(encoder("bert", layers=3, seed=1))
        assert model(**text()).loss > 1e-3


def test_permuted_tokens():
    """Without positions the order of tokens has no part in the loss."""
    teacher, student = encoder("bert", width=TEACHER_WIDTH), encoder("bert", seed=1)
    with torch.no_grad():
        for model in (teacher, student):
            model.embeddings.position_embeddings.weight.zero_()
    model = MiniLMv2ForPreTraining.from_encoder(student, num_relation_heads=HEADS)
    model.attach_teacher(teacher)
    ids = text(1)["input_ids"]
    assert_close(model(input_ids=ids.flip(1)).loss, model(input_ids=ids).loss)


def test_only_the_needed_layers_of_the_teacher_run():
    teacher = encoder("bert", layers=4, width=TEACHER_WIDTH)
    runs = []
    model = MiniLMv2ForPreTraining.from_teacher(
        teacher, encoder_config=SIZES, num_relation_heads=HEADS, teacher_layer=3
    )
    layers = layer_list(model.teacher.encoder)
    assert len(layers) == 3
    for number, layer in enumerate((*layers, *layer_list(model.wrapped))):
        for part in ("attention.output", "output"):
            layer.get_submodule(part).register_forward_hook(lambda *_, number=number: runs.append(number))
    model(**text())
    assert runs == [0, 0, 1, 1, 3, 3]  # two layers of the teacher, one of the student
    runs.clear()
    model.wrapped(**text())
    assert runs == [3, 3, 4, 4]


def test_the_teacher_is_no_part_of_the_student(tmp_path):
    teacher = encoder("bert", width=TEACHER_WIDTH)
    model = MiniLMv2ForPreTraining.from_teacher(teacher, encoder_config=SIZES, num_relation_heads=HEADS).train()
    assert not model.teacher.training and not any(value.requires_grad for value in model.teacher.parameters())
    names = [name for name, _ in (*model.named_parameters(), *model.named_modules())]
    assert not any("teacher" in name or "attached" in name for name in names)
    assert set(model.state_dict()) == {f"model.bert.{name}" for name in model.wrapped.state_dict()}
    model.teacher.train()
    assert not any(part.training for part in model.teacher.modules())
    model.to_base().save_pretrained(tmp_path)
    loaded, report = BertModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()) and loaded.config.model_type == "bert"
    assert "teacher" not in (tmp_path / "config.json").read_text()


def test_freezing_is_undone_and_keeps_what_was_frozen_before():
    student = encoder("bert")
    student.embeddings.word_embeddings.weight.requires_grad_(False)
    student.pooler.dense.bias.requires_grad_(False)
    model = MiniLMv2ForPreTraining.from_encoder(student, num_relation_heads=HEADS, relation_weights={"qk": 1})
    frozen = {name for name, value in student.named_parameters() if not value.requires_grad}
    assert "encoder.layer.1.attention.self.value.weight" in frozen, "no relation has values"
    assert "encoder.layer.1.attention.self.key.weight" not in frozen and "pooler.dense.weight" in frozen
    model.to_base()
    left = {name for name, value in student.named_parameters() if not value.requires_grad}
    assert left == {"embeddings.word_embeddings.weight", "pooler.dense.bias"}
    model.freeze_unused()
    assert {name for name, value in student.named_parameters() if not value.requires_grad} == frozen


def test_earlier_student_layer_freezes_the_later_ones():
    model = MiniLMv2ForPreTraining.from_encoder(encoder("bert", layers=3), num_relation_heads=HEADS, student_layer=2)
    model.attach_teacher(encoder("bert", width=TEACHER_WIDTH))
    model(**text()).loss.backward()
    for name, value in model.wrapped.named_parameters():
        assert value.requires_grad == (value.grad is not None), name
        assert not ("layer.2." in name and value.requires_grad)


@pytest.mark.parametrize("model_type", ["deberta-v2", "deberta", "bestiary-tupe"])
def test_what_only_frozen_layers_use_is_frozen(model_type, tmp_path):
    """Such as tables of relative positions; also after loading, which makes every parameter trainable."""
    model = MiniLMv2ForPreTraining.from_encoder(encoder(model_type), num_relation_heads=HEADS, student_layer=1)
    teacher = encoder(model_type, width=TEACHER_WIDTH)
    model.save_pretrained(tmp_path)
    outside = set()
    for each in (model, MiniLMv2ForPreTraining.from_pretrained(tmp_path)):
        each.attach_teacher(teacher)
        each(**text()).loss.backward()
        for name, value in each.wrapped.named_parameters():
            assert value.requires_grad == (value.grad is not None), name
            if not value.requires_grad and "layer." not in name and "pooler" not in name:
                outside.add(name)
    assert outside
    if model_type == "deberta-v2":
        assert {"encoder.rel_embeddings.weight", "encoder.LayerNorm.weight", "encoder.conv.conv.weight"} <= outside
    assert all(value.requires_grad for value in model.to_base().parameters())


def test_teacher_follows_the_inputs():
    model = MiniLMv2ForPreTraining.from_encoder(encoder("bert"), num_relation_heads=HEADS)
    model.attach_teacher(encoder("bert", width=TEACHER_WIDTH))
    model.to("meta")
    assert model.teacher.encoder.device.type == "cpu"
    found = model._ask_teacher({"input_ids": text()["input_ids"].to("meta")})
    assert {*(part.device.type for part in found.values()), model.teacher.encoder.device.type} == {"meta"}
    model.attach_teacher(encoder("bert", width=TEACHER_WIDTH))
    assert model.teacher.encoder.device.type == "cpu", "weights are not thrown away for a model without"


@pytest.mark.parametrize("pair", PAIRS)
def test_every_relation(pair):
    """Left letter on the left of the product: against softmaxes written out."""
    teacher, student = encoder("bert", width=TEACHER_WIDTH), encoder("bert", seed=1)
    model = MiniLMv2ForPreTraining.from_encoder(student, num_relation_heads=1, relation_weights={pair: 2.0})
    model.attach_teacher(teacher)
    ids = text(1)["input_ids"]
    outputs = model(input_ids=ids)

    def relation(encoder):
        found = project_at(encoder, 2, "qkv", {"input_ids": ids})
        return (found[pair[0]] @ found[pair[1]].mT / encoder.config.hidden_size**0.5).softmax(-1)

    theirs, ours = relation(teacher), relation(student)
    expected = (theirs * (theirs.log() - ours.log())).sum(-1).mean()
    assert_close(outputs[f"{pair}_loss"], expected, rtol=1e-4, atol=1e-6)
    assert_close(outputs.loss, 2 * expected, rtol=1e-4, atol=1e-6)


# ---- students for a teacher


def test_first_layers():
    teacher = encoder("bert", layers=3)
    settings = {"num_relation_heads": HEADS, "student_init": "first_layers"}
    model = MiniLMv2ForPreTraining.from_teacher(teacher, encoder_config=SIZES, **settings)
    theirs = teacher.state_dict()
    own = model.wrapped.state_dict()
    assert_close(own, {name: theirs[name] for name in own}, rtol=0, atol=0)
    own["encoder.layer.0.output.dense.weight"].zero_()
    assert theirs["encoder.layer.0.output.dense.weight"].any()
    with pytest.raises(ValueError, match="student_init='first_layers' needs a student of the teacher's type"):
        MiniLMv2ForPreTraining.from_teacher(teacher, encoder_config=SIZES | {"hidden_size": 48}, **settings)


def test_student_takes_what_it_reads_from_the_teacher(tmp_path):
    teacher = RobertaConfig(vocab_size=77, max_position_embeddings=66, type_vocab_size=1, layer_norm_eps=1e-5)
    teacher.save_pretrained(tmp_path)
    config = MiniLMv2Config.from_teacher(str(tmp_path))
    student = config.encoder_config
    assert (student.model_type, student.vocab_size, student.max_position_embeddings) == ("roberta", 77, 66)
    assert (student.type_vocab_size, student.layer_norm_eps, student.pad_token_id) == (1, 1e-5, 1)
    assert (student.num_hidden_layers, student.hidden_size, student.intermediate_size) == (6, 384, 1536)
    assert (config.teacher, config.teacher_layer, config.student_layer) == (str(tmp_path), 12, 6)
    other = MiniLMv2Config.from_teacher(teacher, {"model_type": "bert", "hidden_size": 96, "intermediate_size": 7})
    assert (other.max_position_embeddings, other.intermediate_size, longest_input(teacher)) == (64, 7, 64)


@pytest.mark.parametrize(
    ("model_type", "layers", "width", "expected", "heads"),
    [
        ("bert", 12, 768, 12, 48),
        ("bert", 24, 1024, 21, 64),
        ("roberta", 24, 1024, 19, 64),
        ("xlm-roberta", 24, 1024, 19, 64),
        ("electra", 24, 1024, 24, 64),
        ("bert", 6, 384, 6, 48),
    ],
)
def test_the_papers_layers_and_heads(model_type, layers, width, expected, heads):
    teacher = AutoConfig.for_model(model_type, num_hidden_layers=layers, hidden_size=width, num_attention_heads=16)
    assert paper_teacher_layer(teacher) == expected
    config = MiniLMv2Config.from_teacher(teacher)
    assert (config.teacher_layer, config.num_relation_heads) == (expected, heads)
    assert MiniLMv2Config.from_teacher(teacher, teacher_layer=2, num_relation_heads=32).teacher_layer == 2


@pytest.mark.parametrize(
    ("teacher", "settings", "message"),
    [
        ({}, {"num_relation_heads": 36}, "num_relation_heads must be a divisor of the student's hidden_size=384"),
        ({"hidden_size": 60}, {}, "num_relation_heads must be a divisor of the teacher's hidden_size=60, got 48"),
        ({}, {"teacher_layer": 13}, "teacher_layer must be in 1..12"),
        ({}, {"encoder_config": {"hiden_size": 48}}, "did you mean 'hidden_size'"),
        ({}, {"encoder_config": {"model_type": "brt"}}, "no encoder type 'brt'"),
        ({}, {"encoder_config": BertConfig(vocab_size=5, hidden_size=48)}, "vocab_size=30522, the student 5"),
    ],
)
def test_refused_students(teacher, settings, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        MiniLMv2Config.from_teacher(BertConfig(**teacher), **settings)


def test_refused_models(tmp_path):
    config = MiniLMv2Config(encoder_config=STUDENT, num_relation_heads=HEADS)
    model = MiniLMv2ForPreTraining(config)
    with pytest.raises(ValueError, match="no teacher at .*nowhere"):
        model.attach_teacher(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="MiniLMv2Config.teacher=.*nowhere"):
        MiniLMv2Config.from_teacher(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="either config or single settings, got config and teacher_layer"):
        MiniLMv2ForPreTraining.from_teacher(encoder("bert"), config, teacher_layer=1)
    with pytest.raises(ValueError, match="needs the teacher's projections q, k, v for the relations .* got q"):
        model(input_ids=torch.ones(1, 3).long(), teacher_query=torch.zeros(1, 3, 48))
    albert = AutoModel.from_config(AutoConfig.for_model("albert", hidden_size=24, num_attention_heads=2))
    with pytest.raises(ValueError, match="AlbertModel has no lists? of 12 layers"):
        MiniLMv2ForPreTraining.from_encoder(albert, num_relation_heads=HEADS)
    plain = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Linear has no query, key and value projections"):
        LayerProjections(plain)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_of_both_kinds(reentrant):
    model = MiniLMv2ForPreTraining.from_encoder(encoder("bert"), num_relation_heads=HEADS).train()
    model.attach_teacher(encoder("bert", width=TEACHER_WIDTH))
    expected = gradients(model, **text())
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    assert_close(gradients(model, **text()), expected)


def test_teacher_of_any_class(tmp_path):
    """A masked language model, a folder of one, and a distilled student that was not unwrapped."""
    config = encoder_config("bert", width=TEACHER_WIDTH)
    torch.manual_seed(0)
    teacher = AutoModelForMaskedLM.from_config(config).eval()
    teacher.save_pretrained(tmp_path / "plain")
    wrapped = MiniLMv2Model(MiniLMv2Config.from_encoder(config), copy.deepcopy(teacher.bert))
    wrapped.save_pretrained(tmp_path / "wrapped")
    made = MiniLMv2ForPreTraining.from_teacher(tmp_path / "plain", encoder_config=SIZES, num_relation_heads=HEADS)
    assert made.config.teacher == str(tmp_path / "plain") and made.teacher.layer == 2
    model = MiniLMv2ForPreTraining.from_encoder(encoder("bert"), num_relation_heads=HEADS)
    losses = []
    for each in (teacher, tmp_path / "plain", tmp_path / "wrapped", wrapped):
        model.attach_teacher(each)
        losses.append(model(**text()).loss.item())
    assert losses == pytest.approx([losses[0]] * 4) and losses[0] > 0
    model.attach_teacher(teacher, dtype=torch.bfloat16)
    assert model.teacher.encoder.dtype == torch.bfloat16 and teacher.dtype == torch.float32
    assert model(**text()).loss.item() == pytest.approx(losses[0], rel=0.05)
    assert minilmv2.load_encoder(teacher) is not teacher.bert
