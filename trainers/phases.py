"""Training on several data sets one after the other under one schedule, such as BERT's short and long sequences."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset


class PhasedDataset(Dataset):
    """One pass over all examples of a run: phase after phase, each shuffled anew whenever it starts over.

    The place in the run determines the example, so it is to be read in order
    (`train_sampling_strategy="sequential"`), and a resumed run sees what the uninterrupted one would. Phases should
    be multiples of the global batch, so that no batch mixes two of them.

    Args:
        phases: pairs of a data set and the number of examples to draw from it.
        seed: of the shuffles.

    Raises:
        ValueError: no phase, an empty data set, or a negative number.
    """

    def __init__(self, phases: Sequence[tuple[Any, int]], seed: int):
        if not phases:
            raise ValueError("PhasedDataset.phases must name at least one data set.")
        for number, (dataset, examples) in enumerate(phases):
            if len(dataset) == 0 or examples < 0:
                raise ValueError(
                    f"PhasedDataset.phases[{number}] has {len(dataset)} rows and is to give {examples} examples; "
                    "it needs rows, and a number that is not negative."
                )
        self.phases = list(phases)
        self.ends = np.cumsum([examples for _, examples in self.phases])
        self.seed = seed
        self._order: tuple[tuple[int, int], np.ndarray] | None = None

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"PhasedDataset has {len(self)} examples, asked for {index}.")
        phase = int(np.searchsorted(self.ends, index, side="right"))
        dataset, examples = self.phases[phase]
        turn, place = divmod(index - int(self.ends[phase]) + examples, len(dataset))
        return dataset[int(self._permutation(phase, turn)[place])]

    def _permutation(self, phase: int, turn: int) -> np.ndarray:
        if self._order is None or self._order[0] != (phase, turn):
            rows = len(self.phases[phase][0])
            self._order = (phase, turn), np.random.default_rng([self.seed, phase, turn]).permutation(rows)
        return self._order[1]
