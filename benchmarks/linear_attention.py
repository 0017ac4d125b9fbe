"""Rows for attention in linear time: against the packages that users would take, and against fused softmax attention.

The packages performer-pytorch and linear-attention-transformer are no dependencies; without one of them its row is
skipped. Both sides get the same queries, keys and values, and are timed only after their results were seen to agree.
"""

import importlib
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F

from bestiary.configuration.configuration_linear_attention import LinearAttentionConfig
from bestiary.configuration.configuration_performer import PerformerConfig
from bestiary.modeling.modeling_linear_attention import LinearSelfAttention
from bestiary.modeling.modeling_performer import PerformerSelfAttention

from .harness import PeerMissing, compare, compare_memory, row, with_target


HEADS, WIDTH, FEATURES = 4, 64, 256
LENGTHS = (512, 2048, 8192)
SCALES = (1.0, 0.5, 0.1)
"""Deviations of queries and keys at which the error of FAVOR+ is given."""

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def package(name: str) -> ModuleType:
    """A peer's module.

    Raises:
        PeerMissing: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise PeerMissing(f"{name.split('.')[0].replace('_', '-')} cannot be imported ({error})") from error


def heads(length: int, scale: float = 1.0) -> Heads:
    """Normal queries, keys and values (1, H, T, d) that want gradients."""
    draw = torch.Generator().manual_seed(length)
    query, key, value = (torch.randn(1, HEADS, length, WIDTH, generator=draw) for _ in range(3))
    return tuple(part.requires_grad_() for part in (query * scale, key * scale, value))


def module(config: PerformerConfig | LinearAttentionConfig, projection: torch.Tensor | None = None) -> Attend:
    """Our self-attention without its linear maps: (1, H, T, d) three times -> (1, T, H d)."""
    performer = isinstance(config, PerformerConfig)
    layer = (PerformerSelfAttention if performer else LinearSelfAttention)(config, 0)
    if performer and config.projects:
        layer.projection_matrix.copy_(layer.new_projection(0, 0) if projection is None else projection)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        layer.project = lambda hidden: (query, key, value)
        return layer(value[:, 0])[0]

    return attend


SIZES = {"hidden_size": HEADS * WIDTH, "num_attention_heads": HEADS}


def favor(projection: torch.Tensor | None = None, causal: bool = False, **settings) -> Attend:
    """FAVOR+ with 256 features."""
    return module(PerformerConfig(**SIZES, num_random_features=FEATURES, is_decoder=causal, **settings), projection)


def linear(kernel: str, causal: bool = False, **settings) -> Attend:
    """Linear attention by one of its kernels."""
    return module(LinearAttentionConfig(**SIZES, attention_kernel=kernel, is_decoder=causal, **settings))


def agree(name: str, length: int, ours: torch.Tensor, peer: torch.Tensor) -> None:
    """Refuse to time functions that do not compute the same."""
    peer = peer.transpose(1, 2).flatten(2)
    error = (ours - peer).abs().max().item() / peer.abs().max().item()
    if not error < 1e-4:
        raise RuntimeError(f"benchmark {name}, length {length}: the results differ by {error:.1e} of the largest one")


def both_passes(attend: Attend, inputs: Heads) -> Callable[[], object]:
    """Forward and backward pass to queries, keys and values."""
    with torch.no_grad():
        grad = torch.randn(attend(*inputs).shape, generator=torch.Generator().manual_seed(0))
    return lambda: torch.autograd.grad(attend(*inputs), inputs, grad)


def forward_pass(attend: Attend, inputs: Heads) -> Callable[[], object]:
    """Forward pass without a graph."""

    def run() -> torch.Tensor:
        with torch.no_grad():
            return attend(*inputs)

    return run


def against_package(name: str, pairs: int, ours: Attend, peer: Attend, target: float, lengths=LENGTHS) -> dict:
    """Times of both passes and of the forward pass, and peak memory, by length."""
    metrics = {}
    for length in lengths:
        inputs = heads(length)
        with torch.no_grad():
            agree(name, length, ours(*inputs), peer(*inputs))
        functions = {"peer": both_passes(peer, inputs), "ours": both_passes(ours, inputs)}
        times, memory = compare(functions, pairs), compare_memory(functions)
        metrics[f"both passes, {length} tokens"] = {
            "peer": times["peer"],
            "ours": with_target(times["ours"], target),
        }
        metrics[f"forward, {length} tokens"] = compare(
            {"peer": forward_pass(peer, inputs), "ours": forward_pass(ours, inputs)}, pairs
        )
        metrics[f"peak memory, {length} tokens"] = memory
    return metrics


def favor_errors(length: int = 512, draws: int = 4) -> dict[str, float]:
    """Largest difference of FAVOR+ from exact softmax attention over the largest result, median of some projections,
    by the deviation of normal queries and keys.
    """
    errors = {}
    for scale in SCALES:
        query, key, value = (part.detach() for part in heads(length, scale))
        exact = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        found = []
        for seed in range(draws):
            config = PerformerConfig(**SIZES, num_random_features=FEATURES)
            projection = PerformerSelfAttention(config, 0).new_projection(seed, 0)
            found.append((favor(projection)(query, key, value) - exact).abs().max() / exact.abs().max())
        errors[str(scale)] = torch.stack(found).median().item()
    return errors


@row("favor_attention")
def favor_attention(pairs: int) -> dict:
    peer = package("performer_pytorch.performer_pytorch").FastAttention(WIDTH, FEATURES)
    return {
        "description": f"FAVOR+ softmax, {HEADS} heads of {WIDTH}, {FEATURES} features, equal results (epsilon 1e-4)",
        "peer": "performer-pytorch FastAttention",
        "metrics": against_package(
            "favor_attention", pairs, favor(peer.projection_matrix, kernel_epsilon=1e-4), peer, 0.88
        ),
        "error against exact softmax, share of the largest result, by deviation of queries and keys": favor_errors(),
    }


@row("causal_linear_attention")
def causal_linear_attention(pairs: int) -> dict:
    product = package("performer_pytorch.performer_pytorch").causal_linear_attention_noncuda

    def peer(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return product(F.elu(query) + 1, F.elu(key) + 1, value)

    return {
        "description": f"causal linear attention, elu + 1, {HEADS} heads of {WIDTH}",
        "peer": "performer-pytorch causal_linear_attention_noncuda on the same features",
        "metrics": against_package("causal_linear_attention", pairs, linear("elu", causal=True), peer, 0.12),
    }


@row("efficient_attention")
def efficient_attention(pairs: int) -> dict:
    product = package("linear_attention_transformer.linear_attention_transformer").linear_attn

    def peer(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return product(query, key, value) * WIDTH**0.5  # it divides by the root of the width, which no paper does

    return {
        "description": f"two softmaxes, {HEADS} heads of {WIDTH}",
        "peer": "linear-attention-transformer linear_attn",
        "metrics": against_package("efficient_attention", pairs, linear("double_softmax"), peer, 1.10),
    }


@row("linear_against_softmax")
def linear_against_softmax(pairs: int) -> dict:
    length = 2048
    inputs = heads(length)
    variants = {
        "elu + 1": (linear("elu"), 0.12),
        "FAVOR+ relu": (favor(attention_kernel="generalized_relu", use_projection=True), 0.45),
        "FAVOR+ softmax": (favor(), None),
        "two softmaxes": (linear("double_softmax"), None),
    }
    functions = {"peer": both_passes(F.scaled_dot_product_attention, inputs)}
    functions |= {name: both_passes(attend, inputs) for name, (attend, _) in variants.items()}
    times = compare(functions, pairs)
    for name, (_, target) in variants.items():
        times[name] = times[name] if target is None else with_target(times[name], target)
    return {
        "description": f"both passes, {HEADS} heads of {WIDTH}, {length} tokens, {FEATURES} features",
        "peer": "fused scaled_dot_product_attention",
        "metrics": {"time": times},
    }
