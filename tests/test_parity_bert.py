"""BERT against numbers from the official TensorFlow graph. Its data replays are in test_documents.py.

Tolerance 1e-5 (see suites/parity.py for the measure); an independent re-implementation was within 5e-6 in log-
probabilities.
"""

import pytest
import torch
from suites.parity import Comparison, Record, compare_gradients, dense_labels, take_positions

from bestiary.conversion import bert


OFFICIAL_EPSILON = 1e-5
"""What the official masked-LM loss adds to the number of predictions that it divides by."""
OFFICIAL_ACTIVATIONS = {"gelu": "gelu_new"}
"""The official code's "gelu" is the tanh form."""


@pytest.fixture
def record(parity_dir):
    return Record.load(parity_dir("bert"))


@pytest.fixture(params=["eager", "sdpa"])
def model(record, request):
    """The converted model. The official word table has no row without gradient, so neither has this one."""
    sizes = dict(record.config["model_config"], pad_token_id=None)
    sizes["hidden_act"] = OFFICIAL_ACTIVATIONS.get(sizes["hidden_act"], sizes["hidden_act"])
    model = bert.convert(record.weights, sizes)
    model.set_attn_implementation(request.param)
    return model


def encoder_inputs(record):
    return {name: record.inputs[name] for name in ("input_ids", "attention_mask", "token_type_ids")}


def labels_of(record):
    slots = [record.inputs[f"masked_lm_{name}"] for name in ("positions", "ids", "weights")]
    return dense_labels(*slots, length=record.inputs["input_ids"].shape[1])


def joint_loss(model, record):
    """Forward pass with both losses, the masked-LM one with the official denominator."""
    predictions = record.inputs["masked_lm_weights"].sum().item()
    return model(
        **encoder_inputs(record),
        labels=labels_of(record),
        next_sentence_label=record.inputs["next_sentence_label"],
        num_items_in_batch={"mlm": predictions + OFFICIAL_EPSILON},
    )


@torch.no_grad()
def test_states_predictions_and_losses(model, record):
    inputs = record.inputs
    encoded = model.bert(**encoder_inputs(record))
    heads = model(**encoder_inputs(record))
    losses = joint_loss(model, record)
    with Comparison(record) as compare:
        compare("sequence_output", encoded.last_hidden_state, where=inputs["attention_mask"])
        compare("pooled_output", encoded.pooler_output)
        log_probs = take_positions(heads.prediction_logits, inputs["masked_lm_positions"]).log_softmax(-1)
        compare("masked_lm_log_probs", log_probs, where=inputs["masked_lm_weights"])
        compare("sentence_log_probs", heads.seq_relationship_logits.log_softmax(-1))
        if "labels" in inputs:
            compare("labels", labels_of(record), inputs["labels"])
        compare("masked_lm_loss", losses.mlm_loss)
        compare("sentence_loss", losses.sentence_loss)
        compare("total_loss", losses.loss)
        compare.remind(skip=lambda name: name.startswith(("data.", "grad.")))


def test_gradients(model, record):
    joint_loss(model, record).loss.backward()
    official = [name for name in record.outputs if name.startswith("grad.")]
    if not official and not record.config.get("gradient_norms"):
        pytest.skip(f"no official gradients in {record.folder}")
    with Comparison(record) as compare:
        compare_gradients(compare, model, bert.naming(record.weights))
