"""Rows for the kernels of modeling/layers against the torch functions they replace."""

import torch
import torch.nn.functional as F

from bestiary.modeling.layers.dropout import dropout
from bestiary.modeling.layers.linear_cross_entropy import linear_cross_entropy_sum
from bestiary.modeling.layers.sampling import sample_categorical

from .harness import compare, compare_memory, row, with_target


VOCABULARY = 30_522


@row("linear_cross_entropy")
def linear_cross_entropy(pairs: int) -> dict:
    rows, width = 2048, 256
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=draw, requires_grad=True)
    weight = (torch.randn(VOCABULARY, width, generator=draw) * 0.05).requires_grad_()
    bias = torch.zeros(VOCABULARY, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (rows,), generator=draw)

    def peer():
        loss = F.cross_entropy(F.linear(hidden, weight, bias), labels, reduction="sum")
        return torch.autograd.grad(loss, (hidden, weight, bias))

    def ours():
        return torch.autograd.grad(linear_cross_entropy_sum(hidden, weight, bias, labels), (hidden, weight, bias))

    functions = {"peer": peer, "ours": ours}
    times, memory = compare(functions, pairs), compare_memory(functions)
    return {
        "description": f"loss and gradients, {rows} rows, width {width}, vocabulary {VOCABULARY}",
        "peer": "cross_entropy on the full logits",
        "metrics": {
            "time": {"peer": times["peer"], "ours": with_target(times["ours"], 1.05)},
            "memory": {"peer": memory["peer"], "ours": with_target(memory["ours"], 0.15)},
        },
    }


@row("dropout")
def dropout_row(pairs: int) -> dict:
    p = 0.1
    torch.zeros(2**23)  # freed at once: malloc then keeps freed memory, as in any process that has trained a step
    values = torch.randn(8, 128, 768, generator=torch.Generator().manual_seed(0))
    leaf = values.clone().requires_grad_()

    def backward(function):
        return lambda: torch.autograd.grad(function(leaf, p), leaf, values)

    forward = compare({"peer": lambda: F.dropout(values, p), "ours": lambda: dropout(values, p)}, 4 * pairs, warmup=3)
    both = compare({"peer": backward(F.dropout), "ours": backward(dropout)}, 4 * pairs, warmup=3)
    return {
        "description": f"{values.numel()} values, p = {p}",
        "peer": "torch.nn.functional.dropout",
        "metrics": {
            "forward": {"peer": forward["peer"], "ours": with_target(forward["ours"], 0.40)},
            "forward and backward": {"peer": both["peer"], "ours": with_target(both["ours"], 0.60)},
        },
    }


@row("sampling")
def sampling(pairs: int) -> dict:
    rows = 300
    logits = torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(0)) * 2
    slots = {"seeds": torch.tensor([1]), "rows": (torch.zeros(rows, dtype=torch.int64), torch.arange(rows))}
    times = compare(
        {
            "peer": lambda: torch.multinomial(logits.softmax(1), 1),
            "inverse_cdf": lambda: sample_categorical(logits, method="inverse_cdf"),
            "inverse_cdf, seeds": lambda: sample_categorical(logits, method="inverse_cdf", **slots),
            "gumbel": lambda: sample_categorical(logits, method="gumbel"),
            "gumbel, seeds": lambda: sample_categorical(logits, method="gumbel", **slots),
        },
        pairs,
    )
    for name in ("inverse_cdf", "inverse_cdf, seeds"):
        times[name] = with_target(times[name], 0.10)
    return {
        "description": f"one token for each of {rows} rows of {VOCABULARY} logits",
        "peer": "softmax and torch.multinomial",
        "metrics": {"time": times},
    }
