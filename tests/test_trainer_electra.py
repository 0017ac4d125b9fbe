"""ELECTRA's trainer: the common suite over the paper's variants, figures of the discriminator, optimizer and data."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from sklearn.metrics import accuracy_score, precision_score, recall_score, roc_auc_score
from suites.trainer_suite import ObjectiveSuite, TrainerSuite, logged
from transformers import BertTokenizerFast

from bestiary.configuration.configuration_electra import ElectraJointConfig
from bestiary.modeling.modeling_electra import ElectraJointForPreTraining
from bestiary.trainers.masking import ElectraMaskingCollator, SpecialTokens
from bestiary.trainers.optimization import BertAdam
from bestiary.trainers.pretraining import PretrainingDataArguments
from bestiary.trainers.trainer_electra import ElectraTrainer, ElectraTrainingArguments


VOCABULARY = 40
SPECIAL = SpecialTokens(
    cls_id=2, sep_id=3, pad_id=0, mask_id=4, vocab_size=VOCABULARY, continuation=None, has_token_types=True
)
FIGURES = ("generator_accuracy", "sampled_accuracy", "replaced_share")
DISCRIMINATOR = tuple(f"discriminator_{name}" for name in ("accuracy", "precision", "recall", "auc"))


def model(dropout: float = 0.0, **fields) -> ElectraJointForPreTraining:
    encoder = {
        "vocab_size": VOCABULARY,
        "embedding_size": 16,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 16,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }
    config = ElectraJointConfig(discriminator_config=encoder, generator_size_fraction=0.5, **fields)
    return ElectraJointForPreTraining(config)


class Electra:
    slug = "electra"
    parts = ("mlm", "discriminator")
    metrics = FIGURES + DISCRIMINATOR
    fields: dict = {}

    def make_model(self, dropout):
        return model(dropout, **self.fields)

    def make_rows(self, number):
        rng = np.random.default_rng(5)
        made = []
        for _ in range(number):
            ids = rng.integers(5, 10, int(rng.integers(6, 17)))
            ids[0], ids[-1] = 2, 3
            made.append({"input_ids": ids.tolist()})
        return made

    def make_collator(self):
        return ElectraMaskingCollator(SPECIAL, mlm_probability=0.3, seed=1)

    def drawn(self, outputs):
        return {} if outputs.corrupted_ids is None else {"corrupted_ids": outputs.corrupted_ids}


class TestElectraTrainer(Electra, TrainerSuite):
    def test_samples_are_those_of_the_example(self, whole, tmp_path):
        """The suite compares rows with `corrupted_ids`; here they must be there, and be more than the masks."""
        trainer = self.make_trainer(tmp_path)
        batch = trainer.data_collator([{**row, "example_key": key} for key, row in enumerate(self.make_rows(6))])
        corrupted = trainer.model(**batch).corrupted_ids
        assert torch.equal(corrupted, trainer.model(**batch).corrupted_ids)
        reseeded = trainer.model(**batch | {"sampling_seeds": batch["sampling_seeds"] + 1}).corrupted_ids
        assert not torch.equal(corrupted, reseeded) and all(len(rows[0]) == 6 for rows in whole.rows)


class TestMaskedLanguageModelControl(Electra, ObjectiveSuite):
    fields = {"objective": "mlm"}
    parts = ("mlm",)
    metrics = ("generator_accuracy",)


class TestUniformGenerator(Electra, ObjectiveSuite):
    fields = {"uniform_generator": True}

    def test_loss_falls(self, tmp_path):
        trainer = self.make_trainer(tmp_path, max_steps=20)
        before = trainer.evaluate()
        trainer.train()
        after = trainer.evaluate()
        assert before["eval_mlm_loss"] == after["eval_mlm_loss"] == pytest.approx(np.log(VOCABULARY), rel=1e-6)
        assert after["eval_discriminator_loss"] < 0.8 * before["eval_discriminator_loss"]


class TestSeparateEmbeddings(Electra, ObjectiveSuite):
    fields = {"tie_generator_embeddings": False, "sampling": "inverse_cdf"}


class TestOneEncoder(Electra, ObjectiveSuite):
    fields = {"untied_generator": False, "disallow_correct": True}

    def test_every_masked_token_is_replaced(self, tmp_path):
        trainer = self.make_trainer(tmp_path)
        trainer.train()
        assert {entry["sampled_accuracy"] for entry in logged(trainer) if "loss" in entry} == {0.0}


# ---- figures


@pytest.fixture
def trainer(tmp_path) -> ElectraTrainer:
    arguments = ElectraTrainingArguments(output_dir=str(tmp_path), report_to="none", disable_tqdm=True)
    return ElectraTrainer(model(), arguments)


def made_up(seed: int, rows: int = 30) -> tuple[SimpleNamespace, dict[str, torch.Tensor]]:
    """Outputs and batch whose scores say something about which tokens are fake; padding carries wild scores."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 13, (rows,), generator=draw)
    real = torch.arange(12) < lengths[:, None]
    labels = torch.where(real & (torch.rand(real.shape, generator=draw) < 0.4), 7, -100)
    is_fake = (labels != -100) & (torch.rand(real.shape, generator=draw) < 0.7)
    scores = torch.randn(real.shape, generator=draw) + 1.5 * is_fake - 0.5
    guesses = torch.where(torch.rand(real.shape, generator=draw) < 0.6, 7, 8).where(labels != -100, -100)
    outputs = SimpleNamespace(logits=torch.where(real, scores, 50.0), is_fake=is_fake, generator_predictions=guesses)
    return outputs, {"labels": labels, "attention_mask": real.long()}


def test_figures_are_those_of_sklearn(trainer):
    """Summed over two batches."""
    batches = [made_up(seed) for seed in range(2)]
    sums = [trainer.metric_sums(*batch) for batch in batches]
    found = trainer.metrics_from_sums({name: sums[0][name] + sums[1][name] for name in sums[0]})
    real = [batch["attention_mask"].bool() for _, batch in batches]
    masked = [batch["labels"] != -100 for _, batch in batches]
    fake = torch.cat([outputs.is_fake[kept] for (outputs, _), kept in zip(batches, real)]).numpy()
    score = torch.cat([outputs.logits[kept].sigmoid() for (outputs, _), kept in zip(batches, real)]).numpy()
    guess = torch.cat([outputs.generator_predictions[kept] for (outputs, _), kept in zip(batches, masked)])
    kept_fake = torch.cat([outputs.is_fake[kept] for (outputs, _), kept in zip(batches, masked)])
    called = score >= 0.5
    binned = np.floor(score * 1000)  # equal scores in a bin count half, in sklearn and here
    assert found["discriminator_auc"] == pytest.approx(roc_auc_score(fake, binned), rel=1e-9)
    assert found == pytest.approx(
        {
            "generator_accuracy": (guess == 7).double().mean().item(),
            "sampled_accuracy": 1 - kept_fake.double().mean().item(),
            "replaced_share": fake.mean(),
            "discriminator_accuracy": accuracy_score(fake, called),
            "discriminator_precision": precision_score(fake, called),
            "discriminator_recall": recall_score(fake, called),
            "discriminator_auc": pytest.approx(roc_auc_score(fake, score), abs=1e-3),
        }
    )


@pytest.mark.parametrize("is_fake, score, expected", [(False, -3.0, (1.0, 0.0, 0.0)), (True, 40.0, (1.0, 1.0, 1.0))])
def test_figures_at_the_ends(is_fake, score, expected, trainer):
    """All tokens real or all replaced, and a probability of exactly 1."""
    shape = (2, 3)
    outputs = SimpleNamespace(
        logits=torch.full(shape, score),
        is_fake=torch.full(shape, is_fake),
        generator_predictions=torch.full(shape, 7),
    )
    batch = {"labels": torch.full(shape, 8), "attention_mask": torch.ones(shape, dtype=torch.long)}
    found = trainer.metrics_from_sums(trainer.metric_sums(outputs, batch))
    assert tuple(found[name] for name in DISCRIMINATOR[:3]) == expected
    assert found["discriminator_auc"] == 0.0 and found["generator_accuracy"] == 0.0


def test_scores_that_are_not_numbers_do_not_stop_the_log(trainer):
    outputs, batch = made_up(0)
    outputs.logits = torch.full_like(outputs.logits, torch.nan)
    assert all(np.isfinite(value) for value in trainer.metrics_from_sums(trainer.metric_sums(outputs, batch)).values())


# ---- optimizer and data of the paper


def test_optimizer_and_schedule_of_the_paper(tmp_path):
    arguments = ElectraTrainingArguments(output_dir=str(tmp_path), report_to="none", learning_rate=5e-4)
    trainer = ElectraTrainer(model(), arguments)
    trainer.create_optimizer_and_scheduler(1_000_000)
    assert type(trainer.optimizer) is BertAdam
    settings = [(group["betas"], group["eps"], group["weight_decay"]) for group in trainer.optimizer.param_groups]
    assert settings == [((0.9, 0.999), 1e-6, decay) for decay in (0.01, 0.0)]
    (factor, *_), (peak, *_) = trainer.lr_scheduler.lr_lambdas, trainer.lr_scheduler.base_lrs
    rates = {0: 0.0, 5_000: 2.4875e-4, 10_000: 4.95e-4, 500_000: 2.5e-4, 1_000_000: 0.0}
    assert {step: peak * factor(step) for step in rates} == pytest.approx(rates)
    assert arguments.max_grad_norm == 1.0
    assert ElectraTrainingArguments(output_dir=str(tmp_path)).learning_rate == 2e-4


@pytest.mark.parametrize("rate, length, limit, own", [(0.15, 12, 1, None), (0.25, 16, 4, None), (0.25, 16, 2, 2)])
def test_data_and_number_of_predictions(rate, length, limit, own, tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]
    tokenizer = BertTokenizerFast(vocab={word: index for index, word in enumerate(words)})
    sentences = [["a b c d e f", "g h i", "j a b c d e f g"] * 4 for _ in range(3)]
    documents = DatasetDict({"train": Dataset.from_dict({"sentences": sentences})})
    data = PretrainingDataArguments(max_length=length, mlm_probability=rate, max_predictions=own)
    training = ElectraTrainingArguments(output_dir=str(tmp_path), seed=11)
    config = model().config
    rows = ElectraTrainer.build_datasets(documents, tokenizer, config, data, training)["train"]
    collator = ElectraTrainer.build_collator(tokenizer, config, data, training)
    assert isinstance(collator, ElectraMaskingCollator) and collator.seed == 11
    counts = [(collator([row])["labels"] != -100).sum().item() for row in rows]
    assert max(len(row["input_ids"]) for row in rows) == length and max(counts) == limit
