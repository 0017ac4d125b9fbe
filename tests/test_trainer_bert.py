"""BERT's trainer: the common suite, two lengths under one schedule, the ablation without next-sentence prediction."""

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from suites.trainer_suite import DROPOUT, ObjectiveSuite, TrainerSuite, differences, logged, outcome
from transformers import BertTokenizerFast

from bestiary.configuration.configuration_bert import BertPretrainingConfig
from bestiary.modeling.modeling_bert import BertPretrainingForPreTraining
from bestiary.trainers.masking import MaskingCollator, SpecialTokens
from bestiary.trainers.optimization import BertAdam, bert_schedule
from bestiary.trainers.phases import PhasedDataset
from bestiary.trainers.trainer_bert import (
    BertPretrainingDataArguments,
    BertPretrainingTrainer,
    BertPretrainingTrainingArguments,
)


VOCABULARY = 40
SPECIAL = SpecialTokens(
    cls_id=2, sep_id=3, pad_id=0, mask_id=4, vocab_size=VOCABULARY, continuation=None, has_token_types=True
)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrs", "##t"]


def config(dropout: float = 0.0, **fields) -> BertPretrainingConfig:
    return BertPretrainingConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=16,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        **fields,
    )


def rows(number: int) -> list[dict]:
    """Pairs of 6 to 16 tokens; the second segment of a random pair is made of other tokens than the first."""
    rng = np.random.default_rng(5)
    made = []
    for row in range(number):
        length, random_pair = int(rng.integers(6, 17)), row % 3 == 0
        split = length // 2
        ids = rng.integers(5, 10, length)
        if random_pair:
            ids[split:] += 5
        ids[0], ids[split], ids[-1] = 2, 3, 3
        types = [0] * (split + 1) + [1] * (length - split - 1)
        made.append({"input_ids": ids.tolist(), "token_type_ids": types, "next_sentence_label": int(random_pair)})
    return made


class Bert:
    slug = "bert"

    def make_rows(self, number):
        return rows(number)

    def make_collator(self):
        return MaskingCollator(SPECIAL, mlm_probability=0.3, seed=1)


class TestBertTrainer(Bert, TrainerSuite):
    stands_for_all = True
    parts = ("mlm", "sentence")
    metrics = ("sentence_accuracy",)

    def make_model(self, dropout):
        return BertPretrainingForPreTraining(config(dropout, masked_lm_loss_weight=0.5, next_sentence_loss_weight=2.0))

    def test_sentence_accuracy(self, tmp_path):
        """Of pairs with a label; the part of the loss and the accuracy are over the same pairs."""
        trainer = self.make_trainer(tmp_path)
        labels = [row["next_sentence_label"] for row in trainer.eval_dataset]
        labels[1] = trainer.eval_dataset[1]["next_sentence_label"] = -100
        batch = self.make_collator()([row | {"example_key": key} for key, row in enumerate(trainer.eval_dataset)])
        trainer.model.eval()
        with torch.no_grad():
            predicted = trainer.model(**batch).seq_relationship_logits.argmax(1).tolist()
        right = sum(guess == label for guess, label in zip(predicted, labels))
        assert trainer.evaluate()["eval_sentence_accuracy"] == pytest.approx(right / 5)


class TestWithoutNextSentencePrediction(Bert, ObjectiveSuite):
    """The paper's ablation: its own rows have no second segment."""

    parts = ("mlm",)

    def make_model(self, dropout):
        return BertPretrainingForPreTraining(config(dropout, next_sentence_prediction=False))

    def make_rows(self, number):
        return [{"input_ids": row["input_ids"]} for row in rows(number)]


def test_optimizer_and_schedule_of_the_paper(tmp_path):
    arguments = BertPretrainingTrainingArguments(output_dir=str(tmp_path), report_to="none")
    trainer = BertPretrainingTrainer(BertPretrainingForPreTraining(config()), arguments)
    trainer.create_optimizer_and_scheduler(1_000_000)
    assert type(trainer.optimizer) is BertAdam
    settings = [
        (group["lr"], group["betas"], group["eps"], group["weight_decay"]) for group in trainer.optimizer.param_groups
    ]
    assert settings == [(0.0, (0.9, 0.999), 1e-6, decay) for decay in (0.01, 0.0)]  # the rate of step 0 is 0
    (factor, *_), (peak, *_) = trainer.lr_scheduler.lr_lambdas, trainer.lr_scheduler.base_lrs
    rates = {0: 0.0, 5_000: 5e-5, 9_999: 9.999e-5, 10_000: 9.9e-5, 505_000: 4.95e-5, 1_000_000: 0.0}
    assert {step: peak * factor(step) for step in rates} == pytest.approx(rates)
    assert arguments.max_grad_norm == 1.0


# ---- two lengths


@pytest.fixture(scope="module")
def tokenizer() -> BertTokenizerFast:
    return BertTokenizerFast(vocab={word: index for index, word in enumerate(WORDS)})


@pytest.fixture(scope="module")
def documents() -> DatasetDict:
    rng = np.random.default_rng(0)
    made = [[" ".join(rng.choice(WORDS[5:-1], int(rng.integers(1, 5)))) for _ in range(12)] for _ in range(8)]
    return DatasetDict({split: Dataset.from_dict({"sentences": made}) for split in ("train", "validation")})


STEPS = 20
DATA = {"max_length": 8, "long_max_length": 16, "long_fraction": 0.1, "dupe_factor": 2, "mlm_probability": 0.3}


def two_length_trainer(documents, tokenizer, output_dir, fields=None, **arguments) -> BertPretrainingTrainer:
    training = BertPretrainingTrainingArguments(
        **{
            "output_dir": str(output_dir),
            "max_steps": STEPS,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-3,
            "warmup_steps": 5,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        | arguments
    )
    data = BertPretrainingDataArguments(**DATA)
    torch.manual_seed(0)
    model = BertPretrainingForPreTraining(config(DROPOUT, **fields or {}))
    examples = BertPretrainingTrainer.build_datasets(documents, tokenizer, model.config, data, training)
    return BertPretrainingTrainer(
        model,
        training,
        data_collator=BertPretrainingTrainer.build_collator(tokenizer, model.config, data, training),
        train_dataset=examples["train"],
        eval_dataset=examples["validation"],
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("fields", [{}, {"next_sentence_prediction": False}], ids=["pairs", "one segment"])
def test_the_last_tenth_of_the_updates_is_long(fields, documents, tokenizer, tmp_path):
    trainer = two_length_trainer(documents, tokenizer, tmp_path, fields)
    assert isinstance(trainer.train_dataset, PhasedDataset) and len(trainer.train_dataset) == STEPS * 4
    lengths: dict[int, list[int]] = {}

    def note(module, args, batch, outputs):
        lengths.setdefault(trainer.state.global_step, []).extend(batch["attention_mask"].sum(1).tolist())

    trainer.model.register_forward_hook(note, with_kwargs=True)
    trainer.train()
    assert [len(found) for found in lengths.values()] == [4] * STEPS
    assert max(max(lengths[step]) for step in range(18)) <= 8
    assert all(max(lengths[step]) > 8 for step in (18, 19))
    rates = [entry["learning_rate"] for entry in logged(trainer) if "loss" in entry]
    assert rates == pytest.approx([1e-3 * bert_schedule(step, 5, STEPS) for step in range(STEPS)])


def test_resuming_in_the_second_phase_is_exact(documents, tokenizer, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 19, "logging_steps": 4}
    straight = two_length_trainer(documents, tokenizer, tmp_path, **saving)
    straight.train()
    resumed = two_length_trainer(documents, tokenizer, tmp_path, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-19"))
    assert resumed._initial_global_step == 19 and differences(outcome(resumed), outcome(straight)) == []


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"max_steps": -1}, "long_max_length needs training.max_steps"),
        ({"long_fraction": 1.0}, r"long_fraction must be in \(0, 1\)"),
    ],
)
def test_two_lengths_need_a_number_of_updates_and_a_share(changes, message, documents, tokenizer, tmp_path):
    training = BertPretrainingTrainingArguments(output_dir=str(tmp_path), max_steps=changes.pop("max_steps", 10))
    data = BertPretrainingDataArguments(**DATA | changes)
    with pytest.raises(ValueError, match=message):
        BertPretrainingTrainer.build_datasets(documents, tokenizer, config(), data, training)


@pytest.mark.parametrize(
    "changes, message",
    [({"long_max_length": 17}, "max_position_embeddings=16"), ({}, "The tokenizer has 25 entries")],
)
def test_data_that_does_not_fit_the_model(changes, message, documents, tokenizer, tmp_path):
    model = config() if changes else BertPretrainingConfig.from_dict(config().to_dict() | {"vocab_size": 24})
    training = BertPretrainingTrainingArguments(output_dir=str(tmp_path), max_steps=10)
    with pytest.raises(ValueError, match=message):
        BertPretrainingTrainer.build_datasets(
            documents, tokenizer, model, BertPretrainingDataArguments(**DATA | changes), training
        )


def test_the_collator_takes_the_options_of_the_recipe(tokenizer, tmp_path):
    training = BertPretrainingTrainingArguments(output_dir=str(tmp_path), seed=11)
    data = BertPretrainingDataArguments(
        mlm_probability=0.2, max_predictions=3, whole_word=True, pad_to_multiple_of=8, data_seed=5
    )
    collator = BertPretrainingTrainer.build_collator(tokenizer, config(), data, training)
    options = (collator.mlm_probability, collator.max_predictions, collator.whole_word, collator.pad_to_multiple_of)
    assert options == (0.2, 3, True, 8)
    assert (collator.seed, collator.max_length, collator.replace) == (11, 16, (0.8, 0.1, 0.1))
