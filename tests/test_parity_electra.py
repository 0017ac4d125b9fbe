"""ELECTRA against numbers from the official TensorFlow graph, with its recorded draws in place of ours.

Tolerance 1e-5 (see suites/parity.py for the measure); an independent re-implementation was within 5e-6 in hidden
states, 1.3e-5 in logits and gradients, not relative to their size, and 2e-6 in losses.
"""

import pytest
import torch
from suites.parity import Comparison, Record, compare_gradients, dense_labels, take_positions
from torch.nn import functional as F

from bestiary.conversion import electra
from bestiary.modeling import modeling_electra
from bestiary.modeling.layers.sampling import gumbel_argmax
from bestiary.trainers.masking import prediction_counts


OFFICIAL_EPSILON = 1e-6
"""What the official losses add to the numbers that they divide by."""


@pytest.fixture
def record(parity_dir):
    return Record.load(parity_dir("electra"))


@pytest.fixture(params=["eager", "sdpa"])
def model(record, request):
    """The converted model. The official word table has no row without gradient, so neither has this one."""
    model = electra.convert(record.weights, dict(record.config, pad_token_id=None))
    model.set_attn_implementation(request.param)
    return model


@pytest.fixture
def labels(record):
    """Labels (B, T) at the positions that were officially masked, (B, P) slots of which those of weight 1 count."""
    positions, ids, weights = (record.outputs[f"masked_lm_{name}"] for name in ("positions", "ids", "weights"))
    labels = dense_labels(positions, ids, weights, length=record.inputs["input_ids"].shape[1])
    if (labels != -100).sum() < weights.sum():
        pytest.skip(f"{record.folder} masks a position twice, which labels cannot say and this package never does")
    return labels


@pytest.fixture
def forward(model, record, labels, monkeypatch):
    """The joint forward pass on some rows, sampling with the recorded noise and dividing by the official numbers."""
    batch, length = labels.shape
    uniform = record.outputs["sampling_uniform"]  # (B, P, V)
    noise = torch.zeros(batch, length, uniform.shape[-1])
    used = record.outputs["masked_lm_weights"].bool()
    rows, slots = used.nonzero(as_tuple=True)
    noise[rows, record.outputs["masked_lm_positions"][used]] = uniform[rows, slots]

    def run(rows=slice(None), **kwargs):
        def recorded(logits, *, method, temperature, seeds, rows):
            return gumbel_argmax(logits, noise[seeds[rows[0]], rows[1]], temperature)

        monkeypatch.setattr(modeling_electra, "sample_categorical", recorded)
        mask = record.inputs["attention_mask"][rows]
        return model(
            record.outputs["masked_input_ids"][rows],
            attention_mask=mask,
            token_type_ids=record.inputs["token_type_ids"][rows],
            labels=labels[rows],
            sampling_seeds=torch.arange(batch)[rows],  # with one seed a row, `recorded` knows the row
            num_items_in_batch={
                "mlm": (labels[rows] != -100).sum() + OFFICIAL_EPSILON,
                "discriminator": mask.sum() + OFFICIAL_EPSILON,
            },
            **kwargs,
        )

    return run


@torch.no_grad()
def test_generator(model, record):
    if model.config.uniform_generator:
        pytest.skip("a uniform generator has no states")
    outputs, real = record.outputs, record.inputs["attention_mask"]
    encoded = model.generator_encoder()(
        outputs["masked_input_ids"],
        attention_mask=real,
        token_type_ids=record.inputs["token_type_ids"],
        output_hidden_states=True,
    )
    rows = take_positions(encoded.last_hidden_state, outputs["masked_lm_positions"])  # (B, P, D)
    logits = model.generator_lm_head(model.generator_predictions(rows))  # (B, P, V)
    slots = outputs["masked_lm_weights"]
    with Comparison(record) as compare:
        compare("generator_embedding_output", encoded.hidden_states[0], where=real)
        compare("generator_hidden", encoded.last_hidden_state, where=real)
        compare("generator_logits", logits, where=slots)
        per_slot = F.cross_entropy(logits.transpose(1, 2), outputs["masked_lm_ids"], reduction="none")
        compare("mlm_per_token_loss", per_slot, where=slots)


@torch.no_grad()
def test_samples_discriminator_and_losses(forward, record, labels):
    outputs, real = record.outputs, record.inputs["attention_mask"]
    joint = forward(output_hidden_states=True)
    with Comparison(record) as compare:
        samples = take_positions(joint.corrupted_ids, outputs["masked_lm_positions"])
        compare("sampled_ids", samples, where=outputs["masked_lm_weights"])
        compare("corrupted_input_ids", joint.corrupted_ids)
        compare("is_fake", joint.is_fake.to(outputs["is_fake"].dtype))
        compare("discriminator_hidden", joint.hidden_states[-1], where=real)
        compare("discriminator_logits", joint.logits, where=real)
        each = [forward(slice(row, row + 1)).discriminator_loss for row in range(len(labels))]
        compare("discriminator_per_example_loss", torch.stack(each))
        compare("mlm_loss", joint.mlm_loss)
        compare("discriminator_loss", joint.discriminator_loss)
        compare("total_loss", joint.loss)
        compare.remind(
            skip=lambda name: name.startswith(("grad.", "generator_", "mlm_per", "masked_", "sampling_uniform"))
        )


def test_gradients(forward, model, record):
    forward().loss.backward()
    with Comparison(record) as compare:
        compare_gradients(compare, model, electra.official_name)


def test_masking_rule(record, labels):
    """What was officially masked keeps to the rule of our collator: as many positions, [MASK] or left as they were."""
    inputs, masked = record.inputs, labels != -100
    counts = prediction_counts(
        inputs["attention_mask"].sum(1).numpy(), record.config["mask_prob"], record.config["max_predictions_per_seq"]
    )
    mask_id = torch.tensor(record.config["special_tokens"]["mask"])
    with Comparison(record) as compare:
        compare("number of masked positions", torch.from_numpy(counts), masked.sum(1))
        compare("labels", labels, inputs["input_ids"], where=masked)
        ids = record.outputs["masked_input_ids"]
        restored = torch.where(masked & (ids == mask_id), inputs["input_ids"], ids)
        compare("ids under the masks", restored, inputs["input_ids"])
