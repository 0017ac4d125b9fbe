"""Pack the sequences of a padded batch into fewer rows, so that no work is spent on padding.

Every layer of an encoder except attention treats tokens alone, so whole sequences can share a row when attention is
kept inside each of them by a block-diagonal mask. Planning reads the sequence lengths on the host (it waits for a
device and breaks a compiled graph): do it once per forward pass, before the layers.
"""

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class PackedRows:
    """Where each token of a padded (B, T) batch stands in R packed rows of L <= T slots, and back.

    Attributes:
        index: (R, L) int64, the token of each slot in the flattened (B * T) batch; 0 in empty slots.
        sequence_ids: (R, L) int64, the batch row a slot's token comes from; -1 in empty slots.
        inverse: (B, T) int64, the slot of each token in the flattened (R * L) rows; 0 at padding.
        token_mask: (B, T) bool, True at tokens.
    """

    index: torch.Tensor
    sequence_ids: torch.Tensor
    inverse: torch.Tensor
    token_mask: torch.Tensor

    def pack(self, tensor: torch.Tensor, fill: float = 0) -> torch.Tensor:
        """(B, T, ...) -> (R, L, ...) with `fill` in empty slots (-100 for labels). Differentiable."""
        return _select(tensor, self.index, self.sequence_ids >= 0, fill)

    def unpack(self, tensor: torch.Tensor) -> torch.Tensor:
        """(R, L, ...) -> (B, T, ...) with zeros at padding. Differentiable."""
        return _select(tensor, self.inverse, self.token_mask, 0)

    def attention_mask(self) -> torch.Tensor:
        """(R, 1, L, L) bool, True = attend: slots of one sequence. Empty slots see each other: no softmax is empty."""
        return self.sequence_ids[:, None, :, None] == self.sequence_ids[:, None, None, :]


def plan_packing(attention_mask: torch.Tensor) -> PackedRows:
    """Assign the sequences of a batch to rows, longest first, each to the first row with room (first-fit decreasing).

    Args:
        attention_mask: (B, T), non-zero = token. Padding may stand on any side or between tokens; order is kept, gaps
            are closed.
    """
    if attention_mask.dim() != 2:
        raise ValueError(
            "plan_packing: attention_mask must have two axes (batch, length), got shape "
            f"{tuple(attention_mask.shape)}; masks of one score per query and key cannot be packed."
        )
    mask = attention_mask != 0  # (B, T)
    batch, width = mask.shape
    device = mask.device
    lengths = mask.sum(1).cpu().numpy()  # (B,)
    used = np.zeros(max(1, batch), dtype=np.int64)  # slots taken in each row; rows are opened from the left
    row, offset = np.zeros(batch, dtype=np.int64), np.zeros(batch, dtype=np.int64)
    for sequence in np.argsort(-lengths, kind="stable"):
        row[sequence] = np.argmax(used + lengths[sequence] <= width)
        offset[sequence] = used[row[sequence]]
        used[row[sequence]] += lengths[sequence]
    rows, length = max(1, np.count_nonzero(used)), max(1, used.max())

    start = torch.from_numpy(row * length + offset).to(device)  # (B,)
    slots = start[:, None] + mask.cumsum(1) - 1  # (B, T), meaningful at tokens
    taken = slots[mask]  # (N,)
    index = torch.zeros(rows * length, dtype=torch.int64, device=device)
    sequence_ids = torch.full_like(index, -1)
    tokens = mask.flatten().nonzero().squeeze(1)  # (N,)
    index[taken] = tokens
    sequence_ids[taken] = tokens // width
    return PackedRows(
        index=index.view(rows, length),
        sequence_ids=sequence_ids.view(rows, length),
        inverse=slots.masked_fill(~mask, 0),
        token_mask=mask,
    )


def padding_share(attention_mask: torch.Tensor) -> float:
    """Share of padding in a (B, T) mask, 0 to 1. Waits for a device."""
    return 1 - (attention_mask != 0).float().mean().item()


def _select(tensor: torch.Tensor, index: torch.Tensor, kept: torch.Tensor, fill: float) -> torch.Tensor:
    """(X, Y, ...) -> index.shape + (...): rows of the flattened tensor, `fill` where not kept."""
    picked = tensor.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape)
    return picked.masked_fill(~kept.view(kept.shape + (1,) * (picked.dim() - 2)), fill)
