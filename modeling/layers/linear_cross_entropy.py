"""Cross-entropy of a linear layer without the (rows, vocabulary) logits in memory.

Plain path: linear layer, then cross-entropy. Fast path, from about a thousand rows at a vocabulary of 30,000 on: the
same numbers chunk by chunk, the gradient made in the forward pass while a chunk's logits are at hand. It takes a tenth
of the memory there and no more time; below the limit the plain path is as good.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


PLAIN_LOGITS = 2**25
"""The plain path is taken up to this many logits: 1,099 rows at a vocabulary of 30,522."""
CHUNK_LOGITS = 2**23
"""Logits held at a time by the chunked path: 274 rows at a vocabulary of 30,522, 32 MB in float32."""


def linear_cross_entropy_sum(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
) -> torch.Tensor:
    """Sum over kept rows i of `-log softmax(hidden_i @ weight.T + bias)[labels_i]`.

    Args:
        hidden: (M, D). M = 0 gives 0 and zero gradients, so that every process of a data-parallel run has them.
        weight: (V, D).
        bias: (V,) or None.
        labels: (M,) int64. Rows with `ignore_index` count nothing but cost as much as others: gather the labelled rows
            first.
        ignore_index: label of rows to leave out.
        chunk_rows: None chooses the path by the number of logits; a number forces the chunked path with so many rows
            at a time.

    Returns:
        () in float32 (float64 for float64 inputs), also under autocast, where the products alone are in the lower
        precision. The chunked path sums the gradients of its chunks in float32. It can be differentiated once;
        `torch.compile` always gets the plain path.

    Raises:
        ValueError: a kept label outside [0, V). Checked on CPU outside `torch.compile`; elsewhere the check would wait
            for the device.
    """
    vocabulary = weight.shape[0]
    compiling = torch.compiler.is_compiling()
    if labels.device.type == "cpu" and not compiling:
        wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= vocabulary))]
        if wrong.numel():
            raise ValueError(
                f"linear_cross_entropy_sum: labels must lie in [0, {vocabulary}) or be {ignore_index} (left out), "
                f"got {wrong[0].item()}; check that tokenizer and model have the same vocabulary."
            )
    if compiling or (chunk_rows is None and labels.shape[0] * vocabulary <= PLAIN_LOGITS):
        logits = F.linear(hidden, weight, bias)  # (M, V)
        return F.cross_entropy(_at_least_float32(logits), labels, ignore_index=ignore_index, reduction="sum")
    chunk_rows = chunk_rows or max(1, CHUNK_LOGITS // vocabulary)
    return _ChunkedLinearCrossEntropy.apply(
        hidden, weight, bias, labels, ignore_index, chunk_rows, torch.is_grad_enabled()
    )


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    """The chunked path: P = softmax(logits), Y one-hot, dlogits = P - Y, dweight = dlogits.T @ hidden."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, ignore_index, chunk_rows, grad_enabled):
        device = hidden.device.type
        dtype = hidden.dtype
        if torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        # needs_input_grad ignores no_grad, and grad mode is always off in here: the caller tells.
        need_hidden, need_weight, need_bias = (grad_enabled and need for need in ctx.needs_input_grad[:3])
        sums = {"dtype": torch.float64 if dtype == torch.float64 else torch.float32, "device": hidden.device}
        loss = torch.zeros((), **sums)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros(weight.shape, **sums) if need_weight else None
        grad_bias = torch.zeros(bias.shape, **sums) if need_bias else None
        kept = labels != ignore_index  # (M,)
        labels = labels.masked_fill(~kept, 0)
        with torch.autocast(device, enabled=False):
            cast_weight = weight.to(dtype)
            cast_bias = None if bias is None else bias.to(dtype)
            for start in range(0, hidden.shape[0], chunk_rows):
                rows = slice(start, start + chunk_rows)
                chunk = hidden[rows].to(dtype)  # (C, D)
                target = labels[rows, None]  # (C, 1)
                keep = kept[rows, None]  # (C, 1)
                logits = _at_least_float32(F.linear(chunk, cast_weight, cast_bias))  # (C, V)
                logits -= logits.amax(1, keepdim=True)
                picked = logits.gather(1, target)
                total = logits.exp_().sum(1, keepdim=True)
                loss += ((total.log() - picked) * keep).sum()
                if need_hidden or need_weight or need_bias:
                    grad = logits.mul_(keep / total)  # (C, V), in place: P
                    grad.scatter_add_(1, target, -keep.to(grad.dtype))  # P - Y
                    if need_bias:
                        grad_bias += grad.sum(0)
                    grad = grad.to(dtype)
                    if need_hidden:
                        grad_hidden[rows] = grad @ cast_weight
                    if need_weight and dtype == grad_weight.dtype:
                        grad_weight.addmm_(grad.T, chunk)
                    elif need_weight:
                        grad_weight += grad.T @ chunk
                    del grad
                del logits  # before the next chunk's logits are made
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        # Out of place: the saved gradients serve again if the graph is kept.
        grads = (
            None if grad is None else (grad * grad_loss).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes)
        )
        return *grads, None, None, None, None
