"""Official numbers against ours: reading a folder of them, and comparing with a table of every error.

A folder has `config.json`, and `inputs`, `outputs` and `weights` in safetensors. A parity test gets it from the
fixture `parity_dir(slug)`, so that `pytest --parity-dir DIR` runs the same test on `DIR/<slug>`, whose sizes and
options may be others: whatever depends on them is read from the folder.
"""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


TOLERANCE = 1e-5
"""Largest allowed error, as `Comparison` measures it, where a paper's test does not say otherwise."""


@dataclass(frozen=True)
class Record:
    """A folder of official numbers."""

    folder: Path
    config: dict[str, Any]
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]

    @classmethod
    def load(cls, folder: Path) -> "Record":
        tensors = (load_file(folder / f"{name}.safetensors") for name in ("inputs", "outputs", "weights"))
        return cls(folder, json.loads((folder / "config.json").read_text(encoding="utf-8")), *tensors)


class Comparison:
    """Collects comparisons in a `with` block and fails at its end, with a table, if one is beyond its tolerance.

    The error of a tensor is max |ours - official| / max(1, max |official|): absolute for numbers about 1, relative to
    the largest one for larger numbers. Integers must be equal.
    """

    def __init__(self, record: Record):
        self.record = record
        self.rows: list[tuple[str, float, float, str]] = []

    def __enter__(self) -> "Comparison":
        return self

    def __call__(
        self,
        name: str,
        ours: torch.Tensor,
        official: torch.Tensor | None = None,
        tolerance: float = TOLERANCE,
        where: torch.Tensor | None = None,
    ) -> None:
        """Compare with `official`, by default the recorded output of this name, at the places `where` is true."""
        official = self.record.outputs[name] if official is None else official
        ours = ours.detach()
        if ours.numel() == official.numel() == 1:
            ours, official = ours.reshape(()), official.reshape(())
        if ours.shape != official.shape:
            self.rows.append((name, float("nan"), 0.0, f"shape {list(ours.shape)}, official {list(official.shape)}"))
            return
        if where is not None:
            ours, official = ours[where.bool()], official[where.bool()]
        if ours.numel() == 0:
            self.rows.append((name, float("nan"), 0.0, "nothing to compare"))
        elif not official.is_floating_point():
            wrong = int((ours != official).sum())
            self.rows.append((name, wrong, 0.0, f"{wrong} of {official.numel()} differ"))
        else:
            error = (ours.double() - official.double()).abs().max() / official.double().abs().max().clamp(min=1)
            self.rows.append((name, error.item(), tolerance, f"{official.numel()} numbers"))

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is not None:
            return
        width = max(len(name) for name, *_ in self.rows)
        bad = [not error <= tolerance for _, error, tolerance, _ in self.rows]
        table = [
            f"{'FAIL' if failed else 'ok':4}  {name:{width}}  {error:.1e} <= {tolerance:.1e}  {note}"
            for failed, (name, error, tolerance, note) in zip(bad, self.rows)
        ]
        report = "\n".join([f"{sum(bad)} of {len(bad)} differ from {self.record.folder}", *table])
        print(report)
        if any(bad):
            raise AssertionError(report)

    def remind(self, skip: Callable[[str], bool]) -> None:
        """Warn of recorded outputs that were not compared and that `skip` does not know from elsewhere."""
        left = sorted(set(self.record.outputs) - {name for name, *_ in self.rows})
        if left := [name for name in left if not skip(name)]:
            warnings.warn(f"{self.record.folder}: nothing is compared with {', '.join(left)}.", stacklevel=2)


def dense_labels(positions: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, length: int) -> torch.Tensor:
    """Labels (B, T) from the slots of official code: the id at every position whose slot has weight 1, else -100."""
    labels = torch.full((positions.shape[0], length), -100)
    rows, slots = weights.bool().nonzero(as_tuple=True)
    labels[rows, positions[rows, slots]] = ids[rows, slots]
    return labels


def take_positions(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """States (B, T, D) at positions (B, P): (B, P, D)."""
    return states[torch.arange(len(positions))[:, None], positions]


def compare_gradients(compare: Comparison, model: torch.nn.Module, name_of: Callable[[str], str]) -> None:
    """Compare all gradients `grad.<official name>`, and all norms in `gradient_norms` of `config.json`.

    `name_of` gives the official name of a parameter; a name in `/kernel` is that of a transposed matrix.
    """
    gradients = {}
    for key, parameter in model.named_parameters():
        name = name_of(key)
        gradients[name] = parameter.grad.T if name.endswith("/kernel") else parameter.grad
    record = compare.record
    for name in record.outputs:
        if name.startswith("grad."):
            compare(name, gradients[name.removeprefix("grad.")])
    for name, norm in record.config.get("gradient_norms", {}).items():
        compare(f"norm of {name}", gradients[name].norm(), torch.tensor(norm))
