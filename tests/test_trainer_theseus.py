"""Theseus' trainer: the common suite, draws and rates, both phases, dropping the predecessor, the plain result."""

import copy
import json

import numpy as np
import pytest
import torch
from suites.trainer_suite import RUN, TrainerSuite, differences, outcome
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import EvalPrediction

from bestiary.configuration.configuration_theseus import TheseusConfig
from bestiary.modeling.modeling_theseus import SUCCESSOR, TheseusForSequenceClassification
from bestiary.trainers.finetuning import classification_metrics
from bestiary.trainers.trainer_theseus import TheseusTrainer, TheseusTrainingArguments


VOCABULARY = 40
FIGURES = ("replacing_rate", "replaced_modules")


def pad(rows):
    """Rows of different lengths as a batch."""
    longest = max(len(row["input_ids"]) for row in rows)
    return {
        "input_ids": torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows]),
        "attention_mask": torch.tensor(
            [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
        ),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


class Theseus:
    """6 layers to 3; the rate goes from 0.4 to 1 within 5 updates, half of the suite's longest run."""

    slug = "theseus"
    parts = ()
    training_figures = FIGURES
    fields: dict = {"replacing_rate": 0.4, "steps_for_replacing": 5}

    def make_model(self, dropout, **fields):
        encoder = BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=6,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=16,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            num_labels=3,
            initializer_range=0.1,
        )
        config = TheseusConfig(encoder_config=encoder, successor_num_hidden_layers=3, **self.fields | fields)
        model = TheseusForSequenceClassification(config)
        with torch.no_grad():
            model.wrapped.classifier.weight.mul_(4)  # it stays as it is, and a loss has to fall
        return model

    def make_rows(self, number):
        rng = np.random.default_rng(5)
        made = []
        for _ in range(number):
            ids = rng.integers(5, VOCABULARY, int(rng.integers(6, 17))).tolist()
            made.append({"input_ids": ids, "labels": max(ids) % 3})
        return made

    def make_collator(self):
        return pad


class TestTheseusTrainer(Theseus, TrainerSuite):
    def test_layerwise_rates(self, tmp_path):
        with pytest.raises(ValueError, match="TheseusTrainingArguments.layerwise_lr_decay must be 1, got 0.5"):
            TheseusTrainingArguments(output_dir=str(tmp_path), layerwise_lr_decay=0.5)

    def test_the_run_replaces_and_then_drops(self, uninterrupted, tmp_path):
        """Both phases happen in the run whose resuming the suite tests: checkpoints 3 and 4 before, 6 after."""
        folder, expected = uninterrupted
        kept = [
            json.loads((folder / f"checkpoint-{step}/config.json").read_text())["has_predecessor"]
            for step in (3, 4, 5, 6, 10)
        ]
        assert kept == [True, True, True, False, False]  # the sixth update, number 5, is the first at rate 1
        assert not any(".layer.0." in name for name in expected["weights"])
        assert [line["replacing_rate"] for line in expected["log"] if "loss" in line] == pytest.approx([0.76, 1.0])

    def test_two_processes_agree_whatever_is_drawn(self, tmp_path):
        """Also with a pattern for every micro-batch, and in updates in which nothing is drawn."""
        code, output = self.start("run_rare_draws", tmp_path, processes=2)
        assert code == 0, output[-4000:]
        first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in range(2))
        assert differences(first, second) == []
        patterns = [pattern for _, pattern in first["official"]["patterns"]]
        assert (0, 0, 0) in patterns[::2] and any(a != b for a, b in zip(patterns[::2], patterns[1::2]))

    def run_rare_draws(self, folder):
        """What each of two processes does for the test above."""
        found = {}
        for name in ("default", "official"):
            rare = {"replacing_scheduler": "constant", "replacing_rate": 0.3, "steps_for_replacing": None}
            trainer = make_trainer(
                folder / name,
                self.make_model(0.0, **rare),
                max_steps=16,
                gradient_accumulation_steps=2,
                per_device_train_batch_size=2,
                draw_every_micro_batch=name == "official",
            )
            found[name] = {"patterns": patterns_of(trainer), "weights": dict(trainer.model.state_dict())}
        torch.save(found, folder / f"rank{trainer.args.process_index}.pt")
        torch.distributed.destroy_process_group()


# ---- draws


def make_trainer(folder, model=None, rows=16, trainer_class=TheseusTrainer, **arguments):
    made = Theseus()
    torch.manual_seed(0)
    common = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "seed": 3}
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "output_dir": str(folder)}
    return trainer_class(
        made.make_model(0.0) if model is None else model,
        TheseusTrainingArguments(**common | quiet | arguments),
        data_collator=pad,
        train_dataset=made.make_rows(rows),
        eval_dataset=made.make_rows(6),
    )


def patterns_of(trainer):
    """Train, and note the pattern that each forward pass in training ran with."""
    seen = []

    def note(module, *_):
        if module.training:
            seen.append((trainer.state.global_step, module.layers.pattern))

    hook = trainer.model.register_forward_pre_hook(note)
    trainer.train()
    hook.remove()
    return seen


def test_one_draw_per_update_by_default(tmp_path):
    accumulated = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 12}
    seen = patterns_of(make_trainer(tmp_path, **accumulated))
    assert len(seen) == 48 and len(set(seen)) == 12
    whole = patterns_of(make_trainer(tmp_path, max_steps=12))
    assert whole == sorted(set(seen)) and len({pattern for _, pattern in whole}) > 2
    official = patterns_of(make_trainer(tmp_path, draw_every_micro_batch=True, **accumulated))
    assert {step for step, _ in official} == set(range(12))
    assert any(len({pattern for at, pattern in official if at == step}) > 1 for step in range(5))
    assert [pattern for _, pattern in official[::4]] == [pattern for _, pattern in whole]  # the first ones are equal
    assert patterns_of(make_trainer(tmp_path, max_steps=12, seed=4)) != whole


def test_draws_have_the_rate_and_are_independent(tmp_path):
    model = Theseus().make_model(0.0, replacing_scheduler="constant", steps_for_replacing=None)
    trainer = make_trainer(tmp_path, model)
    before = torch.get_rng_state()
    drawn = torch.tensor([trainer.pattern_at(step) for step in range(4000)], dtype=torch.float)
    assert torch.equal(torch.get_rng_state(), before), "draws come from the generator of dropout"
    assert (drawn.mean(0) - 0.4).abs().max() < 5 * (0.4 * 0.6 / 4000) ** 0.5
    assert (torch.corrcoef(drawn.T) - torch.eye(3)).abs().max() < 5 / 4000**0.5
    neighbours = torch.corrcoef(torch.stack([drawn[:-1].flatten(), drawn[1:].flatten()]))[0, 1]
    assert neighbours.abs() < 5 / 12_000**0.5


def test_figures_are_those_of_the_updates(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=12, logging_steps=3)
    seen = patterns_of(trainer)
    lines = [line for line in trainer.state.log_history if "loss" in line]
    for place, line in enumerate(lines):
        counts = [sum(pattern) for _, pattern in seen[3 * place : 3 * place + 3]]
        assert line["replaced_modules"] == pytest.approx(sum(counts) / 3)
        assert line["replacing_rate"] == pytest.approx(min(0.4 + 0.6 * (3 * place + 2) / 5, 1.0))
    assert lines[-1]["replaced_modules"] == 3


# ---- what is trained


def test_updates_in_which_nothing_is_drawn(tmp_path):
    """The loss is logged, no parameter moves, and Adam's momentum does not either."""
    rare = Theseus().make_model(0.0, replacing_scheduler="constant", replacing_rate=0.3, steps_for_replacing=None)
    trainer = make_trainer(tmp_path, rare, max_steps=20)
    states = []

    def note(module, *_):
        if module.training:
            states.append((module.layers.pattern, copy.deepcopy(module.successor.state_dict())))

    trainer.model.register_forward_pre_hook(note)
    trainer.train()
    states.append(((), trainer.model.successor.state_dict()))
    patterns = [pattern for pattern, _ in states]
    assert (0, 0, 0) in patterns[4:]  # when Adam has momentum
    for (pattern, before), (_, after) in zip(states, states[1:]):
        moved = {int(name[0]) for name, value in before.items() if not torch.equal(after[name], value)}
        assert moved == {index for index, drawn in enumerate(pattern) if drawn}
    assert all(np.isfinite(line["loss"]) for line in trainer.state.log_history if "loss" in line)


def test_clipping_is_by_the_norm_of_the_successor(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, max_grad_norm=1e-3)
    norms = []

    step = trainer.training_step

    def noted(model, *args):
        loss = step(model, *args)
        norms.append(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item())
        assert all(SUCCESSOR in name for name, p in model.named_parameters() if p.grad is not None)
        return loss

    trainer.training_step = noted
    trainer.train()
    line = next(line for line in trainer.state.log_history if "grad_norm" in line)
    assert line["grad_norm"] == pytest.approx(norms[0], rel=1e-5)
    trained = {name for name, value in trainer.model.named_parameters() if value.requires_grad}
    held = sum(len(group["params"]) for group in trainer.optimizer.param_groups)
    assert held == len(trained) and all(SUCCESSOR in name for name in trained)


def test_at_rate_1_it_is_plain_fine_tuning_of_the_small_model(tmp_path):
    """With frozen embeddings and head, by the stock trainer."""
    model = Theseus().make_model(0.0, replacing_rate=1, steps_for_replacing=None)
    plain = copy.deepcopy(model.to_base())
    plain.requires_grad_(False)
    plain.bert.encoder.requires_grad_(True)
    trainer = make_trainer(tmp_path, model)
    trainer.train()
    arguments = {
        name: getattr(trainer.args, name)
        for name in ("max_steps", "per_device_train_batch_size", "learning_rate", "seed", "data_seed", "adam_epsilon")
    }
    stock = Trainer(
        plain,
        TrainingArguments(output_dir=str(tmp_path), report_to="none", save_strategy="no", use_cpu=True, **arguments),
        data_collator=pad,
        train_dataset=trainer.train_dataset,
    )
    stock.train()
    result = trainer.result_model().state_dict()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(result[name], value, rtol=1e-5, atol=1e-6)


def test_a_plain_trainer_trains_it_too(tmp_path):
    """At a constant rate, without draws that follow a schedule."""
    torch.manual_seed(0)
    model = Theseus().make_model(0.0)
    arguments = {"max_steps": 20, "learning_rate": 1e-2, "per_device_train_batch_size": 8, "logging_steps": 5}
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), report_to="none", save_strategy="no", use_cpu=True, **arguments),
        data_collator=pad,
        train_dataset=Theseus().make_rows(16),
        eval_dataset=Theseus().make_rows(16),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before


# ---- phases, results


def test_resuming_needs_the_predecessor_before_the_rate_is_1(tmp_path):
    run = RUN | {"max_steps": 8, "eval_strategy": "no", "save_steps": 2, "save_total_limit": None}
    trainer = make_trainer(tmp_path, **run)
    trainer.train()
    assert not trainer.model.config.has_predecessor
    expected = copy.deepcopy(outcome(trainer))
    with pytest.raises(ValueError, match="the predecessor was dropped, so the pattern"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    again = make_trainer(tmp_path, **run)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert differences(outcome(again), expected) == []


def test_the_best_checkpoint_may_be_from_either_phase(tmp_path):
    """Early stopping, as in the paper; a model without its predecessor takes a successor saved beside one."""
    order = iter([3.0, 9.0, 1.0, 1.0, 1.0])
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(
        tmp_path,
        max_steps=8,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        save_total_limit=None,
        **settings,
    )
    trainer.compute_metrics = lambda result: {"score": next(order)}
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    best = TheseusForSequenceClassification.from_pretrained(tmp_path / "checkpoint-4")
    assert best.config.has_predecessor and not trainer.model.config.has_predecessor
    torch.testing.assert_close(trainer.model.successor.state_dict(), best.successor.state_dict(), rtol=0, atol=0)


def test_result_is_the_small_plain_model(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=8)
    trainer.compute_metrics = lambda found: classification_metrics(found.predictions, found.label_ids)
    trainer.train()
    found = trainer.evaluate()
    trainer.save_result()
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(model) is BertForSequenceClassification and model.config.num_hidden_layers == 3
    rows = pad(trainer.eval_dataset)
    logits = model.eval()(rows["input_ids"], rows["attention_mask"]).logits.detach().numpy()
    scores = classification_metrics(*(EvalPrediction(logits, rows["labels"].numpy())))
    assert scores["accuracy"] == pytest.approx(found["eval_accuracy"])
    assert "Theseus" in (tmp_path / "README.md").read_text()


def test_a_run_that_ends_too_early_is_noticed(tmp_path, caplog):
    logger = "bestiary.trainers.trainer_theseus"
    for fields, expected in (({}, 0), ({"steps_for_replacing": None}, 1), ({"steps_for_replacing": 8}, 1)):
        caplog.clear()
        trainer = make_trainer(tmp_path, Theseus().make_model(0.0, **fields))
        with caplog.at_level("WARNING", logger=logger):
            trainer.create_optimizer_and_scheduler(6)
        found = [line for line in caplog.messages if "never trained alone" in line]
        assert len(found) == expected, caplog.messages


# ---- arguments


def test_defaults_are_the_papers(tmp_path):
    arguments = TheseusTrainingArguments(output_dir=str(tmp_path))
    assert (arguments.learning_rate, arguments.num_train_epochs, arguments.warmup_steps) == (2e-5, 15, 0)
    assert (arguments.weight_decay, arguments.adam_epsilon, arguments.max_grad_norm) == (0, 1e-8, 1)
    assert arguments.per_device_train_batch_size == 32 and arguments.lr_scheduler_type == "linear"
    assert arguments.ddp_find_unused_parameters and not arguments.draw_every_micro_batch


def test_refused(tmp_path):
    with pytest.raises(ValueError, match="fp16 is not supported.*use bf16"):
        TheseusTrainingArguments(output_dir=str(tmp_path), fp16=True)
    plain = BertForSequenceClassification(BertConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1))
    with pytest.raises(ValueError, match="TheseusTrainer trains a model with a predecessor.* got a BertForSequence"):
        make_trainer(tmp_path, plain)
