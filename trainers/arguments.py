"""Training arguments shared by all papers; a paper's own subclass only adds fields or changes defaults."""

import os
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from .optimization import OPTIMIZERS, check_name, check_schedule


@dataclass
class BestiaryTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with the optimizers, schedules and layer-wise rates of `optimization.py`.

    Added:
        optimizer: name in `OPTIMIZERS` ("bert_adam", "lamb", "radam"); None leaves the choice to transformers'
            `optim`.
        schedule: "bert", "electra", "inverse_square_root", "one_cycle", or a step-wise schedule of transformers
            ("linear", "cosine", ...); None leaves the choice to `lr_scheduler_type`.
        schedule_kwargs: options of `schedule`, a dict or a JSON string.
        layerwise_lr_decay: factor of the learning rate from one layer to the layer below; 1 switches it off.
        layerwise_lr_decay_off_by_one: the official ELECTRA exponent, one power more for all but the heads.

    Changed defaults:
        adam_epsilon: 1e-6, the value of the BERT code and its descendants (transformers: 1e-8).
        logging_nan_inf_filter: False, so that a loss that is not finite is seen in the log (transformers: True).
        logging_steps: 50, so that short runs have a curve (transformers: 500).
        use_cpu: True where there is no accelerator; without it torchrun starts processes that train apart.
        data_seed: the value of `seed`, so that the order of the data never depends on the state of a generator.
        save_total_limit: 2, the newest checkpoint and one more in case the newest was cut off (transformers: all).

    Raises:
        ValueError: an unknown optimizer, schedule or schedule option, or a decay outside (0, 1].
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "schedule_kwargs"]

    optimizer: str | None = field(
        default=None, metadata={"help": "Optimizer of a paper: bert_adam, lamb, radam. Default: the one of `optim`."}
    )
    schedule: str | None = field(
        default=None,
        metadata={
            "help": "Schedule of a paper (bert, electra, inverse_square_root, one_cycle) or one of transformers "
            "(linear, ...). Default: the one of `lr_scheduler_type`."
        },
    )
    schedule_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Options of `schedule`, as JSON: '{\"base\": 0.25}'."}
    )
    layerwise_lr_decay: float = field(
        default=1.0,
        metadata={
            "help": "Factor of the learning rate from one layer to the layer below, in (0, 1]; 1 switches it off."
        },
    )
    layerwise_lr_decay_off_by_one: bool = field(
        default=False,
        metadata={"help": "Exponent of the official ELECTRA code: one power of the decay more for all but the heads."},
    )

    adam_epsilon: float = field(default=1e-6, metadata={"help": "Epsilon of the Adam family, outside the root."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave nan and inf losses out of the logged mean."}
    )
    logging_steps: float = field(
        default=50, metadata={"help": "Updates between two log lines; below 1, a share of all updates."}
    )
    save_total_limit: int | None = field(
        default=2, metadata={"help": "Checkpoints kept; older ones are deleted. Default: 2."}
    )

    def __post_init__(self):
        if not torch.accelerator.is_available():
            self.use_cpu = True
        super().__post_init__()
        owner = type(self).__name__
        started = int(os.environ.get("WORLD_SIZE", 1))
        if started != self.world_size:
            raise ValueError(
                f"{owner}: this is one of {started} processes, but it sees {self.world_size}, so they would train "
                "apart and "
                "overwrite each other's files; give every process a device of its own, or set use_cpu."
            )
        if self.data_seed is None:
            self.data_seed = self.seed
        if self.optimizer is not None:
            check_name(owner, "optimizer", self.optimizer, OPTIMIZERS)
        if self.schedule_kwargs and self.schedule is None:
            raise ValueError(
                f"{owner}.schedule_kwargs is set but schedule is not; name the schedule that it belongs to."
            )
        if isinstance(self.schedule_kwargs, str):
            raise ValueError(f"{owner}.schedule_kwargs must be a dict or a JSON object, got {self.schedule_kwargs!r}.")
        if self.schedule is not None:
            check_schedule(owner, self.schedule, **(self.schedule_kwargs or {}))
        if not 0 < self.layerwise_lr_decay <= 1:
            raise ValueError(f"{owner}.layerwise_lr_decay must be in (0, 1], got {self.layerwise_lr_decay}.")
