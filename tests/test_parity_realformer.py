"""RealFormer against numbers from the official TensorFlow functions, for the sum and for the mean.

Tolerance 1e-5 (see suites/parity.py for the measure).
"""

import pytest
import torch
from suites.parity import Comparison, Record

from bestiary.configuration.configuration_realformer import RealformerConfig
from bestiary.conversion import realformer
from bestiary.conversion.bert import official_name
from bestiary.modeling import modeling_realformer


VARIANTS = {"running_sum": False, "running_mean": True}


@pytest.fixture
def record(parity_dir):
    return Record.load(parity_dir("realformer"))


@pytest.fixture(params=VARIANTS)
def variant(record, request):
    if not any(name.startswith(f"{request.param}.") for name in record.outputs):
        pytest.skip(f"no {request.param} in {record.folder}")
    return request.param


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("grad", [False, True])
def test_states_and_scores(record, variant, backend, grad):
    model = realformer.convert(record.weights, record.config["config"] | {"use_running_mean": VARIANTS[variant]})
    model.set_attn_implementation(backend)
    handed = []
    for layer in model.encoder.layer:
        layer.register_forward_hook(lambda module, inputs, outputs: handed.append(outputs[1]))
    real = record.inputs["attention_mask"].bool()
    with torch.set_grad_enabled(grad):
        encoded = model(**record.inputs, output_hidden_states=True)
    with Comparison(record) as compare:
        states = torch.stack(encoded.hidden_states)
        compare(f"{variant}.hidden_states", states, where=real.expand(states.shape[:-1]))
        compare(f"{variant}.pooled_output", encoded.pooler_output)
        name = f"{variant}.last_attention_scores"
        if handed[-1] is not None and name in record.outputs:  # a single layer hands on nothing
            scores = handed[-1]
            if backend == "sdpa" and VARIANTS[variant]:
                scores = scores * len(handed)  # this path hands on the mean
            # for padded keys this path holds the mask too
            keys = torch.ones_like(real) if backend == "eager" else real
            compare(name, scores, where=keys[:, None, None, :].expand_as(scores))
        compare.remind(skip=lambda name: not name.startswith(f"{variant}."))


# ---- the converter beyond the recorded layout


@pytest.mark.parametrize(
    ("head", "found"),
    [
        ("RealformerForPreTraining", "RealformerForPreTraining"),
        ("RealformerForMaskedLM", "RealformerForMaskedLM"),
        ("RealformerModel", "RealformerModel"),
    ],
)
@pytest.mark.parametrize("official", [True, False])
def test_the_class_follows_the_heads(head, found, official):
    """By TensorFlow's names, and by those of transformers; "gelu" of the official program is the tanh form."""
    sizes = {
        "vocab_size": 30,
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 20,
        "max_position_embeddings": 9,
    }
    model = getattr(modeling_realformer, head)(RealformerConfig(**sizes)).eval()
    state = {}
    for key, value in model.state_dict().items():
        if key in model.all_tied_weights_keys:
            continue
        whole = key if key.startswith(("bert.", "cls.")) else f"bert.{key}"
        name = official_name(whole) if official else key
        state[name] = value.T if name.endswith("/kernel") else value
    given = {"num_attention_heads": 3, "hidden_act": "gelu", "use_running_mean": True, "directionality": "bidi"}
    converted = realformer.convert(state, given)
    assert type(converted).__name__ == found
    assert converted.config.hidden_act == ("gelu_new" if official else "gelu") and converted.config.use_running_mean
    ours, theirs = converted.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("change", "mean"), [({}, True), ({"use_running_mean": False}, False), ({"num_hidden_layers": 24}, False)], ids=str
)
def test_the_xlarge_checkpoint_takes_the_mean(change, mean):
    """No file of it says so."""
    sizes = {name: size for name, size in RealformerConfig.SIZES["xlarge"].items() if name != "use_running_mean"}
    assert realformer._configuration(sizes | change, {}, official=True).use_running_mean == mean


def test_what_does_not_fit_is_named(record):
    with pytest.raises(ValueError, match="realformer: num_attention_heads is not given"):
        realformer.convert(record.weights, {})
    broken = dict(record.weights)
    name = next(name for name in broken if name.endswith("query/bias"))
    broken["extra"] = broken.pop(name)
    with pytest.raises(ValueError, match=rf"(?s)1 missing: {name}.*1 extra: extra"):
        realformer.convert(broken, record.config["config"])
