"""Pair building and packing: official replays, invariants of the notes, determinism, bad input."""

import json
import random
import re

import numpy as np
import pytest
from datasets import Dataset
from safetensors.numpy import load_file
from transformers import BertTokenizerFast

from bestiary.trainers.documents import (
    Corpus,
    create_pretraining_pairs,
    pack_segments,
    replay_pretraining_instances,
    segments,
    sentence_pairs,
    tokenize_documents,
)
from bestiary.trainers.masking import SpecialTokens


SPECIAL = SpecialTokens(cls_id=1, sep_id=2, pad_id=0, mask_id=3, vocab_size=200_000)


def make_documents(number=40, seed=0, sentences=(1, 25), words=(1, 20)):
    """Documents whose tokens are all different, so that every token tells where it came from."""
    rng, token, documents = random.Random(seed), 10, []
    for _ in range(number):
        document = []
        for _ in range(rng.randint(*sentences)):
            length = rng.randint(*words)
            document.append(list(range(token, token + length)))
            token += length
        documents.append(document)
    return documents


def split_row(row):
    """[CLS] A [SEP] B [SEP] -> A, B; checks the frame and the token types."""
    ids, types = row["input_ids"], row["token_type_ids"]
    assert ids[0] == SPECIAL.cls_id and ids[-1] == SPECIAL.sep_id
    first, *rest = np.flatnonzero(np.array(ids) == SPECIAL.sep_id).tolist()
    assert types == [0] * (first + 1) + [1] * (len(ids) - first - 1)
    assert rest in ([], [len(ids) - 1])
    return ids[1:first], ids[first + 1 : -1]


def read_parity(folder):
    config = json.loads((folder / "config.json").read_text())
    inputs, outputs = load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")
    pieces = np.split(inputs["data.tokens"], np.cumsum(inputs["data.sentence_lengths"])[:-1])
    documents, start = [], 0
    for number in inputs["data.sentences_per_document"].tolist():
        documents.append([piece.tolist() for piece in pieces[start : start + number]])
        start += number
    rule = re.search(r"id i>=(\d+) is a word CONTINUATION .* iff i % (\d+) == (\d+)", config["data"]["note"])
    first, divisor, rest = map(int, rule.groups())
    ids, vocabulary = config["special_token_ids"], np.arange(config["model_config"]["vocab_size"])
    special = SpecialTokens(
        cls_id=ids["[CLS]"],
        sep_id=ids["[SEP]"],
        pad_id=ids["[PAD]"],
        mask_id=ids["[MASK]"],
        vocab_size=len(vocabulary),
        continuation=(vocabulary >= first) & (vocabulary % divisor == rest),
    )
    return config, documents, special, outputs


def test_official_data_is_replayed_number_for_number(parity_dir):
    config, documents, special, outputs = read_parity(parity_dir("bert"))
    assert config["data_variants"]
    for name, variant in config["data_variants"].items():
        length, slots = variant["max_seq_length"], variant["max_predictions_per_seq"]
        instances = replay_pretraining_instances(
            documents,
            special,
            max_length=length,
            max_predictions=slots,
            mlm_probability=variant["masked_lm_prob"],
            short_seq_prob=variant["short_seq_prob"],
            dupe_factor=variant["dupe_factor"],
            whole_word=variant["do_whole_word_mask"],
            seed=config["data"]["python_random_seed"],
        )

        def table(rows, width):
            return np.array([row + [0] * (width - len(row)) for row in rows])

        made = {
            "input_ids": table([row["input_ids"] for row in instances], length),
            "input_mask": table([[1] * len(row["input_ids"]) for row in instances], length),
            "segment_ids": table([row["token_type_ids"] for row in instances], length),
            "masked_lm_positions": table([row["masked_lm_positions"] for row in instances], slots),
            "masked_lm_ids": table([row["masked_lm_ids"] for row in instances], slots),
            "masked_lm_weights": table([[1] * len(row["masked_lm_ids"]) for row in instances], slots),
            "next_sentence_labels": np.array([row["next_sentence_label"] for row in instances]),
        }
        for key, values in made.items():
            np.testing.assert_array_equal(values, outputs[f"data.{name}.{key}"], err_msg=f"{name}.{key}")


def test_lone_sentences_get_a_random_partner():
    documents = [[[10, 11]], [[12, 13]]]
    rows = create_pretraining_pairs(documents, SPECIAL, 16, dupe_factor=1, short_seq_prob=0, progress=False)
    assert sorted(row["input_ids"] for row in rows) == [[1, 10, 11, 2, 12, 13, 2], [1, 12, 13, 2, 10, 11, 2]]
    assert rows["next_sentence_label"][:] == [1, 1]


def test_pairs_keep_the_rules():
    documents = make_documents()
    where = {token: number for number, document in enumerate(documents) for tokens in document for token in tokens}
    rows = create_pretraining_pairs(documents, SPECIAL, max_length=48, dupe_factor=6, seed=3, progress=False)
    labels, own_document = np.array(rows["next_sentence_label"]), []
    for row in rows:
        a, b = split_row(row)
        assert a and b and len(row["input_ids"]) <= 48
        assert a == list(range(a[0], a[-1] + 1)) and b == list(range(b[0], b[-1] + 1))  # each one stretch of text
        documents_a, documents_b = {where[token] for token in a}, {where[token] for token in b}
        assert len(documents_a) == len(documents_b) == 1
        if row["next_sentence_label"] == 0:
            assert documents_a == documents_b and b[0] > a[-1]
        else:
            own_document.append(documents_a == documents_b)
    assert not any(own_document)  # 10 tries to hit another of 40 documents
    assert max(len(row) for row in rows["input_ids"]) == 48
    assert 0.5 < labels.mean() < 0.65  # chunks of one sentence are always random


def test_share_of_random_pairs_and_of_short_rows():
    documents = make_documents(number=60, sentences=(30, 30), words=(4, 6))

    def build(**options):
        return create_pretraining_pairs(documents, SPECIAL, 48, dupe_factor=4, progress=False, **options)

    never = build(nsp_probability=0.0, short_seq_prob=0.0)
    ends = {document[-1][-1] for document in documents}
    full = [len(row["input_ids"]) for row in never if row["input_ids"][-2] not in ends]
    assert min(full) >= 40  # 45 tokens less what truncation leaves; nothing is cut below the target
    single = [row for row in never if row["next_sentence_label"] == 1]
    assert all(len(split_row(row)[0]) <= 6 for row in single)  # only the last, lone sentence of a document
    assert np.mean(build(nsp_probability=1.0)["next_sentence_label"]) == 1
    short = [len(row["input_ids"]) for row in build(nsp_probability=0.0, short_seq_prob=1.0)]
    assert np.mean(short) < 0.75 * np.mean(full)


@pytest.mark.parametrize(("max_length", "left"), [(33, (15, 15)), (34, (16, 15))])
def test_truncation_cuts_both_ends_of_the_longer_segment(max_length, left):
    documents = [[list(range(100, 120)), list(range(120, 160))], [[5000]]]
    fronts, backs, lengths = set(), set(), set()
    for seed in range(60):
        rows = create_pretraining_pairs(
            documents, SPECIAL, max_length, 1, short_seq_prob=0, nsp_probability=0, seed=seed, progress=False
        )
        (row,) = [row for row in rows if row["next_sentence_label"] == 0]
        a, b = split_row(row)
        fronts.add(b[0])
        backs.add(b[-1])
        lengths.add((len(a), len(b)))
    assert lengths == {left}  # the longer one, the second on a tie, loses a token at a time
    assert len(fronts) > 5 and len(backs) > 5


def test_unused_sentences_are_used_again():
    documents = make_documents(number=12, sentences=(8, 8), words=(3, 5))
    corpus = Corpus.from_documents(documents)
    pairs = sentence_pairs(corpus, random.Random(0), 64, range(12), short_seq_prob=0, nsp_probability=1.0)
    seen = [token for (a_start, a_end, _, _), _ in pairs for token in corpus.tokens[a_start:a_end].tolist()]
    assert seen == corpus.tokens.tolist()  # all B random: the A segments alone cover the text, in order, once


def test_same_seed_same_table_and_disk_equals_memory(tmp_path):
    documents = make_documents()
    first = create_pretraining_pairs(documents, SPECIAL, 32, dupe_factor=2, seed=5, progress=False)
    path = tmp_path / "sub" / "pairs.arrow"
    second = create_pretraining_pairs(documents, SPECIAL, 32, dupe_factor=2, seed=5, cache_file=path, progress=False)
    assert first.to_dict() == second.to_dict()
    assert second.cache_files == [{"filename": str(path)}]
    assert [file.name for file in path.parent.iterdir()] == ["pairs.arrow"]
    other = create_pretraining_pairs(documents, SPECIAL, 32, dupe_factor=2, seed=6, progress=False)
    assert first.to_dict() != other.to_dict()
    assert first.features == second.features and str(first.features["input_ids"].feature.dtype) == "int32"
    passes = create_pretraining_pairs(documents, SPECIAL, 32, dupe_factor=1, seed=5, progress=False)
    assert len(first) > 1.8 * len(passes)


def test_failed_write_leaves_the_old_table(tmp_path, monkeypatch):
    path = tmp_path / "pairs.arrow"
    create_pretraining_pairs(make_documents(), SPECIAL, 32, dupe_factor=1, cache_file=path, progress=False)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("bestiary.trainers.documents._rows", fail)
    with pytest.raises(OSError, match="No space"):
        create_pretraining_pairs(make_documents(), SPECIAL, 32, dupe_factor=2, cache_file=path, progress=False)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_packed_segments_keep_the_rules():
    documents = make_documents(number=200, sentences=(5, 40))
    where = {token: number for number, document in enumerate(documents) for tokens in document for token in tokens}
    starts = {sentence[0] for document in documents for sentence in document}
    last = {document[-1][-1] for document in documents}
    length = 64
    rows = pack_segments(documents, SPECIAL, length, seed=1, progress=False)
    singles, lengths, closed, shares = 0, [], 0, []
    for row in rows:
        a, b = split_row(row)
        text = a + b
        assert text == list(range(text[0], text[0] + len(a))) + b and len(row["input_ids"]) <= length
        assert len({where[token] for token in text}) == 1 and text[0] in starts
        assert not b or (b[0] in starts and b[0] == a[-1] + 1)
        singles += not b
        lengths.append(len(row["input_ids"]))
        closed += text[-1] in last
        if b and len(row["input_ids"]) == length:
            shares.append(len(a) / (length - 3))
    assert 0.05 < singles / len(rows) < 0.2  # 0.1, and closed documents with one sentence left
    assert abs(np.mean(shares) - 0.5) < 0.08
    assert closed >= 0.8 * len(documents)  # the rest was cut off
    assert np.mean(np.array(lengths) == length) > 0.6
    assert rows.column_names == ["input_ids", "token_type_ids"]
    assert rows.to_dict() == pack_segments(documents, SPECIAL, length, seed=1, progress=False).to_dict()


def test_packing_options():
    documents = make_documents(number=20, sentences=(60, 60), words=(1, 3))
    corpus = Corpus.from_documents(documents)

    def spans(**options):
        return np.array(list(segments(corpus, random.Random(0), 32, **options)))

    a_start, a_end, b_start, b_end = spans(single_segment_prob=1.0, random_length_prob=0.0).T
    assert (b_start == b_end).all() and (a_end - a_start).max() == 30
    a_start, a_end, b_start, b_end = spans(single_segment_prob=0.0, random_length_prob=0.0).T
    assert ((a_end - a_start) <= 16).all()  # below (32 - 3) // 2 = 14, or the sentence that crosses it
    assert ((b_end - b_start) > 0).mean() > 0.9  # all but the rests of documents
    lengths = {tuple(row) for row in spans(single_segment_prob=1.0, random_length_prob=1.0)}
    targets = [end - start for start, end, _, _ in lengths]
    assert min(targets) < 9 and len(set(targets)) > 15  # uniform targets, met to a sentence


def test_long_sentence_is_cut_at_the_end():
    rows = pack_segments([[list(range(10, 60))]], SPECIAL, 20, progress=False)
    assert rows["input_ids"][:] == [[1, *range(10, 28), 2]]


@pytest.fixture(scope="module")
def tokenizer():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s", "sat", "mat", "."]
    return BertTokenizerFast(vocab={word: index for index, word in enumerate(words)})


def test_tokenize_documents(tokenizer):
    texts = [["The cats sat.", "", "the mat."], [], ["cat."]]
    dataset = Dataset.from_dict({"body": texts, "id": [1, 2, 3]})
    tokens = tokenize_documents(dataset, tokenizer, column="body", batch_size=1)
    assert tokens.to_dict() == {"sentences": [[[5, 6, 7, 8, 10], [5, 9, 10]], [], [[6, 10]]]}
    corpus = Corpus.from_documents(tokens)
    assert len(corpus) == 2 and corpus.documents == [0, 2, 3] and corpus.sentences == [0, 5, 8, 10]
    rows = create_pretraining_pairs(tokens, tokenizer, 16, dupe_factor=1, progress=False)
    assert {row[0] for row in rows["input_ids"]} == {2} and {row[-1] for row in rows["input_ids"]} == {3}


@pytest.mark.parametrize("build", [create_pretraining_pairs, pack_segments])
@pytest.mark.parametrize(
    ("documents", "options", "message"),
    [
        ([], {}, "holds no token"),
        ([[[]], []], {}, "holds no token"),
        ([[[10]], [[11]]], {"max_length": 4}, "max_length must be at least 5"),
        ([["some text"]], {}, "list of token ids"),
        ([[10, 11]], {}, "list of token ids"),
        (Dataset.from_dict({"text": ["a"]}), {}, "no column sentences"),
    ],
)
def test_bad_documents(build, documents, options, message):
    with pytest.raises(ValueError, match=message):
        build(documents, SPECIAL, progress=False, **options)


def test_bad_options(tokenizer):
    with pytest.raises(ValueError, match="at least 2"):
        create_pretraining_pairs([[[10], [11]], [[]]], SPECIAL, progress=False)
    for option in ({"short_seq_prob": 1.5}, {"nsp_probability": -0.1}, {"dupe_factor": 0}):
        with pytest.raises(ValueError, match=next(iter(option))):
            create_pretraining_pairs(make_documents(), SPECIAL, progress=False, **option)
    for option in ({"single_segment_prob": 1.5}, {"random_length_prob": -0.1}):
        with pytest.raises(ValueError, match=next(iter(option))):
            pack_segments(make_documents(), SPECIAL, progress=False, **option)
    with pytest.raises(ValueError, match="no column 'text'"):
        tokenize_documents(Dataset.from_dict({"body": [["a"]]}), tokenizer, column="text")
    with pytest.raises(ValueError, match="list of sentences"):
        tokenize_documents(Dataset.from_dict({"body": ["a"]}), tokenizer, column="body")
    with pytest.raises(ValueError, match="empty"):
        tokenize_documents(Dataset.from_dict({"body": [["a"]]}).select([]), tokenizer, column="body")
    tokenizer_without_mask = BertTokenizerFast(vocab=tokenizer.get_vocab())
    tokenizer_without_mask.mask_token = None
    with pytest.raises(ValueError, match="no mask_token"):
        create_pretraining_pairs(make_documents(), tokenizer_without_mask, progress=False)
