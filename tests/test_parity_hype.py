"""HyPe against numbers from the official code, with its recorded draws in place of ours.

A group of outputs `<group>.*` has its draws in the inputs `<group>.noise.<j>`, in the order in which they are used;
the name of the group says where they go. Tolerance 1e-5 (see suites/parity.py for the measure); an independent
re-implementation was within 1.5e-6.
"""

import re

import pytest
import torch
from suites.parity import Comparison, Record
from transformers import BertConfig, BertForSequenceClassification

from bestiary.modeling.modeling_hype import HypeForSequenceClassification, Perturbation


@pytest.fixture
def record(parity_dir):
    return Record.load(parity_dir("hype"))


@pytest.fixture(params=["eager", "sdpa"])
def plain(record, request):
    """The recorded weights in transformers' model: their names are the official ones."""
    known = BertConfig().to_dict().keys() - {"dtype", "transformers_version"}
    settings = {name: value for name, value in record.config.items() if name in known}
    config = BertConfig(**settings, num_labels=record.config["num_labels"])
    if config.num_labels > 1:
        config.problem_type = "single_label_classification"
    model = BertForSequenceClassification(config)
    model.load_state_dict(record.weights)
    model.set_attn_implementation(request.param)
    return model


def recorded_draws(record: Record, group: str) -> list[torch.Tensor]:
    """Draws of a group, in order."""
    names = [name for name in record.inputs if name.startswith(f"{group}.noise.")]
    return [record.inputs[name] for name in sorted(names, key=lambda name: int(name.rsplit(".", 1)[1]))]


def settings_of(group: str, record: Record) -> dict:
    """Fields of the configuration that a group's name stands for: `layer<i>_only`, `top<k>`, `lowest<k>`, `only` or
    `with` `intermediate`; the distribution does not matter, since the draws are given.
    """
    depth, draws = record.config["num_hidden_layers"], len(recorded_draws(record, group))
    settings = {"noise": "uniform" if "uniform" in group else "normal", "noise_scale": record.config["hype_eps"]}
    settings["official_uniform"] = settings["noise"] == "uniform"
    if single := re.search(r"layers?_?(\d+)", group):
        settings["noise_layers"] = [int(single[1])]
    elif some := re.search(r"(top|lowest|low|bottom)_?k?_?(\d+)", group):
        number = int(some[2])
        settings["noise_layers"] = [*range(-number, 0)] if some[1] == "top" else [*range(number)]
    if "intermediate" in group or "mid" in group:
        settings["noise_position"] = "mid" if "only" in group else "both"
    chosen = len(settings.get("noise_layers", range(depth)))
    expected = chosen * (2 if settings.get("noise_position") == "both" else 1)
    assert draws == expected, f"group {group} has {draws} draws, read as {settings} it needs {expected}"
    return settings


def test_every_group(plain, record, monkeypatch):
    groups = sorted({name.split(".")[0] for name in record.outputs})
    assert "eval" in groups and len(groups) > 1
    inputs = {name: value for name, value in record.inputs.items() if ".noise." not in name}
    with Comparison(record) as compare:
        for group in groups:
            plain.zero_grad(set_to_none=True)
            plain.eval()
            draws = iter(())
            if group == "eval":
                model = HypeForSequenceClassification.from_encoder(plain)
            else:
                draws = iter(recorded_draws(record, group))
                settings = settings_of(group, record)
                model = HypeForSequenceClassification.from_encoder(plain, **settings).train()
                monkeypatch.setattr(Perturbation, "draw", lambda self, hidden, stream, draws=draws: next(draws))
            outputs = model(**inputs, output_hidden_states=True)
            assert next(draws, None) is None, "a recorded draw was not used"
            for name, value in {
                "last_hidden_state": outputs.hidden_states[-1],
                "logits": outputs.logits,
                "loss": outputs.loss,
            }.items():
                compare(f"{group}.{name}", value)
            outputs.loss.backward()
            gradients = {name: value.grad for name, value in plain.named_parameters()}
            for name in record.outputs:
                if name.startswith(f"{group}.grad."):
                    compare(name, gradients[name.removeprefix(f"{group}.grad.")])
            model.to_base()  # takes the hooks off
        compare.remind(skip=lambda name: False)
