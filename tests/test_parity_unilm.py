"""UniLM against numbers from the official code: masks, segments, states, losses, greedy search and beam traces.

Tolerance 1e-5 (see suites/parity.py for the measure); an independent re-implementation was within 3e-6.
"""

import pytest
import torch
from suites.parity import Comparison, Record, take_positions

from bestiary.conversion import unilm
from bestiary.modeling.modeling_unilm import (
    UniLMForConditionalGeneration,
    allowed_pairs,
    official_beam_search,
    segments,
    smoothed_cloze_sum,
)


OFFICIAL_EPSILON = 1e-5
"""What the official losses add to the number of predictions that they divide by."""


@pytest.fixture
def record(parity_dir):
    return Record.load(parity_dir("unilm"))


def settings(record):
    """The configuration; the official word table has no row without gradient."""
    special = record.config["special_ids"]
    ids = {"mask_token_id": special["mask"], "eos_token_id": special["sep"], "decoder_start_token_id": special["cls"]}
    return record.config | ids | {"pad_token_id": special["pad"]}


@pytest.fixture(params=["eager", "sdpa"])
def model(record, request):
    model = unilm.convert(record.weights, settings(record))
    model.set_attn_implementation(request.param)
    return model


@pytest.fixture(params=["eager", "sdpa"])
def writer(record, request):
    """The model that writes, with the weights of the one for pre-training."""
    whole = unilm.convert(record.weights, settings(record))
    model = UniLMForConditionalGeneration(whole.config).eval()
    state = {name: value for name, value in whole.state_dict().items() if name in model.state_dict()}
    model.load_state_dict(state)
    model.set_attn_implementation(request.param)
    return model


def packed(record):
    """Inputs of the four tasks and which tokens are real."""
    inputs = record.inputs
    length = inputs["input_ids"].shape[1]
    real = torch.arange(length) < (inputs["num_tokens_a"] + inputs["num_tokens_b"])[:, None]
    names = {"task_ids": inputs["task_idx"], "num_tokens_a": inputs["num_tokens_a"]}
    return {"input_ids": inputs["input_ids"], "attention_mask": real.long()} | names, real


def test_masks_and_segments(record):
    inputs, real = packed(record)
    order = real.long().cumsum(1) - 1
    tasks = inputs["task_ids"], inputs["num_tokens_a"], order, real
    config = unilm.convert(record.weights, settings(record)).config
    with Comparison(record) as compare:
        both = real[:, :, None] & real[:, None, :]
        compare("attention_mask", allowed_pairs(*tasks).long(), where=both)
        compare("token_type_ids", segments(config, *tasks), where=real)


@torch.no_grad()
def test_states_predictions_and_losses(model, record):
    inputs, real = packed(record)
    places, ids, weights = (record.inputs[name] for name in ("masked_pos", "masked_lm_labels", "masked_weights"))
    encoded = model.bert(**inputs)
    logits = model.cls.predictions(take_positions(encoded.last_hidden_state, places))
    chosen = weights.bool()
    labels = torch.full_like(inputs["input_ids"], -100)
    rows, slots = chosen.nonzero(as_tuple=True)
    labels[rows, places[rows, slots]] = ids[rows, slots]
    pairs = record.inputs["next_sentence_label"]
    count = chosen.sum() + OFFICIAL_EPSILON
    losses = model(
        **inputs,
        labels=labels,
        next_sentence_label=pairs.masked_fill(pairs < 0, -100),
        num_items_in_batch={"mlm": count, "sentence": (pairs >= 0).sum()},
    )
    smoothing = record.config["label_smoothing_for_masked_lm_loss_smoothed"]
    smoothed, _ = smoothed_cloze_sum(logits[chosen], ids[chosen], smoothing, record.config["special_ids"]["pad"])
    with Comparison(record) as compare:
        compare("last_hidden_state", encoded.last_hidden_state, where=real)
        compare("pooler_output", encoded.pooler_output)
        compare("masked_logits", logits, where=chosen)
        compare("seq_relationship_logits", losses.seq_relationship_logits)
        compare("masked_lm_loss", losses.mlm_loss)
        compare("next_sentence_loss", losses.sentence_loss)
        compare("masked_lm_loss_smoothed", smoothed / count)
        compare.remind(skip=lambda name: name.startswith(("beam", "greedy", "attention_mask", "token_type")))


def source(record):
    ids = record.inputs["decode_input_ids"]
    return {"input_ids": ids, "attention_mask": (ids != record.config["special_ids"]["pad"]).long()}


@pytest.mark.filterwarnings("ignore:.*eos_token_id.*")
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_ids(writer, record, use_cache):
    """The official greedy search does not know the end: it fills the row."""
    writer.generation_config.eos_token_id = None
    tokens = record.config["decode"]["max_tgt_length"]
    found = writer.generate(**source(record), max_new_tokens=tokens, do_sample=False, use_cache=use_cache)
    with Comparison(record) as compare:
        compare("greedy_ids", found[:, 1:])


@pytest.mark.parametrize("use_cache", [True, False])
def test_beam_traces(writer, record, use_cache):
    decode, beam = record.config["decode"], record.config["decode"]["beam"]
    found = writer.generate(
        **source(record),
        custom_generate=official_beam_search,
        max_new_tokens=decode["max_tgt_length"],
        eos_token_id=decode["eos_id"],
        num_beams=beam["beam_size"],
        length_penalty=beam["length_penalty"],
        min_new_tokens=beam["min_len"] or None,
        no_repeat_ngram_size=beam["ngram_size"] if beam["forbid_duplicate_ngrams"] else 0,
        use_cache=use_cache,
        return_dict_in_generate=True,
    )
    steps = found.frame_tokens.shape[1]
    ended = (record.outputs["beam_wids"] == decode["eos_id"]).all(-1)
    valid = (ended.long().cumsum(1) - ended.long() < 1)[:, :steps, None].expand_as(found.frame_tokens)
    answers = torch.zeros_like(record.outputs["beam_pred_seq"])
    answers[:, : found.sequences.shape[1] - 1] = found.sequences[:, 1:]
    with Comparison(record) as compare:
        compare("beam_wids", found.frame_tokens, record.outputs["beam_wids"][:, :steps], where=valid)
        compare("beam_ptrs", found.frame_pointers, record.outputs["beam_ptrs"][:, :steps], where=valid)
        compare("beam_scores", found.frame_scores, record.outputs["beam_scores"][:, :steps], where=valid)
        compare("beam_pred_seq", answers)
