"""UniLM's models: the common suite, the four tasks, and writing targets through generate()."""

import copy
import math
import re

import pytest
import torch
from suites.encoder_suite import EncoderSuite, gradients
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import AutoModelForSeq2SeqLM, BertConfig, BertForPreTraining, GenerationConfig
from transformers.modeling_outputs import BaseModelOutput

from bestiary import get_paper
from bestiary.configuration.configuration_unilm import UniLMConfig
from bestiary.conversion import unilm as conversion
from bestiary.modeling import modeling_unilm as unilm
from bestiary.modeling.modeling_unilm import (
    BIDIRECTIONAL,
    LEFT_TO_RIGHT,
    RIGHT_TO_LEFT,
    SEQ2SEQ,
    NgramBlock,
    allowed_pairs,
    official_beam_search,
    segments,
    smoothed_cloze_sum,
)


TINY = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
    "num_labels": 3,
    "mask_token_id": 4,
    "eos_token_id": 3,
    "decoder_start_token_id": 2,
}
MASK, END, START = 4, 3, 2
WRITER = unilm.UniLMForConditionalGeneration
BACKENDS = pytest.mark.parametrize("backend", ["eager", "sdpa"])


class TestUniLM(EncoderSuite):
    slug = "unilm"
    config = UniLMConfig(**TINY)
    base = unilm.UniLMModel
    heads = (
        unilm.UniLMForPreTraining,
        unilm.UniLMForMaskedLM,
        unilm.UniLMForSequenceClassification,
        unilm.UniLMForTokenClassification,
        unilm.UniLMForQuestionAnswering,
        unilm.UniLMForMultipleChoice,
    )
    parameters = {
        "base": {unilm.UniLMModel: 108_313_344, unilm.UniLMForPreTraining: 108_936_006},
        "large": {unilm.UniLMModel: 333_583_360, unilm.UniLMForPreTraining: 334_666_054},
        "base-uncased": {unilm.UniLMModel: 109_482_240, unilm.UniLMForPreTraining: 110_106_428},
    }
    reduces_to_bert = {}
    bad_config = (
        ({"source_type_id": 6}, r"source_type_id must be in \[0, type_vocab_size=6\), got 6"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), got 1.0"),
        ({"masked_lm_loss_weight": -1.0}, "masked_lm_loss_weight must be at least 0"),
        ({"num_attention_heads": 5}, "num_attention_heads must be a divisor of hidden_size=32, got 5"),
    )

    def pretraining_targets(self, labels, real):
        return {"next_sentence_label": torch.tensor([0, 1, -100, 0])}, {
            "mlm": int((labels != -100).sum()),
            "sentence": 3,
        }

    def test_heads_are_the_registered_ones(self):
        assert set(get_paper(self.slug).models.values()) == {self.base, *self.heads, WRITER}

    # The class that writes, which takes no segments and has a loss on a target

    def inputs(self, model_class, padding=None):
        inputs = super().inputs(model_class, padding)
        if model_class is WRITER:
            del inputs["token_type_ids"]
        return inputs

    def labelled(self, head, padding=None):
        if head is not WRITER:
            return super().labelled(head, padding)
        labels = torch.tensor([[7, 8, 9, END], [11, END, -100, -100], [7, 90, END, -100], [END, -100, -100, -100]])
        return self.inputs(head, padding) | {"labels": labels}, 10

    @pytest.mark.parametrize(
        "test",
        [
            "test_checkpoints_load_into_the_encoder_and_into_heads",
            "test_ties_hold_after_loading_and_resizing",
            "test_activation_checkpointing_keeps_the_gradients",
        ],
    )
    def test_the_writer_as_others(self, test, tmp_path):
        arguments = () if "checkpointing" in test else (tmp_path,)
        getattr(self, test)(WRITER, *arguments)

    @pytest.mark.parametrize("kind", ["weights", "others"])
    def test_missing_parameters_of_the_writer(self, kind, tmp_path):
        self.test_missing_parameters_are_initialised_and_others_untouched(WRITER, kind, tmp_path)

    @pytest.mark.parametrize("autocast", [True, False])
    def test_writer_in_bfloat16(self, autocast):
        self.test_bfloat16(WRITER, autocast)

    @pytest.mark.parametrize("padding", [None, "left", "right"])
    def test_backends_of_the_writer_agree(self, padding):
        self.test_backends_agree(WRITER, padding)

    def test_loss_of_the_writer_is_a_sum_over_a_count(self):
        model = self.build(WRITER)
        inputs, count = self.labelled(WRITER, "right")
        whole = model(**inputs).loss
        assert_close(model(**inputs, num_items_in_batch=count).loss, whole)
        parts = [{name: value[rows] for name, value in inputs.items()} for rows in (slice(0, 1), slice(1, None))]
        assert_close(sum(model(**part, num_items_in_batch=count).loss for part in parts), whole)

    @pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
    def test_every_parameter_of_the_writer_gets_a_gradient(self, compiled):
        model = self.build(WRITER).train()
        inputs, _ = self.labelled(WRITER, "right")
        inputs["cloze_input_ids"] = torch.where(inputs["labels"] == -100, 0, MASK)
        plain = gradients(model.eval(), **inputs)
        for name, _ in model.named_parameters():
            assert name in plain, name
            assert plain[name].any() or name.endswith("key.bias"), name
        rows = plain["bert.embeddings.token_type_embeddings.weight"]
        assert rows[4].any() and rows[5].any() and not rows[1:4].any()
        if compiled:
            torch._dynamo.reset()
            found = gradients(torch.compile(model, fullgraph=True, backend="eager"), **inputs)
            torch._dynamo.reset()
            assert_close({name.removeprefix("_orig_mod."): value for name, value in found.items()}, plain)


def build(model_class=WRITER, backend="sdpa", scale=0.3, **fields):
    torch.manual_seed(0)
    model = model_class(UniLMConfig(**TINY | fields)).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value), alpha=scale)
    model.set_attn_implementation(backend)
    return model


IDS = torch.randint(5, 99, (4, 9), generator=torch.Generator().manual_seed(1))
ALL = torch.tensor([BIDIRECTIONAL, LEFT_TO_RIGHT, RIGHT_TO_LEFT, SEQ2SEQ])


# The four tasks


def pairs(n_a, n_b, padding=0):
    """Allowed pairs of every task, (4, T, T)."""
    length = n_a + n_b + padding
    real = torch.arange(length).expand(4, -1) < n_a + n_b
    order = real.long().cumsum(1) - 1
    return allowed_pairs(ALL, torch.full((4,), n_a), order, real)


def test_numbers_of_allowed_pairs():
    assert pairs(5, 4).sum((1, 2)).tolist() == [81, 45, 45, 55]
    for n_a, n_b in ((1, 1), (7, 2), (3, 0), (0, 6)):
        count = pairs(n_a, n_b)[SEQ2SEQ].sum().item()
        assert count == n_a**2 + n_a * n_b + n_b * (n_b + 1) // 2
    assert torch.equal(pairs(6, 0)[SEQ2SEQ], pairs(6, 0)[BIDIRECTIONAL])
    assert torch.equal(pairs(0, 6)[SEQ2SEQ], pairs(0, 6)[LEFT_TO_RIGHT])
    assert torch.equal(pairs(4, 3)[LEFT_TO_RIGHT], pairs(4, 3)[RIGHT_TO_LEFT].T)
    padded = pairs(3, 2, padding=3)
    assert not padded[:, :, 5:].any() and padded[:, 5:, :5].all() and torch.equal(padded[:, :5, :5], pairs(3, 2))


def test_segments_by_the_rule_of_the_official_model():
    real = torch.arange(9) < torch.tensor([8, 9, 7, 9])[:, None]
    lengths = torch.tensor([3, 4, 2, 5])
    order = real.long().cumsum(1) - 1
    found = segments(UniLMConfig(**TINY), ALL, lengths, order, real)
    task = ALL[:, None]
    last = torch.where(task == 3, task + 2, task + 1)  # of the target, or of the whole row
    expected = torch.where((order < lengths[:, None]) & ((task == 0) | (task == 3)), last - 1, last) * real
    assert torch.equal(found, expected)
    two = UniLMConfig(**TINY | {"type_vocab_size": 2, "source_type_id": 0, "target_type_id": 1})
    assert torch.equal(segments(two, ALL, lengths, order, real)[3], (order[3] >= 5).long())


@BACKENDS
@torch.no_grad()
def test_bidirectional_task_is_bert(backend):
    model = build(unilm.UniLMModel, backend)
    mask = (torch.arange(9) < torch.tensor([9, 6, 7, 3])[:, None]).long()
    types = (torch.arange(9) >= 2).long() * mask
    plain = model(IDS, mask, types).last_hidden_state
    tasks = {"task_ids": torch.zeros(4, dtype=torch.long), "num_tokens_a": torch.full((4,), 2)}
    assert_close(model(IDS, mask, **tasks).last_hidden_state[mask.bool()], plain[mask.bool()], rtol=1e-5, atol=1e-6)


@BACKENDS
@torch.no_grad()
def test_what_a_token_does_not_see_does_not_change_it(backend):
    model = build(unilm.UniLMModel, backend)
    tasks = {"task_ids": ALL, "num_tokens_a": torch.full((4,), 4)}
    before = model(IDS, **tasks).last_hidden_state
    for place in range(9):
        ids = IDS.clone()
        ids[:, place] = 5 + (ids[:, place] - 4) % 94
        moved = (model(ids, **tasks).last_hidden_state != before).any(-1)
        expected = pairs(4, 5)[:, :, place]
        assert torch.equal(moved, expected), place


@torch.no_grad()
def test_sequence_to_sequence_without_one_side():
    model = build(unilm.UniLMModel)
    whole = {"task_ids": torch.full((4,), SEQ2SEQ), "token_type_ids": torch.ones_like(IDS)}
    both = {"task_ids": torch.full((4,), BIDIRECTIONAL), "token_type_ids": torch.ones_like(IDS)}
    left = {"task_ids": torch.full((4,), LEFT_TO_RIGHT), "token_type_ids": torch.ones_like(IDS)}
    all_a, none = torch.full((4,), 9), torch.zeros(4, dtype=torch.long)
    assert_close(model(IDS, num_tokens_a=all_a, **whole)[0], model(IDS, num_tokens_a=all_a, **both)[0])
    assert_close(model(IDS, num_tokens_a=none, **whole)[0], model(IDS, num_tokens_a=none, **left)[0])


@torch.no_grad()
def test_padding_of_packed_rows_may_stand_on_either_side():
    model = build(unilm.UniLMModel)
    results = []
    for side in ("left", "right"):
        mask = torch.arange(9) < torch.tensor([9, 6, 7, 5])[:, None]
        mask = mask.flip(1) if side == "left" else mask
        ids = torch.zeros_like(IDS).masked_scatter(mask, torch.arange(27) % 60 + 5)
        tasks = {"task_ids": ALL, "num_tokens_a": torch.tensor([3, 2, 4, 2])}
        results.append(model(ids, mask.long(), **tasks).last_hidden_state[mask])
    assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*flex_attention.*without torch.compile")
@torch.no_grad()
def test_block_masks_of_flex_attention():
    """Of the tasks, of targets under [MASK]s of their own, and of cloze targets; the kernel is not compiled."""
    model = build()
    mask = (torch.arange(9) < torch.tensor([9, 6, 7, 3])[:, None]).long()
    tasks = {"task_ids": ALL, "num_tokens_a": torch.tensor([3, 2, 4, 2])}
    results = []
    for backend in ("sdpa", "flex_attention"):
        model.set_attn_implementation(backend)
        with torch.compiler.set_stance("force_eager"):
            states = model.bert(IDS, mask, **tasks).last_hidden_state[mask.bool()]
            whole = model(*left_padded(SOURCES, REAL), labels=TARGETS)
            cloze = model(SOURCES, REAL, cloze_input_ids=TARGETS.clamp(min=0), labels=TARGETS)
        results.append((states, whole.logits, whole.loss, cloze.loss))
    assert_close(*results, rtol=1e-4, atol=1e-5)


def test_wrong_tasks():
    model = build(unilm.UniLMModel)
    with pytest.raises(ValueError, match=r"task_ids must be in \[0, 4\), the numbers of bidirectional, .* \[4\]"):
        model(IDS[:1], task_ids=torch.tensor([4]))
    with pytest.raises(ValueError, match="num_tokens_a belongs to task_ids"):
        model(IDS, num_tokens_a=torch.ones(4))
    with pytest.raises(ValueError, match=r"attention_mask must be \(4, 9\), got \(4, 1, 9, 9\)"):
        model(IDS, torch.zeros(4, 1, 9, 9), task_ids=ALL)


def test_losses_by_task_and_without_pairs():
    model = build(unilm.UniLMForPreTraining, masked_lm_loss_weight=0.5, next_sentence_loss_weight=3.0)
    labels = IDS.masked_fill(torch.rand(IDS.shape, generator=torch.Generator().manual_seed(2)) < 0.6, -100)
    tasks = {"task_ids": ALL, "num_tokens_a": torch.full((4,), 4)}
    sentence = torch.tensor([1, -100, -100, -100])
    found = model(IDS, **tasks, labels=labels, next_sentence_label=sentence)
    logits = model(IDS, **tasks).prediction_logits
    sums = [F.cross_entropy(each, wanted, reduction="sum") for each, wanted in zip(logits, labels)]
    assert_close(found.task_losses, torch.stack(sums).detach(), rtol=1e-5, atol=1e-5)
    assert found.task_counts.tolist() == (labels != -100).sum(1).tolist()
    assert_close(found.mlm_loss, sum(sums) / (labels != -100).sum())
    assert_close(found.sentence_loss, F.cross_entropy(found.seq_relationship_logits[:1], sentence[:1]))
    assert_close(found.loss, 0.5 * found.mlm_loss + 3 * found.sentence_loss)
    none = model(IDS, **tasks, labels=labels, next_sentence_label=torch.full((4,), -100))
    assert none.sentence_loss == 0 and none.loss.isfinite()
    rows = gradients(model, input_ids=IDS[3:], **{name: value[3:] for name, value in tasks.items()}, labels=labels[3:])
    table = rows["bert.embeddings.token_type_embeddings.weight"]
    assert not table[:4].any() and table[4].any() and table[5].any()


def test_initialisation_shrinks_with_depth():
    torch.manual_seed(0)
    model = unilm.UniLMModel(
        UniLMConfig(**TINY | {"hidden_size": 64, "num_hidden_layers": 4, "initializer_range": 0.5})
    )
    for number, layer in enumerate(model.encoder.layer):
        for part in (layer.attention.output, layer.output):
            expected = 0.5 / math.sqrt(2 * (number + 1))
            assert part.dense.weight.std().item() == pytest.approx(expected, rel=0.1)
        assert layer.attention.self.query.weight.std().item() == pytest.approx(0.5, rel=0.1)
    assert model.embeddings.word_embeddings.weight.abs().max() > 1  # not cut at two deviations


# Losses of fine-tuning


def test_smoothed_loss():
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([3, 8, 1, 0, 5])  # 0 is padding
    smooth = torch.full((5, 9), 0.1 / 7)
    smooth[:, 0] = 0
    smooth[range(5), labels] = 0.9
    assert_close(smooth.sum(1)[[0, 1, 2, 4]], torch.ones(4))
    smooth[3] = 0
    expected = F.kl_div(logits.log_softmax(-1), smooth, reduction="none").sum(-1)
    found, count = smoothed_cloze_sum(logits, labels, 0.1, 0)
    assert_close(found, expected[[0, 1, 2, 4]].sum())
    assert count == 5
    equal = smooth[[0, 1, 2, 4]].clamp(min=1e-30).log()
    assert smoothed_cloze_sum(equal, labels[[0, 1, 2, 4]], 0.1, 0)[0].abs() < 1e-5
    plain = smoothed_cloze_sum(logits[:3], labels[:3], 0.0, 0)[0]
    assert_close(plain, F.cross_entropy(logits[:3], labels[:3], reduction="sum"))


# Writing

SOURCES = torch.tensor([[2, 17, 36, 42, 34, 3], [2, 25, 3, 0, 0, 0], [2, 50, 51, 52, 3, 0]])
REAL = (SOURCES != 0).long()
TARGETS = torch.tensor([[7, 8, 9, END], [11, END, -100, -100], [60, 61, END, -100]])


def left_padded(ids, mask):
    rows = [torch.cat((row[real == 0], row[real == 1])) for row, real in zip(ids, mask)]
    return torch.stack(rows), mask.flip(1)


@torch.no_grad()
def log_likelihood(model, source, target):
    """Of one target, token by token, by packed rows with one [MASK] each through the encoder alone."""
    total = 0.0
    for place, token in enumerate(target):
        ids = torch.tensor([[*source, *target[:place], MASK]])
        tasks = {"task_ids": torch.tensor([SEQ2SEQ]), "num_tokens_a": torch.tensor([len(source)])}
        state = model.bert(ids, **tasks).last_hidden_state[:, -1]
        total += model.cls.predictions(state).log_softmax(-1)[0, token].item()
    return total


@BACKENDS
@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_of_a_target_is_that_of_decoding(backend, side):
    model = build(backend=backend)
    ids, mask = left_padded(SOURCES, REAL) if side == "left" else (SOURCES, REAL)
    outputs = model(input_ids=ids, attention_mask=mask, labels=TARGETS)
    sources = [row[real.bool()].tolist() for row, real in zip(SOURCES, REAL)]
    targets = [row[row != -100].tolist() for row in TARGETS]
    total = sum(log_likelihood(model, *pair) for pair in zip(sources, targets))
    assert outputs.loss.item() == pytest.approx(-total / 9, rel=1e-5)
    assert_close(F.cross_entropy(outputs.logits.flatten(0, 1), TARGETS.flatten()), outputs.loss)


@torch.no_grad()
def test_first_token_and_decoder_inputs():
    model = build()
    start = torch.full((3, 1), START)
    first = model(SOURCES, REAL).logits
    assert_close(first, model(SOURCES, REAL, decoder_input_ids=start).logits)
    shifted = model.prepare_decoder_input_ids_from_labels(TARGETS)
    assert shifted.tolist() == [[2, 7, 8, 9], [2, 11, 3, 0], [2, 60, 61, 3]]
    whole = model(SOURCES, REAL, decoder_input_ids=shifted).logits
    assert_close(whole[:, :1], first, rtol=1e-5, atol=1e-5)
    assert_close(model(SOURCES, REAL, decoder_input_ids=shifted, logits_to_keep=2).logits, whole[:, -2:])
    with pytest.raises(ValueError, match="needs input_ids, the source"):
        model(decoder_input_ids=shifted)


@torch.no_grad()
def test_decoding_with_a_cache_is_the_whole_pass():
    model = build()
    ids = torch.tensor([[2, 7, 8, 9, 10], [2, 11, 12, 13, 14], [2, 60, 61, 62, 63]])
    whole = model(SOURCES, REAL, decoder_input_ids=ids).logits
    source, cache, parts = model.get_encoder()(SOURCES, REAL), None, []
    for begin, end in ((0, 1), (1, 3), (3, 4), (4, 5)):  # the new decoder inputs only, as for any encoder-decoder
        new = ids[:, begin:end]
        step = model(encoder_outputs=source, decoder_input_ids=new, past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        assert step.logits.shape[1] == end - begin and cache.get_seq_length() == end
        parts.append(step.logits)
    assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    cache.crop(-2)  # the last two tokens are written again
    again = model(encoder_outputs=source, decoder_input_ids=ids[:, 3:], past_key_values=cache).logits
    assert_close(again, whole[:, 3:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
def test_decoder_inputs_may_be_padded_on_either_side(use_cache):
    model = build()
    sides = {}
    for side in ("left", "right"):
        mask = torch.arange(5) < torch.tensor([5, 3, 4])[:, None]
        mask = mask.flip(1) if side == "left" else mask
        ids = torch.zeros(3, 5, dtype=torch.long).masked_scatter(
            mask, torch.tensor([2, 7, 8, 9, 5, 2, 7, 5, 2, 9, 9, 6])
        )
        decoder = {"decoder_input_ids": ids, "decoder_attention_mask": mask.long(), "use_cache": use_cache}
        sides[side] = model(SOURCES, REAL, **decoder).logits[mask]
    assert_close(sides["left"], sides["right"], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"decoder_attention_mask must be \(3, 5\)"):
        model(SOURCES, REAL, decoder_input_ids=ids, decoder_attention_mask=mask[:, 1:], use_cache=use_cache)


def test_prompts_of_different_lengths():
    """With a mask for prompts padded on the left, each row is continued as if it stood alone."""
    model = build()
    prompts, mask = torch.tensor([[7, 8], [0, 11], [9, 9]]), torch.tensor([[1, 1], [0, 1], [1, 1]])
    options = {"max_new_tokens": 4, "num_beams": 2}
    decoder = {"decoder_input_ids": prompts, "decoder_attention_mask": mask}
    found = model.generate(SOURCES, attention_mask=REAL, **decoder, **options)
    for row in range(3):
        prompt = prompts[row, mask[row].bool()][None]
        alone = model.generate(SOURCES[row, REAL[row].bool()][None], decoder_input_ids=prompt, **options)
        new = alone[0, 1 + prompt.shape[1] :]
        assert torch.equal(found[row, 3 : 3 + len(new)], new)


def test_activation_checkpointing_with_an_encoded_source():
    model = build(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        model(encoder_outputs=model.get_encoder()(SOURCES, REAL), labels=TARGETS).loss.backward()
        found.append({name: value.grad.clone() for name, value in model.named_parameters()})
    assert_close(*found, rtol=1e-4, atol=1e-5)


def test_what_a_tokenizer_and_a_trainer_give():
    """Token types of the tokenizer are not read, embeddings stand for ids, and states are the decoder's."""
    model = build()
    types = {"token_type_ids": torch.zeros_like(SOURCES)}
    plain = model(SOURCES, REAL, labels=TARGETS, output_hidden_states=True)
    assert_close(model(SOURCES, REAL, labels=TARGETS, **types).loss, plain.loss)
    cloze = {"cloze_input_ids": TARGETS.clamp(min=0), "labels": TARGETS}
    assert_close(model(SOURCES, REAL, **cloze, **types).loss, model(SOURCES, REAL, **cloze).loss)
    embeds = {"inputs_embeds": model.get_input_embeddings()(SOURCES), "attention_mask": REAL}
    assert_close(model(**embeds, labels=TARGETS).loss, plain.loss, rtol=1e-5, atol=1e-5)
    options = {"attention_mask": REAL, "max_new_tokens": 5}
    found = model.generate(SOURCES, **options)
    assert torch.equal(model.generate(input_ids=SOURCES, **types, **options), found)
    assert torch.equal(model.generate(**embeds, max_new_tokens=5), found)
    assert torch.equal(model.generate(encoder_outputs=model.get_encoder()(SOURCES, REAL), **options), found)
    assert_close(model.cls.predictions(plain.decoder_hidden_states[-1]), plain.logits)
    real, encoded = REAL.bool(), plain.encoder_hidden_states[-1]
    assert_close(encoded[real], model.get_encoder()(SOURCES, REAL)[0][real], rtol=1e-4, atol=1e-5)
    kept = model(encoder_outputs=model.get_encoder()(SOURCES, REAL), labels=TARGETS, logits_to_keep=2)
    assert_close(kept.loss, plain.loss, rtol=1e-5, atol=1e-5)
    assert_close(kept.logits, plain.logits[:, -2:], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*output_attentions.*")
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_everything_that_generate_returns(options):
    model = build(backend="eager")
    found = model.generate(
        SOURCES,
        attention_mask=REAL,
        max_new_tokens=4,
        min_new_tokens=4,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_attentions=True,
        output_hidden_states=True,
        **options,
    )
    rows = 3 * options.get("num_beams", 1)
    assert len(found.scores) == len(found.logits) == len(found.decoder_attentions) == 4
    for step, (states, attention) in enumerate(zip(found.decoder_hidden_states, found.decoder_attentions), 1):
        assert states[-1].shape == (rows, 1, 32)
        assert attention[-1].shape == (rows, 4, 1, 6 + step + 1)  # the source, start and tokens, and the [MASK]
        assert_close(attention[-1].sum(-1), torch.ones(rows, 4, 1))
        assert not attention[-1][..., 6].any(), "the start token is not seen"
    assert found.encoder_hidden_states[-1].shape == (3, 6, 32) and found.encoder_attentions[-1].shape == (3, 4, 6, 6)


def test_assisted_decoding_gives_the_same():
    model, source = build(scale=0.2), SOURCES[:1]
    plain = model.generate(source, max_new_tokens=7)
    assert torch.equal(model.generate(source, max_new_tokens=7, assistant_model=build()), plain)
    assert torch.equal(model.generate(source, max_new_tokens=7, prompt_lookup_num_tokens=3), plain)


def test_blocked_ngrams():
    model = build(scale=0.2)
    options = {"attention_mask": REAL, "max_new_tokens": 9, "num_beams": 3, "min_new_tokens": 9}
    for size in (1, 2, 3):
        stock = model.generate(SOURCES, **options, no_repeat_ngram_size=size)
        assert torch.equal(model.generate(SOURCES, **options, logits_processor=[NgramBlock(size)]), stock)
    ids = torch.tensor([[START, 7, 8, 9, 7, 8], [START, 7, 9, 9, 7, 9], [START, 7, 7, 7, 7, 7]])
    blocked = NgramBlock(3, exempt=[9])(ids, torch.zeros(3, 12)).isinf()
    assert blocked.nonzero().tolist() == [[2, 7]]  # 7 8 9 and 7 9 9 have a 9, in the last or an earlier place
    assert NgramBlock(3)(ids, torch.zeros(3, 12)).isinf().nonzero().tolist() == [[0, 9], [1, 9], [2, 7]]
    with pytest.raises(ValueError, match="NgramBlock.size must be at least 1, got 0"):
        NgramBlock(0)


@torch.no_grad()
def greedy_by_hand(model, source, steps):
    """Greedy search by packed rows through the encoder alone."""
    written = []
    while len(written) < steps and END not in written:
        ids = torch.tensor([[*source, *written, MASK]])
        tasks = {"task_ids": torch.tensor([SEQ2SEQ]), "num_tokens_a": torch.tensor([len(source)])}
        state = model.bert(ids, **tasks).last_hidden_state[:, -1]
        written.append(model.cls.predictions(state).argmax(-1).item())
    return written


@BACKENDS
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_search(backend, use_cache):
    model = build(backend=backend)
    found = model.generate(SOURCES, attention_mask=REAL, max_new_tokens=8, use_cache=use_cache)
    assert (found[:, 0] == START).all()
    for row, source, real in zip(found[:, 1:].tolist(), SOURCES, REAL):
        expected = greedy_by_hand(model, source[real.bool()].tolist(), 8)
        assert row[: len(expected)] == expected and not any(row[len(expected) :])
    assert len({tuple(row) for row in found.tolist()}) == 3


OPTIONS = {
    "beam": {"num_beams": 4},
    "blocked": {"num_beams": 3, "no_repeat_ngram_size": 2, "length_penalty": 0.6, "min_new_tokens": 3},
    "returned": {"num_beams": 4, "num_return_sequences": 2},
    "sampled": {"do_sample": True, "top_k": 20},
    "official": {"num_beams": 4, "custom_generate": official_beam_search, "length_penalty": 1.0},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_search_does_not_depend_on_cache_or_padding(name):
    """Beams share the keys and values of their source; a cache that is reordered wrongly shows here."""
    model = build(scale=0.25)
    results = []
    for sources, mask in ((SOURCES, REAL), left_padded(SOURCES, REAL)):
        for use_cache in (True, False):
            torch.manual_seed(3)
            results.append(
                model.generate(sources, attention_mask=mask, max_new_tokens=7, use_cache=use_cache, **OPTIONS[name])
            )
    assert results[0].shape[0] == (6 if name == "returned" else 3) and len(set(map(tuple, results[0].tolist()))) > 2
    assert all(torch.equal(result, results[0]) for result in results)
    if name in ("beam", "blocked", "official"):
        for row in range(3):
            alone = model.generate(SOURCES[row, REAL[row].bool()][None], max_new_tokens=7, **OPTIONS[name])
            assert torch.equal(alone[0], results[0][row, : alone.shape[1]])


def test_best_of_all_targets_is_found():
    """Beams as wide as the vocabulary search everything, and their scores are those of the loss."""
    sizes = {"vocab_size": 9, "max_position_embeddings": 16}
    model = build(scale=0.5, **sizes)
    source = [2, 7, 8, 5, 3]
    found = model.generate(
        torch.tensor([source]),
        num_beams=9,
        max_new_tokens=2,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    targets = [[END], *([first, second] for first in range(9) for second in range(9) if first != END)]
    scores = {tuple(target): log_likelihood(model, source, target) for target in targets}
    best = max(scores, key=scores.get)
    assert tuple(found.sequences[0, 1 : 1 + len(best)].tolist()) == best
    assert found.sequences_scores.item() == pytest.approx(scores[best], abs=1e-4)


def test_official_search_with_one_beam_is_greedy():
    model = build(scale=0.2)
    options = {"attention_mask": REAL, "max_new_tokens": 7}
    greedy = model.generate(SOURCES, **options)
    official = {"custom_generate": official_beam_search, "num_beams": 1}
    assert torch.equal(greedy, model.generate(SOURCES, **options, **official))
    assert model.generate(SOURCES, **options, **official, max_time=0.0).shape[1] == 2  # it may be stopped
    for wrong in ({"do_sample": True}, {"num_beams": 2, "num_return_sequences": 2}):
        with pytest.raises(ValueError, match="leave out do_sample and num_return_sequences"):
            model.generate(SOURCES, **options, **official | wrong)


def test_official_search_by_hand():
    """Two beams, three steps: what ended stays with continuations at -10000, the answer is the best by length."""
    scores = torch.tensor([[[-1.0, -2.0], [-1.5, -2.2], [-3.0, -9.0]]])
    tokens = torch.tensor([[[7, 8], [END, 9], [END, 5]]])
    pointers = torch.tensor([[[0, 0], [0, 1], [1, 1]]])
    pick = unilm._best_of_frames
    assert pick(scores, tokens, pointers, torch.tensor([END]), 0.0)[0] == [[7, END]]  # -1.5 > -3
    answers, values = pick(scores, tokens, pointers, torch.tensor([END]), 8.0)
    assert answers == [[7, END]] if -1.5 / (7 / 6) ** 8 > -3 / (8 / 6) ** 8 else [[8, 9, END]]
    assert answers == [[8, 9, END]] and values.item() == pytest.approx(-3 / (8 / 6) ** 8)


def test_source_states_are_there_once_for_all_beams():
    model, seen = build(), []
    attend = unilm.DecodingStep.attend

    def watch(step, layer, query, *rest):
        seen.append((len(query), len(step.source[layer][0]), query.shape[2]))
        return attend(step, layer, query, *rest)

    unilm.DecodingStep.attend = watch
    try:
        model.generate(SOURCES, attention_mask=REAL, max_new_tokens=4, min_new_tokens=4, num_beams=5)
    finally:
        unilm.DecodingStep.attend = attend
    assert seen == [(15, 3, 2)] * 8, "a step reads the token before and a [MASK]"


def test_a_target_that_does_not_fit():
    model = build()
    for options in ({"max_new_tokens": 11}, {"max_length": 12, "num_beams": 2, "use_cache": False}):
        with pytest.raises(ValueError, match="source of 6 and a target of 11 tokens.*max_position_embeddings is 16"):
            model.generate(SOURCES, attention_mask=REAL, **options)
    assert model.generate(SOURCES, attention_mask=REAL, max_new_tokens=10, min_new_tokens=10).shape == (3, 11)
    with pytest.raises(ValueError, match="a source of 17 and a target of 0 tokens"):
        model.generate(torch.full((1, 17), 7), max_new_tokens=1)
    with pytest.raises(ValueError, match="a source of 6 and a target of 11 tokens"):
        model(SOURCES, REAL, labels=torch.full((3, 11), 7))
    with pytest.raises(ValueError, match="a source of 6 and a target of 11 tokens"):
        model(SOURCES, REAL, cloze_input_ids=torch.full((3, 11), 7))
    with pytest.raises(ValueError, match="a source of 6 and a target of 11 tokens"):
        model(SOURCES, REAL, decoder_input_ids=torch.full((3, 11), 7), use_cache=True)
    longest = torch.full((3, 13), 7)  # beside the shortest source; each pair fits
    longest[0, 10:] = longest[2, 11:] = -100
    pairs = [(SOURCES[row, REAL[row].bool()][None], longest[row, longest[row] != -100][None]) for row in range(3)]
    alone = torch.stack([model(source, labels=target, num_items_in_batch=1).loss for source, target in pairs])
    assert_close(model(SOURCES, REAL, labels=longest, num_items_in_batch=1).loss, alone.sum(), rtol=1e-5, atol=1e-4)


def test_wrong_sources_and_caches():
    model = build()
    with pytest.raises(ValueError, match="encoder_outputs must be what get_encoder.. gives.*BaseModelOutput"):
        model(encoder_outputs=BaseModelOutput(torch.zeros(3, 6, 32)), labels=TARGETS)
    with pytest.raises(ValueError, match="4 rows of decoder inputs for 3 sources"):
        model(encoder_outputs=model.get_encoder()(SOURCES, REAL), decoder_input_ids=torch.full((4, 1), START))
    with pytest.raises(ValueError, match=r"attention_mask must be \(3, 6\) as the sources, got \(3, 5\)"):
        model(SOURCES, REAL[:, 1:], labels=TARGETS)
    with pytest.raises(ValueError, match="a cache that grows; leave cache_implementation out"):
        model.generate(SOURCES, attention_mask=REAL, max_new_tokens=4, cache_implementation="static")
    with pytest.raises(ValueError, match="source 1 has no tokens"):
        model(SOURCES, torch.tensor([[1], [0], [1]]) * REAL, labels=TARGETS)
    with pytest.raises(ValueError, match=r"mask_token_id must be in \[0, vocab_size=99\) to write targets, got 103"):
        WRITER(UniLMConfig(**TINY | {"mask_token_id": 103}))
    with pytest.raises(ValueError, match=r"labels must be in \[0, 99\)"):
        model(SOURCES, REAL, labels=torch.full((3, 2), 99))


def test_cloze_of_fine_tuning():
    """Masked rows see source, earlier target and themselves; the loss is at labels only, and smoothed."""
    model = build(label_smoothing=0.0)
    cloze = torch.tensor([[7, MASK, 9, MASK], [MASK, END, 0, 0], [60, MASK, 5, 0]])
    labels = torch.tensor([[-100, 8, -100, END], [11, -100, -100, -100], [-100, 61, END, -100]])
    found = model(SOURCES, REAL, cloze_input_ids=cloze, labels=labels)
    logits = model(SOURCES, REAL, cloze_input_ids=cloze).logits
    assert_close(F.cross_entropy(logits.flatten(0, 1), labels.flatten()), found.loss)
    ids = torch.tensor([[*SOURCES[0].tolist(), *cloze[0].tolist()]])
    tasks = {"task_ids": torch.tensor([SEQ2SEQ]), "num_tokens_a": torch.tensor([6])}
    state = model.bert(ids, **tasks).last_hidden_state[:, 6:]
    assert_close(model.cls.predictions(state)[0], logits[0], rtol=1e-5, atol=1e-5)
    moved = left_padded(SOURCES, REAL)
    assert_close(model(*moved, cloze_input_ids=cloze, labels=labels).loss, found.loss)
    told = {"decoder_attention_mask": (cloze != 0).long()}
    assert_close(model(SOURCES, REAL, cloze_input_ids=cloze, labels=labels, **told).loss, found.loss)
    smooth = build(label_smoothing=0.1)(SOURCES, REAL, cloze_input_ids=cloze, labels=labels).loss
    kept = labels != -100
    assert_close(smooth, smoothed_cloze_sum(logits[kept], labels[kept], 0.1, 0)[0] / 5)
    assert smooth != found.loss


def test_saved_options_and_classes(tmp_path):
    model = build()
    model.generation_config = GenerationConfig(
        max_length=5, num_beams=2, eos_token_id=END, decoder_start_token_id=START
    )
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert type(loaded) is WRITER and loaded.config.is_encoder_decoder and loaded.generation_config.num_beams == 2
    assert torch.equal(loaded.generate(SOURCES, attention_mask=REAL), model.generate(SOURCES, attention_mask=REAL))
    reader = unilm.UniLMForMaskedLM.from_pretrained(tmp_path)
    assert not reader.config.is_encoder_decoder and loaded.bert.config is loaded.config
    tasks = {"task_ids": torch.full((3,), SEQ2SEQ)}
    assert reader(SOURCES, REAL, **tasks).logits.shape == (3, 6, 99)


# Converters


def test_tables_of_bert_are_extended():
    state = {
        "bert.embeddings.token_type_embeddings.weight": torch.tensor([[1.0], [2.0]]),
        "bert.embeddings.position_embeddings.weight": torch.arange(3.0)[:, None],
        "bert.pooler.dense.bias": torch.ones(4),
    }
    config = UniLMConfig(**TINY | {"max_position_embeddings": 8})
    grown = conversion.extended(state, config)
    types, positions, other = grown.values()
    assert types.flatten().tolist() == [1, 2, 1, 1, 1, 2]
    assert positions.flatten().tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert other is state["bert.pooler.dense.bias"]
    seven = conversion.extended(state, UniLMConfig(**TINY | {"type_vocab_size": 7}))
    assert seven["bert.embeddings.token_type_embeddings.weight"].flatten().tolist() == [1, 2, 1, 1, 1, 2, 2]
    with pytest.raises(ValueError, match="max_position_embeddings must be from 3, .* got 2"):
        conversion.extended(state, UniLMConfig(**TINY | {"max_position_embeddings": 2}))


def official(**options):
    """A checkpoint with BERT's names."""
    torch.manual_seed(0)
    sizes = {name: value for name, value in TINY.items() if not name.endswith("_id") and name != "num_labels"}
    stock = BertForPreTraining(BertConfig(**sizes | {"type_vocab_size": 6, "layer_norm_eps": 1e-5} | options)).eval()
    return stock, dict(stock.state_dict())


def test_official_layouts():
    stock, state = official()
    assert "cls.predictions.decoder.weight" in state
    settings = {"num_attention_heads": 4, "layer_norm_epsilon": 1e-5, "mask_token_id": 4, "decoder_start_token_id": 2}
    model = conversion.convert(state, settings)
    assert type(model) is unilm.UniLMForPreTraining and model.config.layer_norm_eps == 1e-5
    types = torch.arange(9).expand_as(IDS) % 6
    with torch.no_grad():
        ours, theirs = model(IDS, token_type_ids=types), stock(IDS, token_type_ids=types)
    assert_close(ours.prediction_logits, theirs.prediction_logits, rtol=1e-5, atol=1e-5)
    assert_close(ours.seq_relationship_logits, theirs.seq_relationship_logits, rtol=1e-5, atol=1e-5)

    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in state.items()
        if name != "cls.predictions.decoder.weight" and name != "cls.predictions.decoder.bias"
    }
    assert_close(conversion.convert(old, settings).state_dict(), model.state_dict())
    wrong = state | {"cls.predictions.decoder.weight": state["cls.predictions.decoder.weight"] + 1}
    with pytest.raises(ValueError, match="contradictory"):
        conversion.convert(wrong, settings)

    smoothed = state | {"crit_mask_lm_smoothed.one_hot": torch.full((1, 99), 0.1 / 97)}  # fine-tuned
    assert_close(conversion.convert(smoothed, settings).state_dict(), model.state_dict())

    # s2s-ft has no pooler and no pairs, and its head holds the word table by a name of its own
    s2s_ft = {name: value for name, value in smoothed.items() if not re.search("seq_rel|pooler|decoder", name)}
    table = state["cls.predictions.decoder.weight"]
    writer = conversion.convert(s2s_ft | {"cls.predictions.decoder_weight": table}, settings)
    assert type(writer) is WRITER and writer.config.eos_token_id == 102
    assert_close(
        writer.bert.state_dict(),
        {name: value for name, value in model.bert.state_dict().items() if "pooler" not in name},
    )
    with pytest.raises(ValueError, match="contradictory"):
        conversion.convert(s2s_ft | {"cls.predictions.decoder_weight": table + 1}, settings)
    encoder = {name: value for name, value in state.items() if name.startswith("bert.")}
    assert type(conversion.convert(encoder, settings)) is unilm.UniLMModel


def test_configurations_of_official_checkpoints():
    _, state = official(type_vocab_size=2)
    settings = {"num_attention_heads": 4, "mask_token_id": 4}
    config = conversion.convert(state, settings).config
    assert (config.type_vocab_size, config.source_type_id, config.target_type_id) == (2, 0, 1)
    assert config.layer_norm_eps == 1e-5
    assert conversion.convert(state, settings | {"layer_norm_eps": 1e-12}).config.layer_norm_eps == 1e-12
    with pytest.raises(ValueError, match="num_attention_heads is not given"):
        conversion.convert(state, {})
    with pytest.raises(ValueError, match="no official checkpoint of the paper 'unilm'"):
        conversion.convert({"electra.embeddings.weight": torch.ones(1)}, settings)


def test_configuration_is_not_changed_by_the_class():
    config = UniLMConfig(**TINY)
    WRITER(config)
    assert not config.is_encoder_decoder
    both = copy.deepcopy(config)
    both.is_encoder_decoder = True
    for reader in (unilm.UniLMForMaskedLM(both), unilm.UniLMModel(both)):
        assert not reader.config.is_encoder_decoder and both.is_encoder_decoder
        attention = next(part for part in reader.modules() if isinstance(part, unilm.UniLMSelfAttention))
        assert attention.config is reader.config
