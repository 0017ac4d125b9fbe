"""HyPe's trainer: the common suite for tags and classes, plain models, NoisyTune, the recipe."""

import copy
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from suites.trainer_suite import DROPOUT, ObjectiveSuite, TrainerSuite, differences, logged, outcome
from transformers import (
    AutoModelForTokenClassification,
    BertConfig,
    BertForTokenClassification,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
)

from bestiary.configuration.configuration_bert import BertPretrainingConfig
from bestiary.configuration.configuration_hype import HypeConfig
from bestiary.modeling.layers.wrapping import layer_list
from bestiary.modeling.modeling_hype import HypeForSequenceClassification, HypeForTokenClassification
from bestiary.trainers.randomness import EVALUATION_EPOCH, step_generator
from bestiary.trainers.trainer_hype import (
    HypeTrainer,
    HypeTrainingArguments,
    KeyedNoiseCollator,
    add_weight_noise,
)


SIZES = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
    "initializer_range": 0.2,
}


def encoder_config(dropout=0.0, kind=BertConfig, **changes):
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return kind(**SIZES | rates | {"num_labels": 3} | changes)


def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {"[PAD]": 0, "[UNK]": 1, **{f"w{number}": number for number in range(2, 30)}}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "[UNK]")), pad_token="[PAD]")


def tagged_rows(number):
    """Tags that the words give; some carry no label."""
    rng = np.random.default_rng(5)
    rows = []
    for _ in range(number):
        ids = rng.integers(2, 30, int(rng.integers(4, 13)))
        labels = np.where(rng.random(len(ids)) < 0.3, -100, ids % 3)
        labels[0] = ids[0] % 3
        rows.append({"input_ids": ids.tolist(), "attention_mask": [1] * len(ids), "labels": labels.tolist()})
    return rows


class Tags:
    slug = "hype"
    parts = ("loss",)
    fields = {"noise_scale": 0.2, "noise_position": "both"}

    def make_model(self, dropout):
        return HypeForTokenClassification(HypeConfig(encoder_config=encoder_config(dropout), **self.fields))

    def make_rows(self, number):
        return tagged_rows(number)

    def make_collator(self):
        return KeyedNoiseCollator(DataCollatorForTokenClassification(tokenizer()), seed=1)

    def test_parts_and_metrics_are_logged(self, tmp_path):
        """One loss, no parts."""
        trainer = self.make_trainer(tmp_path)
        trainer.train()
        trainer.evaluate()
        lines = [entry for entry in logged(trainer) if "loss" in entry]
        assert len(lines) == 4 and all(np.isfinite(entry["loss"]) for entry in lines)
        assert "eval_loss" in logged(trainer)[-1]


class TestHypeTrainer(Tags, TrainerSuite):
    def test_noise_is_in_the_update(self, whole, tmp_path, monkeypatch):
        """Without noise, or with that of another seed, the same rows give other gradients."""
        first = []
        for seed, scale in ((1, 0.2), (1, 0.0), (2, 0.2)):
            monkeypatch.setattr(Tags, "fields", {"noise_scale": scale, "noise_position": "both"})
            monkeypatch.setattr(
                Tags,
                "make_collator",
                lambda self, seed=seed: KeyedNoiseCollator(DataCollatorForTokenClassification(tokenizer()), seed),
            )
            found = self.record_split(tmp_path, per_device_train_batch_size=8).gradients[0]
            first.append(torch.cat([found[name].flatten() for name in sorted(found)]))
        known = torch.cat([whole.gradients[0][name].flatten() for name in sorted(whole.gradients[0])])
        assert torch.equal(first[0], known)
        for one, other in itertools.combinations(first, 2):
            assert (one - other).norm() > 0.01 * known.norm()


class TestGlobalGenerator(Tags, ObjectiveSuite):
    """Noise by step, as in the official code: resuming is exact, splitting a batch is not."""

    fields = {"noise_scale": 0.2, "noise": "uniform"}

    def make_collator(self):
        return DataCollatorForTokenClassification(tokenizer())

    def make_trainer(self, output_dir, **arguments):
        return super().make_trainer(output_dir, **{"keyed_noise": False} | arguments)

    def test_accumulation_gives_the_same_update(self, whole, tmp_path):
        other = self.record_split(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2)
        name = next(iter(other.gradients[0]))
        assert not torch.allclose(other.gradients[0][name], whole.gradients[0][name], rtol=1e-3)

    def test_resuming_is_exact(self, tmp_path):
        run = {"save_strategy": "steps", "save_steps": 2, "dropout": DROPOUT}
        trainer = self.make_trainer(tmp_path / "whole", **run)
        trainer.train()
        resumed = self.make_trainer(tmp_path / "resumed", **run)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
        assert differences(outcome(resumed), outcome(trainer)) == []


# ---- plain models


def plain_trainer(folder, model=None, perturbation=None, collator=None, **arguments):
    torch.manual_seed(0)
    model = BertForTokenClassification(encoder_config()) if model is None else model
    common = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 3,
    }
    return HypeTrainer(
        model,
        HypeTrainingArguments(**common | arguments),
        perturbation=perturbation,
        data_collator=collator or DataCollatorForTokenClassification(tokenizer()),
        train_dataset=tagged_rows(12),
        eval_dataset=tagged_rows(5),
    )


def has_hooks(model):
    return any(part._forward_pre_hooks or part._forward_hooks for part in layer_list(model).modules())


NOISE = {"noise": "uniform", "noise_scale": 0.2, "noise_position": "both"}


@pytest.mark.parametrize("keyed", [True, False])
def test_plain_model_trains_as_the_pair(keyed, tmp_path):
    """The same losses and weights; hooks while it trains, none afterwards, and none in what is saved."""
    trainer = plain_trainer(tmp_path / "plain", perturbation=NOISE, keyed_noise=keyed)
    pair = HypeForTokenClassification(HypeConfig(encoder_config=encoder_config(), **NOISE))
    pair.wrapped.load_state_dict(trainer.model.state_dict())
    other = plain_trainer(tmp_path / "pair", model=pair, keyed_noise=keyed)
    seen = []
    trainer.model.register_forward_pre_hook(lambda module, _: seen.append(has_hooks(module)))
    for each in (trainer, other):
        torch.manual_seed(4)
        each.train()
    assert seen == [True] * 3 and not has_hooks(trainer.model)
    expected = {name.removeprefix("model."): value for name, value in other.model.state_dict().items()}
    assert differences(trainer.model.state_dict(), expected) == []
    assert differences(logged(trainer), logged(other)) == []
    assert trainer.evaluate()["eval_loss"] == other.evaluate()["eval_loss"]
    for each in (trainer, other):
        each.save_result()
        folder = each.args.output_dir
        loaded, report = AutoModelForTokenClassification.from_pretrained(folder, output_loading_info=True)
        assert type(loaded) is BertForTokenClassification and not any(report.values())
        assert differences(loaded.state_dict(), expected) == []
        assert "Hidden Representation Perturbation" in (Path(folder) / "README.md").read_text()


def test_plain_model_without_noise_is_plain_fine_tuning(tmp_path):
    quiet = plain_trainer(tmp_path, perturbation={"noise": "none"})
    noisy = plain_trainer(tmp_path, perturbation=NOISE)
    assert isinstance(noisy.data_collator, KeyedNoiseCollator)
    assert isinstance(quiet.data_collator, DataCollatorForTokenClassification)
    quiet.train()
    noisy.train()
    assert differences(quiet.model.state_dict(), noisy.model.state_dict()) != []


def test_hooks_go_when_training_fails(tmp_path):
    trainer = plain_trainer(tmp_path, perturbation=NOISE, collator=lambda rows: {}["nothing"])
    with pytest.raises(KeyError, match="nothing"):
        trainer.train()
    assert not has_hooks(trainer.model)


def test_predicting_without_labels(tmp_path):
    trainer = plain_trainer(tmp_path, perturbation=NOISE)
    rows = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in tagged_rows(5)]
    trainer.data_collator = KeyedNoiseCollator(DataCollatorWithPadding(tokenizer()))
    assert trainer.predict(rows).predictions.shape[0] == 5


def test_what_the_trainer_refuses(tmp_path):
    pair = HypeForTokenClassification(HypeConfig(encoder_config=encoder_config(), **NOISE))
    with pytest.raises(ValueError, match="HypeForTokenClassification has its settings in its configuration"):
        plain_trainer(tmp_path, model=pair, perturbation=NOISE)
    with pytest.raises(StrictDataclassError, match="noise_layers must be None or numbers from -2 to 1"):
        plain_trainer(tmp_path, perturbation={"noise_layers": [2]})
    packed = AutoModelForTokenClassification.from_config(
        encoder_config(kind=BertPretrainingConfig, unpad_threshold=0.1)
    )
    with pytest.raises(ValueError, match="unpad_threshold=0.1 packs examples .* keyed_noise to False"):
        plain_trainer(tmp_path, model=packed, perturbation=NOISE)
    plain_trainer(tmp_path, model=packed, perturbation=NOISE, keyed_noise=False).train()
    with pytest.raises(ValueError, match="give the model itself, not model_init"):
        HypeTrainer(
            args=HypeTrainingArguments(output_dir=str(tmp_path)),
            model_init=lambda: BertForTokenClassification(encoder_config()),
        )
    with pytest.raises(ValueError, match="HypeTrainingArguments.noisy_tune must be at least 0"):
        HypeTrainingArguments(output_dir=str(tmp_path), noisy_tune=-0.1)


# ---- the collator


def test_seeds_are_those_of_epoch_and_example():
    rows = [{**row, "example_key": key} for key, row in enumerate(tagged_rows(6))]
    collator = KeyedNoiseCollator(DataCollatorForTokenClassification(tokenizer()), seed=1)
    seeds = collator(rows)["noise_seeds"]
    assert seeds.dtype == torch.int64 and seeds.unique().numel() == 6 and seeds.min() >= 0
    assert "example_key" not in collator(rows)
    assert torch.equal(collator(rows[4:])["noise_seeds"], seeds[4:])
    others = KeyedNoiseCollator(collator.collator, seed=2)(rows)["noise_seeds"]
    collator.set_epoch(1)
    later = collator(rows)["noise_seeds"]
    assert torch.cat([seeds, others, later]).unique().numel() == 18
    collator.set_epoch(0)
    plain = [{name: value for name, value in row.items() if name != "example_key"} for row in rows]
    found = [collator(plain[:4])["noise_seeds"], collator(plain[4:])["noise_seeds"]]
    assert torch.equal(torch.cat(found), seeds)  # numbered as they come
    collator.set_epoch(EVALUATION_EPOCH)
    assert "noise_seeds" not in collator(rows)
    assert collator.tokenizer is collator.collator.tokenizer


class CountingCollator(DataCollatorForTokenClassification):
    """A keyed collator of other origin: it tells its epoch and the keys that it sees."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __call__(self, features, return_tensors=None):
        keys = [feature.pop("example_key") for feature in features]
        return super().__call__(features) | {"seen": (self.epoch, keys)}


def test_keyed_collators_of_other_origin_get_seeds(tmp_path):
    """They see the keys and the epoch as without HyPe; evaluation leaves the epoch of training; own seeds stay."""
    inner = CountingCollator(tokenizer())
    collator = plain_trainer(tmp_path, perturbation=NOISE, collator=inner).data_collator
    assert isinstance(collator, KeyedNoiseCollator)
    assert plain_trainer(tmp_path, perturbation=NOISE, collator=collator).data_collator is collator
    rows = [{**row, "example_key": 7 + key} for key, row in enumerate(tagged_rows(3))]
    known = KeyedNoiseCollator(DataCollatorForTokenClassification(tokenizer()), seed=3)
    collator.set_epoch(2)
    known.set_epoch(2)
    evaluation = copy.copy(collator)  # as the base trainer does
    evaluation.set_epoch(EVALUATION_EPOCH)
    found = collator(rows)
    assert found["seen"] == (2, [7, 8, 9]) and torch.equal(found["noise_seeds"], known(rows)["noise_seeds"])
    found = evaluation(rows)
    assert found["seen"] == (EVALUATION_EPOCH, [7, 8, 9]) and "noise_seeds" not in found
    own = KeyedNoiseCollator(lambda rows: {"noise_seeds": torch.tensor([5])})
    assert torch.equal(own(rows)["noise_seeds"], torch.tensor([5]))


# ---- NoisyTune


def test_weight_noise_by_hand():
    """Uniform within half of lambda standard deviations, the standard deviation of each tensor its own."""
    model = torch.nn.Sequential(torch.nn.Linear(200, 300), torch.nn.Linear(300, 1))
    with torch.no_grad():
        model[1].weight.mul_(40)
    before = copy.deepcopy(model)
    add_weight_noise(model, 0.5, torch.Generator().manual_seed(0))
    for (name, new), old in zip(model.named_parameters(), before.parameters(), strict=True):
        if old.numel() == 1:
            assert torch.equal(new, old)
            continue
        change = (new - old) / (0.5 * old.std())
        assert change.abs().max() <= 0.5 + 1e-4 and change.abs().max() > 0.48, name
        assert abs(change.mean()) < 5 * (12 * old.numel()) ** -0.5
        assert change.std().item() == pytest.approx(12**-0.5, rel=0.1)


def test_noisy_tune_changes_weights_once_and_before_training(tmp_path):
    """With a rate of 0 what training leaves is the noise; a resumed run gets none on top."""
    run = {"noisy_tune": 0.15, "learning_rate": 0.0, "weight_decay": 0.0, "save_strategy": "steps", "save_steps": 2}
    trainer = plain_trainer(tmp_path / "whole", perturbation={"noise": "none"}, **run)
    expected = copy.deepcopy(trainer.model)
    start = copy.deepcopy(expected.state_dict())
    add_weight_noise(expected, 0.15, step_generator(3, 0))
    trainer.train()
    assert differences(trainer.model.state_dict(), expected.state_dict()) == []
    assert len(differences(start, expected.state_dict())) == sum(bool(value.std() > 0) for value in start.values())
    resumed = plain_trainer(tmp_path / "resumed", perturbation={"noise": "none"}, **run)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert differences(resumed.model.state_dict(), expected.state_dict()) == []


# ---- arguments


def test_defaults_of_the_official_command(tmp_path):
    arguments = HypeTrainingArguments(output_dir=str(tmp_path))
    found = (arguments.learning_rate, arguments.per_device_train_batch_size, arguments.num_train_epochs)
    assert found == (2e-5, 16, 3)
    assert (arguments.warmup_steps, arguments.weight_decay, arguments.adam_epsilon) == (0.1, 0.01, 1e-6)
    assert arguments.keyed_noise and arguments.noisy_tune == 0


def test_classification_and_regression_train(tmp_path):
    for labels, kind in ((3, "single_label_classification"), (1, "regression")):
        config = HypeConfig(encoder_config=encoder_config(num_labels=labels, problem_type=kind), **NOISE)
        rows = [
            {**row, "labels": row["labels"][0] if labels == 3 else float(row["labels"][0])} for row in tagged_rows(12)
        ]
        trainer = plain_trainer(
            tmp_path, HypeForSequenceClassification(config), collator=DataCollatorWithPadding(tokenizer())
        )
        trainer.train_dataset = rows
        trainer.train()
        assert np.isfinite(trainer.evaluate(rows)["eval_loss"])
