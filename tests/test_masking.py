"""Masking collators: counts, shares, whole words, independence of the batch's split, bad input, official counts."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch.utils.data import DataLoader
from transformers import BertTokenizerFast

from bestiary.trainers.masking import (
    ElectraMaskingCollator,
    MaskingCollator,
    SpecialTokens,
    choose_positions,
    prediction_counts,
)


VOCAB = 1000
PAD, CLS, SEP, MASK = 0, 1, 2, 3
SPECIAL = SpecialTokens(
    cls_id=CLS, sep_id=SEP, pad_id=PAD, mask_id=MASK, vocab_size=VOCAB, continuation=np.arange(VOCAB) % 3 == 0
)


def make_rows(lengths, seed=0, low=10):
    rng = np.random.default_rng(seed)
    rows = []
    for key, length in enumerate(lengths):
        split = length // 2
        ids = rng.integers(low, VOCAB, length)
        ids[0], ids[split], ids[-1] = CLS, SEP, SEP
        rows.append(
            {
                "input_ids": ids.tolist(),
                "token_type_ids": [0] * (split + 1) + [1] * (length - split - 1),
                "next_sentence_label": key % 2,
                "example_key": key,
            }
        )
    return rows


def by_row(batch):
    """The batch as one dict of unpadded values per row."""
    lengths = batch["attention_mask"].sum(1).tolist()
    return [
        {name: (column[row, :length] if column.ndim == 2 else column[row]).tolist() for name, column in batch.items()}
        for row, length in enumerate(lengths)
    ]


def test_counts_of_the_papers():
    lengths = np.array([128, 512, 10, 30, 3])
    assert prediction_counts(lengths, 0.15).tolist() == [19, 77, 2, 4, 1]  # 1.5 -> 2 and 4.5 -> 4
    assert prediction_counts(lengths, 0.15, 20).tolist() == [19, 20, 2, 4, 1]
    for length, rate, count in ((128, 0.15, 19), (512, 0.15, 77), (512, 0.25, 128), (10, 0.15, 1), (5, 0.15, 1)):
        batch = ElectraMaskingCollator(SPECIAL, mlm_probability=rate, max_length=length)(make_rows([length]))
        assert (batch["labels"] != -100).sum() == count
    # The limit is int((rate + 0.005) * max_length): at rate 0.45 it is 455 of 1000, below round(0.4563 * 1000).
    collator = ElectraMaskingCollator(SPECIAL, mlm_probability=0.4599, max_length=10)
    assert (collator(make_rows([10]))["labels"] != -100).sum() == 4  # round(4.599) = 5, the limit int(4.649) = 4
    wider = replace(collator, max_length=100)  # a later phase with longer rows has its own limit
    assert (wider(make_rows([100]))["labels"] != -100).sum() == 46


@pytest.mark.parametrize(
    "collator", [MaskingCollator(SPECIAL), ElectraMaskingCollator(SPECIAL)], ids=["bert", "electra"]
)
def test_exact_counts_and_untouched_positions(collator):
    lengths = [128, 10, 30, 3, 64, 4, 77]
    rows = make_rows(lengths, low=4)
    rows[0]["input_ids"][5:9] = [MASK] * 4
    rows[0]["input_ids"][9:50] = [PAD] * 41  # a row padded without an attention mask
    batch = collator(rows)
    assert {name: (column.dtype, column.shape[0]) for name, column in batch.items()} == {
        name: (torch.int64, 7) for name in batch
    }
    assert batch["input_ids"].shape == (7, 128)
    assert batch["attention_mask"].sum(1).tolist() == lengths
    chosen = batch["labels"] != -100
    available = [max(1, length - 3) if length > 3 else 0 for length in lengths]
    available[3] = 0  # [CLS] [SEP] [SEP]
    expected = [min(max(1, round(0.15 * length)), most) for length, most in zip(lengths, available)]
    assert chosen.sum(1).tolist() == expected
    for row, original in enumerate(rows):
        ids = torch.full((128,), PAD)
        ids[: lengths[row]] = torch.tensor(original["input_ids"])
        assert torch.equal(batch["labels"][row][chosen[row]], ids[chosen[row]])
        assert torch.equal(batch["input_ids"][row][~chosen[row]], ids[~chosen[row]])
        assert not (chosen[row] & torch.isin(ids, torch.tensor([PAD, CLS, SEP]))).any()
        assert batch["token_type_ids"][row, : lengths[row]].tolist() == original["token_type_ids"]
    assert batch["next_sentence_label"].tolist() == [0, 1, 0, 1, 0, 1, 0]


def test_existing_mask_is_a_candidate_for_bert_only():
    row = {"input_ids": [CLS, MASK, MASK, MASK, 9, SEP]}
    keys = range(50)
    bert = MaskingCollator(SPECIAL)([{**row, "example_key": key} for key in keys])["labels"]
    electra = ElectraMaskingCollator(SPECIAL)([{**row, "example_key": key} for key in keys])["labels"]
    assert (bert == MASK).any()
    assert (electra[:, 4] == 9).all() and (electra != -100).sum() == 50


def test_positions_are_uniform():
    length, draws = 22, 4000
    row = {"input_ids": [CLS, *range(10, 10 + length - 2), SEP]}
    labels = MaskingCollator(SPECIAL)([{**row, "example_key": key} for key in range(draws)])["labels"]
    hits = (labels != -100).sum(0)[1:-1].double()
    expected = draws * 3 / (length - 2)
    assert (hits - expected).abs().max() < 5 * expected**0.5
    assert hits.sum() == 3 * draws


@pytest.mark.parametrize("whole_word", [False, True])
@pytest.mark.parametrize(
    ("kind", "shares"), [(MaskingCollator, (0.8, 0.1, 0.1)), (ElectraMaskingCollator, (0.85, 0, 0.15))]
)
def test_shares_of_mask_random_and_kept(kind, shares, whole_word):
    batch = kind(SPECIAL, whole_word=whole_word, seed=4)(make_rows([128] * 1000))
    chosen = batch["labels"] != -100
    ids, original = batch["input_ids"][chosen], batch["labels"][chosen]
    masked, kept = ids == MASK, ids == original
    found = [part.double().mean().item() for part in (masked, ~masked & ~kept, kept)]
    np.testing.assert_allclose(found, shares, atol=4 * (0.25 / len(ids)) ** 0.5)
    if shares[1]:
        drawn = ids[~masked & ~kept]
        assert drawn.max() < VOCAB and drawn.min() >= 0
        assert drawn.double().mean().sub(VOCAB / 2).abs() < 5 * VOCAB / (12 * len(drawn)) ** 0.5
        assert (drawn < 10).any()  # special tokens and the like are drawn too; rows have none below 10
    else:
        assert masked.logical_or(kept).all()
    visible = (chosen & (batch["input_ids"] != MASK)).sum(1).double()
    assert visible.var() > 0.8 * 19 * shares[0] * (1 - shares[0])  # coins, not a quota


def test_kept_and_random_only():
    rows = make_rows([64] * 20)
    kept = MaskingCollator(SPECIAL, replace=(0, 0, 1))(rows)
    assert (kept["labels"] == kept["input_ids"]).sum() == 200
    only_random = MaskingCollator(SPECIAL, replace=(0, 1, 0))(rows)
    chosen = only_random["labels"] != -100
    assert (only_random["input_ids"][chosen] != only_random["labels"][chosen]).double().mean() > 0.97


def choose_one_by_one(keys, candidates, count, continuation):
    """The official loop for one row, visiting words by the key of their first piece."""
    words = []
    for position in np.flatnonzero(candidates):
        if words and continuation[position]:
            words[-1].append(position)
        else:
            words.append([position])
    chosen = []
    for word in sorted(words, key=lambda word: keys[word[0]]):
        if len(chosen) + len(word) <= count:
            chosen += word
    return sorted(chosen)


def test_whole_words_equal_the_loop():
    rng = np.random.default_rng(0)
    skipped = 0
    for rate in (0.2, 0.6, 0.9):
        keys, candidates = rng.random((300, 40)), rng.random((300, 40)) < 0.9
        continuation = rng.random((300, 40)) < rate
        counts = rng.integers(1, 12, 300)
        chosen = choose_positions(keys, candidates, counts, continuation)
        for row in range(300):
            expected = choose_one_by_one(keys[row], candidates[row], counts[row], continuation[row])
            skipped += len(expected) < counts[row]
            if expected:
                assert np.flatnonzero(chosen[row]).tolist() == expected
            else:
                assert chosen[row].sum() > counts[row]  # no word fits: the shortest one
    assert skipped > 50


def test_whole_words_are_all_or_nothing():
    rows = make_rows([100] * 50)
    batch = MaskingCollator(SPECIAL, whole_word=True)(rows)
    partial = 0
    for row, feature in enumerate(rows):
        words = []
        for position, token in enumerate(feature["input_ids"]):
            if token in (CLS, SEP):
                continue
            if words and token % 3 == 0:
                words[-1].append(position)
            else:
                words.append([position])
        chosen = (batch["labels"][row] != -100).tolist()
        corrupted = (batch["input_ids"][row] == MASK).tolist()
        assert all(len({chosen[position] for position in word}) == 1 for word in words)
        assert 14 <= sum(chosen) <= 15
        partial += any(len({corrupted[position] for position in word}) == 2 for word in words)
    assert partial > 10  # the 80/10/10 coin is thrown per piece


def test_no_word_fits():
    batch = MaskingCollator(SPECIAL, whole_word=True)([{"input_ids": [CLS, 10, 12, 15, 11, 18, SEP]}])
    assert (batch["labels"] != -100)[0].tolist() == [False] * 4 + [True, True, False]  # n is 1; [11, 18] is shorter


def test_whole_words_from_a_tokenizer():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s", "##ka", "sat"]
    tokenizer = BertTokenizerFast(vocab={word: index for index, word in enumerate(words)})
    collator = MaskingCollator(tokenizer, whole_word=True, mlm_probability=0.3)
    assert np.flatnonzero(collator.special.continuation).tolist() == [7, 8]
    assert collator.special.vocab_size == 10
    row = tokenizer("the catkas sat", return_special_tokens_mask=True)
    batch = collator([{**row, "example_key": key} for key in range(40)])
    patterns = {tuple(labels) for labels in (batch["labels"] != -100).int().tolist()}
    # n is 2: "cat ##ka ##s" never fits, so "the" and "sat" are chosen
    assert patterns == {(0, 1, 0, 0, 0, 1, 0)}
    assert set(batch) == {"input_ids", "token_type_ids", "attention_mask", "labels"}


def collate_all(collator, rows, groups):
    made = {}
    for group in groups:
        for number, row in zip(group, by_row(collator([rows[number] for number in group]))):
            made[number] = row
    return [made[number] for number in sorted(made)]


@pytest.mark.parametrize("whole_word", [False, True])
@pytest.mark.parametrize("kind", [MaskingCollator, ElectraMaskingCollator])
def test_the_split_of_a_batch_changes_nothing(kind, whole_word):
    rows = make_rows([20, 40, 9, 64, 31, 12, 50, 5])
    collator = kind(SPECIAL, whole_word=whole_word, seed=7, epoch=2)
    whole = collate_all(collator, rows, [range(8)])
    assert whole == collate_all(collator, rows, [range(4), range(4, 8)])
    assert whole == collate_all(collator, rows, [range(0, 8, 2), range(1, 8, 2)])  # two processes
    assert whole == collate_all(replace(collator, pad_to_multiple_of=64), rows, [[7, 3, 1], [0, 2, 4, 6, 5]])
    workers = DataLoader(rows, batch_size=2, collate_fn=collator, num_workers=2, multiprocessing_context="fork")
    assert whole == [row for batch in workers for row in by_row(batch)]
    assert rows[0]["example_key"] == 0  # rows stay as they are


def test_epoch_seed_and_key_change_the_masks():
    rows = make_rows([64] * 4)
    collator = ElectraMaskingCollator(SPECIAL, seed=1)

    def made(epoch, collator=collator, rows=rows):
        collator.set_epoch(epoch)
        return by_row(collator(rows))

    assert made(0) == made(0) and made(-1) == made(-1)
    others = [made(1), made(-1), made(0, collator=replace(collator, seed=2))]
    others.append(made(0, rows=[{**row, "example_key": 99 - key} for key, row in enumerate(rows)]))
    first = made(0)
    for other in others:
        assert all(one["labels"] != two["labels"] for one, two in zip(first, other))
        assert all(one["sampling_seeds"] != two["sampling_seeds"] for one, two in zip(first, other))


def test_rows_without_keys_are_numbered():
    keyed = make_rows([30] * 6)
    rows = [{name: value for name, value in row.items() if name != "example_key"} for row in keyed]
    collator = MaskingCollator(SPECIAL)
    once = by_row(collator(keyed))
    assert once == by_row(collator(rows[:2])) + by_row(collator(rows[2:]))
    assert by_row(collator(rows)) != once  # goes on counting
    collator.set_epoch(0)
    assert by_row(collator(rows)) == once


def test_sampling_seeds():
    seeds = ElectraMaskingCollator(SPECIAL)(make_rows([20] * 500))["sampling_seeds"]
    assert seeds.dtype == torch.int64 and seeds.shape == (500,) and len(set(seeds.tolist())) == 500
    assert seeds.min() >= 0 and 2**61 < seeds.max() < 2**62


@pytest.mark.parametrize("kind", [MaskingCollator, ElectraMaskingCollator])
def test_pickled_collator_is_the_same(kind):
    collator, rows = kind(SPECIAL, whole_word=True, seed=3, epoch=5), make_rows([40] * 4)
    copy = pickle.loads(pickle.dumps(collator))
    assert by_row(copy(rows)) == by_row(collator(rows))


def test_padding_and_columns():
    padded = [
        {"input_ids": [CLS, 10, 11, SEP, PAD, PAD], "attention_mask": [1, 1, 1, 1, 0, 0], "text": "x", "score": 0.5}
    ]
    plain = [{"input_ids": [CLS, 10, 11, SEP], "text": "x", "score": 0.5}]
    one, two = (MaskingCollator(SPECIAL, pad_to_multiple_of=8)(rows) for rows in (padded, plain))
    assert set(one) == {"input_ids", "attention_mask", "token_type_ids", "labels", "score"}
    assert one["score"].dtype == torch.float32 and one["input_ids"].shape == (1, 8)
    assert all(torch.equal(one[name], two[name]) for name in one)
    without_types = replace(SPECIAL, has_token_types=False)
    assert "token_type_ids" not in MaskingCollator(without_types)(plain)
    arrays = [{"input_ids": np.array([CLS, 10, 11, SEP], dtype=np.int32)}]
    assert torch.equal(MaskingCollator(SPECIAL)(arrays)["labels"], two["labels"][:, :4])


def test_official_electra_counts(parity_dir):
    folder = parity_dir("electra")
    config = json.loads((folder / "config.json").read_text())
    inputs, outputs = load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")
    ids = config["special_tokens"]
    special = SpecialTokens(ids["cls"], ids["sep"], ids["pad"], ids["mask"], config["vocab_size"])
    collator = ElectraMaskingCollator(
        special, mlm_probability=config["mask_prob"], max_length=config["max_seq_length"]
    )
    rows = [
        {name: inputs[name][row].tolist() for name in ("input_ids", "attention_mask", "token_type_ids")}
        for row in range(len(inputs["input_ids"]))
    ]
    batch = collator(rows)
    counts = (batch["labels"] != -100).sum(1).numpy()
    np.testing.assert_array_equal(counts, outputs["masked_lm_weights"].sum(1))
    assert counts.max() <= config["max_predictions_per_seq"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mlm_probability": 0.0}, "mlm_probability must be in"),
        ({"mlm_probability": 1.5}, "mlm_probability must be in"),
        ({"replace": (0.8, 0.1, 0.2)}, "sum to 1"),
        ({"replace": (1.2, -0.1, -0.1)}, "not negative"),
        ({"replace": (0.8, 0.2)}, "three shares"),
        ({"max_predictions": 0}, "max_predictions must be at least 1"),
        ({"max_length": 0}, "max_length must be at least 1"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of must be at least 1"),
        ({"seed": -1}, "seed must not be negative"),
        ({"epoch": -2}, "epoch must be at least -1"),
        ({"tokenizer": replace(SPECIAL, continuation=None), "whole_word": True}, "continuation is None"),
    ],
)
def test_bad_options(options, message):
    for kind in (MaskingCollator, ElectraMaskingCollator):
        with pytest.raises(ValueError, match=f"{message}"):
            kind(**{"tokenizer": SPECIAL, **options})


def test_bad_tokenizers():
    tokenizer = BertTokenizerFast(
        vocab={word: n for n, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])}
    )
    with pytest.raises(ValueError, match="whole_word=True needs a WordPiece vocabulary"):
        MaskingCollator(tokenizer, whole_word=True)
    tokenizer.mask_token = None
    with pytest.raises(ValueError, match="BertTokenizer.* has no mask_token"):
        MaskingCollator(tokenizer)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"ids": [1]}, "row 1 has no column input_ids"),
        ({"input_ids": [1, 10, 2], "labels": 1}, "row 1 has a column labels"),
        ({"input_ids": []}, "row 1 has empty input_ids"),
        ({"input_ids": [1] + [10] * 10 + [2]}, "row 1 has 12 tokens, but max_length is 8"),
        ({"input_ids": [1, 10, 2], "token_type_ids": [0, 0]}, "token_type_ids"),
        ({"input_ids": [1, 10, 2], "score": 1.0}, "only 1 of 2 rows have the column score"),
    ],
)
def test_bad_rows(row, message):
    with pytest.raises(ValueError, match=message):
        MaskingCollator(SPECIAL, max_length=8)([{"input_ids": [1, 10, 11, 2]}, row])
