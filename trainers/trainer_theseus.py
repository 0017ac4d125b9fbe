"""Compression by progressive module replacing (Xu et al., 2020, arXiv 2002.02925), both phases in one run.

The rate is a function of the update's number, and what is drawn of (seed, update): one pattern per optimizer step,
equal on all processes, so that neither accumulation nor the number of processes changes an update, and a resumed run
draws what the uninterrupted one would have drawn.

Difference from the official code: it draws for every micro-batch anew, from the global generator
(`draw_every_micro_batch` draws as often). Further ones, of the model, are in `modeling_theseus`.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..modeling.modeling_theseus import TheseusPreTrainedModel
from .finetuning import FinetuneTrainer, FinetuneTrainingArguments
from .randomness import step_generator


logger = logging.get_logger(__name__)


@dataclass
class TheseusTrainingArguments(FinetuneTrainingArguments):
    """Training arguments of module replacing; the schedule of the rate is in `TheseusConfig`.

    Added:
        draw_every_micro_batch: draw a pattern for each micro-batch, as the official code does; what accumulation
            gives is then not what a larger batch gives.

    Changed defaults (official code; paper, section 4.2): learning_rate 2e-5 (or 1e-5), 15 epochs (the example's for
    MRPC), batch 32, warmup_steps 0, weight_decay 0, adam_epsilon 1e-8; max_grad_norm 1 is over the successor alone.
    ddp_find_unused_parameters True, since modules that are not drawn have no gradient.

    Raises:
        ValueError: `layerwise_lr_decay` below 1, or fp16.
    """

    draw_every_micro_batch: bool = field(
        default=False, metadata={"help": "Draw a pattern per micro-batch, not per update, as the official code does."}
    )
    learning_rate: float = field(default=2e-5, metadata={"help": "Peak learning rate."})
    num_train_epochs: float = field(default=15.0, metadata={"help": "Passes over the training set, both phases."})
    warmup_steps: float = field(default=0, metadata={"help": "Updates of warm-up; below 1, a share of all."})
    weight_decay: float = field(default=0.0, metadata={"help": "Decoupled weight decay."})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "Epsilon of the Adam family, outside the root."})
    ddp_find_unused_parameters: bool | None = field(
        default=True, metadata={"help": "Let distributed training cope with modules that were not drawn."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.layerwise_lr_decay < 1:
            raise ValueError(
                f"{type(self).__name__}.layerwise_lr_decay must be 1, got {self.layerwise_lr_decay}: only the "
                "successor's layers are trained, under names of their own."
            )
        if self.fp16:
            raise ValueError(
                f"{type(self).__name__}.fp16 is not supported: where no module is drawn there is no gradient to scale "
                "the loss by; use bf16."
            )


class TheseusTrainer(FinetuneTrainer):
    """Trains the successor of a Theseus model for any task of `FinetuneTrainer`.

    Logged besides the loss: `replacing_rate` of the last update, and `replaced_modules`, the mean number of modules
    that were drawn since the last line. The predecessor is dropped from memory at the first update from which on the
    rate is 1 (not where parameters are sharded). `save_result()` writes the plain small model.

    Raises:
        ValueError: the model is none of `modeling_theseus`.
    """

    args: TheseusTrainingArguments
    model: TheseusPreTrainedModel

    def __init__(self, model: nn.Module | None = None, args: TheseusTrainingArguments | None = None, *rest, **kwargs):
        if model is not None and not isinstance(model, TheseusPreTrainedModel):
            raise ValueError(
                f"{type(self).__name__} trains a model with a predecessor and a successor, but got a "
                f"{type(model).__name__}; make one by TheseusForSequenceClassification.from_encoder(model)."
            )
        args = TheseusTrainingArguments(output_dir="runs") if args is None else args
        super().__init__(model, args, *rest, **kwargs)
        self._drawn_at = (-1, -1)

    def pattern_at(self, step: int, micro_batch: int = 0) -> list[int]:
        """What is drawn for update `step` (from 0), with `draw_every_micro_batch` for one of its micro-batches."""
        config = self.model.config
        rate = config.rate_at(step, self.state.max_steps)
        draws = torch.rand(
            micro_batch + 1, config.successor_num_hidden_layers, generator=step_generator(self.args.seed, step)
        )
        return (draws[-1] < rate).int().tolist()

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """As in transformers, with the pattern of this update."""
        step, config = self.state.global_step, self.model.config
        micro_batch = self._drawn_at[1] + 1 if self._drawn_at[0] == step else 0
        self._drawn_at = (step, micro_batch)
        finished = config.is_replaced_at(step, self.state.max_steps)
        if finished and config.has_predecessor and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            logger.info(f"The replacing rate is 1 from update {step} on: the predecessor is dropped.")
            self.model.drop_predecessor()
        pattern = self.pattern_at(step, micro_batch if self.args.draw_every_micro_batch else 0)
        self.model.set_pattern(pattern)
        if not any(pattern) and all(value.grad is None for value in self.model.successor.parameters()):
            model = self.model  # nothing to put together: DistributedDataParallel would wait for its hooks
        return super().training_step(model, inputs, num_items_in_batch)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """As in transformers; warns if the run will end before the successor was trained alone."""
        config = self.model.config
        if not config.is_replaced_at(num_training_steps - 1, num_training_steps):
            logger.warning(
                f"The replacing rate is {config.rate_at(num_training_steps - 1, num_training_steps):.3f} at the last "
                f"of {num_training_steps} updates, so the successor is never trained alone, as it is evaluated; "
                f"{type(config).__name__}.steps_for_replacing=0.5 would give it half of the run."
            )
        return super().create_scheduler(num_training_steps, optimizer)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the rate and the number of replaced modules to a training line."""
        if "loss" in logs and self.state.global_step > self._logged_at:
            each = range(self.args.gradient_accumulation_steps if self.args.draw_every_micro_batch else 1)
            steps = range(self._logged_at, self.state.global_step)
            counts = [sum(self.pattern_at(step, index)) for step in steps for index in each]
            logs["replacing_rate"] = self.model.config.rate_at(steps[-1], self.state.max_steps)
            logs["replaced_modules"] = sum(counts) / len(counts)
        super().log(logs, start_time)
