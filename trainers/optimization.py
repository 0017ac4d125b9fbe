"""Optimizers, learning-rate schedules and layer-wise rates that papers use and transformers does not have.

Sources: optimizer, decay rule and schedule of google-research/bert and google-research/electra (Apache-2.0); LAMB,
You et al., 2019, arXiv 1904.00962, as google-research/albert runs it; one-cycle budget of Geiping and Goldstein, 2022,
arXiv 2212.14034; inverse square root of Vaswani et al., 2017, arXiv 1706.03762, and of T5, 2019, arXiv 1910.10683.
"""

import inspect
import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import TrainingArguments, get_scheduler
from transformers.trainer_utils import SchedulerType


# Optimizers


class BertAdam(torch.optim.AdamW):
    """Adam of the official BERT and ELECTRA code: AdamW without bias correction.

        m <- beta1 m + (1 - beta1) g
        v <- beta2 v + (1 - beta2) g^2
        w <- w - lr (m / (sqrt(v) + eps) + weight_decay w)

    The first step is sqrt(10) times that of AdamW at the default betas. Torch's own kernels run it: the step count in
    the state of each parameter stands at a number so large that both corrections, 1 - beta^step, are exactly 1 and
    adding 1 does not change it.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to sqrt(v), outside the root.
        weight_decay: decoupled decay, scaled by the learning rate.
        foreach: run torch's multi-tensor loop instead of the fused kernel.
        fused: run the fused kernel; by default yes, unless `foreach` is given.
    """

    STEP = 2.0**60

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        foreach: bool | None = None,
        fused: bool | None = None,
    ):
        if fused is None:
            fused = foreach is None
        super().__init__(params, lr, betas, eps, weight_decay, foreach=foreach, fused=fused)

    def _init_group(self, group, params_with_grad, *lists):
        new = [p for p in group["params"] if p.grad is not None and p not in self.state]
        has_complex = super()._init_group(group, params_with_grad, *lists)
        for p in new:
            self.state[p]["step"].fill_(self.STEP)
        return has_complex


def lamb(params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> Optimizer:
    """LAMB as in the official ALBERT code: BertAdam's update, decay included, times |w| / |update| per tensor.

    The class comes from the library pytorch-optimizer; its three departures from the official code are switched off:
    decay outside the trust ratio, |w| clamped at 10, bias correction of the step size.

    Raises:
        ImportError: pytorch-optimizer is not installed.
    """
    try:
        from pytorch_optimizer import Lamb
    except ImportError as error:
        raise ImportError("The optimizer 'lamb' needs pytorch-optimizer, pip install bestiary[optimizers].") from error

    optimizer = Lamb(
        params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, weight_decouple=False, adam_debias=True
    )
    optimizer.clamp = math.inf
    return optimizer


def radam(params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> Optimizer:
    """Adam with a rectified rate in its first steps (Liu et al., 2019, arXiv 1908.03265), decay decoupled."""
    return torch.optim.RAdam(
        params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, decoupled_weight_decay=True
    )


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"bert_adam": BertAdam, "lamb": lamb, "radam": radam}
"""Optimizers by the name that `BestiaryTrainingArguments.optimizer` takes; others are transformers' own (`optim`)."""


def build_optimizer(name: str, parameter_groups: Iterable[dict[str, Any]], args: TrainingArguments) -> Optimizer:
    """The optimizer `name` of `OPTIMIZERS`, with learning rate, betas, eps and decay of the training arguments.

    Raises:
        ValueError: unknown name.
        ImportError: the library behind the optimizer is not installed.
    """
    check_name("build_optimizer", "name", name, OPTIMIZERS)
    return OPTIMIZERS[name](
        parameter_groups,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.weight_decay,
    )


def check_name(owner: str, field: str, name: str, allowed: Iterable[str]) -> None:
    """Raise `ValueError` naming the allowed values if `name` is none of them."""
    if name not in allowed:
        raise ValueError(f"{owner}.{field} must be one of {', '.join(allowed)}; got {name!r}.")


# Schedules: factor on the peak learning rate of update number `step` = 0, 1, ..., total_steps - 1


def bert_schedule(step: int, warmup_steps: int, total_steps: int) -> float:
    """s/W while s < W, then 1 - s/T: a drop at the end of the warm-up, as in the official BERT and ALBERT code."""
    return step / warmup_steps if step < warmup_steps else _remaining(step, total_steps)


def electra_schedule(step: int, warmup_steps: int, total_steps: int) -> float:
    """(1 - s/T) min(1, s/W): the decay runs during the warm-up too, as in the official ELECTRA code."""
    return _remaining(step, total_steps) * min(1.0, step / warmup_steps if warmup_steps else 1.0)


def inverse_square_root_schedule(
    step: int, warmup_steps: int, total_steps: int, constant_warmup: bool = False
) -> float:
    """min(s/W, sqrt(W/s)), the peak being at W; `constant_warmup` gives T5's form, 1 until W instead of s/W.

    Raises:
        ValueError: no warm-up steps, which set the time scale here.
    """
    if warmup_steps < 1:
        raise ValueError(f"inverse_square_root: warmup_steps must be at least 1, got {warmup_steps}.")
    if step < warmup_steps:
        return 1.0 if constant_warmup else step / warmup_steps
    return math.sqrt(warmup_steps / step)


def one_cycle_schedule(
    step: int, warmup_steps: int, total_steps: int, base: float = 0.25, fall: float = 0.25
) -> float:
    """Budgeted one-cycle of "cramming": linear from `base` to 1 at u = 1 - fall, then to 0 at u = 1, where u = s/T.

    min(base + u (1 - base)/(1 - fall), (1 - u)/fall). `base=0, fall=0.5` is the symmetric triangle.

    Raises:
        ValueError: `base` outside [0, 1], `fall` outside (0, 1), or warm-up steps beside the cycle's own rise.
    """
    if warmup_steps:
        raise ValueError(f"one_cycle: warmup_steps must be 0, got {warmup_steps}; the rise is set by base and fall.")
    if not 0 <= base <= 1:
        raise ValueError(f"one_cycle: base must be in [0, 1], got {base}.")
    if not 0 < fall < 1:
        raise ValueError(f"one_cycle: fall must be in (0, 1), got {fall}.")
    left = _remaining(step, total_steps)
    return min(base + (1 - left) * (1 - base) / (1 - fall), left / fall)


def _remaining(step: int, total_steps: int) -> float:
    return max(0.0, 1 - step / max(1, total_steps))


SCHEDULES: dict[str, Callable[..., float]] = {
    "bert": bert_schedule,
    "electra": electra_schedule,
    "inverse_square_root": inverse_square_root_schedule,
    "one_cycle": one_cycle_schedule,
}
"""Our schedules by name."""

SCHEDULE_NAMES: tuple[str, ...] = (
    *SCHEDULES,
    *(kind.value for kind in SchedulerType if kind not in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)),
)
"""Names that `build_schedule` takes: ours and those of transformers that depend on the step alone."""


def check_schedule(owner: str, name: str, **kwargs: Any) -> None:
    """Raise `ValueError` if `name` is no schedule, or if one of ours has no such option."""
    check_name(owner, "schedule", name, SCHEDULE_NAMES)
    if name not in SCHEDULES:
        return
    options = list(inspect.signature(SCHEDULES[name]).parameters)[3:]
    unknown = kwargs.keys() - set(options)
    if unknown:
        raise ValueError(
            f"{owner}.schedule_kwargs: the schedule {name!r} has no option {', '.join(sorted(unknown))}; "
            f"it has {', '.join(options) or 'none'}."
        )


def build_schedule(name: str, optimizer: Optimizer, warmup_steps: int, total_steps: int, **kwargs: Any) -> LRScheduler:
    """Learning-rate scheduler that multiplies each group's own rate by the factor of the schedule `name`.

    Args:
        name: one of `SCHEDULE_NAMES`.
        optimizer: whose groups hold the peak rates.
        warmup_steps: optimizer updates until the peak.
        total_steps: optimizer updates of the whole run; the factor of ours stays at its end value after it.
        **kwargs: options of the schedule, for example `base` and `fall` of `one_cycle`.

    Raises:
        ValueError: unknown name, unknown option or an option outside its range.
    """
    check_schedule("build_schedule", name, **kwargs)
    if name not in SCHEDULES:
        return get_scheduler(name, optimizer, warmup_steps, total_steps, scheduler_specific_kwargs=kwargs)
    factor = partial(SCHEDULES[name], warmup_steps=warmup_steps, total_steps=total_steps, **kwargs)
    return LambdaLR(optimizer, factor)


# Parameter groups

NO_DECAY: tuple[str, ...] = ("LayerNorm", "layer_norm", "bias")
"""Parameters whose name contains one of these are not decayed (official BERT and ELECTRA code)."""

_LAYER = re.compile(r"(?:^|\.)(?:layer|layers|h|block|blocks)\.(\d+)\.")
_EMBEDDING = re.compile(r"embed|(?:^|\.)(?:wte|wpe|shared)\.")


def count_layers(names: Iterable[str]) -> int:
    """Number of layers of a model, from the numbers in its parameter names; `ValueError` if there are none."""
    numbers = [int(match[1]) for name in names if (match := _LAYER.search(name))]
    if not numbers:
        raise ValueError(
            "count_layers: no parameter name holds a layer number such as 'encoder.layer.0.'; "
            "layer-wise learning rates need one, so set layerwise_lr_decay to 1 for this model."
        )
    return max(numbers) + 1


def parameter_depths(names: Iterable[str], num_hidden_layers: int) -> dict[str, int]:
    """Depth of each parameter in a BERT-like model of n layers, by its name.

    Embeddings (and their projection) 0, layer i (`layer.i.`, `layers.i.`, `h.i.`, `block.i.`, `blocks.i.`) i + 1, all
    others (pooler, heads) n + 1.
    """
    depths = {}
    for name in names:
        if match := _LAYER.search(name):
            depths[name] = int(match[1]) + 1
        else:
            depths[name] = 0 if _EMBEDDING.search(name) else num_hidden_layers + 1
    return depths


def layerwise_groups(
    model: nn.Module,
    lr: float,
    decay: float = 1.0,
    weight_decay: float = 0.0,
    no_decay_patterns: Sequence[str] = NO_DECAY,
    off_by_one: bool = False,
) -> list[dict[str, Any]]:
    """Parameter groups with layer-wise learning-rate decay: lr * decay^(n + 1 - depth) for a model of n layers.

    Depths are those of `parameter_depths`: heads get lr, the top layer lr * decay, the embeddings lr * decay^(n + 1).
    `decay=1` gives every parameter lr and works for any model.

    Args:
        model: only its parameters that require gradients are taken.
        lr: learning rate of the heads.
        decay: factor from one layer to the layer below, in (0, 1].
        weight_decay: of the parameters whose name contains none of `no_decay_patterns`; 0 for the others.
        no_decay_patterns: parts of names, compared with case.
        off_by_one: the exponent of the official ELECTRA code, n + 2 - depth below the heads: decay^2 at the top layer.
            Its authors call it a bug and kept it for the reported results.

    Returns:
        One group per different (lr, weight_decay), the highest rate first, so that the logged rate is the heads'.

    Raises:
        ValueError: `decay` outside (0, 1], or no layer number in the names of a model while `decay` is below 1.
    """
    if not 0 < decay <= 1:
        raise ValueError(f"layerwise_groups: decay must be in (0, 1], got {decay}.")
    parameters = dict(model.named_parameters())
    top = 0 if decay == 1 else count_layers(parameters) + 1
    depths = dict.fromkeys(parameters, 0) if decay == 1 else parameter_depths(parameters, top - 1)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            continue
        exponent = top - depths[name] + (off_by_one and depths[name] < top)
        decayed = not any(pattern in name for pattern in no_decay_patterns)
        groups.setdefault((lr * decay**exponent, weight_decay if decayed else 0.0), []).append(parameter)
    return [
        {"params": members, "lr": rate, "weight_decay": decays}
        for (rate, decays), members in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]
