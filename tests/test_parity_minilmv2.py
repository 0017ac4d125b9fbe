"""MiniLMv2 against numbers from the third-party bloomberg/minilmv2.bb.

Tolerance 1e-5 (see suites/parity.py for the measure); the paper note re-derived the losses to 1e-7.
"""

import pytest
import torch
from safetensors.torch import save_file
from suites.parity import Comparison, Record
from transformers import AutoConfig, PreTrainedModel

from bestiary.configuration.configuration_minilmv2 import PAIRS, MiniLMv2Config
from bestiary.modeling.layers.wrapping import layer_list
from bestiary.modeling.modeling_minilmv2 import MiniLMv2ForPreTraining, load_encoder


@pytest.fixture
def record(parity_dir):
    return Record.load(parity_dir("minilmv2"))


def encoder_of(record: Record, part: str, folder) -> PreTrainedModel:
    """A plain model of transformers, through a folder, as a user has it. Fields common to both stand at the top."""
    known = {name: value for name, value in record.config.items() if not isinstance(value, dict | list)}
    known |= record.config[part]
    model_type = known.pop("model_type", None) or ("roberta" if known.get("pad_token_id") == 1 else "bert")
    stock = AutoConfig.for_model(model_type)
    fields = {name: value for name, value in known.items() if name in stock.to_dict()}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    AutoConfig.for_model(model_type, **fields | dropout).save_pretrained(folder)
    prefix = f"{part}."
    state = {name.removeprefix(prefix): value for name, value in record.weights.items() if name.startswith(prefix)}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return load_encoder(folder)


@pytest.fixture
def make_model(record, tmp_path):
    (tmp_path / "student").mkdir(), (tmp_path / "teacher").mkdir()
    teacher, student = encoder_of(record, "teacher", tmp_path / "teacher"), tmp_path / "student"
    encoder_of(record, "student", student)

    def make(weights=None):
        names = ("num_relation_heads", "teacher_layer", "student_layer")
        settings = {name: record.config[name] for name in names if name in record.config}
        config = MiniLMv2Config.from_encoder(AutoConfig.from_pretrained(student), **settings, relation_weights=weights)
        model = MiniLMv2ForPreTraining.from_encoder(student, config).train()
        model.attach_teacher(teacher)
        return model

    return make


def relations_of(record: Record) -> list[str]:
    """Names of the relations whose losses are recorded one by one."""
    return [name for name in PAIRS if f"loss_{name}" in record.outputs]


@torch.no_grad()
def test_states(record, make_model):
    model = make_model()
    with Comparison(record) as compare:
        for part, encoder in (("teacher", model.teacher.encoder), ("student", model.wrapped)):
            layer = (model.teacher.layer if part == "teacher" else model.config.student_layer) - 1
            found = []
            hook = layer_list(encoder)[layer].register_forward_pre_hook(
                lambda module, args, found=found: found.append(args[0])
            )
            encoder(**record.inputs)
            hook.remove()
            compare(f"{part}_layer_input_hidden", found[0], where=record.inputs["attention_mask"])


def test_losses_and_gradients(record, make_model):
    model = make_model()
    outputs = model(**record.inputs)
    outputs.loss.backward()
    gradients = {name: value.grad for name, value in model.wrapped.named_parameters()}
    with Comparison(record) as compare:
        compare("loss_total", outputs.loss)
        for pair in relations_of(record):
            every = make_model({pair: 1.0})(**record.inputs)
            compare(f"loss_{pair}", every[f"{pair}_loss"])
            if outputs.get(f"{pair}_loss") is not None:
                compare(f"loss_{pair}", outputs[f"{pair}_loss"])
        for name in record.outputs:
            if name.startswith("grad."):
                compare(name, gradients[name.removeprefix("grad.")])
        compare.remind(skip=lambda name: name.endswith("_layer_input_hidden"))


def test_parameters_without_gradient(record, make_model):
    model = make_model()
    frozen = {name for name, value in model.wrapped.named_parameters() if not value.requires_grad}
    recorded = {name.removeprefix("student.") for name in record.weights}  # not always with the pooler
    assert frozen & recorded == recorded & set(record.config["student_parameters_without_gradient"])
    model(**record.inputs).loss.backward()
    without = {name for name, value in model.wrapped.named_parameters() if value.grad is None}
    assert without == frozen
    assert all(value.requires_grad for value in model.to_base().parameters())
