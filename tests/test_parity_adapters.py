"""Bottleneck adapters against numbers of AdapterHub's library, which has the official placement.

Tolerance 1e-5 (see suites/parity.py for the measure); an independent re-implementation was within 3e-6. The same
numbers must come from our classes and from PEFT's model, and from the weights under the official TensorFlow names.
"""

import re

import pytest
import torch
from peft import PeftModel
from suites.parity import Comparison, Record
from transformers import AutoModel, AutoModelForSequenceClassification

import bestiary
from bestiary.conversion import adapters
from bestiary.modeling.layers.bottleneck import Bottleneck


pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks


@pytest.fixture
def record(parity_dir):
    return Record.load(parity_dir("adapters"))


def as_official(record):
    """The same tensors as the TensorFlow code names and shapes them."""
    found = {}
    for key in adapters.convert(record.weights, record.config).state_dict():
        tensor, name = record.weights[adapters.hub_name(key, adapter_of(record))], adapters.official_name(key)
        if name.endswith(("/kernel", "/weights1", "/weights2")):
            tensor = tensor.T.contiguous()
        found[name] = tensor[None] if "/biases" in name else tensor
    return found


def adapter_of(record):
    """The name of the one adapter of a record."""
    (name,) = {key.split(".adapters.")[1].split(".")[0] for key in record.weights if ".adapters." in key}
    return name


@pytest.fixture(params=["AdapterHub", "TensorFlow", "PEFT"])
def model(record, request, tmp_path):
    """The converted model under eager attention, or PEFT's model from the file that it writes."""
    state = as_official(record) if request.param == "TensorFlow" else record.weights
    model = adapters.convert(state, record.config)
    if request.param == "PEFT":
        model.to_base().save_pretrained(tmp_path / "base")
        bestiary.save_adapter(model, tmp_path / "adapter", base_model=str(tmp_path / "base"))
        stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
        model = PeftModel.from_pretrained(stock, tmp_path / "adapter", is_trainable=True).eval()
    return model


def official(name: str, record: Record) -> str:
    """AdapterHub's name of a parameter of either kind of model; also that of a copy which PEFT trains."""
    name = name.removeprefix("base_model.model.")
    name = re.sub(r"\.(bottleneck_norm|modules_to_save)\.default|\.(base_layer|original_module)", "", name)
    name = name.replace("bottleneck_down.default", "adapter.down").replace("bottleneck_up.default", "adapter.up")
    return adapters.hub_name(name, adapter_of(record))


@torch.no_grad()
def test_states_logits_and_loss(model, record):
    with Comparison(record) as compare:
        outputs = model(**record.inputs, output_hidden_states=True)
        real = record.inputs["attention_mask"]
        compare("last_hidden_state", outputs.hidden_states[-1], where=real)
        compare("logits", outputs.logits)
        compare("loss", outputs.loss)
        with bestiary.adapters_off(model):
            compare("logits_adapters_off", model(**record.inputs).logits)
        compare("logits", model(**record.inputs).logits)
        compare.remind(skip=lambda name: name.startswith("grad."))


def test_gradients(model, record):
    """Of every parameter that the record has a gradient of: adapters, LayerNorms, head, and what is frozen."""
    trained = {official(name, record) for name, value in model.named_parameters() if value.requires_grad}
    parts = (".adapters.", "LayerNorm", "classifier.")
    assert trained == {name for name in record.weights if any(part in name for part in parts)}
    model.requires_grad_(True)(**record.inputs).loss.backward()
    found = {official(name, record): each.grad for name, each in model.named_parameters() if each.grad is not None}
    assert found.keys() == {name for name in record.weights if not name.endswith("position_ids")}
    with Comparison(record) as compare:
        for name in record.outputs:
            if name.startswith("grad."):
                compare(name, found[name.removeprefix("grad.")])


@pytest.mark.parametrize("official", [False, True])
def test_locations_are_taken_from_the_names(record, official):
    """A checkpoint with adapters behind one sub-layer alone gives that model, from either layout."""
    state = as_official(record) if official else record.weights
    inputs = {name: value for name, value in record.inputs.items() if name != "labels"}
    inside = re.compile(r"attention[./]output[./]adapters")
    places = {bool(inside.search(name)) for name in state if "adapters" in name}
    whole = adapters.convert(state, record.config).config.adapter_locations
    assert whole == [name for name, place in (("attention", True), ("output", False)) if place in places]
    if len(places) == 1:
        return
    for kept, dropped in (("attention", "output"), ("output", "attention")):
        some = {
            name: value
            for name, value in state.items()
            if "adapters" not in name or bool(inside.search(name)) is (kept == "attention")
        }
        model = adapters.convert(some, record.config)
        assert model.config.adapter_locations == [kept]
        expected = adapters.convert(state, record.config)
        for name, part in expected.named_modules():
            if isinstance(part, Bottleneck) and (".attention.output." in name) is (dropped == "attention"):
                torch.nn.init.zeros_(part.up.weight)
                torch.nn.init.zeros_(part.up.bias)
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs).logits, expected(**inputs).logits)
    name = next(name for name in some if "adapters" in name)
    with pytest.raises(ValueError, match=re.escape(f"1 missing: {name}")):
        adapters.convert({key: value for key, value in some.items() if key != name}, record.config)


def test_encoder_alone(record):
    """Without its head the same checkpoint is an encoder with adapters."""
    state = {name: tensor for name, tensor in record.weights.items() if not name.startswith("classifier.")}
    encoder = adapters.convert(state, record.config)
    assert type(encoder) is AutoModel._model_mapping[type(encoder.config)]
    inputs = {name: value for name, value in record.inputs.items() if name != "labels"}
    with Comparison(record) as compare, torch.no_grad():
        compare("last_hidden_state", encoder(**inputs).last_hidden_state, where=inputs["attention_mask"])
