"""Linear attention against numbers from fast-transformers, efficient-attention, a third-party module of the cosine
form and float64 evaluations of the definitions.

Tolerance 1e-5 (see suites/parity.py for the measure); an independent re-implementation was within 4e-6.
"""

import math

import pytest
import torch
from suites.parity import Comparison, Record

from bestiary.configuration.configuration_linear_attention import LinearAttentionConfig
from bestiary.conversion import linear_attention
from bestiary.modeling.layers.kernel_attention import KernelCache
from bestiary.modeling.modeling_linear_attention import LinearSelfAttention


DEFINITIONS = {
    "cosine.bidirectional": ("cosine", False, {}),
    "cosine.causal": ("cosine", True, {}),
    "double_softmax.bidirectional": ("double_softmax", False, {}),
    "double_softmax_prefix.causal": ("double_softmax", True, {}),
    "double_softmax_shared_denominator.causal": (
        "double_softmax",
        True,
        {"causal_double_softmax": "shared_denominator"},
    ),
}


@pytest.fixture
def record(parity_dir):
    return Record.load(parity_dir("linear_attention"))


@pytest.fixture
def mask(record):
    """(B, T), 1 at tokens."""
    length = record.inputs["hidden_states"].shape[1]
    return (torch.arange(length) < record.inputs["lengths"][:, None]).long()


def attention(kernel, causal, query, key, value, **settings):
    """A module that takes the given heads, (B, T, H, d), and gives its context (B, T, H, d) and cache."""
    heads, width = query.shape[-2:]
    settings = {"denominator_eps": 0.0} | settings
    config = LinearAttentionConfig(
        attention_kernel=kernel, hidden_size=heads * width, num_attention_heads=heads, is_decoder=causal, **settings
    )
    module = LinearSelfAttention(config, 0)
    module.project = lambda hidden: tuple(part.transpose(1, 2) for part in (query, key, value))

    def run(mask=None, backend="sdpa", cache=None):
        config._attn_implementation = backend
        kept = None if mask is None else mask.bool()[:, None, :, None]
        context, _ = module(torch.zeros(*query.shape[:2], 1), kept, past_key_values=cache)
        return context.unflatten(-1, (heads, -1))

    return run


def heads(record):
    return [record.inputs[name] for name in ("query", "key", "value")]


@torch.no_grad()
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_attention_of_fast_transformers(record, mask, backend):
    with Comparison(record) as compare:
        found = attention("elu", False, *heads(record), denominator_eps=1e-6)(mask, backend)
        compare("elu.bidirectional", found, where=mask)
        run = attention("elu", True, *heads(record), denominator_eps=1e-6)
        compare("elu.causal", run(None, backend))
        cache = KernelCache(1)
        compare("elu.causal", run(None, backend, cache))
        state = cache.layers[0].state
        compare("elu.final_state_S", state[..., :-1])
        compare("elu.final_state_Z", state[..., -1])


@torch.no_grad()
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_definitions(record, mask, backend):
    with Comparison(record) as compare:
        for name, (kernel, causal, settings) in DEFINITIONS.items():
            run = attention(kernel, causal, *heads(record), **settings)
            compare(f"definition.{name}", run(mask, backend), where=mask)
        compare.remind(skip=lambda name: not name.startswith("definition."))


@torch.no_grad()
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("causal", [False, True])
def test_encoder_of_fast_transformers(record, mask, backend, causal):
    state = {
        name.removeprefix("elu_encoder."): tensor
        for name, tensor in record.weights.items()
        if name.startswith("elu_encoder.")
    }
    model = linear_attention.convert(state, dict(record.config["config"], is_decoder=causal))
    model.set_attn_implementation(backend)
    states = record.inputs["hidden_states"]
    with Comparison(record) as compare:
        # the recorded causal run has padding too; on the right it changes no real row
        found = model(inputs_embeds=states, attention_mask=mask).last_hidden_state
        compare(f"elu_encoder.{'causal' if causal else 'bidirectional'}", found, where=mask)


def convolution(record, name, states):
    """A 1 x 1 convolution of a module in the record."""
    weight, bias = record.weights[f"{name}.weight"], record.weights[f"{name}.bias"]
    return states @ weight.flatten(1).T + bias


@torch.no_grad()
def test_efficient_attention_module(record):
    states = record.inputs["hidden_states"]
    number = record.inputs["query"].shape[-2]
    parts = [
        convolution(record, f"double_softmax_module.{name}", states).unflatten(-1, (number, -1))
        for name in ("queries", "keys", "values")
    ]
    context = attention("double_softmax", False, *parts)().flatten(-2)
    with Comparison(record) as compare:
        found = convolution(record, "double_softmax_module.reprojection", context) + states
        compare("double_softmax_module.bidirectional", found)


@torch.no_grad()
def test_cosine_module(record):
    side = math.isqrt(record.inputs["hidden_states"].shape[1])
    states = record.inputs["hidden_states"][:, : side * side]
    query, key, value = (
        convolution(record, f"cosine_module.{name}_conv", states) for name in ("query", "key", "value")
    )
    halves = value.chunk(2, -1)  # values are wider than keys there; each half is a value of the width of a key
    context = torch.cat(
        [attention("cosine", False, *(p.unsqueeze(2) for p in (query, key, half)))() for half in halves], -1
    )
    with Comparison(record) as compare:
        gamma = record.weights["cosine_module.gamma"]
        compare("cosine_module.bidirectional", states + gamma * context.squeeze(2))


def test_what_does_not_fit_is_named(record):
    state = {n.removeprefix("elu_encoder."): t for n, t in record.weights.items() if n.startswith("elu_encoder.")}
    with pytest.raises(ValueError, match="num_attention_heads is not given"):
        linear_attention.convert(state, {})
    given = record.config["config"]
    with pytest.raises(ValueError, match="1 missing: layers.0.norm1.weight"):
        linear_attention.convert({k: v for k, v in state.items() if k != "layers.0.norm1.weight"}, given)
    with pytest.raises(ValueError, match="the checkpoint lacks layers.0.linear1.weight"):
        linear_attention.convert({k: v for k, v in state.items() if k != "layers.0.linear1.weight"}, given)
    with pytest.raises(ValueError, match="attention_type 'full' is none that is built here"):
        linear_attention.convert(state, given | {"attention_type": "full"})
    without = {name: tensor for name, tensor in state.items() if not name.startswith("norm.")}
    assert linear_attention.convert(without, given).config.final_layer_norm is False


def test_options_by_the_names_of_fast_transformers(record):
    state = {n.removeprefix("elu_encoder."): t for n, t in record.weights.items() if n.startswith("elu_encoder.")}
    options = {"n_heads": record.config["config"]["num_attention_heads"], "activation": "relu"}
    config = linear_attention.convert(state, options | {"attention_type": "causal-linear"}).config
    assert (config.num_attention_heads, config.hidden_act, config.is_decoder) == (options["n_heads"], "relu", True)
