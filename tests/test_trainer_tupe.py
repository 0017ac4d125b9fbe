"""TUPE's trainer: the common suite, decay of all parameters, and ELECTRA with TUPE in both networks."""

import pytest
import torch
from suites.trainer_suite import ObjectiveSuite, TrainerSuite
from test_trainer_bert import SPECIAL, VOCABULARY, rows

from bestiary.configuration.configuration_electra import ElectraJointConfig
from bestiary.configuration.configuration_tupe import TupeConfig
from bestiary.modeling.modeling_electra import ElectraJointForPreTraining
from bestiary.modeling.modeling_tupe import TupeForPreTraining
from bestiary.recipe import load_recipe
from bestiary.trainers.masking import ElectraMaskingCollator, MaskingCollator
from bestiary.trainers.trainer_electra import ElectraTrainer
from bestiary.trainers.trainer_tupe import TupeTrainer, TupeTrainingArguments


BODY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}


def config(dropout: float = 0.0, **fields) -> TupeConfig:
    return TupeConfig(**BODY, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, **fields)


class TestTupeTrainer(ObjectiveSuite):
    """The paper's objective."""

    slug = "tupe"
    parts = ("mlm",)

    def make_model(self, dropout):
        return TupeForPreTraining(config(dropout))

    def make_rows(self, number):
        return [{"input_ids": row["input_ids"]} for row in rows(number)]

    def make_collator(self):
        return MaskingCollator(SPECIAL, mlm_probability=0.3, seed=1)


class TestWithNextSentencePrediction(TrainerSuite):
    """With sentence pairs, which the suite's predictions over several processes need."""

    splits_as_bert = True
    slug = "tupe"
    parts = ("mlm", "sentence")
    metrics = ("sentence_accuracy",)

    def make_model(self, dropout):
        return TupeForPreTraining(config(dropout, next_sentence_prediction=True, use_relative_bias=False))

    def make_rows(self, number):
        return rows(number)

    def make_collator(self):
        return MaskingCollator(SPECIAL, mlm_probability=0.3, seed=1)


class TestElectraTupe(ObjectiveSuite):
    """ELECTRA's trainer takes TUPE by configuration alone."""

    slug = "electra"
    parts = ("mlm", "discriminator")
    metrics = (
        "generator_accuracy",
        "sampled_accuracy",
        "replaced_share",
        "discriminator_accuracy",
        "discriminator_precision",
        "discriminator_recall",
        "discriminator_auc",
    )

    def make_model(self, dropout):
        rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        body = {"model_type": "bestiary-tupe", **BODY, **rates}
        return ElectraJointForPreTraining(ElectraJointConfig(discriminator_config=body, generator_size_fraction=0.5))

    def make_rows(self, number):
        return [{"input_ids": row["input_ids"], "token_type_ids": row["token_type_ids"]} for row in rows(number)]

    def make_collator(self):
        return ElectraMaskingCollator(SPECIAL, mlm_probability=0.3, seed=1)

    def drawn(self, outputs):
        return {"corrupted_ids": outputs.corrupted_ids}


def test_the_packaged_recipe_builds_both_networks_from_tupe():
    recipe = load_recipe(["--config", "electra_tupe_tiny"], data=ElectraTrainer.data_arguments)
    built = recipe.build_config(vocab_size=VOCABULARY)
    assert recipe.slug == "electra"
    assert type(built.discriminator_config) is type(built.generator_config) is TupeConfig
    assert built.generator_config.hidden_size < built.discriminator_config.hidden_size


@pytest.mark.parametrize("everything", [True, False])
def test_optimizer_and_schedule_of_the_paper(everything, tmp_path):
    changes = {} if everything else {"decay_all_parameters": False}
    arguments = TupeTrainingArguments(output_dir=str(tmp_path), report_to="none", **changes)
    trainer = TupeTrainer(TupeForPreTraining(config()), arguments)
    trainer.create_optimizer_and_scheduler(1_000_000)
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    decayed = [group for group in trainer.optimizer.param_groups if group["weight_decay"] == 0.01]
    bare = {
        id(value) for group in trainer.optimizer.param_groups if not group["weight_decay"] for value in group["params"]
    }
    names = {name for name, value in trainer.model.named_parameters() if id(value) in bare}
    assert len(decayed) == 1 and bool(names) != everything
    assert everything or "tupe.positions.LayerNorm.weight" in names and "tupe.positions.query.bias" in names
    settings = {(group["betas"], group["eps"], group["initial_lr"]) for group in trainer.optimizer.param_groups}
    assert settings == {((0.9, 0.999), 1e-6, 1e-4)} and arguments.max_grad_norm == 1.0
    factor = trainer.lr_scheduler.lr_lambdas[0]
    assert [factor(step) for step in (0, 5_000, 10_000, 505_000, 1_000_000)] == pytest.approx([0, 0.5, 1, 0.5, 0])


class Tokenizer:
    """What the check of sizes reads."""

    def __init__(self, pad_token_id):
        self.pad_token_id = pad_token_id

    def __len__(self):
        return VOCABULARY


def test_another_padding_token_is_refused():
    TupeTrainer.check_sizes(Tokenizer(0), config(), 16)
    with pytest.raises(ValueError, match=r"TupeConfig.pad_token_id is 0, .* pads with 3.*set it to 3"):
        TupeTrainer.check_sizes(Tokenizer(3), config(), 16)
    body = {"model_type": "bestiary-tupe", **BODY, "pad_token_id": 1}
    with pytest.raises(ValueError, match=r"ElectraJointConfig.pad_token_id is 1, .* pads with 0.*set it to 0"):
        ElectraTrainer.check_sizes(Tokenizer(0), ElectraJointConfig(discriminator_config=body), 16)
    with pytest.raises(ValueError, match="max_position_embeddings=16"):
        TupeTrainer.check_sizes(Tokenizer(0), config(), 17)
