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
    known = {*BertConfig().to_dict(), "num_labels", "problem_type"} - {"dtype", "transformers_version"}
    settings = {name: value for name, value in record.config.items() if name in known}
    without_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": None}
    config = BertConfig(**settings | without_dropout)
    if config.num_labels > 1 and not record.inputs["labels"].is_floating_point():
        config.problem_type = "single_label_classification"
    model = BertForSequenceClassification(config)
    buffers = "bert.embeddings.position_ids"  # in state dictionaries of older versions
    model.load_state_dict({name: value for name, value in record.weights.items() if name != buffers})
    model.set_attn_implementation(request.param)
    return model


def recorded_draws(record: Record, group: str) -> list[torch.Tensor]:
    """Draws of a group, in order."""
    names = [name for name in record.inputs if name.startswith(f"{group}.noise.")]
    return [record.inputs[name] for name in sorted(names, key=lambda name: int(name.rsplit(".", 1)[1]))]


def settings_of(group: str, record: Record) -> dict:
    """Fields of the configuration that a group stands for: layers by its name (`layer<i>_only`, `layers_<i>_<j>`,
    `top<k>`, `lowest<k>`; else all), the position by the number of draws and by whether the name has `intermediate`.
    The distribution does not matter, since the draws are given.
    """
    depth, draws = record.config["num_hidden_layers"], len(recorded_draws(record, group))
    settings = {"noise": "uniform" if "uniform" in group else "normal", "noise_scale": record.config["hype_eps"]}
    settings["official_uniform"] = settings["noise"] == "uniform"
    if some := re.search(r"(top|lowest|low|bottom)_?(?:k|layers?)?_?(\d+)", group):
        number = int(some[2])
        settings["noise_layers"] = [*range(-number, 0)] if some[1] == "top" else [*range(number)]
    elif named := re.findall(r"layers?((?:_?(?:and_)?\d+)+)", group):
        settings["noise_layers"] = [int(number) for number in re.findall(r"\d+", " ".join(named))]
    chosen = len(settings.get("noise_layers", range(depth)))
    assert draws in (chosen, 2 * chosen), (
        f"group {group} has {draws} draws, read as {settings} it needs {chosen} or twice"
    )
    if draws == 2 * chosen:
        settings["noise_position"] = "both"
    elif re.search(r"(?<!without_)(?<!no_)(intermediate|mid)", group):
        settings["noise_position"] = "mid"
    return settings


@pytest.mark.parametrize(
    ("group", "draws", "layers", "position"),
    [
        ("normal", 4, None, None),
        ("uniform", 4, None, None),
        ("with_intermediate", 8, None, "both"),
        ("only_intermediate", 4, None, "mid"),
        ("intermediate_only_layer2", 1, [2], "mid"),
        ("layer1_only", 1, [1], None),
        ("layer1_only_with_intermediate", 2, [1], "both"),
        ("layers_0_2", 2, [0, 2], None),
        ("layers0_and_3_with_intermediate", 4, [0, 3], "both"),
        ("layer0_layer2_only", 2, [0, 2], None),
        ("top2", 2, [-2, -1], None),
        ("top2_layers_only_intermediate", 2, [-2, -1], "mid"),
        ("lowest_3", 3, [0, 1, 2], None),
        ("normal_without_intermediate", 4, None, None),
    ],
)
def test_names_of_groups(group, draws, layers, position, tmp_path):
    inputs = {f"{group}.noise.{number}": torch.zeros(1) for number in range(draws)}
    found = settings_of(group, Record(tmp_path, {"num_hidden_layers": 4, "hype_eps": 0.1}, inputs, {}, {}))
    assert (found.get("noise_layers"), found.get("noise_position")) == (layers, position)
    assert found["official_uniform"] == (group == "uniform")
    with pytest.raises(AssertionError, match=f"{group} has {3 * draws} draws"):
        inputs |= {f"{group}.noise.{draws + number}": torch.zeros(1) for number in range(2 * draws)}
        settings_of(group, Record(tmp_path, {"num_hidden_layers": 4, "hype_eps": 0.1}, inputs, {}, {}))


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
