"""Pre-training of the Performer (Choromanski et al., 2021, arXiv 2009.14794), masked or causal, with new projections
at an interval.

Decisions where codes differ:
* projections are drawn at the beginning of an update, so that accumulated micro-batches and recomputed layers see one;
  the official JAX code draws in every call, performer-pytorch in the forward pass;
* the drawing number n at update n * interval depends on (seed, n, layer) alone: equal on every process and after a
  resume. Projections are saved with the weights; evaluation never draws;
* fine-tuning keeps the projections of its checkpoint. Pass `FeatureRedraw()` as a callback to draw there too.
"""

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .arguments import BestiaryTrainingArguments
from .language_model import LanguageModelTrainer


@dataclass
class PerformerTrainingArguments(BestiaryTrainingArguments):
    """Training arguments of Performer pre-training.

    Changed defaults (paper, appendix B):
        optimizer: Adam (transformers' AdamW: decay is decoupled) with adam_beta2: 0.98, adam_epsilon: 1e-9;
        learning_rate: 1e-3, schedule: constant; weight_decay: 0.1; max_grad_norm: 0.5.
    """

    schedule: str | None = field(default="constant", metadata={"help": "The paper's rate is fixed."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate."})
    weight_decay: float = field(default=0.1, metadata={"help": "Decoupled weight decay."})
    max_grad_norm: float = field(default=0.5, metadata={"help": "Largest norm of the gradient."})
    adam_beta2: float = field(default=0.98, metadata={"help": "Decay of Adam's second moment."})
    adam_epsilon: float = field(default=1e-9, metadata={"help": "Epsilon of Adam."})


class FeatureRedraw(TrainerCallback):
    """New projections every `config.feature_redraw_interval` updates, for any trainer of a Performer."""

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Draw, if this update's number is a multiple of the interval."""
        interval = model.config.feature_redraw_interval
        if interval is not None and state.global_step and state.global_step % interval == 0:
            model.redraw_projections(args.seed, state.global_step // interval)


class PerformerTrainer(LanguageModelTrainer):
    """Trains `PerformerForPreTraining`."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.add_callback(FeatureRedraw())
