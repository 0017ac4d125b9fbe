"""Fine-tuning with noise in the hidden states (HyPe; Yuan et al., ACL 2023, arXiv 2212.08853), and NoisyTune (Wu et
al., 2022, arXiv 2202.12024), the baseline of its script that puts noise into the weights once.

The noise of an example depends on `(seed, epoch, example)` alone, so that neither the split of a batch over
accumulation steps and processes nor resuming changes an update. `keyed_noise=False` draws from the global generator,
as the official code: then only resuming is exact.
"""

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..configuration.configuration_hype import HypeConfig
from ..modeling.modeling_hype import HypePreTrainedModel, Perturbation, perturbed
from .base import Batch, KeyedCollator, Sums
from .finetuning import FinetuneTrainer, FinetuneTrainingArguments
from .randomness import EVALUATION_EPOCH, example_rng, step_generator


SEEDS = "noise_seeds"


@dataclass
class HypeTrainingArguments(FinetuneTrainingArguments):
    """Training arguments of HyPe.

    Added:
        keyed_noise: draw the noise of each example from `(seed, epoch, example)`.
        noisy_tune: lambda of NoisyTune; its paper finds 0.1 to 0.15 best.

    Changed defaults (README of the official code): learning_rate 2e-5 (the paper searches 1e-5 to 4e-5), batch 16
    (ELECTRA 32).

    Raises:
        ValueError: `noisy_tune` is negative.
    """

    keyed_noise: bool = field(
        default=True,
        metadata={"help": "Noise by seed, epoch and example, the same for every split of a batch; else by step."},
    )
    noisy_tune: float = field(
        default=0.0, metadata={"help": "Noise in all weights before training, in half standard deviations of each."}
    )
    learning_rate: float = field(default=2e-5, metadata={"help": "Peak learning rate."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Batch per device."})

    def __post_init__(self):
        super().__post_init__()
        if not self.noisy_tune >= 0:
            raise ValueError(f"{type(self).__name__}.noisy_tune must be at least 0 (off), got {self.noisy_tune}.")


class KeyedNoiseCollator:
    """A collator that adds `noise_seeds` (B,) int64 to the batches of another: one number in [0, 2**62) per row, from
    `(seed, epoch, example_key)`. Batches of evaluation have none, since evaluation has no noise.

    Args:
        collator: makes the batch. A `KeyedCollator` sees the keys and follows the epoch, another kind does neither.
            Seeds in its batches are kept.
        seed: of the run, non-negative.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]], seed: int = 0):
        self.collator: Any = collator
        self.seed = seed
        self.tokenizer = getattr(collator, "tokenizer", None)  # transformers saves it with the model
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Select the noise of an epoch."""
        if isinstance(self.collator, KeyedCollator):
            inner = copy.copy(self.collator)  # evaluation changes the epoch of a shallow copy of this one
            inner.set_epoch(epoch)
            self.collator = inner
        self.epoch = epoch
        self._next_key = 0

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate rows; those without `example_key` are numbered as they come since the last `set_epoch`."""
        keys = [feature.get("example_key", self._next_key + row) for row, feature in enumerate(features)]
        self._next_key += len(features)
        hidden = () if isinstance(self.collator, KeyedCollator) else ("example_key",)
        rows = [{name: value for name, value in feature.items() if name not in hidden} for feature in features]
        batch = dict(self.collator(rows))
        if self.epoch != EVALUATION_EPOCH and SEEDS not in batch:
            seeds = [int(example_rng(self.seed, self.epoch, int(key)).integers(1 << 62)) for key in keys]
            batch[SEEDS] = torch.tensor(seeds)
        return batch


class HypeTrainer(FinetuneTrainer):
    """Trains a `HypeFor...` model, or any plain one with a head, which gets the noise for the time of training only.

    Args:
        model: what to train; the arguments that follow are `transformers.Trainer`'s.
        perturbation: for a plain model: fields of `HypeConfig` (`noise`, `noise_scale`, ...), by default the paper's.

    Raises:
        ValueError: `perturbation` for a model that has its settings in its configuration, `model_init` where the
            weights that it makes would escape the noise, or a model that moves its tokens to other rows
            (`unpad_threshold`) with `keyed_noise`.
    """

    args: HypeTrainingArguments

    def __init__(
        self,
        model: nn.Module | None = None,
        args: HypeTrainingArguments | None = None,
        *rest: Any,
        perturbation: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        args = HypeTrainingArguments(output_dir="runs") if args is None else args
        super().__init__(model, args, *rest, **kwargs)
        name = type(self).__name__
        trained = self.accelerator.unwrap_model(self.model)
        self.is_plain = not isinstance(trained, HypePreTrainedModel)
        self.settings = dict(perturbation or {})
        self.perturbation: Perturbation | None = None
        if self.is_plain:
            config = HypeConfig(encoder_config=trained.config, **self.settings)
            Perturbation(trained, config)  # errors show here
        elif self.settings:
            raise ValueError(
                f"{name}: {type(trained).__name__} has its settings in its configuration; give perturbation for a "
                "plain model only."
            )
        else:
            config = trained.config
        if self.model_init is not None and (self.is_plain or self.args.noisy_tune):
            raise ValueError(f"{name}: with a plain model or noisy_tune give the model itself, not model_init.")
        if self.args.keyed_noise and config.noise != "none":
            if config.encoder_config.to_dict().get("unpad_threshold") is not None:
                raise ValueError(
                    f"{name}: unpad_threshold={config.encoder_config.unpad_threshold} packs examples into shared "
                    "rows, so that noise cannot be drawn by example; set unpad_threshold to null, or keyed_noise to "
                    "False."
                )
            if not isinstance(self.data_collator, KeyedNoiseCollator):
                self.data_collator = KeyedNoiseCollator(self.data_collator, self.args.seed)

    def train(  # type: ignore[override]  # keywords as in the base class
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> Any:
        """As `BestiaryTrainer.train`. NoisyTune is applied when a run starts, not when it is resumed."""
        model = self.accelerator.unwrap_model(self.model)
        with contextlib.ExitStack() as stack:
            if self.is_plain:
                self.perturbation = stack.enter_context(perturbed(model, **self.settings))
            if self.args.noisy_tune and not resume_from_checkpoint:
                add_weight_noise(model, self.args.noisy_tune, step_generator(self.args.seed, 0))
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def loss_sums(self, model: nn.Module, batch: Batch) -> tuple[Sums, Any]:
        if self.is_plain:
            if self.perturbation is not None:
                self.perturbation.seeds = batch.get(SEEDS)
            batch = {name: value for name, value in batch.items() if name != SEEDS}
        return super().loss_sums(model, batch)

    def card_info(self) -> dict[str, Any]:
        return super().card_info() | {"slug": "hype"}


@torch.no_grad()
def add_weight_noise(model: nn.Module, scale: float, generator: torch.Generator) -> None:
    """NoisyTune: W <- W + (u - 1/2) * scale * std(W), u ~ U[0, 1), for every parameter tensor, heads included.

    The standard deviation has n - 1 in its denominator, as torch's; tensors of one number stay as they are.

    Args:
        model: changed in place.
        scale: lambda.
        generator: on the CPU, so that the noise is the same on every device.
    """
    for parameter in model.parameters():
        if parameter.numel() > 1:
            uniform = torch.rand(parameter.shape, generator=generator).to(parameter.device)
            parameter.add_(((uniform - 0.5) * scale * parameter.float().std()).to(parameter.dtype))
