"""Conversion of official checkpoints: names, strict loading, reading that runs no code, nothing half-done."""

import json
import os
import re
import shlex
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForPreTraining, AutoTokenizer, BertConfig, ElectraConfig

from bestiary import conversion
from bestiary.configuration.configuration_bert import BertPretrainingConfig
from bestiary.configuration.configuration_electra import ElectraJointConfig
from bestiary.conversion import bert, convert_checkpoint, electra, load_strictly, read_checkpoint, read_config
from bestiary.modeling.modeling_bert import BertPretrainingForPreTraining
from bestiary.modeling.modeling_electra import ElectraJointForPreTraining


SIZES = {
    "vocab_size": 30,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
}
LAYER = {
    "attention/self/query/kernel": (12, 12),
    "attention/self/query/bias": (12,),
    "attention/self/key/kernel": (12, 12),
    "attention/self/key/bias": (12,),
    "attention/self/value/kernel": (12, 12),
    "attention/self/value/bias": (12,),
    "attention/output/dense/kernel": (12, 12),
    "attention/output/dense/bias": (12,),
    "attention/output/LayerNorm/gamma": (12,),
    "attention/output/LayerNorm/beta": (12,),
    "intermediate/dense/kernel": (12, 20),
    "intermediate/dense/bias": (20,),
    "output/dense/kernel": (20, 12),
    "output/dense/bias": (12,),
    "output/LayerNorm/gamma": (12,),
    "output/LayerNorm/beta": (12,),
}
OFFICIAL_BERT = {  # as the note of the paper has it
    "bert/embeddings/word_embeddings": (30, 12),
    "bert/embeddings/position_embeddings": (16, 12),
    "bert/embeddings/token_type_embeddings": (2, 12),
    "bert/embeddings/LayerNorm/gamma": (12,),
    "bert/embeddings/LayerNorm/beta": (12,),
    **{f"bert/encoder/layer_{layer}/{name}": shape for layer in (0, 1) for name, shape in LAYER.items()},
    "bert/pooler/dense/kernel": (12, 12),
    "bert/pooler/dense/bias": (12,),
    "cls/predictions/transform/dense/kernel": (12, 12),
    "cls/predictions/transform/dense/bias": (12,),
    "cls/predictions/transform/LayerNorm/gamma": (12,),
    "cls/predictions/transform/LayerNorm/beta": (12,),
    "cls/predictions/output_bias": (30,),
    "cls/seq_relationship/output_weights": (2, 12),
    "cls/seq_relationship/output_bias": (2,),
}
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij", "##a", "##b", "the"]
INPUTS = {
    "input_ids": torch.tensor([[2, 7, 9, 4, 3, 11, 3], [2, 8, 3, 12, 3, 0, 0]]),
    "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2]),
    "token_type_ids": torch.tensor([[0] * 5 + [1] * 2, [0] * 3 + [1] * 2 + [0] * 2]),
}


def randomised(model, seed=0):
    """The model with other numbers in every parameter, LayerNorms and biases included."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)
    return model.eval()


def official_bert():
    draw = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=draw) * 0.2 for name, shape in OFFICIAL_BERT.items()}


def official_electra(**options):
    """A joint model and its tensors by official names."""
    model = randomised(ElectraJointForPreTraining(joint_config(**options)))
    state = {}
    for key, parameter in model.named_parameters():
        name = electra.official_name(key)
        state[name] = (parameter.T if name.endswith("/kernel") else parameter).detach().contiguous()
    return model, state


def joint_config(**options):
    ours = SIZES | {"num_attention_heads": 1, "embedding_size": 8}
    theirs = ours | {"hidden_size": 6, "intermediate_size": 10, "num_hidden_layers": 1}
    return ElectraJointConfig(discriminator_config=ours, generator_config=theirs, **options)


@pytest.fixture
def official_folder(tmp_path):
    """An official BERT download turned into npz, with optimizer slots and a step counter."""
    folder = tmp_path / "uncased_L-2"
    folder.mkdir()
    state = official_bert()
    slots = {f"{name}/adam_{slot}": tensor for name, tensor in state.items() for slot in "mv"}
    arrays = {name: tensor.numpy() for name, tensor in (state | slots).items()}
    np.savez(folder / "bert_model.npz", global_step=np.int64(7), **arrays)
    (folder / "bert_config.json").write_text(json.dumps(SIZES | {"hidden_act": "gelu", "directionality": "bidi"}))
    (folder / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    return folder


# ------------------------------------------------------------------------------------------------------ BERT, by names


def test_official_bert_becomes_a_folder_that_loads(official_folder, tmp_path):
    out = tmp_path / "made" / "bert"
    assert convert_checkpoint("bert", official_folder, out) == out
    model, report = AutoModelForPreTraining.from_pretrained(out, output_loading_info=True)
    assert type(model) is BertPretrainingForPreTraining and not any(report.values())
    official, ours = official_bert(), model.state_dict()
    assert torch.equal(
        ours["bert.encoder.layer.1.output.dense.weight"], official["bert/encoder/layer_1/output/dense/kernel"].T
    )
    assert torch.equal(ours["cls.seq_relationship.weight"], official["cls/seq_relationship/output_weights"])
    assert torch.equal(ours["cls.predictions.bias"], official["cls/predictions/output_bias"])
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("A the BA")["input_ids"] == [2, 5, 17, 6, 15, 3]  # "ba" -> "b", "##a"
    assert tokenizer.model_max_length == 16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "uncased_L-2"]


def test_official_bert_is_the_model_that_transformers_makes_of_it():
    """The same tensors put into transformers' class by hand, tensor by tensor."""
    official = official_bert()
    ours = bert.convert(official, SIZES)
    stock = transformers.BertForPreTraining(BertConfig(**SIZES)).eval()
    renamed = {}
    for name, tensor in official.items():
        key = name.replace("/", ".").replace("layer_", "layer.").replace("kernel", "weight")
        key = key.replace("gamma", "weight").replace("beta", "bias").replace("output_", "")
        key = key.replace("weights", "weight") + (".weight" if key.endswith("_embeddings") else "")
        renamed[key] = tensor.T if name.endswith("kernel") else tensor
    assert not stock.load_state_dict(renamed, strict=False).unexpected_keys
    stock.tie_weights()
    with torch.no_grad():
        expected, found = stock(**INPUTS), ours(**INPUTS)
    torch.testing.assert_close(found.prediction_logits, expected.prediction_logits)
    torch.testing.assert_close(found.seq_relationship_logits, expected.seq_relationship_logits)


@pytest.mark.parametrize(
    ("stock", "ours"),
    [
        ("BertForPreTraining", "BertPretrainingForPreTraining"),
        ("BertForMaskedLM", "BertPretrainingForMaskedLM"),
        ("BertForNextSentencePrediction", "BertPretrainingForNextSentencePrediction"),
        ("BertModel", "BertPretrainingModel"),
    ],
)
def test_stock_checkpoints_give_the_class_that_fits(stock, ours, tmp_path):
    model = randomised(getattr(transformers, stock)(BertConfig(**SIZES, hidden_act="gelu_new")))
    model.save_pretrained(tmp_path / "stock")
    converted = bert.convert(read_checkpoint(tmp_path / "stock"), read_config(tmp_path / "stock"))
    assert type(converted).__name__ == ours
    assert isinstance(converted.config, BertPretrainingConfig) and converted.config.hidden_act == "gelu_new"
    with torch.no_grad():
        for found, expected in zip(converted(**INPUTS).to_tuple(), model(**INPUTS).to_tuple(), strict=True):
            torch.testing.assert_close(found, expected)


def test_old_names_and_a_masked_lm_with_a_useless_pooler(tmp_path):
    model = randomised(transformers.BertForPreTraining(BertConfig(**SIZES)))
    state = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in model.state_dict().items()
        if "seq_relationship" not in name
    }
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "a.pt"
    )
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    converted = bert.convert(read_checkpoint(tmp_path / "a.pt"), read_config(tmp_path / "a.pt"))
    assert type(converted).__name__ == "BertPretrainingForMaskedLM"
    with torch.no_grad():
        torch.testing.assert_close(converted(**INPUTS).logits, model(**INPUTS).prediction_logits)


def test_bert_needs_to_be_told_the_heads_and_takes_the_rest_from_the_tensors():
    config = bert.convert(official_bert(), {"num_attention_heads": 4}).config
    assert {name: getattr(config, name) for name in SIZES} == SIZES | {"num_attention_heads": 4}
    with pytest.raises(ValueError, match="num_attention_heads is not given.*bert_config.json"):
        bert.convert(official_bert(), {"hidden_size": 12})


# --------------------------------------------------------------------------------------------------- ELECTRA, by names


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_generator_embeddings": False},
        {"untied_generator": False},
        {"uniform_generator": True},
        {"objective": "mlm"},
    ],
    ids=str,
)
def test_official_electra_comes_back(options):
    model, state = official_electra(**options)
    shared = {"uniform_generator": True} if "uniform_generator" in options else {}
    given = shared | ({"electra_objective": False} if "objective" in options else {})
    converted = electra.convert(state | {"global_step": torch.tensor(3)}, given)
    assert converted.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(converted.state_dict()[name], tensor), name
    assert all(getattr(converted.config, name) == value for name, value in options.items())


def test_electra_without_a_configuration_follows_the_official_code(tmp_path):
    sizes = SIZES | {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 24}
    theirs = sizes | {"hidden_size": 72, "num_attention_heads": 1, "num_hidden_layers": 3}
    config = ElectraJointConfig(
        discriminator_config=sizes | {"embedding_size": 8}, generator_config=theirs | {"embedding_size": 8}
    )
    state = {}
    for key, parameter in randomised(ElectraJointForPreTraining(config)).named_parameters():
        name = electra.official_name(key)
        state[name] = (parameter.T if name.endswith("/kernel") else parameter).detach().contiguous()
    save_file(state, tmp_path / "model.safetensors")
    convert_checkpoint("electra", tmp_path / "model.safetensors", tmp_path / "out")
    made = AutoModelForPreTraining.from_pretrained(tmp_path / "out").config
    for part, expected in (("discriminator", sizes), ("generator", theirs)):
        found = getattr(made, f"{part}_config").to_dict() | {"num_labels": 2}
        assert {name: found[name] for name in expected} == expected
        assert found["embedding_size"] == 8 and found["hidden_act"] == "gelu" and found["layer_norm_eps"] == 1e-12


def test_official_options_are_understood():
    _, state = official_electra()
    options = {"gen_weight": 0.5, "disc_weight": 20.0, "temperature": 0.7, "disallow_correct": True, "mask_prob": 0.15}
    config = electra.convert(state, options).config
    assert (config.generator_loss_weight, config.discriminator_loss_weight) == (0.5, 20.0)
    assert config.sampling_temperature == 0.7 and config.disallow_correct
    config = electra.convert(state, {"hidden_dropout_prob": 0.3, "generator": {"hidden_dropout_prob": 0.2}}).config
    assert config.discriminator_config.hidden_dropout_prob == 0.3
    assert config.generator_config.hidden_dropout_prob == 0.2
    with pytest.raises(ValueError, match="num_atention_heads.*num_attention_heads"):
        electra.convert(state, {"generator": {"num_atention_heads": 2}})


@pytest.mark.parametrize("shared", [True, False])
def test_a_pair_of_stock_checkpoints_becomes_one_model(shared, tmp_path):
    sizes = SIZES | {"embedding_size": 8}
    discriminator = randomised(transformers.ElectraForPreTraining(ElectraConfig(**sizes)))
    generator = randomised(transformers.ElectraForMaskedLM(ElectraConfig(**sizes | {"hidden_size": 6})), seed=1)
    if shared:
        generator.electra.embeddings.load_state_dict(discriminator.electra.embeddings.state_dict())
    discriminator.save_pretrained(tmp_path / "pair" / "discriminator")
    generator.save_pretrained(tmp_path / "pair" / "generator")
    (tmp_path / "pair" / "discriminator" / "vocab.txt").write_text("\n".join(PIECES))
    convert_checkpoint("electra", tmp_path / "pair", tmp_path / "out")
    joint = AutoModelForPreTraining.from_pretrained(tmp_path / "out")
    assert joint.config.tie_generator_embeddings is shared
    assert AutoTokenizer.from_pretrained(tmp_path / "out").mask_token_id == 4
    with torch.no_grad():
        torch.testing.assert_close(joint.to_discriminator()(**INPUTS).logits, discriminator(**INPUTS).logits)
        torch.testing.assert_close(joint.to_generator()(**INPUTS).logits, generator(**INPUTS).logits)
    with pytest.raises(ValueError, match="this is a generator alone.*sub-folders discriminator and generator"):
        convert_checkpoint("electra", tmp_path / "pair" / "generator", tmp_path / "half")
    assert not (tmp_path / "half").exists()


# ---------------------------------------------------------------------------------------------- what does not fit


def spoiled(paper):
    """A checkpoint with two tensors missing, two extra and two of another shape, and what the message must name."""
    state = official_bert() if paper == "bert" else official_electra()[1]
    scope = "bert" if paper == "bert" else "generator"
    missing = [
        f"{scope}/encoder/layer_0/attention/self/query/kernel",
        f"{scope}/encoder/layer_0/output/LayerNorm/gamma",
    ]
    shapes = [f"{scope}/encoder/layer_0/intermediate/dense/kernel", f"{scope}/encoder/layer_0/attention/self/key/bias"]
    for name in missing:
        del state[name]
    wrong = []
    for name in shapes:
        right = list(state[name].shape)
        state[name] = torch.zeros([right[0] + 1, *right[1:]])
        wrong.append(f"{name} is {list(state[name].shape)}, must be {right}")
    extra = ["output_weights", f"{scope}/encoder/layer_9/output/dense/bias"]
    state |= {name: torch.zeros(2) for name in extra}
    return state, missing, extra, wrong


@pytest.mark.parametrize("paper", ["bert", "electra"])
def test_everything_that_does_not_fit_is_named_and_nothing_is_written(paper, tmp_path):
    state, missing, extra, wrong = spoiled(paper)
    config = SIZES if paper == "bert" else joint_config()
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="does not fit") as caught:
        convert_checkpoint(paper, tmp_path, tmp_path / "deep" / "out", config)
    lines = {re.sub(r"^\d+ ", "", line).split(":")[0]: line for line in str(caught.value).splitlines()}
    for what, names in (("missing", missing), ("extra", extra), ("of another shape", wrong)):
        assert lines[what].startswith("2 ") and all(name in lines[what] for name in names), (what, lines)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_model_is_loaded_whole_or_not_at_all():
    model = randomised(BertPretrainingForPreTraining(BertPretrainingConfig(**SIZES)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {name: torch.ones_like(tensor) for name, tensor in before.items()}
    load_strictly(model, state)
    assert all((tensor == 1).all() for tensor in model.state_dict().values())
    state["cls.predictions.decoder.weight"] = torch.zeros(30, 12)
    other = {name: tensor * 2 for name, tensor in state.items()}
    with pytest.raises(ValueError, match="contradictory.*decoder.weight != bert.embeddings.word_embeddings.weight"):
        load_strictly(model, other)
    assert all((tensor == 1).all() for tensor in model.state_dict().values())
    del state["bert.embeddings.word_embeddings.weight"]
    load_strictly(model, state)  # any one of the tied names will do
    assert (model.bert.embeddings.word_embeddings.weight == 0).all()


def test_many_names_are_still_all_named():
    with pytest.raises(ValueError) as caught:
        bert.convert(official_bert(), SIZES | {"num_hidden_layers": 5})
    message = str(caught.value)
    assert "48 missing: " in message
    assert all(f"bert/encoder/layer_{{2,3,4}}/{name}" in message for name in LAYER)
    assert "num_hidden_layers is 5 in the configuration and 2 in the tensors" in message


@pytest.mark.parametrize(
    ("field", "value"), [("vocab_size", 31), ("hidden_size", 24), ("intermediate_size", 8), ("type_vocab_size", 4)]
)
def test_a_configuration_of_other_sizes_is_explained(field, value):
    with pytest.raises(ValueError, match=f"bert: {field} is {value} in the configuration and {SIZES[field]} in the"):
        bert.convert(official_bert(), SIZES | {field: value})
    _, state = official_electra()
    sizes = SIZES | {"num_attention_heads": 1, "embedding_size": 8}
    with pytest.raises(
        ValueError, match=f"discriminator: {field} is {value} in the configuration and {sizes[field]} in"
    ):
        electra.convert(
            state, {"discriminator": {field: value}, "generator": {} if "hidden" in field else {field: value}}
        )


def test_a_fine_tuned_checkpoint_is_refused(tmp_path):
    transformers.BertForSequenceClassification(BertConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="2 extra: classifier.bias, classifier.weight"):
        bert.convert(read_checkpoint(tmp_path), read_config(tmp_path))


@pytest.mark.parametrize(
    ("slug", "names", "looks"),
    [
        ("bert", ["electra/encoder/layer_0/attention/self/key/bias"], "the paper 'electra'"),
        ("electra", ["bert/encoder/layer_0/attention/self/key/bias"], "the paper 'bert'"),
        ("bert", ["bert/encoder/transformer/group_0/inner_group_0/attention_1/self/key/bias"], "ALBERT"),
        ("bert", ["roberta.encoder.layer.0.attention.self.key.bias"], "RoBERTa"),
        ("electra", ["encoder.block.0.layer.0.SelfAttention.q.weight"], "T5"),
        ("bert", ["conv1.weight"], "none that is known. Its names begin with conv1.weight"),
    ],
)
def test_a_checkpoint_of_another_paper_is_recognised(slug, names, looks, tmp_path):
    save_file({name: torch.zeros(2) for name in names}, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=f"no official checkpoint of the paper '{slug}'; it looks like .*{re.escape(looks)}"
    ):
        convert_checkpoint(slug, tmp_path, tmp_path / "out", SIZES)
    assert not (tmp_path / "out").exists()


def test_the_configuration_too_tells_another_paper(official_folder, tmp_path):
    out = convert_checkpoint("bert", official_folder, tmp_path / "out")
    with pytest.raises(ValueError, match="model_type 'bestiary-bert': it is a bestiary checkpoint of 'bert' already"):
        convert_checkpoint("bert", out, tmp_path / "again")
    # the layers of a bare encoder have the same names in BERT and RoBERTa
    transformers.RobertaModel(transformers.RobertaConfig(**SIZES)).save_pretrained(tmp_path / "roberta")
    with pytest.raises(ValueError, match="model_type 'roberta'"):
        convert_checkpoint("bert", tmp_path / "roberta", tmp_path / "again")
    with pytest.raises(ValueError, match="model_type 'electra', for which there is `bestiary convert electra`"):
        bert.convert(official_bert(), SIZES | {"model_type": "electra"})
    with pytest.raises(ValueError, match="No paper 'brt' is registered; there are .*bert"):
        convert_checkpoint("brt", official_folder, tmp_path / "again")
    assert not (tmp_path / "again").exists()


# ------------------------------------------------------------------------------------------------------------- reading


class Harmful:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("name", ["a.pt", "a.bin", "a.pth", "a.npz"])
def test_pickled_code_is_refused_and_not_run(name, tmp_path):
    marker, file = tmp_path / "code_ran", tmp_path / name
    if name.endswith(".npz"):
        np.savez(file, weight=np.array([Harmful(marker)], dtype=object))
    else:
        torch.save({"weight": torch.ones(2), "args": Harmful(marker)}, file)
    with pytest.raises(ValueError, match=f"{name}.*(are refused|weight cannot be read)"):
        read_checkpoint(file)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["a.safetensors", "a.npz", "a.pt", "a.bin", "a.ckpt"])
@pytest.mark.parametrize("content", [b"", b"no checkpoint at all", b"PK\x03\x04 cut off"])
def test_a_damaged_file_is_named(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(name)):
        read_checkpoint(tmp_path / name)


def test_what_cannot_be_a_tensor_is_named(tmp_path):
    np.savez(tmp_path / "a.npz", fine=np.ones(2), words=np.array(["text"]))
    with pytest.raises(ValueError, match=r"a.npz: words cannot be read"):
        read_checkpoint(tmp_path / "a.npz")
    torch.save({"epoch": 3}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="a.pt holds no tensors"):
        read_checkpoint(tmp_path / "a.pt")
    with pytest.raises(FileNotFoundError, match="no checkpoint .*nowhere"):
        read_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "given", ["", "bert_model.ckpt", "bert_model.ckpt.index", "bert_model.ckpt.data-00000-of-00001"]
)
def test_tensorflow_files_come_with_the_commands_that_turn_them_into_npz(given, tmp_path, monkeypatch):
    for suffix in ("index", "meta", "data-00000-of-00001"):
        (tmp_path / f"bert_model.ckpt.{suffix}").write_bytes(b"\x00")
    with pytest.raises(ValueError, match="only TensorFlow reads") as caught:
        read_checkpoint(tmp_path / given)
    python, option, code = shlex.split(re.search(r'python -c "[^"]*"', str(caught.value))[0])
    reader = SimpleNamespace(
        get_variable_to_shape_map=lambda: {"bert/pooler/dense/kernel": [2, 3], "global_step": []},
        get_tensor=lambda name: np.int64(5) if name == "global_step" else np.arange(6.0).reshape(2, 3),
    )
    opened = []
    train = SimpleNamespace(load_checkpoint=lambda prefix: opened.append(prefix) or reader)
    monkeypatch.setitem(sys.modules, "tensorflow", SimpleNamespace(train=train))
    monkeypatch.chdir(tmp_path)
    exec(code, {})  # what the user is told to run, with TensorFlow replaced
    assert opened == ["bert_model.ckpt"]
    state = read_checkpoint(tmp_path)  # of all files, the npz alone can be read
    assert state["bert/pooler/dense/kernel"].tolist() == [[0, 1, 2], [3, 4, 5]] and state["global_step"] == 5


def test_folders(tmp_path):
    tensors = {"a": torch.ones(2), "b": torch.zeros(3)}
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    for name, file in index["weight_map"].items():
        save_file({name: tensors[name]}, tmp_path / file)
    with pytest.raises(ValueError, match="several files with weights, one.safetensors, two.safetensors"):
        read_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        assert read_checkpoint(path).keys() == tensors.keys()
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(ValueError, match="names the file 'two.safetensors', which is not beside it"):
        read_checkpoint(tmp_path)
    (tmp_path / "inner").mkdir()
    outside = {"weight_map": {"a": "../one.safetensors"}}
    (tmp_path / "inner" / "model.safetensors.index.json").write_text(json.dumps(outside))
    with pytest.raises(ValueError, match="which is not beside it"):
        read_checkpoint(tmp_path / "inner")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no weights"):
        read_checkpoint(tmp_path / "empty")
    torch.save(tensors, tmp_path / "empty" / "weights.pt")
    for name in ("training_args.bin", "optimizer.pt", "rng_state_0.pth"):
        (tmp_path / "empty" / name).write_bytes(b"")
    assert read_checkpoint(tmp_path / "empty").keys() == tensors.keys()


# ------------------------------------------------------------------------------------------------------------- writing


def test_a_folder_with_something_in_it_is_left_alone(official_folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="out exists and is no empty folder"):
        convert_checkpoint("bert", official_folder, out)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    (out / "notes.txt").unlink()
    convert_checkpoint("bert", official_folder, out)
    assert (out / "model.safetensors").is_file()


def test_a_save_that_breaks_off_leaves_nothing(official_folder, tmp_path, monkeypatch):
    def full(self, folder, **kwargs):
        (folder / "tokenizer.json").write_text("half")
        raise OSError("No space left on device")

    monkeypatch.setattr(conversion.BertTokenizer, "save_pretrained", full)
    with pytest.raises(OSError, match="No space"):
        convert_checkpoint("bert", official_folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [official_folder.name]


def test_bad_configurations_and_tokenizers_write_nothing(official_folder, tmp_path):
    convert = conversion.convert_checkpoint
    with pytest.raises(FileNotFoundError, match="no configuration .*nowhere.json"):
        convert("bert", official_folder, tmp_path / "out", tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match="num_attention_heads must be a divisor of hidden_size=12, got 5"):
        convert("bert", official_folder, tmp_path / "out", SIZES | {"num_attention_heads": 5})
    with pytest.raises(ValueError, match="expected int, got str"):
        convert("bert", official_folder, tmp_path / "out", SIZES | {"num_attention_heads": "3"})
    (official_folder / "vocab.txt").write_text("\n".join(PIECES + [f"w{number}" for number in range(30)]))
    with pytest.raises(ValueError, match="has 48 tokens, but vocab_size of the model is 30"):
        convert("bert", official_folder, tmp_path / "out")
    (official_folder / "bert_config.json").write_text("{")
    with pytest.raises(ValueError, match="bert_config.json is no JSON file"):
        convert("bert", official_folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [official_folder.name]


def test_a_vocabulary_with_capitals_keeps_case(official_folder, tmp_path):
    (official_folder / "vocab.txt").write_text("\n".join([*PIECES, "The"]))
    convert_checkpoint("bert", official_folder, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").tokenize("The the") == ["The", "the"]


def test_a_saved_tokenizer_comes_along(official_folder, tmp_path):
    (official_folder / "vocab.txt").unlink()
    pieces = {piece: index for index, piece in enumerate(PIECES)}
    transformers.BertTokenizer(pieces, do_lower_case=False, model_max_length=9).save_pretrained(official_folder)
    convert_checkpoint("bert", official_folder, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.model_max_length == 9 and tokenizer.tokenize("the THE") == ["the", "[UNK]"]


def test_weights_of_other_types_are_converted(tmp_path):
    half = {name: tensor.half() for name, tensor in official_bert().items()}
    save_file(half, tmp_path / "model.safetensors")
    model = bert.convert(load_file(tmp_path / "model.safetensors"), SIZES)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.cls.predictions.bias, half["cls/predictions/output_bias"].float())
