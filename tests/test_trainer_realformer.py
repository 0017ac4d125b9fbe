"""RealFormer's trainer: the common suite, and the paper's two diagnostics of attention."""

import math

import pytest
import torch
from suites.trainer_suite import TrainerSuite
from test_trainer_bert import SPECIAL, VOCABULARY, rows
from torch.testing import assert_close

from bestiary.configuration.configuration_realformer import RealformerConfig
from bestiary.modeling.modeling_realformer import RealformerForPreTraining
from bestiary.trainers.masking import MaskingCollator
from bestiary.trainers.optimization import BertAdam
from bestiary.trainers.trainer_realformer import (
    RealformerTrainer,
    RealformerTrainingArguments,
    attention_sums,
)


def config(dropout: float = 0.0, **fields) -> RealformerConfig:
    return RealformerConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=16,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        **fields,
    )


class TestRealformerTrainer(TrainerSuite):
    splits_as_bert = True
    slug = "realformer"
    parts = ("mlm", "sentence")
    metrics = ("sentence_accuracy",)

    def make_model(self, dropout):
        return RealformerForPreTraining(config(dropout))

    def make_rows(self, number):
        return rows(number)

    def make_collator(self):
        return MaskingCollator(SPECIAL, mlm_probability=0.3, seed=1)

    @pytest.mark.parametrize("fields", [{}, {"unpad_threshold": 0.0}, {"next_sentence_prediction": False}], ids=str)
    def test_statistics_of_attention(self, fields, tmp_path):
        """Means over real tokens, however the examples are batched and padded; losses stay what they were."""
        figures = []
        for size in (1, 4):
            trainer = self.make_trainer(
                tmp_path, attention_statistics=True, per_device_eval_batch_size=size, max_steps=1
            )
            torch.manual_seed(0)
            trainer.model = trainer.model_wrapped = RealformerForPreTraining(config(**fields))
            if not trainer.model.config.next_sentence_prediction:
                trainer.eval_dataset = [{"input_ids": row["input_ids"]} for row in trainer.eval_dataset]
            figures.append(trainer.evaluate())
            with_tables = trainer.attention_table
            trainer.args.attention_statistics = False
            plain = trainer.evaluate()
            assert not any("attention" in name for name in plain)
            assert plain["eval_mlm_loss"] == pytest.approx(figures[-1]["eval_mlm_loss"], rel=1e-5)
        found = {name: value for name, value in figures[0].items() if "attention" in name}
        names = [f"entropy_{layer}" for layer in range(3)] + [f"divergence_{layer}" for layer in (1, 2)]
        assert set(found) == {f"eval_attention_{name}" for name in names}
        assert {name: figures[1][name] for name in found} == pytest.approx(found, rel=1e-4, abs=1e-7)
        assert with_tables["entropy"].shape == (3, 2) and with_tables["divergence"].shape == (2, 2)
        assert found["eval_attention_entropy_1"] == pytest.approx(with_tables["entropy"][1].mean().item(), rel=1e-4)
        lengths = [len(row["input_ids"]) for row in trainer.eval_dataset]
        uniform = sum(length * math.log(length) for length in lengths) / sum(lengths)
        assert 0.9 * uniform < found["eval_attention_entropy_0"] <= uniform  # a fresh model attends nearly evenly

    def test_training_lines_have_no_statistics(self, tmp_path):
        trainer = self.make_trainer(tmp_path, attention_statistics=True, max_steps=1)
        trainer.train()
        assert not any("attention" in name for entry in trainer.state.log_history for name in entry)


def test_statistics_by_hand():
    """Entropy in nats and Jensen-Shannon divergence of known distributions, real queries only."""
    even, sharp = torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0])
    below = torch.stack([even, sharp]).view(1, 1, 2, 2)
    above = torch.stack([sharp, sharp]).view(1, 1, 2, 2)
    entropy, divergence = attention_sums((below, above), torch.ones(1, 2))
    assert_close(entropy, torch.tensor([[math.log(2)], [0.0]], dtype=torch.float64))
    mixed = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert_close(divergence, torch.tensor([[mixed - math.log(2) / 2]], dtype=torch.float64))
    entropy, divergence = attention_sums((below, above), torch.tensor([[0, 1]]))
    assert not entropy.any() and not divergence.any()
    entropy, divergence = attention_sums((below,), torch.ones(1, 2))
    assert entropy.shape == (1, 1) and divergence.shape == (0, 1)


def test_optimizer_is_that_of_bert(tmp_path):
    arguments = RealformerTrainingArguments(output_dir=str(tmp_path), report_to="none")
    trainer = RealformerTrainer(RealformerForPreTraining(config()), arguments)
    trainer.create_optimizer_and_scheduler(1000)
    assert type(trainer.optimizer) is BertAdam and arguments.warmup_steps == 10_000 and arguments.schedule == "bert"
