"""T-TA's trainer: the common suite, cutting of long sentences, both reductions, one sentence an example."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from suites.trainer_suite import ObjectiveSuite, TrainerSuite
from transformers import BertTokenizerFast

from bestiary.configuration.configuration_tta import TtaConfig
from bestiary.flops import count_flops
from bestiary.modeling.modeling_tta import TtaForMaskedLM
from bestiary.trainers.masking import SpecialTokens
from bestiary.trainers.optimization import BertAdam
from bestiary.trainers.trainer_tta import TtaCollator, TtaDataArguments, TtaTrainer, TtaTrainingArguments


VOCABULARY = 40
SPECIAL = SpecialTokens(cls_id=2, sep_id=3, pad_id=0, mask_id=4, vocab_size=VOCABULARY)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrs", "##t"]


def config(dropout: float = 0.0, **fields) -> TtaConfig:
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 16,
    }
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return TtaConfig(**sizes | rates | fields)


class Tta:
    slug = "tta"
    parts = ("autoencoding",)
    metrics = ("pseudo_perplexity",)

    def make_model(self, dropout):
        return TtaForMaskedLM(config(dropout))

    def make_rows(self, number):
        """Most are longer than 16 tokens, so that epochs differ in what is cut."""
        rng = np.random.default_rng(5)
        lengths = rng.integers(24, 40, number)
        lengths[::4] = rng.integers(3, 16, len(lengths[::4]))
        return [{"input_ids": [2, *(5 + rng.integers(0, 9, length - 2) % 12).tolist(), 3]} for length in lengths]

    def make_collator(self):
        return TtaCollator(SPECIAL, max_length=16, seed=1)


class TestTtaTrainer(Tta, TrainerSuite):
    splits_as_bert = True

    def test_pseudo_perplexity_is_over_all_real_tokens(self, tmp_path):
        trainer = self.make_trainer(tmp_path)
        collator = self.make_collator()
        collator.set_epoch(-1)
        batch = collator(trainer.eval_dataset)
        trainer.model.eval()
        with torch.no_grad():
            found = trainer.model.token_log_likelihoods(batch["input_ids"], batch["attention_mask"]).sum()
        mean = -found.item() / batch["attention_mask"].sum().item()
        measured = trainer.evaluate()
        assert measured["eval_loss"] == pytest.approx(mean, rel=1e-5)
        assert measured["eval_pseudo_perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)

    def test_predictions_are_log_likelihoods_of_tokens(self, tmp_path):
        trainer = self.make_trainer(tmp_path)
        collator = self.make_collator()
        collator.set_epoch(-1)
        batch = collator(trainer.eval_dataset[:2])
        trainer.model.eval()
        with torch.no_grad():
            expected = trainer.model.token_log_likelihoods(batch["input_ids"], batch["attention_mask"]).numpy()
        found = trainer.predict(trainer.eval_dataset)
        assert found.predictions[:2] == pytest.approx(expected, rel=1e-4)
        assert found.label_ids[:2].tolist() == batch["labels"].tolist()


class TestOfficialMean(Tta, ObjectiveSuite):
    """Divided by all positions of the model, however far a batch is padded."""

    def make_model(self, dropout):
        return TtaForMaskedLM(config(dropout, max_position_embeddings=20))

    def make_trainer(self, output_dir, **arguments):
        return super().make_trainer(output_dir, **{"normalize_by": "positions"} | arguments)

    def test_is_smaller_by_the_share_of_padding(self, tmp_path):
        rows = self.make_rows(6)
        tokens = sum(min(16, len(row["input_ids"])) for row in rows)
        means, perplexities = [], []
        for normalize_by in ("tokens", "positions"):
            trainer = self.make_trainer(tmp_path, normalize_by=normalize_by)
            measured = trainer.evaluate()
            means.append(measured["eval_loss"])
            perplexities.append(measured["eval_pseudo_perplexity"])
        assert means[1] == pytest.approx(means[0] * tokens / (6 * 20), rel=1e-6)
        assert perplexities[0] == perplexities[1]


# ---- collator


def test_every_token_is_its_label():
    batch = TtaCollator(SPECIAL, pad_to_multiple_of=4)([{"input_ids": [2, 7, 8, 9, 3]}, {"input_ids": [2, 4, 3]}])
    assert batch["input_ids"].tolist() == [[2, 7, 8, 9, 3, 0, 0, 0], [2, 4, 3, 0, 0, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 5 + [0] * 3, [1] * 3 + [0] * 5]
    assert batch["labels"].tolist() == [[2, 7, 8, 9, 3, -100, -100, -100], [2, 4, 3, *[-100] * 5]]
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_long_sentences_are_cut_at_random_ends():
    collator = TtaCollator(SPECIAL, max_length=8, seed=3)
    text = list(range(10, 26))  # 16 tokens, of which 6 stay

    def first_kept(epoch, key):
        collator.set_epoch(epoch)
        (row,) = collator([{"input_ids": [2, *text, 3], "example_key": key}])["input_ids"].tolist()
        assert len(row) == 8 and (row[0], row[-1]) == (2, 3)
        assert row[1:-1] == text[row[1] - 10 : row[1] - 4], "tokens in the middle were lost"
        return row[1] - 10

    cuts = [first_kept(epoch, key) for epoch in range(10) for key in range(40)]
    assert np.mean(cuts) == pytest.approx(5, abs=0.3)  # 10 tokens, each from the front by even chance
    assert np.var(cuts) == pytest.approx(2.5, abs=0.6)
    assert [first_kept(-1, key) for key in range(5)] == [0] * 5  # evaluation keeps the beginning
    assert first_kept(2, 7) == first_kept(2, 7)
    assert {first_kept(0, key) for key in range(9)} != {first_kept(0, 0)}


@pytest.mark.parametrize(
    ("options", "rows", "message"),
    [
        ({"max_length": 2}, [], "TtaCollator.max_length must be at least 3 or None, got 2"),
        ({"pad_to_multiple_of": 0}, [], "pad_to_multiple_of must be at least 1"),
        ({"seed": -1}, [], "seed must not be negative, got -1"),
        ({"epoch": -2}, [], "epoch must be at least -1, got -2"),
        ({}, [{"input_ids": [2, 3]}, {"text": "a"}], r"row 1 has no input_ids, only \['text'\]"),
        ({}, [{"input_ids": []}], "row 0 .* empty"),
    ],
)
def test_mistakes(options, rows, message):
    with pytest.raises(ValueError, match=message):
        TtaCollator(SPECIAL, **options)(rows)


# ---- arguments and data


def test_optimizer_and_schedule_of_the_official_script(tmp_path):
    arguments = TtaTrainingArguments(output_dir=str(tmp_path), report_to="none")
    trainer = TtaTrainer(TtaForMaskedLM(config()), arguments)
    trainer.create_optimizer_and_scheduler(1_000_000)
    assert type(trainer.optimizer) is BertAdam
    assert (arguments.learning_rate, arguments.warmup_steps, arguments.max_grad_norm) == (1e-4, 10_000, 1.0)
    assert {(g["eps"], g["weight_decay"]) for g in trainer.optimizer.param_groups} == {(1e-6, 0.01), (1e-6, 0.0)}
    with pytest.raises(ValueError, match="normalize_by must be one of tokens, positions, got 'batch'"):
        TtaTrainingArguments(output_dir=str(tmp_path), normalize_by="batch")
    with pytest.raises(ValueError, match="unit must be one of sentence, segment, got 'word'"):
        TtaDataArguments(unit="word")


@pytest.fixture(scope="module")
def tokenizer() -> BertTokenizerFast:
    return BertTokenizerFast(vocab={word: index for index, word in enumerate(WORDS)})


@pytest.fixture(scope="module")
def documents() -> DatasetDict:
    made = [["a b c d e f g h i j k l m n o p q", "", "b"], ["c d"]]
    return DatasetDict({split: Dataset.from_dict({"sentences": made}) for split in ("train", "validation")})


def build(documents, tokenizer, tmp_path, **options):
    data = TtaDataArguments(max_length=8, **options)
    training = TtaTrainingArguments(output_dir=str(tmp_path), seed=9)
    built = TtaTrainer.build_datasets(documents, tokenizer, config(), data, training)
    return built, TtaTrainer.build_collator(tokenizer, config(), data, training)


def test_an_example_is_a_sentence(documents, tokenizer, tmp_path):
    built, collator = build(documents, tokenizer, tmp_path)
    rows = built["train"]["input_ids"]
    assert rows == [[2, *range(5, 22), 3], [2, 6, 3], [2, 7, 8, 3]]  # whole: the collator cuts
    assert (collator.max_length, collator.seed) == (8, 9)
    assert collator(list(built["train"]))["input_ids"].shape == (3, 8)


def test_an_example_may_be_a_segment(documents, tokenizer, tmp_path):
    """The rows of the masked language models that it is compared with."""
    from bestiary.trainers.documents import pack_segments, tokenize_documents

    built, _ = build(documents, tokenizer, tmp_path, unit="segment")
    known = pack_segments(tokenize_documents(documents["train"], tokenizer), tokenizer, 8, seed=0)
    assert built["train"]["input_ids"] == known["input_ids"]


def test_sizes_are_checked(documents, tokenizer, tmp_path):
    training = TtaTrainingArguments(output_dir=str(tmp_path))
    for fields, data in (({}, {"max_length": 17}), ({"vocab_size": 24}, {"max_length": 8})):
        with pytest.raises(ValueError, match="max_position_embeddings=16|tokenizer has 25 entries"):
            TtaTrainer.build_datasets(documents, tokenizer, config(**fields), TtaDataArguments(**data), training)


def test_another_query_token_is_told(documents, tokenizer, tmp_path, monkeypatch):
    training, data = TtaTrainingArguments(output_dir=str(tmp_path)), TtaDataArguments(max_length=8)
    told = []
    monkeypatch.setattr("bestiary.trainers.trainer_tta.logger.warning", told.append)
    for query in (4, None, 7):
        TtaTrainer.build_datasets(documents, tokenizer, config(query_token_id=query), data, training)
    assert len(told) == 1 and "query_token_id is 7, but [MASK] of the tokenizer is 4" in told[0]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_operations_of_a_step_are_counted(dropout):
    """What `bestiary compare` makes equal: all products of a step, forward and backward, by hand."""
    model = TtaForMaskedLM(config(dropout)).train()
    batch = TtaCollator(SPECIAL)([{"input_ids": [2, *range(5, 15), 3]}] * 2)
    tokens, width, inner, layers, length = 24, 32, 48, 2, 12
    linear = layers * 2 * tokens * (4 * width**2 + 2 * width * inner) + 2 * tokens * (width**2 + width * VOCABULARY)
    product = 2 * tokens * length * width  # queries by keys, or probabilities by values, over all heads
    recomputed = product if dropout == 0 else 0  # by the fused kernel
    attention = layers * (6 * product + recomputed)
    assert count_flops(lambda: model(**batch).loss.backward()) == 3 * linear + attention
