"""Performer against numbers from the official JAX functions (`favor.*`) and from performer-pytorch (`lm.*`).

Tolerance 1e-5 (see suites/parity.py for the measure); an independent re-implementation was within 3e-7.
"""

import pytest
import torch
from suites.parity import TOLERANCE, Comparison, Record

from bestiary.configuration.configuration_performer import PerformerConfig
from bestiary.conversion import performer
from bestiary.modeling.modeling_performer import PerformerSelfAttention


STEP = 3
"""Every so many-th position's logits are recorded."""
OFFICIAL = {
    "softmax_positive": {"attention_kernel": "softmax_positive", "kernel_epsilon": 1e-6, "denominator_guard": 1e-6},
    "softmax_sincos": {"attention_kernel": "softmax_trig", "denominator_guard": 1e-6},
    "generalized_relu_deterministic": {"attention_kernel": "generalized_relu"},
    "generalized_relu_projected": {"attention_kernel": "generalized_relu", "use_projection": True},
}
"""Settings of the official functions, by the name of the kernel in the record."""


@pytest.fixture
def record(parity_dir):
    return Record.load(parity_dir("performer"))


def attention(record, causal, **settings):
    """A self-attention module with the recorded projection, which takes recorded heads."""
    weight = record.weights["favor.projection_matrix"]
    heads, width = record.inputs["favor.query"].shape[-2:]
    config = PerformerConfig(
        hidden_size=heads * width,
        num_attention_heads=heads,
        num_random_features=weight.shape[0],
        is_decoder=causal,
        key_stabilizer="sequence",
        **settings,
    )
    module = PerformerSelfAttention(config, 0)
    if config.projects:
        module.projection_matrix.copy_(weight)
    inputs = [record.inputs[f"favor.{name}"].transpose(1, 2) for name in ("query", "key", "value")]  # (B, H, T, d)
    module.project = lambda hidden: inputs
    return module


def cancellation(module):
    """How many times larger the terms of the denominator are than their sum, at most. Those of sine and cosine cancel,
    and what either side rounds is blown up by as much."""
    query, key, _ = module.project(None)
    query, key = module.features(query, key, None, None)
    terms = (query[..., :, None, :] * key[..., None, :, :]).abs().sum(-1)
    sums = query @ key.mT
    if module.is_causal:
        terms, sums = terms.tril(), sums.tril()
    return (terms.sum(-1) / sums.sum(-1).abs()).max().item()


@torch.no_grad()
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_official_functions(record, backend):
    shape = record.inputs["favor.query"].shape
    with Comparison(record) as compare:
        for name, settings in OFFICIAL.items():
            for direction in ("bidirectional", "causal"):
                if f"favor.{name}.{direction}" not in record.outputs:
                    continue
                module = attention(record, direction == "causal", **settings)
                module.config._attn_implementation = backend
                context, _ = module(torch.zeros(*shape[:2], 1))
                tolerance = TOLERANCE if name != "softmax_sincos" else TOLERANCE * max(1.0, cancellation(module) / 100)
                compare(f"favor.{name}.{direction}", context.view(shape), tolerance=tolerance)
        module = attention(record, False, **OFFICIAL["softmax_positive"])
        query, key, _ = module.project(None)
        ours = module.features(query, key, None, None)
        for name, features in zip(("query", "key"), ours):
            compare(f"favor.{name}_features_positive", features)
        compare.remind(skip=lambda name: name.startswith("lm."))


def language_models(record):
    """(name in the record, our converted model) for every network of performer-pytorch there."""
    found = {name.split(".")[1] for name in record.outputs if name.startswith("lm.")}
    state = {name: tensor for name, tensor in record.weights.items() if not name.startswith("favor.")}
    given = {"num_attention_heads": record.config["config"]["num_attention_heads"]}
    for name in sorted(found):
        direction, kernel = name.split("_")
        settings = given | {"causal": direction == "causal", "generalized_attention": kernel == "relu"}
        yield name, direction, settings, state


@torch.no_grad()
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_language_models(record, backend):
    ids, mask = record.inputs["input_ids"], record.inputs["mask"]
    with Comparison(record) as compare:
        for name, direction, settings, state in language_models(record):
            if direction == "causal":
                model = performer.convert(state, settings)
                model.set_attn_implementation(backend)
                compare(f"lm.{name}.encodings", model.bert(ids).last_hidden_state)
                compare(f"lm.{name}.logits", model(ids).logits[:, ::STEP])
                compare(f"lm.{name}.loss", model(ids, labels=ids).loss)
                continue
            model = performer.convert(state, settings)
            model.set_attn_implementation(backend)
            states = model.bert(ids, attention_mask=mask).last_hidden_state
            compare(f"lm.{name}.encodings_truncated", states, where=mask)
            model = performer.convert(state, settings | {"mask_values_only": True})
            model.set_attn_implementation(backend)
            compare(f"lm.{name}.encodings", model.bert(ids, attention_mask=mask).last_hidden_state)
            compare(f"lm.{name}.logits", model(ids, attention_mask=mask).logits[:, ::STEP])
        compare.remind(skip=lambda name: name.startswith("favor."))


def test_missing_biases_are_zeros_and_copies_are_passed_over(record):
    """PerformerLM has no biases in its attention by default, and saves its layers twice."""
    _, _, settings, state = next(language_models(record))
    projections = ("to_q.bias", "to_k.bias", "to_v.bias")
    expected = {
        name: torch.zeros_like(value) if name.endswith(projections) else value for name, value in state.items()
    }
    bare = {name: value for name, value in state.items() if not name.endswith(projections)}
    bare |= {f"performer.proj_updater.instance.{name}": value for name, value in state.items()}
    ours, theirs = performer.convert(bare, settings), performer.convert(expected, settings)
    ids = record.inputs["input_ids"]
    assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_what_does_not_fit_is_named(record):
    _, _, settings, state = next(language_models(record))
    with pytest.raises(ValueError, match="num_attention_heads .* is not given"):
        performer.convert(state, {})
    with pytest.raises(ValueError, match="no_projection=True of PerformerLM is a network that is not built"):
        performer.convert(state, settings | {"no_projection": True})
    heads = settings["num_attention_heads"]
    wrong_heads = settings | {"num_attention_heads": 1 if heads > 1 else 2}
    rotary = performer.ROTARY in state
    with pytest.raises(ValueError, match="layer_pos_emb.emb is not the table" if rotary else "projection_matrix is"):
        performer.convert(state, wrong_heads)
    with pytest.raises(ValueError, match="the checkpoint lacks token_emb.weight, which show the sizes"):
        performer.convert({k: v for k, v in state.items() if k != "token_emb.weight"}, settings)
    with pytest.raises(ValueError, match="1 missing: performer.net.layers.0.0.fn.to_q.weight"):
        performer.convert({k: v for k, v in state.items() if k != "performer.net.layers.0.0.fn.to_q.weight"}, settings)
