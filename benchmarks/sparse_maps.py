"""Rows for alpha-entmax and its losses against the package of its authors, and against softmax.

The package entmax is no dependency; without it the rows are skipped. Both sides get the same logits, and are timed
only after their probabilities were seen to agree.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from bestiary.modeling.layers.entmax import entmax, entmax_losses

from .harness import compare, compare_memory, row, with_target
from .linear_attention import package


SHAPES = {"8x4x128x128": (8, 4, 128, 128), "2x12x512x512": (2, 12, 512, 512), "256x32000": (256, 32_000)}
DEVIATIONS = (1.5, 0.1)
"""Of normal logits: of a trained model, and flat as in an untrained one."""
TARGETS = {"8x4x128x128": 0.20, "2x12x512x512": 0.20, "256x32000": 0.15}
TOP_K_TARGETS = {1.5: 0.95, 0.1: 0.40}
LARGEST_ERROR = 2e-6

Map = Callable[[torch.Tensor], torch.Tensor]


def logits_of(shape: tuple[int, ...], deviation: float) -> torch.Tensor:
    """Normal logits that want a gradient."""
    draw = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=draw) * deviation).requires_grad_()


def both_passes(function: Map, logits: torch.Tensor) -> Callable[[], object]:
    """Forward and backward pass to the logits."""
    grad = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    return lambda: torch.autograd.grad(function(logits), logits, grad)


def agree(name: str, ours: torch.Tensor, peer: torch.Tensor) -> None:
    """Refuse to time functions that do not compute the same."""
    error = (ours - peer).abs().max().item()
    if not error <= LARGEST_ERROR:
        raise RuntimeError(f"benchmark {name}: the results differ by {error:.1e}")


def map_row(name: str, alpha: float, peer_name: str, pairs: int, targets: dict[str, float]) -> dict:
    """Times and peak memory of both passes by shape and deviation."""
    peer = getattr(package("entmax"), peer_name)
    metrics = {}
    for label, shape in SHAPES.items():
        for deviation in DEVIATIONS:
            logits = logits_of(shape, deviation)
            with torch.no_grad():
                agree(f"{name}, {label}", entmax(logits, alpha), peer(logits, -1))
            functions = {
                "peer": both_passes(lambda z: peer(z, -1), logits),
                "ours": both_passes(lambda z: entmax(z, alpha), logits),
                "ours, sort": both_passes(lambda z: entmax(z, alpha, method="sort"), logits),
                "softmax": both_passes(lambda z: z.softmax(-1), logits),
            }
            times = compare(functions, pairs)
            if label in targets:
                times["ours"] = with_target(times["ours"], targets[label])
            metrics[f"both passes, {label}, deviation {deviation}"] = times
        functions.pop("ours, sort")
        metrics[f"peak memory, {label}, deviation {deviation}"] = compare_memory(functions)
    for deviation in DEVIATIONS:
        logits = logits_of(SHAPES["256x32000"], deviation)
        times = compare(
            {
                "peer": both_passes(lambda z: peer(z, -1, 100), logits),
                "ours": both_passes(lambda z: entmax(z, alpha), logits),
                "ours, topk": both_passes(lambda z: entmax(z, alpha, method="topk"), logits),
            },
            pairs,
        )
        if targets:
            times["ours"] = with_target(times["ours"], TOP_K_TARGETS[deviation])
        metrics[f"both passes, 256x32000, deviation {deviation}, peer with k=100"] = times
    return {"description": f"entmax with alpha {alpha}", "peer": f"entmax.{peer_name}", "metrics": metrics}


@row("entmax15")
def entmax15_row(pairs: int) -> dict:
    return map_row("entmax15", 1.5, "entmax15", pairs, TARGETS)


@row("sparsemax")
def sparsemax_row(pairs: int) -> dict:
    return map_row("sparsemax", 2.0, "sparsemax", pairs, {})


@row("entmax_loss")
def entmax_loss_row(pairs: int) -> dict:
    peer = package("entmax").entmax15_loss
    shape = SHAPES["256x32000"]
    labels = torch.randint(0, shape[1], shape[:1], generator=torch.Generator().manual_seed(1))
    metrics = {}
    for deviation in DEVIATIONS:
        logits = logits_of(shape, deviation)
        with torch.no_grad():
            agree("entmax_loss", entmax_losses(logits, labels).losses / 10, peer(logits, labels) / 10)

        def step(loss: Map, logits: torch.Tensor = logits) -> Callable[[], object]:
            return lambda: torch.autograd.grad(loss(logits), logits)

        functions = {
            "peer": step(lambda z: peer(z, labels).sum()),
            "peer, k=100": step(lambda z: peer(z, labels, 100).sum()),
            "ours": step(lambda z: entmax_losses(z, labels).losses.sum()),
            "cross-entropy": step(lambda z: F.cross_entropy(z, labels, reduction="sum")),
        }
        metrics[f"loss and gradient, deviation {deviation}"] = compare(functions, pairs)
        metrics[f"peak memory, deviation {deviation}"] = compare_memory(functions)
    return {"description": "1.5-entmax loss, 256x32000", "peer": "entmax.entmax15_loss", "metrics": metrics}


@row("entmax_any_alpha")
def entmax_any_alpha(pairs: int) -> dict:
    peer = package("entmax").entmax_bisect
    label = "8x4x128x128"
    logits = logits_of(SHAPES[label], 1.5)
    alpha = torch.linspace(1.1, 1.9, 4).view(4, 1, 1).requires_grad_()
    grad = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        agree("entmax_any_alpha", entmax(logits, alpha), peer(logits, alpha.expand(8, 4, 128, 1)))

    def step(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(logits, alpha), (logits, alpha), grad)

    functions = {
        "peer": step(lambda z, a: peer(z, a.expand(8, 4, 128, 1), n_iter=30)),
        "ours": step(lambda z, a: entmax(z, a, n_iter=30)),
    }
    return {
        "description": "one alpha a head and its gradient, 30 halvings",
        "peer": "entmax.entmax_bisect",
        "metrics": {f"both passes, {label}": compare(functions, pairs)},
    }
