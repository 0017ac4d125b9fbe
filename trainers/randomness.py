"""Random streams that depend on what is drawn for, never on who draws it or when.

A corruption drawn from one running generator changes with the batch size, the number of accumulation steps, processes
or workers, and is lost when training is killed. Here every draw has a key: `(seed, epoch, example)` in collators,
`(seed, step)` in trainers.
"""

import numpy as np
import torch


EVALUATION_EPOCH = -1
"""Epoch number of every evaluation, so that each evaluation of a run sees the same corruption."""


def example_rng(seed: int, epoch: int, key: int) -> np.random.Generator:
    """Generator for everything drawn for one example in one epoch.

    Args:
        seed: of the run, non-negative.
        epoch: non-negative in training, `EVALUATION_EPOCH` in evaluation.
        key: of the example, usually its index in the data set.
    """
    words = np.array([key, epoch - EVALUATION_EPOCH], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=np.array([seed, 0], dtype=np.uint64), counter=[0, 0, *words]))


def step_generator(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Torch generator for an algorithm's own draws at one optimizer step, equal on all processes."""
    state = int(np.random.SeedSequence([seed, step]).generate_state(1, dtype=np.uint64)[0] >> np.uint64(1))
    return torch.Generator(device=device).manual_seed(state)
