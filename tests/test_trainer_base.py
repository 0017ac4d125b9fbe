"""What all trainers share and no paper's suite shows: single losses, odd checkpoints, data sets, processes, phases."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from suites.trainer_suite import (
    PLAIN,
    SPLIT_RUN,
    SPLITS,
    GradientRecorder,
    Recording,
    assert_same_updates,
    half_written,
    logged,
)
from test_trainer_bert import TestBertTrainer as BertSuite
from test_trainer_bert import config
from transformers import default_data_collator

from bestiary.modeling.modeling_bert import BertPretrainingForSequenceClassification
from bestiary.trainers.arguments import BestiaryTrainingArguments
from bestiary.trainers.base import BestiaryTrainer, is_complete, last_complete_checkpoint
from bestiary.trainers.phases import PhasedDataset


BERT = BertSuite()
del BertSuite  # its tests are run where it is defined


# ---- a model with one loss, and a collator that corrupts nothing


def classification_trainer(output_dir, labelled: bool = True, **arguments) -> BestiaryTrainer:
    rng = np.random.default_rng(0)
    rows = [{"input_ids": rng.integers(5, 40, 6).tolist(), "labels": int(label)} for label in rng.integers(0, 3, 20)]
    for row in rows[::3]:
        row["labels"] = -100
    unlabelled = [{"input_ids": row["input_ids"]} for row in rows]
    torch.manual_seed(0)
    model = BertPretrainingForSequenceClassification(config(num_labels=3))
    common = {"output_dir": str(output_dir), "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    return BestiaryTrainer(
        model,
        BestiaryTrainingArguments(**common | arguments),
        data_collator=default_data_collator,
        train_dataset=rows,
        eval_dataset=rows[:7] if labelled else unlabelled[:7],
        compute_metrics=lambda found: {"rows": len(found.predictions), "labels": len(found.label_ids)},
    )


def test_one_loss_is_normalised_over_the_whole_update(tmp_path):
    runs = []
    for split in SPLITS.values():
        trainer = classification_trainer(tmp_path, **PLAIN | SPLIT_RUN | split)
        recording = Recording()
        trainer.add_callback(GradientRecorder(recording))
        trainer.train()
        lines = [entry for entry in logged(trainer) if "loss" in entry]
        recording.logs = [{name: value for name, value in line.items() if name != "epoch"} for line in lines]
        runs.append(recording)
    assert_same_updates(runs[1], runs[0], "2 x 4")
    assert set(runs[0].logs[0]) == {"loss", "grad_norm", "learning_rate", "step"}


def test_evaluation_averages_over_labels_and_gives_all_predictions(tmp_path):
    trainer = classification_trainer(tmp_path, per_device_eval_batch_size=2)
    found = trainer.evaluate()
    rows = trainer.eval_dataset
    with torch.no_grad():
        logits = trainer.model(torch.tensor([row["input_ids"] for row in rows])).logits
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor([row["labels"] for row in rows]))
    assert found["eval_loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert (found["eval_rows"], found["eval_labels"]) == (7, 7)
    assert torch.allclose(torch.tensor(trainer.predict(rows).predictions), logits, atol=1e-6)
    both = trainer.evaluate({"first": rows[:2], "second": rows[2:]})
    assert (both["eval_first_rows"], both["eval_second_rows"]) == (2, 5)


def test_rows_without_labels_are_predicted(tmp_path):
    trainer = classification_trainer(tmp_path, labelled=False)
    found = trainer.predict(trainer.eval_dataset)
    assert found.predictions.shape == (7, 3) and "test_loss" not in found.metrics


# ---- data


def test_a_data_set_with_other_columns_gives_the_same_batches(tmp_path):
    """Columns that nothing takes are left out; numbers among them would reach the model."""
    logs = []
    for rows in (
        BERT.make_rows(8),
        Dataset.from_list([row | {"number": 3, "text": "x"} for row in BERT.make_rows(8)]),
    ):
        trainer = BERT.make_trainer(tmp_path)
        trainer.train_dataset = rows
        trainer.train()
        logs.append(logged(trainer))
    assert logs[0] == logs[1]


def test_workers_that_live_on_are_refused(tmp_path):
    persistent = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer = BERT.make_trainer(tmp_path, **persistent)
    with pytest.raises(
        ValueError, match="BertPretrainingTrainingArguments.dataloader_persistent_workers must be False"
    ):
        trainer.get_train_dataloader()
    trainer.get_eval_dataloader()
    classification_trainer(tmp_path, **persistent).get_train_dataloader()


# ---- checkpoints


def test_the_newest_complete_checkpoint(tmp_path):
    assert last_complete_checkpoint(tmp_path / "missing") is None
    for name, file in (
        ("9", "model.safetensors"),
        ("10", "pytorch_model.bin"),
        ("11", "optimizer.pt"),
        ("best", "model.safetensors"),
    ):
        folder = tmp_path / f"checkpoint-{name}"
        folder.mkdir()
        (folder / file).touch()
        (folder / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-12").touch()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_resuming_without_a_complete_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"no complete checkpoint in {tmp_path}"):
        BERT.make_trainer(tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("state", ["missing", "of two processes"])
def test_sums_that_cannot_be_continued_are_dropped(state, tmp_path):
    """The next line is then over fewer updates, but its figures belong together."""
    run = {"max_steps": 4, "logging_steps": 4, "save_strategy": "steps", "save_steps": 2}
    BERT.make_trainer(tmp_path, **run).train()
    file = tmp_path / "checkpoint-2" / "bestiary_state_0.pt"
    kept = torch.load(file)
    assert kept["world_size"] == 1 and kept["parts"].keys() == {"mlm", "sentence"}
    file.unlink()
    if state != "missing":
        share = {name: value / 2 for name, value in kept["parts"].items()}
        torch.save(kept | {"world_size": 2, "parts": share}, file)
    trainer = BERT.make_trainer(tmp_path, **run)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    line = next(entry for entry in logged(trainer) if "loss" in entry)
    total = sum(weight * line[f"{name}_loss"] for name, weight in trainer.loss_weights().items())
    assert line["loss"] == pytest.approx(total, rel=1e-6)


def test_a_checkpoint_that_is_being_overwritten_is_not_complete(tmp_path, monkeypatch):
    run = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    BERT.make_trainer(tmp_path, **run).train()
    seen = []
    half_written(
        "optimizer.pt",
        "checkpoint-2",
        lambda: seen.append(is_complete(tmp_path / "checkpoint-2")),
        monkeypatch.setattr,
    )
    BERT.make_trainer(tmp_path, **run).train()
    assert seen == [False] and is_complete(tmp_path / "checkpoint-2")


def test_weights_that_are_shared_are_not_reported_missing(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    run = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    BERT.make_trainer(tmp_path, **run).train()
    BERT.make_trainer(tmp_path, **run).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert "missing keys" not in caplog.text


# ---- processes


@pytest.mark.skipif(torch.accelerator.is_available(), reason="would start talking to the other process")
def test_processes_that_do_not_see_each_other_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    there = SimpleNamespace(is_available=lambda: True)  # so that use_cpu stays as it is
    monkeypatch.setattr("bestiary.trainers.arguments.torch", SimpleNamespace(accelerator=there))
    with pytest.raises(ValueError, match="one of 2 processes, but it sees 1"):
        BestiaryTrainingArguments(output_dir=str(tmp_path))


def test_several_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(BestiaryTrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="2 GPUs are visible to one process"):
        classification_trainer(tmp_path)


# ---- phases


def read(dataset: PhasedDataset) -> list[int]:
    return [dataset[index] for index in range(len(dataset))]


def test_phases_follow_each_other_and_use_each_row_once_a_turn():
    phases = [(range(5), 12), (range(100, 103), 0), (range(200, 204), 6)]
    dataset = PhasedDataset(phases, seed=1)
    rows = read(dataset)
    assert len(rows) == len(dataset) == 18
    turns = [rows[:5], rows[5:10], rows[12:16]]
    assert [sorted(turn) for turn in turns] == [list(range(5)), list(range(5)), list(range(200, 204))]
    assert len(set(rows[10:12])) == 2 and set(rows[10:12]) < set(range(5))
    assert len(set(rows[16:])) == 2 and set(rows[16:]) < set(range(200, 204))
    longer = [(range(100), 200)]
    first, second = (read(PhasedDataset(longer, seed=seed)) for seed in (1, 2))
    assert first[:100] != first[100:] and first != second and first[:100] != list(range(100))


def test_a_place_determines_the_row():
    """Read out of order, or by another process, the rows are the same."""
    phases = [(range(5), 12), (range(200, 204), 6)]
    expected = read(PhasedDataset(phases, seed=1))
    places = np.random.default_rng(0).permutation(18)
    dataset = PhasedDataset(phases, seed=1)
    assert [dataset[int(place)] for place in places] == [expected[place] for place in places]


def test_places_outside_and_bad_phases():
    dataset = PhasedDataset([(range(5), 12)], seed=1)
    for place in (-1, 12):
        with pytest.raises(IndexError, match=f"PhasedDataset has 12 examples, asked for {place}"):
            dataset[place]
    for phases, message in (
        ([], "must name at least one"),
        ([(range(0), 3)], r"phases\[0\] has 0 rows"),
        ([(range(2), -1)], "-1 examples"),
    ):
        with pytest.raises(ValueError, match=message):
            PhasedDataset(phases, seed=1)
