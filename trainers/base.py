"""The trainer that all papers share: exact normalisation, loss parts in the logs, exact resume, keyed corruption,
cards.

A batch's split never changes the update. Objectives return sums, the items they run over are counted before the
forward pass over all accumulation steps and processes, and the loss is sum / count. Stock transformers divides by
micro-batch counts in most of its heads.

Differences from `transformers.Trainer`, besides that:
* collators that corrupt their input draw by `(seed, epoch, example)`, see `randomness.py`; evaluation always sees the
  same corruption;
* the rows that distributed samplers repeat to fill the last round count for nothing, in training and in evaluation,
  and evaluation averages over items, not over batches;
* evaluation leaves the random generators as they were, so that it does not change the training that goes on after it;
* a checkpoint also holds what was summed up since the last log line, so that a resumed run logs what the
  uninterrupted one would;
* `resume_from_checkpoint=True` takes the newest complete checkpoint, and a failed save leaves no half-written one
  behind;
* `nn.DataParallel` is refused.
"""

import contextlib
import copy
import itertools
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import datasets
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import PreTrainedModel, Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput
from transformers.utils.generic import find_labels

from ..modeling.layers.losses import IGNORE
from ..modeling.layers.wrapping import WrapperPreTrainedModel
from ..registry import paper_of
from .arguments import BestiaryTrainingArguments
from .optimization import build_optimizer, build_schedule, layerwise_groups
from .randomness import EVALUATION_EPOCH


Batch = Mapping[str, Any]
Sums = dict[str, torch.Tensor]

STATE_NAME = "bestiary_state_{rank}.pt"


@runtime_checkable
class KeyedCollator(Protocol):
    """A collator that corrupts its input: draws depend on its seed, its epoch and the `example_key` of each row."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the draws."""

    def __call__(self, features: list[Batch]) -> dict[str, torch.Tensor]:
        """Collate rows."""


class ExampleKeys(Dataset):
    """Rows of a map-style data set with their index as `example_key`."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataset[index], "example_key": index}


class BestiaryTrainer(Trainer):
    """Base of every paper's trainer; arguments as `transformers.Trainer`.

    A paper with one loss overrides nothing if its model's `loss` is sum / `num_items_in_batch`. A paper with several
    names them in `loss_weights`, counts their items in `count_items`, and its model returns them as `<name>_loss`,
    each divided by `num_items_in_batch[name]`. `metric_sums` and `metrics_from_sums` add figures to the logs of
    training and evaluation.
    """

    args: BestiaryTrainingArguments
    model: nn.Module
    _signature_columns: Any
    loss_is_scaled_for_ga = True
    collator_columns: ClassVar[tuple[str, ...]] = ()
    """Columns of the data set that the collator needs and the model's forward does not name."""
    predicted: ClassVar[str] = "logits"
    """End of the names of the model's outputs that `predict` returns."""
    smooths_labels: ClassVar[bool] = False
    """Whether `loss_sums` heeds `args.label_smoothing_factor`."""

    def __init__(
        self, model: nn.Module | None = None, args: BestiaryTrainingArguments | None = None, *rest: Any, **kwargs: Any
    ):
        args = BestiaryTrainingArguments(output_dir="runs") if args is None else args
        super().__init__(model, args, *rest, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{type(self).__name__}: {self.args.n_gpu} GPUs are visible to one process, which would train with "
                "nn.DataParallel and break the exact normalisation; start one process per GPU with `accelerate "
                "launch`, or set CUDA_VISIBLE_DEVICES."
            )
        if self.args.label_smoothing_factor and not self.smooths_labels:
            raise ValueError(
                f"{type(self).__name__}: label_smoothing_factor={self.args.label_smoothing_factor} is not supported, "
                "since the objective computes its own sums; leave it at 0."
            )
        self._train_sums, self._eval_sums = _Accumulator(), _Accumulator()
        self._logged_at = 0
        self._last_batch_counts = True
        wrapper = self.accelerator.unwrap_model(self.model)
        if isinstance(wrapper, WrapperPreTrainedModel) and self.args.label_names is None:
            # a wrapper's forward names the labels of every task; without all of its labels a batch has no loss
            theirs = find_labels(type(wrapper.wrapped))
            self.label_names = [name for name in self.label_names if name in theirs] or self.label_names
        self.run_description: dict[str, Any] = {}
        """What only the caller knows of the run, for the card; see `bestiary.cards.TrainerInfo`."""

    # The objective

    def loss_weights(self) -> dict[str, float]:
        """Weight of each part of the loss, by name. `{"loss": 1.0}` is a model with a single loss."""
        return {"loss": 1.0}

    def count_items(self, batch: Batch) -> Sums:
        """Number of items, (), that each part of the loss runs over in one micro-batch, before the forward pass."""
        return {"loss": (batch["labels"] != IGNORE).sum()}

    def loss_sums(self, model: nn.Module, batch: Batch) -> tuple[Sums, Any]:
        """Sum, (), of each part over the items of one micro-batch, and the model's output."""
        names = list(self.loss_weights())
        if names == ["loss"]:
            outputs = model(**batch, num_items_in_batch=1)
            return {"loss": outputs.loss}, outputs
        outputs = model(**batch, num_items_in_batch=dict.fromkeys(names, 1))
        parts = {name: getattr(outputs, f"{name}_loss") for name in names}
        return {name: part for name, part in parts.items() if part is not None}, outputs

    def metric_sums(self, outputs: Any, batch: Batch) -> Sums:
        """Tensors that are added up over micro-batches and processes and turned into figures by
        `metrics_from_sums`.
        """
        return {}

    def metrics_from_sums(self, sums: Sums) -> dict[str, float]:
        """Figures for the log from summed tensors; never called with nothing summed."""
        return {}

    # Normalisation

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Micro-batches of one optimizer step, without repeated rows, and the number of their items."""
        samples = []
        for batch in itertools.islice(epoch_iterator, num_batches):
            own, self._last_batch_counts = self._without_repeats(batch)
            samples.append(own)
        return samples, self._get_num_items_in_batch(samples, device)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        counts: Sums = {}
        for batch in batch_samples:
            counted = self._last_batch_counts or batch is not batch_samples[-1]
            for name, count in self.count_items(batch).items():
                counts[name] = counts.get(name, 0) + count.to(device) * counted
        return {name: value.clamp(min=1) for name, value in self._over_processes(counts).items()}

    def _over_processes(self, sums: Sums) -> Sums:
        """Add up over processes, in one message."""
        if self.args.world_size == 1 or not sums:
            return sums
        flat = torch.cat([value.reshape(-1).double() for value in sums.values()])
        flat = self.accelerator.reduce(flat, "sum")
        parts = flat.split([value.numel() for value in sums.values()])
        return {name: part.view(value.shape).to(value.dtype) for (name, value), part in zip(sums.items(), parts)}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Weighted sum of sum / count over the parts, with the counts of the whole optimizer step."""
        counts = (
            self._get_num_items_in_batch([inputs], self.args.device)
            if num_items_in_batch is None
            else num_items_in_batch
        )
        sums, outputs = self.loss_sums(model, inputs)
        parts = {name: total / counts[name] for name, total in sums.items()}
        weights = self.loss_weights()
        loss = sum(weights[name] * part for name, part in parts.items())
        if model.training:
            counted = self._last_batch_counts or not self.accelerator.sync_gradients
            self._train_sums.add(parts, self._detached_metrics(outputs, inputs), counted=counted)
            # distributed training averages gradients over processes
            loss = loss * (self.args.world_size if counted else 0)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _detached_metrics(self, outputs: Any, inputs: Batch) -> Sums:
        return self.metric_sums(outputs, inputs)

    # Logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the loss (means since the last line, over all processes) and the metrics to a training
        line.
        """
        if "loss" in logs:
            steps = max(1, self.state.global_step - self._logged_at)
            logs.update(self._figures(self._train_sums, steps))
            self._train_sums, self._logged_at = _Accumulator(), self.state.global_step
        super().log(logs, start_time)

    def _figures(self, accumulator: "_Accumulator", steps: int | None) -> dict[str, float]:
        """Parts and metrics of an accumulator; parts are divided by the number of steps, or (None) by their own
        counts.
        """
        parts = self._over_processes(accumulator.parts)
        counts = self._over_processes(accumulator.counts)
        means = {
            name: (part / (counts[name].clamp(min=1) if steps is None else steps)).item()
            for name, part in parts.items()
        }
        figures = {} if list(means) == ["loss"] else {f"{name}_loss": mean for name, mean in means.items()}
        if steps is None and means:
            weights = self.loss_weights()
            figures["loss"] = sum(weights[name] * mean for name, mean in means.items())
        metrics = self._over_processes(accumulator.metrics)
        return figures | (self.metrics_from_sums(metrics) if metrics else {})

    # Evaluation

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As in transformers, with losses and metrics that are exact over items."""
        self._eval_sums = _Accumulator()
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # every pass over a DataLoader draws from the generator of dropout
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        for name, value in self._figures(self._eval_sums, None).items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Batch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """Loss, logits and labels of one batch; sums are kept for the end of the evaluation."""
        if not self.label_names or any(inputs.get(name) is None for name in self.label_names):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        own, counted = self._without_repeats(inputs)
        loss = torch.zeros((), device=self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            counts = {name: count.to(self.args.device) for name, count in self.count_items(own).items()}
            sums, outputs = self.loss_sums(model, own)
            self._eval_sums.add(sums, self._detached_metrics(outputs, own), counts, counted)
            weights = self.loss_weights()
            for name, total in sums.items():
                loss = loss + weights[name] * total.detach() / counts[name].clamp(min=1)
            if prediction_loss_only:
                return loss, None, None
            if own is not inputs:
                outputs = self.loss_sums(model, inputs)[1]
        logits = tuple(value.detach() for name, value in outputs.items() if name.endswith(self.predicted))
        labels = tuple(inputs[name] for name in self.label_names)
        return loss, _only(logits) if logits else None, _only(labels)

    def _without_repeats(self, batch: Batch) -> tuple[Batch, bool]:
        """The batch without the rows that repeat others to fill the last round of all processes, and True.

        If it has no other rows it comes back whole, and False: the process takes part in the round with sums of zero.
        """
        state = self.accelerator.gradient_state
        if self.args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return batch, True
        size = len(next(value for value in batch.values() if isinstance(value, torch.Tensor)))
        kept = min(size, state.remainder - self.args.process_index * size)
        if kept == size or kept <= 0:
            return batch, kept > 0
        return {name: value[:kept] for name, value in batch.items()}, True

    # Data

    def _get_eval_sampler(self, eval_dataset: Any) -> None:
        """None, for the order of the rows: transformers groups them by length in evaluations too, but answers and
        generated texts are compared by their places.
        """

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        for column in ("example_key", *self.collator_columns):
            if column not in self._signature_columns:
                self._signature_columns.append(column)

    def _get_dataloader(
        self, dataset: Any, description: str, *args: Any, is_training: bool = False, **kwargs: Any
    ) -> DataLoader:
        """As in transformers; a corrupting collator gets example keys, and for evaluation a copy with the
        evaluation's epoch.
        """
        collator = self.data_collator
        if isinstance(collator, KeyedCollator):
            if isinstance(dataset, datasets.Dataset):
                dataset = self._remove_unused_columns(dataset, description=description)
            if not isinstance(dataset, IterableDataset):
                dataset = ExampleKeys(dataset)
            if is_training and self.args.dataloader_persistent_workers:
                raise ValueError(
                    f"{type(self.args).__name__}.dataloader_persistent_workers must be False: workers that live on "
                    f"would not see {type(collator).__name__}'s epoch and corrupt every epoch alike."
                )
            if not is_training:
                self.data_collator = copy.copy(collator)
                self.data_collator.set_epoch(EVALUATION_EPOCH)
        try:
            return super()._get_dataloader(dataset, description, *args, is_training=is_training, **kwargs)
        finally:
            self.data_collator = collator

    def _run_epoch(self, model: nn.Module, epoch: int, *args: Any, **kwargs: Any) -> None:
        if isinstance(self.data_collator, KeyedCollator):
            self.data_collator.set_epoch(epoch)
        super()._run_epoch(model, epoch, *args, **kwargs)

    # Optimizer and schedule

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer named by `args.optimizer`, or transformers' own; with layer-wise rates if
        `args.layerwise_lr_decay` < 1.
        """
        args = self.args
        if self.optimizer is None and (args.optimizer is not None or args.layerwise_lr_decay < 1):
            trained = self.model if model is None else model
            groups = layerwise_groups(
                trained,
                args.learning_rate,
                args.layerwise_lr_decay,
                args.weight_decay,
                off_by_one=args.layerwise_lr_decay_off_by_one,
            )
            if args.optimizer is not None:
                self.optimizer = build_optimizer(args.optimizer, groups, args)
            else:
                optimizer_class, settings = self.get_optimizer_cls_and_kwargs(args, trained)
                self.optimizer = optimizer_class(groups, **settings)
        return super().create_optimizer(model)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The schedule named by `args.schedule`, or transformers' own."""
        if self.lr_scheduler is None and self.args.schedule is not None:
            self.lr_scheduler = build_schedule(
                self.args.schedule,
                self.optimizer if optimizer is None else optimizer,
                self.args.get_warmup_steps(num_training_steps),
                num_training_steps,
                **(self.args.schedule_kwargs or {}),
            )
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    # Checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As in transformers; `True` resumes from the newest complete checkpoint of `args.output_dir`.

        Raises:
            ValueError: there is no complete checkpoint to resume from, or the one named is not complete.
        """
        self._train_sums, self._logged_at = _Accumulator(), 0
        if self.args.world_size > 1 and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            # accelerate's mark of an evaluation before, which would keep it from wrapping the model: without DDP
            # processes train apart
            self.model.__dict__.pop("_is_accelerate_prepared", None)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"There is no complete checkpoint in {self.args.output_dir} to resume from; start without "
                    "resuming."
                )
        elif resume_from_checkpoint and not is_complete(resume_from_checkpoint):
            raise ValueError(
                f"{resume_from_checkpoint} is not a complete checkpoint of a trainer; resume from an earlier one."
            )
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            if self.args.should_save:
                (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)  # what is overwritten is not complete
            super()._save_checkpoint(model, trial)
        except BaseException:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _save_rng_state(self, output_dir: str) -> None:
        """Also save what was summed up since the last log line.

        All processes are done before the trainer's state is written, last.
        """
        super()._save_rng_state(output_dir)
        state = {
            "loss": self._tr_loss.cpu(),
            "loss_since": self._globalstep_last_logged,
            "logged_at": self._logged_at,
            "parts": {name: value.cpu() for name, value in self._train_sums.parts.items()},
            "metrics": {name: value.cpu() for name, value in self._train_sums.metrics.items()},
            "world_size": self.args.world_size,
        }
        torch.save(state, Path(output_dir) / STATE_NAME.format(rank=self.args.process_index))
        self.accelerator.wait_for_everyone()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        self._logged_at = self.state.global_step
        path = Path(checkpoint) / STATE_NAME.format(rank=self.args.process_index)
        state = torch.load(path, weights_only=True) if path.is_file() else {}
        if state.get("world_size") != self.args.world_size:
            return  # a share of the sums is missing: the next line is over the updates from here on
        self._tr_loss = state["loss"].to(self.args.device)  # torch.load refuses the name "cpu:0" that processes have
        self._globalstep_last_logged = state["loss_since"]
        self._logged_at = state["logged_at"]
        kinds = (state["parts"], state["metrics"])
        self._train_sums = _Accumulator(
            *({name: value.to(self.args.device) for name, value in kind.items()} for kind in kinds)
        )
        # the final mean covers the steps of this call only
        self._total_loss_scalar = -self._over_processes({"loss": self._tr_loss})["loss"].item() / self.args.world_size

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Without the shared weights among the missing ones: a checkpoint holds them once."""
        tied = self.accelerator.unwrap_model(self.model)
        tied = tied.all_tied_weights_keys if isinstance(tied, PreTrainedModel) else {}
        missing = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(type(load_result)(missing, load_result.unexpected_keys))

    # Results

    def result_model(self) -> PreTrainedModel:
        """What the run is for: the model; of a method that wraps one, the plain model (`to_base()`)."""
        model = self.accelerator.unwrap_model(self.model)
        return model.to_base() if isinstance(model, WrapperPreTrainedModel) else model

    def save_result(self) -> None:
        """Write `result_model()`, the tokenizer, the card and the plot to `args.output_dir`.

        Where parameters are sharded (FSDP, DeepSpeed) the whole model is saved, as by `save_model`; its `to_base()`
        after loading is the plain one.
        """
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or self.result_model() is self.model:
            self.save_model()
        elif self.args.should_save:
            self.result_model().save_pretrained(self.args.output_dir)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(self.args.output_dir)
        self.create_model_card()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the model card of `args.output_dir` from the registry, the arguments and the log, and the plot of the
        losses; arguments as in transformers.

        There is no plot without a finite loss in the log, or without matplotlib.
        """
        if not self.is_world_process_zero():
            return
        from ..cards import plot_history, write_model_card

        with contextlib.suppress(ValueError, ModuleNotFoundError):
            plot_history(self.state.log_history, Path(self.args.output_dir) / "loss.png")
        write_model_card(self.args.output_dir, model=self.result_model(), trainer_info=self.card_info())

    def card_info(self) -> dict[str, Any]:
        """What the card says of this run."""
        paper = paper_of(self.accelerator.unwrap_model(self.model))
        return {
            "slug": None if paper is None else paper.slug,
            "arguments": self.args,
            "log_history": self.state.log_history,
            "seed": self.args.seed,
            **self.run_description,
        }


class _Accumulator:
    """Running sums on the device: parts of the loss, their counts, and what metrics are made of."""

    def __init__(self, parts: Sums | None = None, metrics: Sums | None = None):
        self.parts, self.metrics, self.counts = parts or {}, metrics or {}, Sums()

    def add(self, parts: Sums, metrics: Sums, counts: Sums | None = None, counted: bool = True) -> None:
        """Add values, or zeros of their shapes: all processes must hold the same names when sums are put together."""
        for kept, new in ((self.parts, parts), (self.metrics, metrics), (self.counts, counts or {})):
            for name, value in new.items():
                value = value.detach() if counted else torch.zeros_like(value)
                kept[name] = kept[name] + value if name in kept else value.clone()


def _only(values: tuple) -> Any:
    return values[0] if len(values) == 1 else values


def is_complete(checkpoint: str | Path) -> bool:
    """Whether a checkpoint folder was written to its end: the trainer's state is written last, after every process is
    done.
    """
    folder = Path(checkpoint)
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return False
    return any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*"))


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest `checkpoint-<step>` folder that was written to its end, or None.

    Incomplete ones are left where they are.
    """
    found = []
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if step.isdigit() and is_complete(path):
            found.append((int(step), str(path)))
    return max(found)[1] if found else None
