"""T-TA against numbers from the official TensorFlow graph, padding included, since the official mean counts it.

Tolerance 1e-5 (see suites/parity.py for the measure); an independent re-implementation was within 2e-6 in states and
6e-6 in log-probabilities.
"""

import pytest
import torch
from suites.parity import Comparison, Record

from bestiary.conversion import tta
from bestiary.scoring import mean_states


@pytest.fixture
def record(parity_dir):
    return Record.load(parity_dir("tta"))


@pytest.fixture(params=["eager", "sdpa"])
def model(record, request):
    model = tta.convert(record.weights, record.config)
    model.set_attn_implementation(request.param)
    return model


def inputs_of(record):
    return {name: record.inputs[name] for name in ("input_ids", "attention_mask")}


@torch.no_grad()
def test_both_streams_and_states(model, record):
    inputs, real = inputs_of(record), record.inputs["attention_mask"]
    positions = torch.arange(real.shape[1])[None]
    encoded = model.bert(**inputs, output_hidden_states=True)
    with Comparison(record) as compare:
        compare("kv_embedding", encoded.content_states)
        compare("kv_embedding", model.bert.embeddings(inputs["input_ids"], positions, None))
        compare("query_embedding", model.bert.embeddings.queries(positions, real.bool(), len(real)))
        for index, states in enumerate(encoded.hidden_states[1:]):
            compare(f"hidden_states.{index}", states)
        compare("sts_sentence_vectors", mean_states(encoded.last_hidden_state, without_ends(real)))
        compare.remind(skip=lambda name: name.startswith(("log_probs", "loss", "nll", "sentence_pll")))


def without_ends(real):
    """Real tokens but the first and the last of each row."""
    real = real.bool()
    inner = real.clone()
    inner[torch.arange(len(real)), real.long().argmax(1)] = False
    inner[torch.arange(len(real)), real.shape[1] - 1 - real.flip(1).long().argmax(1)] = False
    return inner


@torch.no_grad()
def test_log_probabilities_losses_and_likelihoods(model, record):
    inputs, real = inputs_of(record), record.inputs["attention_mask"]
    labels = torch.where(real.bool(), inputs["input_ids"], -100)
    log_probs = model(**inputs).logits.log_softmax(-1)
    scored = model.token_log_likelihoods(**inputs)
    with Comparison(record) as compare:
        compare("log_probs", log_probs)
        compare("nll_per_position", -scored, where=real)
        compare("sentence_pll", scored.sum(1))
        compare("loss_mean_real_tokens", model(**inputs, labels=labels).loss)
        positions = labels.numel()  # the official mean counts padding
        compare("loss_mean_all_positions", model(**inputs, labels=labels, num_items_in_batch=positions).loss)
