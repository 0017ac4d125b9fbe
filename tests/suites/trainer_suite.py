"""What every trainer of the zoo must do.

The test of a paper's trainer is one subclass of `TrainerSuite` that gives a tiny model, rows and the collator; a
variant of the objective may take `ObjectiveSuite`, its cheaper half. The checks that need processes of their own start
this file as a module (see `main`): two processes by torchrun for the split of a batch, one process that is killed.
"""

import errno
import faulthandler
import importlib
import inspect
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerState

from bestiary import get_paper
from bestiary.registry import load_object
from bestiary.trainers.base import BestiaryTrainer, KeyedCollator, is_complete, last_complete_checkpoint


TESTS = Path(__file__).parents[1]
PROCESS_SECONDS = 240.0  # of a task in other processes; they take 20 on a quiet machine
Row = dict[str, Any]

ROWS = 20  # in batches of 8: 8, 8 and 4, then the next epoch
SPLITS = {
    "8": {"per_device_train_batch_size": 8},
    "2 x 4": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
}
SPLITS_OVER_TWO = {
    "2 processes x 4": {"per_device_train_batch_size": 4},
    "2 processes x 2 x 2": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
}
SPLIT_RUN = {"max_steps": 4, "logging_steps": 2, "max_grad_norm": 0, "learning_rate": 0.05}
PLAIN = {"optimizer": None, "optim": "sgd", "schedule": "constant", "warmup_steps": 0}
EVALUATED = (7, 1)  # rows: in batches of 2 by two processes the last round lacks one row, or a whole batch

# Updates of 2 x 2 rows, 4 of them an epoch; neither evaluations nor checkpoints fall together with log lines.
RUN = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 10,
    "logging_steps": 4,
    "eval_strategy": "steps",
    "eval_steps": 5,
    "save_strategy": "steps",
    "save_steps": 3,
}
DROPOUT = 0.1


@dataclass
class Recording:
    """What happened in a run, by optimizer step: rows that the model saw (unpadded), gradients before the step."""

    rows: list[list[Hashable]] = field(default_factory=list)
    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)
    logs: list[Row] = field(default_factory=list)


class GradientRecorder(TrainerCallback):
    """Copies the gradients that the optimizer is about to use."""

    def __init__(self, recording: Recording):
        self.recording = recording

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        found = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
        self.recording.gradients.append(found)


class Kill(TrainerCallback):
    """Ends the process without warning in the middle of the update that follows `step`."""

    def __init__(self, step: int):
        self.step = step

    def on_substep_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def logged(trainer: BestiaryTrainer) -> list[Row]:
    """The log without clock times and without the mean loss of the call, which is over the steps of that call."""
    timed = ("_runtime", "_per_second", "train_loss", "preparation_time")
    return [{k: v for k, v in entry.items() if not k.endswith(timed)} for entry in trainer.state.log_history]


def outcome(trainer: BestiaryTrainer) -> dict[str, Any]:
    """All that two equal runs share."""
    return {
        "weights": trainer.accelerator.unwrap_model(trainer.model_wrapped).state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "schedule": trainer.lr_scheduler.state_dict(),
        "log": logged(trainer),
    }


def differences(first: Any, second: Any, where: str = "") -> list[str]:
    """Places at which two nests of dictionaries, lists, tensors and numbers are not equal, bit for bit."""
    if isinstance(first, dict) and isinstance(second, dict):
        places = [f"{where}/{key} is missing on one side" for key in first.keys() ^ second.keys()]
        return places + [
            p for k in first.keys() & second.keys() for p in differences(first[k], second[k], f"{where}/{k}")
        ]
    if isinstance(first, list | tuple) and isinstance(second, list | tuple) and len(first) == len(second):
        return [p for i, pair in enumerate(zip(first, second)) for p in differences(*pair, f"{where}/{i}")]
    if isinstance(first, torch.Tensor):
        return [] if torch.equal(first, second) else [f"{where}: tensors differ by {(first - second).abs().max()}"]
    return [] if first == second else [f"{where}: {first} != {second}"]


def assert_same_updates(found: Recording, expected: Recording, what: str) -> None:
    """Rows equal; gradients and logged values equal to 1e-6 relative."""
    assert len(found.gradients) == len(expected.gradients) > 0
    for step, (rows, known) in enumerate(zip(found.rows, expected.rows)):
        assert set(rows) >= set(known), f"{what}: other masks or samples in step {step}"
    for step, (ours, theirs) in enumerate(zip(found.gradients, expected.gradients)):
        assert ours.keys() == theirs.keys()
        whole = math.sqrt(sum(value.double().square().sum().item() for value in theirs.values()))
        assert whole > 0
        for name, value in theirs.items():
            error = (ours[name] - value).double().norm().item()
            # a gradient that is 0 by construction (a bias of the keys) is only noise
            allowed = max(1e-6 * value.double().norm().item(), 1e-7 * whole)
            assert error <= allowed, f"{what}: gradient of {name} in step {step} is off by {error}, allowed {allowed}"
    assert len(found.logs) == len(expected.logs)
    for ours, theirs in zip(found.logs, expected.logs):
        assert ours == pytest.approx(theirs, rel=1e-6), what


class ObjectiveSuite:
    """Mixin: the loss, its parts, the split of a batch over accumulation steps, evaluation.

    Attributes:
        slug: the paper's entry in the registry.
        parts: names of the parts of the loss, as they are logged without "_loss"; none if the loss has a single one.
        metrics: names of the further figures in every log line.
        training_figures: names of those that only lines of training have.
    """

    slug: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]
    metrics: ClassVar[tuple[str, ...]] = ()
    training_figures: ClassVar[tuple[str, ...]] = ()

    # ---- what a subclass gives

    def make_model(self, dropout: float) -> PreTrainedModel:
        """A tiny model of at least 2 layers; the suite has seeded torch."""
        raise NotImplementedError

    def make_rows(self, number: int) -> list[Row]:
        """Examples that differ in length and in the number of their items, always the same ones."""
        raise NotImplementedError

    def make_collator(self) -> Callable[[list[Row]], dict[str, torch.Tensor]]:
        """The paper's collator with a rate that gives rows different counts."""
        raise NotImplementedError

    def drawn(self, outputs: Any) -> dict[str, torch.Tensor]:
        """Tensors (B, ...) of a model's output that it drew at random, such as sampled tokens."""
        return {}

    def rows_of(self, batch: dict[str, torch.Tensor]) -> list[Hashable]:
        """The rows of a batch without padding, so that they can be compared across batches."""
        lengths = batch["attention_mask"].sum(1).tolist()
        columns = sorted(batch)
        return [
            tuple(
                tuple(batch[name][row, :length].tolist()) if batch[name].dim() > 1 else batch[name][row].item()
                for name in columns
            )
            for row, length in enumerate(lengths)
        ]

    # ---- building

    def make_trainer(
        self,
        output_dir: Path,
        dropout: float = 0.0,
        rows: int = ROWS,
        eval_rows: int = 6,
        **arguments: Any,
    ) -> BestiaryTrainer:
        """The paper's trainer on `rows` examples, its arguments changed by `arguments`."""
        paper = get_paper(self.slug)
        torch.manual_seed(0)
        model = self.make_model(dropout)
        common = {
            "output_dir": str(output_dir),
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 2,
            "learning_rate": 5e-3,
            "warmup_steps": 2,
            "logging_steps": 1,
            "save_strategy": "no",
            "save_total_limit": None,
            "seed": 3,
            "report_to": "none",
            "disable_tqdm": True,
        }
        return load_object(paper.trainer)(
            model,
            load_object(paper.arguments)(**common | arguments),
            data_collator=self.make_collator(),
            train_dataset=self.make_rows(rows),
            eval_dataset=self.make_rows(eval_rows),
        )

    def record(self, trainer: BestiaryTrainer) -> Recording:
        """Train and note rows, gradients and log."""
        recording = Recording()

        def note(module: nn.Module, args: tuple, batch: dict[str, Any], outputs: Any) -> None:
            if module.training:
                columns = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
                recording.rows.extend([] for _ in range(trainer.state.global_step + 1 - len(recording.rows)))
                recording.rows[-1] += self.rows_of(columns | self.drawn(outputs))

        hook = trainer.model.register_forward_hook(note, with_kwargs=True)
        trainer.add_callback(GradientRecorder(recording))
        trainer.train()
        hook.remove()
        lines = [entry for entry in logged(trainer) if "loss" in entry]
        # transformers counts epochs in micro-batches, of which the last update of an epoch may have fewer
        recording.logs = [{name: value for name, value in line.items() if name != "epoch"} for line in lines]
        return recording

    def record_split(self, output_dir: Path, **split: int) -> Recording:
        """The run that all splits of a batch of 8 must share; the steps of SGD do not blow up rounding errors."""
        trainer = self.make_trainer(output_dir, **PLAIN | SPLIT_RUN | split)
        trainer.evaluate()  # after which several processes must still train together
        return self.record(trainer)

    # ---- loss and its log

    def test_loss_falls(self, tmp_path):
        trainer = self.make_trainer(tmp_path, max_steps=40)
        before = trainer.evaluate(self.make_rows(ROWS))
        trainer.train()
        after = trainer.evaluate(self.make_rows(ROWS))
        assert after["eval_loss"] < 0.9 * before["eval_loss"]

    def test_parts_and_metrics_are_logged(self, tmp_path):
        trainer = self.make_trainer(tmp_path, logging_steps=2)
        trainer.train()
        trainer.evaluate()
        lines = [("", entry) for entry in logged(trainer) if "loss" in entry]
        lines += [("eval_", entry) for entry in logged(trainer) if "eval_loss" in entry]
        assert [prefix for prefix, _ in lines] == ["", "", "eval_"]
        weights = trainer.loss_weights()
        for prefix, entry in lines:
            names = [f"{prefix}{part}_loss" for part in self.parts] + [f"{prefix}{name}" for name in self.metrics]
            names += [] if prefix else self.training_figures
            others = {f"{prefix}loss", "grad_norm", "learning_rate", "epoch", "step"}
            assert set(entry) <= set(names) | others, "a figure that the suite's subclass does not name"
            assert all(math.isfinite(entry[name]) for name in names)
            if not self.parts:
                continue
            total = sum(weights[part] * entry[f"{prefix}{part}_loss"] for part in self.parts)
            assert entry[f"{prefix}loss"] == pytest.approx(total, rel=1e-6)

    def test_a_loss_that_is_not_a_number_is_seen(self, tmp_path):
        trainer = self.make_trainer(tmp_path, max_steps=1)
        weights = dict.fromkeys(trainer.loss_weights(), math.nan)
        trainer.loss_weights = lambda: weights
        assert math.isnan(trainer.evaluate()["eval_loss"])
        trainer.train()
        assert math.isnan(next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry))

    # ---- splits of a batch

    @pytest.fixture(scope="class")
    @classmethod
    def whole(cls, tmp_path_factory) -> Recording:
        """The run with batches of 8, one process, no accumulation."""
        return cls().record_split(tmp_path_factory.mktemp("whole"), **SPLITS["8"])

    def test_accumulation_gives_the_same_update(self, whole, tmp_path):
        counts = [len(rows) for rows in whole.rows]
        assert counts == [8, 8, 4, 8] and len(whole.logs) == 2
        if isinstance(self.make_collator(), KeyedCollator):
            repeated = set(whole.rows[3]) & {row for rows in whole.rows[:3] for row in rows}
            assert len(repeated) < 4, "the second epoch has the draws of the first"
        assert_same_updates(self.record_split(tmp_path, **SPLITS["2 x 4"]), whole, "2 x 4")

    # ---- evaluation

    def test_evaluation_is_reproducible_and_does_not_touch_training(self, tmp_path):
        plain = self.make_trainer(tmp_path / "plain", dropout=DROPOUT)
        plain.train()
        trainer = self.make_trainer(tmp_path / "evaluated", dropout=DROPOUT, eval_strategy="steps", eval_steps=2)
        trainer.train()
        ours, theirs = outcome(trainer), outcome(plain)
        evaluations = [entry for entry in ours["log"] if "eval_loss" in entry]
        ours["log"] = [entry for entry in ours["log"] if "eval_loss" not in entry]
        assert len(evaluations) == 2 and differences(ours, theirs) == []
        if isinstance(trainer.data_collator, KeyedCollator):
            trainer.data_collator.set_epoch(7)  # an evaluation has draws of its own
        trainer.evaluate()
        assert logged(trainer)[-1] == evaluations[-1]


class TrainerSuite(ObjectiveSuite):
    """Mixin for a paper's trainer: the objective, and what needs other processes, checkpoints, workers and a card.

    Tests marked `shared_trainer` are of `BestiaryTrainer` alone: fast for one paper that stands for all, slow else.
    Those marked `processes` are slow for papers that several processes split as they split BERT.
    """

    stands_for_all: ClassVar[bool] = False
    splits_as_bert: ClassVar[bool] = False

    def start(self, task: str, folder: Path, processes: int = 1, timeout: float = PROCESS_SECONDS) -> tuple[int, str]:
        """Run the method `task` of this class in other processes; returns the exit code and what they printed."""
        source = Path(inspect.getfile(type(self)))
        launcher = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--local-addr",
            "127.0.0.1",
            "--nproc-per-node",
            str(processes),
        ]
        command = [
            sys.executable,
            *(launcher if processes > 1 else []),
            *("-m", "suites.trainer_suite", source.stem, type(self).__name__, task, str(folder)),
        ]
        threads = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "TOKENIZERS_PARALLELISM": "false"}
        paths = os.pathsep.join([str(TESTS), str(source.parent), os.environ.get("PYTHONPATH", "")])
        process = subprocess.Popen(
            command,
            env=os.environ | threads | {"PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            output, _ = process.communicate(timeout=timeout)
        finally:
            if process.poll() is None:
                process.terminate()  # torchrun passes it on to the processes that it started
                process.wait(60)
        return process.returncode, output

    # ---- two processes

    @pytest.mark.processes
    def test_two_processes_give_the_same_update(self, whole, tmp_path):
        code, output = self.start("run_two_processes", tmp_path, processes=2)
        assert code == 0, output[-4000:]
        ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in range(2)]
        for found in ranks:
            assert found["setting"] == {"world": 2, "backend": "gloo", "wrapper": "DistributedDataParallel"}
            assert found["resumed"] == []
        for name in SPLITS_OVER_TWO:
            for own in (found[name] for found in ranks):
                both = [a + b for a, b in zip(*(found[name].rows for found in ranks), strict=True)]
                assert_same_updates(Recording(both, own.gradients, own.logs), whole, name)
        one = self.evaluations(tmp_path / "one")
        for found in ranks:
            for ours, theirs in zip(found["evaluations"], one, strict=True):
                assert ours == pytest.approx(theirs, rel=1e-6)
            assert found["predicted"] == EVALUATED[0]

    def evaluations(self, folder: Path) -> list[Row]:
        """Figures of evaluations on data sets of several sizes."""
        trainer = self.make_trainer(folder)
        for rows in EVALUATED:
            trainer.evaluate(self.make_rows(rows))
        return [entry for entry in logged(trainer) if "eval_loss" in entry]

    def run_two_processes(self, folder: Path) -> None:
        """What each of two processes does for `test_two_processes_give_the_same_update`."""
        found: dict[str, Any] = {
            name: self.record_split(folder / name, **split) for name, split in SPLITS_OVER_TWO.items()
        }
        found["evaluations"] = self.evaluations(folder / "two")
        run = RUN | {"per_device_train_batch_size": 1, "max_steps": 5, "eval_strategy": "no"}
        trainer = self.make_trainer(folder / "straight", dropout=DROPOUT, **run)
        trainer.train()
        resumed = self.make_trainer(folder / "resumed", dropout=DROPOUT, **run)
        resumed.train(resume_from_checkpoint=str(folder / "straight" / "checkpoint-3"))
        found["resumed"] = differences(outcome(resumed), outcome(trainer))
        found["predicted"] = len(as_tuple(trainer.predict(self.make_rows(EVALUATED[0])).predictions)[0])
        found["setting"] = {
            "world": trainer.args.world_size,
            "backend": torch.distributed.get_backend(),
            "wrapper": type(trainer.model_wrapped).__name__,
        }
        torch.save(found, folder / f"rank{trainer.args.process_index}.pt")
        torch.distributed.barrier()
        sys.stdout.flush()
        os._exit(0)  # a process was seen to hang for ever in the destructors of its groups, after its last line

    # ---- checkpoints and resuming

    @pytest.fixture(scope="class")
    @classmethod
    def uninterrupted(cls, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
        """Folder and outcome of a run that saved after every update."""
        folder = tmp_path_factory.mktemp("uninterrupted")
        trainer = cls().make_trainer(folder, dropout=DROPOUT, rows=16, **RUN | {"save_steps": 1})
        trainer.train()
        return folder, outcome(trainer)

    @pytest.mark.parametrize("step", [3, 4, 6])  # before the first log line; at the end of an epoch; in the second one
    def test_resuming_is_exact(self, step, uninterrupted, tmp_path):
        folder, expected = uninterrupted
        trainer = self.make_trainer(tmp_path, dropout=DROPOUT, rows=16, **RUN)
        trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        assert trainer.state.global_step == 10 and differences(outcome(trainer), expected) == []

    def check_killed(self, task: str, left: int, uninterrupted: tuple[Path, dict[str, Any]], folder: Path) -> None:
        """Run a task that kills itself, then resume: the newest whole checkpoint must be the one of update `left`."""
        code, output = self.start(task, folder)
        assert code == -signal.SIGKILL, output[-4000:]
        assert last_complete_checkpoint(folder) == str(folder / f"checkpoint-{left}")
        trainer = self.make_trainer(folder, dropout=DROPOUT, rows=16, **RUN)
        trainer.train(resume_from_checkpoint=True)
        assert differences(outcome(trainer), uninterrupted[1]) == []
        assert all(is_complete(path) for path in folder.glob("checkpoint-*"))

    @pytest.mark.shared_trainer
    def test_killed_and_resumed(self, uninterrupted, tmp_path):
        self.check_killed("run_killed_in_a_step", 6, uninterrupted, tmp_path)

    @pytest.mark.slow
    @pytest.mark.parametrize("file", ["optimizer.pt", "bestiary_state_0.pt", "trainer_state.json"])
    def test_killed_while_saving_and_resumed(self, file, uninterrupted, tmp_path):
        self.check_killed(f"run_killed_in_{file}", 3, uninterrupted, tmp_path)
        assert not list(tmp_path.glob(".*")), "remains of the killed save"

    def run_killed(self, folder: Path, where: str) -> None:
        """Train, and die in the middle of update 8, or when half of a file of checkpoint 6 is written."""
        trainer = self.make_trainer(folder, dropout=DROPOUT, rows=16, **RUN)
        if where == "a_step":
            trainer.add_callback(Kill(7))
        else:
            half_written(where, "checkpoint-6", lambda: os.kill(os.getpid(), signal.SIGKILL))
        trainer.train()

    @pytest.mark.shared_trainer
    def test_an_incomplete_checkpoint_is_skipped_or_refused(self, uninterrupted, tmp_path):
        for step in (3, 4, 6):
            name = f"checkpoint-{step}"
            shutil.copytree(uninterrupted[0] / name, tmp_path / name)
        (tmp_path / "checkpoint-6" / "model.safetensors").unlink()
        state = tmp_path / "checkpoint-4" / "trainer_state.json"
        state.write_text(state.read_text()[:-100])
        run = RUN | {"max_steps": 4, "eval_strategy": "no"}
        trainer = self.make_trainer(tmp_path, dropout=DROPOUT, rows=16, **run)
        for step in (4, 6, 8):
            with pytest.raises(ValueError, match=f"checkpoint-{step} is not a complete checkpoint"):
                trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        trainer.train(resume_from_checkpoint=True)
        assert trainer._initial_global_step == 3 and trainer.state.global_step == 4
        assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")

    @pytest.mark.shared_trainer
    @pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
    def test_a_full_disk_leaves_the_older_checkpoint(self, file, tmp_path, monkeypatch):
        def fail() -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        trainer = self.make_trainer(tmp_path, save_strategy="steps", save_steps=2, save_total_limit=1)
        half_written(file, "checkpoint-4", fail, monkeypatch.setattr)
        with pytest.raises(OSError, match="No space left"):
            trainer.train()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2"]
        monkeypatch.undo()
        trainer = self.make_trainer(tmp_path, save_strategy="steps", save_steps=2, save_total_limit=1)
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 4 and is_complete(tmp_path / "checkpoint-4")

    # ---- data

    def test_workers_give_the_same_batches(self, tmp_path):
        runs = []
        for workers in (0, 2):
            sizes = {"rows": 8, "max_steps": 3, "dataloader_num_workers": workers}
            trainer = self.make_trainer(tmp_path / str(workers), dropout=DROPOUT, **sizes)
            runs.append((self.record(trainer).rows, outcome(trainer)))
        assert runs[0][0] == runs[1][0] and differences(runs[0][1], runs[1][1]) == []

    # ---- optimizer, schedule, card

    def test_layerwise_rates(self, tmp_path):
        trainer = self.make_trainer(tmp_path, layerwise_lr_decay=0.5, learning_rate=1.0, weight_decay=0.01)
        groups = trainer.create_optimizer().param_groups
        layers = trainer.model.config.num_hidden_layers
        assert {group["lr"] for group in groups} == {0.5**depth for depth in range(layers + 2)}
        place = {id(parameter): group for group in groups for parameter in group["params"]}
        trained = {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}
        assert sum(len(group["params"]) for group in groups) == len(trained) == len(place)
        for name, parameter in trained.items():
            group = place[id(parameter)]
            assert group["weight_decay"] == (0.0 if "LayerNorm" in name or "bias" in name else 0.01), name
            if "word_embeddings" in name:
                assert group["lr"] == 0.5 ** (layers + 1)

    def test_card_and_plot(self, tmp_path):
        trainer = self.make_trainer(tmp_path)
        trainer.run_description = {"data": "twenty made-up rows"}
        trainer.train()
        loss = trainer.evaluate()["eval_loss"]
        trainer.save_model()
        trainer.create_model_card()
        card = (tmp_path / "README.md").read_text()
        for text in (
            get_paper(self.slug).title,
            "twenty made-up rows",
            f"{loss:.4g}",
            "![Loss over optimizer steps](loss.png)",
        ):
            assert text in card
        assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def as_tuple(value: Any) -> tuple:
    """Predictions of models with one kind of logits are no tuple."""
    return value if isinstance(value, tuple) else (value,)


def half_written(
    file: str, folder: str, then: Callable[[], None], replace: Callable[[Any, str, Any], None] = setattr
) -> None:
    """From now on writing `file` of a checkpoint stops half-way and calls `then`."""
    import transformers.modeling_utils

    def stopping(write: Callable, position: int) -> Callable:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            path = Path(args[position])
            if path.name == file and folder in path.parent.name:
                path.write_bytes(b"{" * 100)
                then()
            return write(*args, **kwargs)

        return wrapped

    replace(torch, "save", stopping(torch.save, 1))
    replace(TrainerState, "save_to_json", stopping(TrainerState.save_to_json, 1))
    name = "safe_save_file"
    replace(transformers.modeling_utils, name, stopping(getattr(transformers.modeling_utils, name), 1))


def main(module: str, suite: str, task: str, folder: str) -> None:
    """Run a task of a suite's subclass in a process of its own, which says where it stands before its time is up."""
    faulthandler.dump_traceback_later(PROCESS_SECONDS - 30, exit=True)
    tests = getattr(importlib.import_module(module), suite)()
    if task.startswith("run_killed_in_"):
        tests.run_killed(Path(folder), task.removeprefix("run_killed_in_"))
    else:
        getattr(tests, task)(Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
