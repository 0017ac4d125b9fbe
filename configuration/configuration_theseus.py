"""Configuration of BERT-of-Theseus (Xu et al., EMNLP 2020, arXiv 2002.02925) over any encoder.

The schedule stands here and not in the training arguments: it defines the method as much as the depth does, and a
checkpoint from the middle of a run then says which run it is from. How often a run draws (`draw_every_micro_batch`) is
an argument of the trainer.
"""

import math
from typing import Literal

from huggingface_hub.dataclasses import strict

from .configuration_core import WrapperConfig


PAPER_SLOPE = 0.0006
"""`replacing_k` of the official example."""


@strict
class TheseusConfig(WrapperConfig):
    """A predecessor, `encoder_config`, whose modules of equally many layers are replaced by one layer each.

    The rate at update t (from 0) is, with b = `replacing_rate` and k = `replacing_k`:

    * "linear": min(k t + b, 1), the curriculum of the paper (equation 6);
    * "constant": b, and 1 from update `steps_for_replacing` on;
    * "anti_curriculum": max(1 - k t, b), the falling rate of the paper's ablation. How it falls is not in the paper.

    Args:
        successor_num_hidden_layers: layers that are kept, a divisor of the encoder's depth.
        replacing_rate: b, in (0, 1]: probability that a module is replaced, at the start ("anti_curriculum": at the
            end).
        replacing_scheduler: how the rate changes.
        replacing_k: change of the rate per update. None follows from `steps_for_replacing` or is the official 0.0006;
            "constant" has none.
        steps_for_replacing: updates of the replacing phase, after which the rate is 1 (linear, constant) or b
            (anti_curriculum); below 1, a share of all updates of the run. None: as `replacing_k` says ("constant":
            never; the official command line's default 0 means 1 from the second update on, and is refused here).
        successor_init: the predecessor's layers that the successor starts from, as in the official code: the "first"
            ones, the "top" ones, every n-th ("interleaved": the last of each module), or "random" weights.
        successor_from: another checkpoint (folder or Hub name) to take these layers from, such as the model before
            its fine-tuning (the paper's wording). Read by `from_encoder` only.
        has_predecessor: False in checkpoints that were saved after `drop_predecessor()`.

    Raises:
        ValueError: a depth that does not divide, a rate outside (0, 1], or settings that another scheduler has.
    """

    model_type = "bestiary-theseus"

    successor_num_hidden_layers: int = 6
    replacing_rate: float | int = 0.3
    replacing_scheduler: Literal["linear", "constant", "anti_curriculum"] = "linear"
    replacing_k: float | int | None = None
    steps_for_replacing: float | int | None = None
    successor_init: Literal["first", "top", "interleaved", "random"] = "first"
    successor_from: str | None = None
    has_predecessor: bool = True

    def validate_successor(self):
        """The successor's depth divides the predecessor's."""
        depth = self.encoder_config.num_hidden_layers
        if self.successor_num_hidden_layers < 1 or depth % self.successor_num_hidden_layers:
            raise self.reject("successor_num_hidden_layers", f"a divisor of the encoder's num_hidden_layers={depth}")
        if self.successor_from is not None and self.successor_init == "random":
            raise self.reject("successor_from", "None with successor_init='random'")

    def validate_schedule(self):
        """The rate is a probability above 0; slope and length of the phase do not contradict each other."""
        if not 0 < self.replacing_rate <= 1:
            raise self.reject("replacing_rate", "in (0, 1]")
        if self.replacing_k is not None:
            if self.replacing_scheduler == "constant":
                raise self.reject("replacing_k", "None with replacing_scheduler='constant'")
            if self.steps_for_replacing is not None:
                raise self.reject("replacing_k", "None where steps_for_replacing is given, from which it follows")
            if not 0 < self.replacing_k < math.inf:
                raise self.reject("replacing_k", "above 0 and finite")
        if self.steps_for_replacing is not None:
            if not 0 < self.steps_for_replacing < math.inf:
                raise self.reject(
                    "steps_for_replacing", "above 0 and finite (below 1: a share of all updates), or None"
                )
            if self.steps_for_replacing >= 1 and self.steps_for_replacing != int(self.steps_for_replacing):
                raise self.reject("steps_for_replacing", "a whole number of updates, or a share below 1")

    def rate_at(self, step: int, total: int) -> float:
        """Probability in force at update `step` (from 0) of `total`; depends on nothing else."""
        rate, length = self.replacing_rate, self.steps_for_replacing
        if length is not None and length < 1:
            length = max(1, math.ceil(length * total))
        if self.replacing_scheduler == "constant":
            return 1.0 if length is not None and step >= length else rate
        if length is None:
            way = (PAPER_SLOPE if self.replacing_k is None else self.replacing_k) * step
        else:
            way = 1 - rate if step >= length else (1 - rate) * step / length
        return min(rate + way, 1.0) if self.replacing_scheduler == "linear" else max(1.0 - way, rate)

    def is_replaced_at(self, step: int, total: int) -> bool:
        """Whether the rate is 1 at update `step` and stays 1: the predecessor has run for the last time."""
        stays = self.replacing_scheduler != "anti_curriculum" or self.replacing_rate == 1
        return stays and self.rate_at(step, total) == 1

    def source_layers(self, depth: int) -> list[int]:
        """Which of `depth` layers each layer of the successor starts from; not for "random".

        Raises:
            ValueError: `depth` is below the successor's, or no multiple of it for "interleaved".
        """
        kept = self.successor_num_hidden_layers
        interleaved = self.successor_init == "interleaved"
        if depth < kept or (interleaved and depth % kept):
            raise ValueError(
                f"{type(self).__name__}.successor_num_hidden_layers={kept} with successor_init="
                f"{self.successor_init!r} needs {'a multiple of as many' if interleaved else 'at least as many'} "
                f"layers to start from; successor_from={self.successor_from!r} has {depth}."
            )
        if self.successor_init == "top":
            return list(range(depth - kept, depth))
        if interleaved:
            return [(index + 1) * depth // kept - 1 for index in range(kept)]
        return list(range(kept))
