"""Training of sparse sequence-to-sequence models: normalisation, statistics, recipes."""

import json

import numpy as np
import pytest
import torch
from suites.trainer_suite import TrainerSuite, logged

from bestiary.configuration.configuration_sparse_seq2seq import SparseSeq2seqConfig
from bestiary.modeling.modeling_sparse_seq2seq import SparseSeq2seqForConditionalGeneration
from bestiary.recipe import load_recipe
from bestiary.trainers.seeds import train_with_seeds
from bestiary.trainers.seq2seq import (
    PreparedPairs,
    Seq2SeqCollator,
    character_tokenizer,
    seq2seq_data_arguments,
    seq2seq_training_arguments,
)
from bestiary.trainers.trainer_sparse_seq2seq import SparseSeq2seqTrainingArguments


class TestSparseSeq2seqTrainer(TrainerSuite):
    slug = "sparse_seq2seq"
    parts = ()
    metrics = ("attention_support", "output_support", "zero_loss", "zero_gold", "token_loss")

    def make_model(self, dropout):
        config = SparseSeq2seqConfig(
            vocab_size=14,
            embedding_size=8,
            hidden_size=12,
            dropout=dropout,
            init_range=0.5,
            pad_token_id=0,
            unk_token_id=1,
        )
        return SparseSeq2seqForConditionalGeneration(config)

    def make_rows(self, number):
        rng = np.random.default_rng(5)
        made = []
        for _ in range(number):
            source = rng.integers(5, 12, int(rng.integers(2, 7))).tolist()
            made.append({"input_ids": [2, *source, 3], "labels": [*source[::-1], 3]})
        return made

    def make_collator(self):
        return Seq2SeqCollator(character_tokenizer("abcdefghi"))

    def rows_of(self, batch):
        sources = [row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"])]
        targets = [row[row != -100].tolist() for row in batch["labels"]]
        return [(tuple(source), tuple(target)) for source, target in zip(sources, targets)]

    def make_trainer(self, output_dir, *args, **arguments):
        return super().make_trainer(output_dir, *args, **{"predict_with_generate": False} | arguments)

    def test_the_sum_is_divided_by_sentences_or_tokens(self, tmp_path):
        rows = self.make_rows(6)
        figures = {}
        for kind in ("sentences", "tokens"):
            trainer = self.make_trainer(tmp_path / kind, loss_normalization=kind)
            trainer.model.eval()
            figures[kind] = trainer.evaluate()
        tokens = sum(len(row["labels"]) for row in rows)
        model, batch = trainer.model, self.make_collator()(rows)
        with torch.no_grad():
            outputs = model(**batch, num_items_in_batch=1)
        assert figures["tokens"]["eval_loss"] == pytest.approx(outputs.loss.item() / tokens, rel=1e-4)
        assert figures["sentences"]["eval_loss"] == pytest.approx(outputs.loss.item() / 6, rel=1e-4)
        for found in figures.values():
            assert found["eval_token_loss"] == pytest.approx(outputs.loss.item() / tokens, rel=1e-4)
            for name in self.metrics[:4]:
                assert found[f"eval_{name}"] == pytest.approx(getattr(outputs, name).item() / tokens, rel=1e-5)

    def test_statistics_are_logged_in_training(self, tmp_path):
        trainer = self.make_trainer(tmp_path)
        trainer.train()
        line = next(entry for entry in logged(trainer) if "loss" in entry)
        assert 1 <= line["output_support"] <= 14 and 1 <= line["attention_support"] <= 8
        assert 0 <= line["zero_gold"] <= 1 and 0 <= line["zero_loss"] <= 1


def test_arguments():
    found = SparseSeq2seqTrainingArguments(output_dir="unused", report_to="none")
    assert (found.learning_rate, found.max_grad_norm, found.per_device_train_batch_size) == (1e-3, 5, 64)
    with pytest.raises(ValueError, match="loss_normalization must be one of sentences, tokens, got 'words'"):
        SparseSeq2seqTrainingArguments(output_dir="unused", loss_normalization="words")


def read(name, *argv):
    return load_recipe(
        ["--config", name, *map(str, argv)], data=seq2seq_data_arguments, training=seq2seq_training_arguments
    )


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    words = "abc bd cabd dda ab bcda ca acbd dcb bb adc cd".split()
    for name in ("a", "b"):
        lines = [json.dumps({"source": f"{word}<V;PST>", "target": f"{word}ed"}) for word in words]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return (
        *("--train_file", tmp_path / "a.jsonl", "--eval_file", tmp_path / "b.jsonl"),
        *("--output_dir", tmp_path / "run", "--disable_tqdm", "true"),
    )


def test_recipe_learns_to_inflect(files, tmp_path):
    options = ("--max_steps", 200, "--per_device_train_batch_size", 12, "--learning_rate", "1e-2")
    sizes = ("--model.hidden_size", 48, "--model.embedding_size", 16, "--model.dropout", 0)
    recipe = read("sparse_seq2seq_tiny", *files, *options, *sizes, "--max_target_length", 9)
    prepared = PreparedPairs.load(recipe)
    config, tokenizer = prepared.config, prepared.tokenizer
    assert config.src_vocab_size == config.tgt_vocab_size == len(tokenizer)
    special = (tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.unk_token_id)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id, config.unk_token_id) == special
    summary = train_with_seeds(recipe, "command", prepared)
    assert summary["eval_exact_match"]["mean"] > 0.8
    assert summary["eval_output_support"]["mean"] < 3 and summary["eval_zero_gold"]["mean"] < 0.1
    model = SparseSeq2seqForConditionalGeneration.from_pretrained(tmp_path / "run")
    assert model.generation_config.num_beams == 5


@pytest.mark.parametrize("name", ["sparse_seq2seq_inflection", "sparse_seq2seq_translation"])
def test_published_recipes_are_read(name, files):
    recipe = read(name, *files, "--tokenizer", "characters")
    config = PreparedPairs.load(recipe).config
    assert (config.attention_alpha, config.output_alpha, config.hidden_size) == (1.5, 1.5, 500)
    assert recipe.training.lr_scheduler_kwargs == {"factor": 0.5, "patience": 0} and recipe.training.schedule is None
