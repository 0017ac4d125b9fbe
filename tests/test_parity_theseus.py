"""BERT-of-Theseus against numbers of the official PyTorch code, for every recorded pattern.

Tolerance 1e-5; an independent re-implementation reproduced them to 1e-6.
"""

import re

import pytest
import torch
from suites.parity import Comparison, Record

from bestiary.configuration.configuration_theseus import TheseusConfig
from bestiary.conversion import theseus


@pytest.fixture
def record(parity_dir):
    return Record.load(parity_dir("theseus"))


@pytest.fixture(params=["eager", "sdpa"])
def model(record, request):
    """The converted pair, without dropout, as it was recorded."""
    dry = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
    model = theseus.convert(record.weights, record.config | dry)
    model.set_attn_implementation(request.param)
    return model


def compare_outputs(compare, prefix, model, record):
    outputs = model(**record.inputs, output_hidden_states=True)
    compare(f"{prefix}_hidden", outputs.hidden_states[-1])
    compare(f"{prefix}_logits", outputs.logits)
    compare(f"{prefix}_loss", outputs.loss)
    return outputs


def test_evaluation(model, record):
    with Comparison(record) as compare:
        compare_outputs(compare, "eval", model, record)
        compare.remind(skip=lambda name: name.startswith(("train_", "grad_", "constant_", "linear_")))


def test_every_pattern(model, record):
    patterns = {match[1] for name in record.outputs if (match := re.match(r"train_([01]+)_", name))}
    assert patterns == set(record.config["patterns"]) and patterns
    model.train()
    with Comparison(record) as compare:
        for pattern in sorted(patterns):
            model.set_pattern([int(digit) for digit in pattern])
            compare_outputs(compare, f"train_{pattern}", model, record)


def successor_parameter(model, name):
    """Index of the module and parameter of `grad_scc<index>_<end of its name>`; None if no or several names fit."""
    match = re.fullmatch(r"grad[_.](?:bert[_.]encoder[_.])?scc(?:_layer)?[_.]?(\d+)[_.](.+)", name)
    if match is None or int(match[1]) >= len(model.successor):
        return None
    wanted = match[2].replace(".", "_")
    found = {key.replace(".", "_"): value for key, value in model.successor[int(match[1])].named_parameters()}
    fitting = [value for key, value in found.items() if key.endswith(f"_{wanted}")]
    fitting = [found[wanted]] if wanted in found else fitting
    return (int(match[1]), fitting[0]) if len(fitting) == 1 else None


def test_gradients(model, record):
    pattern = record.config.get("gradient_pattern", record.config["patterns"][-1])
    compared = 0
    model.train().set_pattern([int(digit) for digit in pattern])
    with Comparison(record) as compare:
        compare_outputs(compare, f"train_{pattern}", model, record).loss.backward()
        for name in record.outputs:
            if (found := successor_parameter(model, name)) is not None:
                index, parameter = found
                zero = torch.zeros_like(parameter)  # officially a zero tensor where the module is not used
                assert (parameter.grad is None) == (pattern[index] == "0")
                compare(name, zero if parameter.grad is None else parameter.grad)
                compared += 1
        compare.remind(skip=lambda name: name.startswith(("train_", "eval_", "constant_", "linear_")))
    assert compared, "no recorded gradient is one of the successor's"


def test_schedules(record):
    sizes = {"num_hidden_layers": 2}
    compared = 0
    with Comparison(record) as compare:
        for name, official in record.outputs.items():
            if match := re.fullmatch(r"linear_rate_b([\d.e-]+)_k([\d.e-]+)", name):
                settings = {"replacing_rate": float(match[1]), "replacing_k": float(match[2])}
            elif match := re.fullmatch(r"constant_rate_([\d.e-]+)_steps(\d+|None)", name):
                length = None if match[2] == "None" else max(1, int(match[2]))  # 0 switches at update 1, as our 1
                settings = {"replacing_scheduler": "constant", "replacing_rate": float(match[1])}
                settings["steps_for_replacing"] = length
            else:
                continue
            config = TheseusConfig(encoder_config=sizes, successor_num_hidden_layers=1, **settings)
            compare(name, torch.tensor([config.rate_at(step, len(official)) for step in range(len(official))]))
            compared += 1
    assert compared
