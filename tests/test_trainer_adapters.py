"""Training with adapters: the common suite for our classes and for PEFT's, decay, clipping, what a run leaves."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from suites.trainer_suite import ObjectiveSuite, TrainerSuite
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

import bestiary
from bestiary import BottleneckAdapterConfig
from bestiary.configuration.configuration_adapters import AdaptersConfig
from bestiary.modeling.layers.losses import IGNORE
from bestiary.modeling.modeling_adapters import AdaptersForSequenceClassification, AdaptersForTokenClassification
from bestiary.trainers.optimization import BertAdam
from bestiary.trainers.trainer_adapters import AdaptersTrainer, AdaptersTrainingArguments


pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks


def encoder(dropout: float = 0.0, **more) -> BertConfig:
    return BertConfig(
        vocab_size=40,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.2,
        **more,
    )


def collate(rows):
    """Right padding of ids and of labels that stand at tokens."""
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(name, value):
        return torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows])
    labels = [row["labels"] for row in rows]
    labels = padded("labels", IGNORE) if isinstance(labels[0], list) else torch.tensor(labels)
    return {"input_ids": padded("input_ids", 0), "attention_mask": mask, "labels": labels}


class Rows:
    """Rows whose labels can be learned."""

    slug = "adapters"
    parts = ("loss",)

    def make_collator(self):
        return collate

    def make_rows(self, number, tokens=False):
        rng = np.random.default_rng(5)
        made = []
        for _ in range(number):
            ids = rng.integers(5, 40, int(rng.integers(6, 17))).tolist()
            made.append({"input_ids": ids, "labels": [each % 2 for each in ids] if tokens else ids[0] % 2})
        return made

    def test_parts_and_metrics_are_logged(self, tmp_path):
        """One loss has no parts."""
        trainer = self.make_trainer(tmp_path, logging_steps=2)
        trainer.train()
        assert np.isfinite([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]).all()
        assert np.isfinite(trainer.evaluate()["eval_loss"])


class TestAdaptersTrainer(Rows, TrainerSuite):
    """Our classes; labels at every token, so that counts differ."""

    def make_model(self, dropout):
        config = AdaptersConfig(encoder_config=encoder(dropout), adapter_size=8, adapter_init_std=0.1)
        return AdaptersForTokenClassification(config)

    def make_rows(self, number):
        return super().make_rows(number, tokens=True)


class TestPeftModel(Rows, ObjectiveSuite):
    """PEFT's model of the same method."""

    def make_model(self, dropout):
        settings = BottleneckAdapterConfig(task_type="SEQ_CLS", adapter_size=8, adapter_init_std=0.1)
        return get_peft_model(BertForSequenceClassification(encoder(dropout)), settings)

    def test_resuming_is_exact(self, tmp_path):
        run = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5, "dropout": 0.1}
        whole = self.make_trainer(tmp_path / "whole", **run)
        whole.train()
        resumed = self.make_trainer(tmp_path / "resumed", **run)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
        for name, value in whole.model.state_dict().items():
            assert torch.equal(value, resumed.model.state_dict()[name]), name
        saved = load_file(tmp_path / "whole/checkpoint-2/adapter_model.safetensors")
        assert all("bottleneck_" in name or "classifier" in name for name in saved)
        assert not (tmp_path / "whole/checkpoint-2/README.md").exists(), "PEFT's own card"


# ----------------------------------------------------------------------------------------------------- the optimizer


@pytest.fixture
def plain(tmp_path):
    """A checkpoint of a plain encoder with a head."""
    torch.manual_seed(0)
    BertForSequenceClassification(encoder()).save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def kinds(plain):
    """The same task for our classes and for PEFT's."""
    torch.manual_seed(1)
    yield AdaptersForSequenceClassification.from_encoder(plain, adapter_size=8)
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(plain)
    yield get_peft_model(model, BottleneckAdapterConfig(task_type="SEQ_CLS", adapter_size=8))


def trainer_for(model, folder, **more):
    common = {"output_dir": str(folder), "report_to": "none", "disable_tqdm": True, "max_steps": 3, "seed": 3}
    arguments = AdaptersTrainingArguments(**common | {"save_strategy": "no", "logging_steps": 1} | more)
    rows = Rows().make_rows(40)
    return AdaptersTrainer(model, arguments, data_collator=collate, train_dataset=rows, eval_dataset=rows[:6])


def test_the_official_settings(tmp_path, plain):
    arguments = AdaptersTrainingArguments(output_dir=str(tmp_path))
    assert (arguments.learning_rate, arguments.weight_decay, arguments.max_grad_norm) == (3e-4, 0.01, 1.0)
    assert (arguments.per_device_train_batch_size, arguments.warmup_steps, arguments.schedule) == (32, 0.1, "bert")
    assert (arguments.adam_beta1, arguments.adam_beta2, arguments.adam_epsilon) == (0.9, 0.999, 1e-6)
    for model in kinds(plain):
        trainer = trainer_for(model, tmp_path)
        optimizer = trainer.create_optimizer()
        assert type(optimizer) is BertAdam
        decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        trained = {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}
        assert len(decay) == len(trained)
        decayed = {name for name, value in trained.items() if decay[id(value)]}
        assert decayed == {
            name
            for name in trained
            if name.endswith("weight") and ("down" in name or "up" in name or "classifier" in name)
        }
        assert len(decayed) == 2 * 2 * 2 + 1 and {decay[id(trained[name])] for name in decayed} == {0.01}


def test_a_first_step_by_hand_and_only_of_what_is_trained(tmp_path, plain):
    """No bias correction: the first step of a weight without decay is lr * 0.1 g / (sqrt(0.001) |g| + eps), after
    clipping by the norm over trained parameters; all others stay bit for bit."""
    for model in kinds(plain):
        model.eval()
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        trainer = trainer_for(
            model, tmp_path, max_steps=1, max_grad_norm=1e-3, schedule="constant", warmup_steps=0, learning_rate=0.01
        )
        seen = {}

        def keep(model=model, seen=seen):
            seen.update({name: v.grad.clone() for name, v in model.named_parameters() if v.grad is not None})

        step = trainer.create_optimizer().step
        trainer.optimizer.step = lambda *a, step=step, **k: (keep(), step(*a, **k))[1]
        trainer.train()
        norm = trainer.state.log_history[0]["grad_norm"]
        total = torch.cat([value.flatten() for value in seen.values()]).norm().item()
        assert norm > 1e-3 and total == pytest.approx(1e-3, rel=1e-3), "clipped over what is trained"
        for name, value in model.named_parameters():
            if not value.requires_grad:
                assert name not in seen and torch.equal(value, before[name]), name
            elif "bias" in name or "norm" in name.lower():
                moved = -0.01 * 0.1 * seen[name] / ((0.001**0.5) * seen[name].abs() + 1e-6)
                torch.testing.assert_close(value - before[name], moved, rtol=1e-3, atol=1e-6)


def test_both_kinds_train_alike(tmp_path, plain):
    """From the same start the same losses."""
    own, _ = kinds(plain)
    bestiary.save_adapter(own, tmp_path / "start")
    stock = AutoModelForSequenceClassification.from_pretrained(plain)
    logs = []
    for number, model in enumerate((own, PeftModel.from_pretrained(stock, tmp_path / "start", is_trainable=True))):
        trainer = trainer_for(model, tmp_path / str(number), warmup_steps=0, learning_rate=1e-2)
        trainer.train()
        logs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert logs[0] == pytest.approx(logs[1], rel=1e-6) and len(set(logs[0])) == 3


# ---------------------------------------------------------------------------------------------------------- the result


def test_what_a_run_leaves(tmp_path, plain):
    """A folder that holds what was trained, a card that says how to load it, and the same outputs."""
    batch = {name: value for name, value in collate(Rows().make_rows(4)).items() if name != "labels"}
    for number, model in enumerate(kinds(plain)):
        folder = tmp_path / str(number)
        trainer = trainer_for(model, folder)
        trainer.train()
        trainer.evaluate()
        trainer.save_result()
        saved = load_file(folder / "adapter_model.safetensors")
        trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
        assert sum(map(torch.numel, saved.values())) == trained and not (folder / "model.safetensors").exists()
        card = (folder / "README.md").read_text()
        assert "Parameter-Efficient Transfer Learning for NLP" in card and f"{trained:,} numbers" in card
        assert "import bestiary  # registers" in card and "AutoModelForSequenceClassification.from_pretrained(" in card
        assert "trust_remote_code" not in card and "id2label={" not in card
        assert (folder / "loss.png").exists()
        model.eval()
        with torch.no_grad():
            expected = model(**batch).logits
            loaded = AutoModelForSequenceClassification.from_pretrained(folder)
            torch.testing.assert_close(loaded(**batch).logits, expected)
            base = AutoModelForSequenceClassification.from_pretrained(plain)
            torch.testing.assert_close(PeftModel.from_pretrained(base, folder).eval()(**batch).logits, expected)
        (folder / "README.md").write_text("my own words")
        trainer.save_result()
        assert (folder / "README.md").read_text() == "my own words"


def test_the_card_names_the_labels(tmp_path, plain):
    names = {0: "earth", 1: "moon", 2: "sun"}
    encoder_alone = tmp_path / "encoder"
    AutoModelForSequenceClassification.from_pretrained(plain).bert.save_pretrained(encoder_alone)
    model = AdaptersForSequenceClassification.from_encoder(encoder_alone, id2label=names, adapter_size=4)
    trainer = trainer_for(model, tmp_path / "out")
    trainer.save_result()
    card = (tmp_path / "out/README.md").read_text()
    assert f'from_pretrained("path/to/this/folder", id2label={names!r})' in card
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", id2label=names)
    assert loaded.config.num_labels == 3 and loaded.config.id2label == names


def test_without_a_checkpoint_below_it_is_saved_whole(tmp_path):
    model = AdaptersForSequenceClassification(AdaptersConfig(encoder_config=encoder(), adapter_size=4))
    trainer = trainer_for(model, tmp_path)
    trainer.save_result()
    assert not (tmp_path / "adapter_config.json").exists()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded) is AdaptersForSequenceClassification
    assert "import bestiary" in (tmp_path / "README.md").read_text()


def test_other_methods_of_peft_can_be_compared(tmp_path, plain):
    model = AutoModelForSequenceClassification.from_pretrained(plain)
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))
    trainer = trainer_for(model, tmp_path)
    trainer.train()
    trainer.save_result()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert "Houlsby" not in (tmp_path / "README.md").read_text()


def test_models_that_are_refused(tmp_path, plain):
    model = AutoModelForSequenceClassification.from_pretrained(plain)
    with pytest.raises(ValueError, match="trains adapters, but a BertForSequenceClassification has none"):
        trainer_for(model, tmp_path)
    half = AutoModelForSequenceClassification.from_pretrained(plain, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="LayerNorm.weight would be trained in torch.bfloat16.*bf16=True"):
        trainer_for(AdaptersForSequenceClassification.from_encoder(half, adapter_size=4), tmp_path)
    half = AutoModelForSequenceClassification.from_pretrained(plain, dtype=torch.bfloat16)
    trainer = trainer_for(get_peft_model(half, BottleneckAdapterConfig(task_type="SEQ_CLS", adapter_size=4)), tmp_path)
    trainer.train()
    assert np.isfinite(trainer.evaluate()["eval_loss"])


def test_the_package_offers_what_is_needed():
    assert {"BottleneckAdapterConfig", "save_adapter", "load_adapter", "adapters_off"} <= set(bestiary.__all__)
