"""TUPE against numbers from the official fairseq code: TUPE-R, and TUPE-A with the same weights.

Tolerance 1e-5 (see suites/parity.py for the measure).
"""

import pytest
import torch
from suites.parity import Comparison, Record
from torch.nn import functional as F

from bestiary.configuration.configuration_tupe import TupeConfig
from bestiary.conversion import tupe
from bestiary.modeling import modeling_tupe


VARIANTS = ("tupe_r", "tupe_a")


@pytest.fixture
def record(parity_dir):
    return Record.load(parity_dir("tupe"))


@pytest.fixture(params=VARIANTS)
def variant(record, request):
    if not any(name.startswith(f"{request.param}.") for name in record.outputs):
        pytest.skip(f"no {request.param} in {record.folder}")
    return request.param


@pytest.fixture(params=["eager", "sdpa"])
def models(record, variant, request):
    """The masked language model, and the classifier if there is one."""
    weights = {
        name: value
        for name, value in record.weights.items()
        if variant == "tupe_r" or not name.endswith("relative_attention_bias.weight")
    }
    settings = record.config["config"] | {"pad_token_id": record.config["pad_token_id"]}
    body = {name: value for name, value in weights.items() if not name.startswith("classification_heads.")}
    found = [tupe.convert(body, settings)]
    if len(body) < len(weights):
        found.append(tupe.convert(weights, settings))
    for model in found:
        model.set_attn_implementation(request.param)
    return found


@torch.no_grad()
def test_states_scores_predictions_and_losses(record, variant, models):
    ids, target, pad = record.inputs["src_tokens"], record.inputs["target"], record.config["pad_token_id"]
    real, masked = ids != pad, target != pad
    predictor = models[0]
    states = predictor.tupe(ids, attention_mask=real.long()).last_hidden_state
    logits = predictor(ids, attention_mask=real.long()).logits[masked]
    labels = torch.where(masked, target, -100)
    with Comparison(record) as compare:
        compare(f"{variant}.hidden_states", states, where=real)
        compare(f"{variant}.masked_logits", logits)
        compare("loss of these logits", F.cross_entropy(logits, target[masked]), record.outputs[f"{variant}.mlm_loss"])
        compare(f"{variant}.mlm_loss", predictor(ids, attention_mask=real.long(), labels=labels).loss)
        scores = predictor.tupe.positions.of_first(ids.shape[1])[0]  # (H, T, T), recorded in steps of 7 and 5
        official = record.outputs[f"{variant}.position_bias"]
        if official.shape != scores.shape:
            scores = scores[:, ::7, ::5]
        compare(f"{variant}.position_bias", scores)
        if len(models) > 1:
            compare(f"{variant}.cls_logits", models[1](ids, attention_mask=real.long()).logits)
        compare.remind(skip=lambda name: not name.startswith(f"{variant}."))


def test_loss_in_training_takes_the_same_numbers(record, variant, models):
    """The path for scores that need a gradient."""
    ids, target, pad = record.inputs["src_tokens"], record.inputs["target"], record.config["pad_token_id"]
    loss = models[0](ids, attention_mask=(ids != pad).long(), labels=torch.where(target != pad, target, -100)).loss
    assert loss.requires_grad
    with Comparison(record) as compare:
        compare(f"{variant}.mlm_loss", loss)


# ---- the converter beyond the recorded layout


def official(model, normalize_before=False):
    """The model's parameters by official names, queries, keys and values stacked."""
    state = {}
    for key, value in model.state_dict().items():
        if key in model.all_tied_weights_keys:
            continue
        state[tupe.official_name(key, normalize_before, "mnli")] = value
    for name in [name for name in state if ".q_proj." in name]:
        parts = [state.pop(name.replace(".q_proj.", f".{letter}_proj.")) for letter in "qkv"]
        state[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    return state


@pytest.mark.parametrize("fields", [{}, {"normalize_before": True, "embedding_layer_norm": False}], ids=str)
@pytest.mark.parametrize("head", ["TupeForMaskedLM", "TupeForSequenceClassification", "TupeModel"])
def test_official_names_and_back(head, fields):
    """Sizes and variants are read from the tensors, and the file's own extras passed over."""
    config = TupeConfig(
        vocab_size=30,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=20,
        max_position_embeddings=9,
        relative_attention_num_buckets=8,
        num_labels=4,
        **fields,
    )
    chooses = {"add_pooling_layer": False} if head == "TupeModel" else {}
    model = getattr(modeling_tupe, head)(config, **chooses).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.normal_()
    state = official(model, config.normalize_before) | {tupe.VERSION: torch.ones(1)}
    assert not [name for name in state if name.startswith(("tupe.", "encoder.", "embeddings.", "cls."))]
    found = tupe.convert(state, {"num_attention_heads": 3, "max_rel_pos": 128})
    assert type(found) is type(model)
    ours, theirs = found.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    ids = torch.arange(9).unsqueeze(0) + 5
    with torch.no_grad():
        assert torch.equal(found(ids)[0], model(ids)[0])


def test_what_does_not_fit_is_named():
    model = modeling_tupe.TupeForMaskedLM(
        TupeConfig(
            vocab_size=30,
            hidden_size=12,
            num_hidden_layers=1,
            num_attention_heads=3,
            intermediate_size=20,
            max_position_embeddings=9,
        )
    )
    state = official(model)
    with pytest.raises(ValueError, match="num_attention_heads is not given"):
        tupe.convert(state, {})
    heads = {"num_attention_heads": 3}
    broken = dict(state)
    broken["decoder.sentence_encoder.layers.0.extra"] = broken.pop("decoder.sentence_encoder.layers.0.fc1.bias")
    with pytest.raises(ValueError, match=r"(?s)1 missing: .*layers.0.fc1.bias.*1 extra: .*layers.0.extra"):
        tupe.convert(broken, heads)
    with pytest.raises(ValueError, match="hidden_size is 16 in the configuration and 12 in the tensors|intermediate"):
        tupe.convert(state, heads | {"num_attention_heads": 4, "hidden_size": 16})
    twice = {f"classification_heads.{name}.dense.bias": torch.zeros(12) for name in ("mnli", "rte")}
    with pytest.raises(ValueError, match=r"2 classification heads, \['mnli', 'rte'\]"):
        tupe.convert(state | twice, heads)
    with pytest.raises(ValueError, match="looks like one of the paper 'bert'"):
        tupe.convert({"bert/encoder/layer_0/attention/self/query/bias": torch.zeros(1)}, heads)
