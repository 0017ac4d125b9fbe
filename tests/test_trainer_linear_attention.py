"""The trainer of linear attention: the common suite on the next token, and the objective of masked tokens."""

import numpy as np
import torch
from suites.trainer_suite import ObjectiveSuite, TrainerSuite

from bestiary.configuration.configuration_linear_attention import LinearAttentionConfig
from bestiary.modeling.modeling_linear_attention import LinearAttentionForPreTraining
from bestiary.trainers.language_model import NextTokenCollator
from bestiary.trainers.masking import MaskingCollator, SpecialTokens
from bestiary.trainers.trainer_linear_attention import LinearAttentionTrainer, LinearAttentionTrainingArguments


VOCABULARY = 40
SPECIAL = SpecialTokens(
    cls_id=2, sep_id=3, pad_id=0, mask_id=4, vocab_size=VOCABULARY, continuation=None, has_token_types=False
)


def config(dropout: float = 0.0, **fields) -> LinearAttentionConfig:
    return LinearAttentionConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=16,
        hidden_dropout_prob=dropout,
        chunk_size=4,
        **fields,
    )


class Linear:
    slug = "linear_attention"

    def make_rows(self, number):
        """Texts of 6 to 16 tokens."""
        rng = np.random.default_rng(5)
        made = []
        for _ in range(number):
            ids = rng.integers(5, 12, int(rng.integers(6, 17)))
            ids[0], ids[-1] = 2, 3
            made.append({"input_ids": ids.tolist()})
        return made


class TestLinearAttentionTrainer(Linear, TrainerSuite):
    splits_as_bert = True
    parts = ("lm",)
    metrics = ("perplexity",)

    def make_model(self, dropout):
        return LinearAttentionForPreTraining(config(dropout, is_decoder=True))

    def make_collator(self):
        return NextTokenCollator(SPECIAL)


class TestMaskedLinearAttentionTrainer(Linear, ObjectiveSuite):
    parts = ("mlm",)
    metrics = ("perplexity",)

    def make_model(self, dropout):
        return LinearAttentionForPreTraining(config(dropout, attention_kernel="double_softmax"))

    def make_collator(self):
        return MaskingCollator(SPECIAL, mlm_probability=0.3, seed=1)


def test_defaults_of_the_paper(tmp_path):
    arguments = LinearAttentionTrainingArguments(output_dir=str(tmp_path), report_to="none")
    trainer = LinearAttentionTrainer(LinearAttentionForPreTraining(config()), arguments)
    trainer.create_optimizer_and_scheduler(1000)
    assert type(trainer.optimizer) is torch.optim.RAdam
    assert {(group["lr"], group["decoupled_weight_decay"]) for group in trainer.optimizer.param_groups} == {
        (1e-3, True)
    }


def test_collators_follow_the_objective(tmp_path):
    training = LinearAttentionTrainingArguments(output_dir=str(tmp_path), seed=11)
    data = LinearAttentionTrainer.data_arguments(mlm_probability=0.2, pad_to_multiple_of=8)
    causal, masked = (
        LinearAttentionTrainer.build_collator(SPECIAL, config(is_decoder=decoder), data, training)
        for decoder in (True, False)
    )
    assert type(causal) is NextTokenCollator and (causal.max_length, causal.pad_to_multiple_of) == (16, 8)
    assert type(masked) is MaskingCollator and (masked.mlm_probability, masked.seed) == (0.2, 11)
