"""The sparse LSTM model against numbers of the official code, and the maps against those of the package entmax.

Tolerance 1e-6 for float64, where an independent implementation reached it, and 1e-5 for the network in float32 (see
suites/parity.py for the measure).
"""

import re

import pytest
import torch
from suites.parity import Comparison, Record

from bestiary.conversion import sparse_seq2seq
from bestiary.conversion.sparse_seq2seq import official_name
from bestiary.modeling.layers.entmax import METHODS, entmax, entmax_losses
from bestiary.modeling.layers.losses import IGNORE


EXACT = {"entmax15": 1.5, "sparsemax": 2.0, "softmax": 1.0}


def alpha_of(name):
    """alpha in the name of a recorded tensor: `map_bisect_1.2_y`, `loss_entmax_1.25`, `map_sparsemax_dx`."""
    number = re.search(r"_(\d+(?:\.\d+)?)(?:_|$)", name)
    return float(number[1]) if number else next(value for key, value in EXACT.items() if key in name)


def methods(alpha):
    return METHODS if alpha in (1.5, 2.0) else (None,)


@pytest.fixture
def record(parity_dir):
    return Record.load(parity_dir("sparse_seq2seq"))


@pytest.fixture
def model(record):
    return sparse_seq2seq.convert(record.weights, record.config)


@pytest.fixture
def batch(record, model):
    """Sources and targets with the batch first; the official ones are (T, B, 1)."""
    source, target = (record.inputs[name].squeeze(-1).T for name in ("src", "tgt"))
    mask = (torch.arange(source.shape[1]) < record.inputs["src_lengths"].unsqueeze(1)).long()
    gold = target[:, 1:]
    labels = gold.masked_fill(gold == model.config.pad_token_id, IGNORE)
    inputs = {"input_ids": source, "attention_mask": mask, "decoder_input_ids": target[:, :-1]}
    return inputs, labels


def time_first(tensor):
    return tensor.transpose(0, 1)


@torch.no_grad()
def test_states_attention_logits_and_probabilities(model, batch, record):
    inputs, _ = batch
    states = model.model(**inputs)
    logits = model(**inputs).logits
    with Comparison(record) as compare:
        compare("decoder_output", time_first(states.last_hidden_state))
        compare("attention", time_first(states.cross_attentions[0][:, 0]))
        compare("logits", time_first(logits))
        for name in record.outputs:
            if name.startswith("probs_"):
                for method in methods(alpha_of(name)):
                    compare(name, time_first(entmax(logits, alpha_of(name), method=method)))
        known = ("loss_", "grad_", "map")
        compare.remind(skip=lambda name: name.startswith(known))


@torch.no_grad()
def test_decoding_step_by_step(model, batch, record):
    inputs, _ = batch
    cache, steps = None, []
    for token in inputs["decoder_input_ids"].split(1, 1):
        outputs = model(**inputs | {"decoder_input_ids": token}, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        steps.append(outputs.logits)
    with Comparison(record) as compare:
        compare("logits", time_first(torch.cat(steps, 1)))


def test_losses_and_gradients(model, batch, record):
    """The gradients of parameters are of the 1.5-entmax loss or, as the names do not say, of whichever fits."""
    inputs, labels = batch
    names = [name for name in record.outputs if name.startswith("loss_")]
    fitting = {"grad_generator_weight": "lm_head.weight", "grad_src_embedding": "model.encoder.embed_tokens.weight"}
    errors = {name: [] for name in fitting if name in record.outputs}
    with Comparison(record) as compare:
        for name in names:
            model.zero_grad()
            logits = model(**inputs).logits
            logits.retain_grad()
            loss = entmax_losses(logits, labels, alpha_of(name)).losses.sum()
            loss.backward()
            compare(name, loss)
            compare(name.replace("loss_", "grad_logits_"), time_first(logits.grad))
            model.config.output_alpha = alpha_of(name)
            compare(f"{name} of the model", model(**inputs, labels=labels, num_items_in_batch=1).loss, loss)
            for recorded, parameter in fitting.items():
                if recorded in errors:
                    grad, official = model.get_parameter(parameter).grad, record.outputs[recorded]
                    errors[recorded].append((grad - official).abs().max() / official.abs().max().clamp(min=1))
        for recorded, found in errors.items():
            compare(f"{recorded} of the best loss", torch.stack(found).min(), torch.tensor(0.0))


def test_maps_and_their_gradients(record):
    names = [name for name in record.outputs if name.startswith("map_") and name.endswith("_y")]
    if not names:
        pytest.skip("no maps recorded")
    grad = record.outputs["map_dy"].double()
    with Comparison(record) as compare:
        for name in names:
            alpha = alpha_of(name)
            for method in methods(alpha):
                logits = record.outputs["map_x"].double().requires_grad_()
                p = entmax(logits, alpha, method=method)
                tolerance = 1e-6
                compare(name, p, tolerance=tolerance)
                of_logits = name.replace("_y", "_dx")
                compare(of_logits, torch.autograd.grad(p, logits, grad)[0], tolerance=tolerance)
            single = entmax(record.outputs["map_x"], alpha)
            compare(name, single.double(), tolerance=2e-6)
        for name in record.outputs:
            if name.startswith("map_") and name.endswith("_dalpha"):
                alpha = torch.full((len(grad), 1), alpha_of(name), dtype=torch.float64, requires_grad=True)
                p = entmax(record.outputs["map_x"].double(), alpha, n_iter=60)
                compare(name, torch.autograd.grad(p, alpha, grad)[0], tolerance=1e-6)


def test_losses_of_the_maps(record):
    names = [name for name in record.outputs if name.startswith("maploss_") and not name.endswith("_dx")]
    if not names:
        pytest.skip("no losses of maps recorded")
    labels = record.outputs["map_target"]
    with Comparison(record) as compare:
        for name in names:
            for method in methods(alpha_of(name)):
                logits = record.outputs["map_x"].double().requires_grad_()
                losses = entmax_losses(logits, labels, alpha_of(name), method).losses
                compare(name, losses, tolerance=1e-6)
                compare(f"{name}_dx", torch.autograd.grad(losses.sum(), logits)[0], tolerance=1e-6)


# ---------------------------------------------------------------------------------------------------------- converting


def test_every_key_has_one_name(model, record):
    feeds = model.config.input_feed
    assert sorted(official_name(key, feeds) for key in model.state_dict()) == sorted(record.weights)


def test_the_generator_may_be_named_as_in_its_own_file(record):
    state = {name.removeprefix("generator."): tensor for name, tensor in record.weights.items()}
    again = sparse_seq2seq.convert(state, record.config)
    assert torch.equal(again.lm_head.weight, record.weights["generator.0.weight"])


def test_sizes_are_read_from_the_tensors(record):
    model = sparse_seq2seq.convert(record.weights, {})
    for name in ("src_vocab_size", "tgt_vocab_size", "embedding_size", "hidden_size", "num_encoder_layers"):
        assert getattr(model.config, name) == record.config[name]
    for name in ("attention_score", "bidirectional_encoder", "input_feed", "num_decoder_layers"):
        assert getattr(model.config, name) == record.config[name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bridge": True}, "has a bridge"),
        ({"attention_function": "tsallis"}, "attention_function must be one of softmax, tsallis15.* got 'tsallis'"),
        ({"hidden_size": 1000}, "hidden_size is 1000 in the configuration"),
    ],
)
def test_what_does_not_fit(record, changes, message):
    with pytest.raises(ValueError, match=message):
        sparse_seq2seq.convert(record.weights, record.config | changes)


def test_missing_and_foreign_tensors(record):
    some = dict(record.weights)
    some.pop("generator.0.bias")
    with pytest.raises(ValueError, match=r"1 missing: generator.0.bias"):
        sparse_seq2seq.convert(some, record.config)
    with pytest.raises(ValueError, match="no official checkpoint of the paper 'sparse_seq2seq'"):
        sparse_seq2seq.convert({"bert.embeddings.word_embeddings.weight": torch.zeros(2, 2)}, {})
