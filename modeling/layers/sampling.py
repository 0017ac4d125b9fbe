"""Draw one token per row from the softmax of vocabulary-sized logits.

`method="gumbel"` is the Gumbel-max trick in float32 with the two epsilons of ELECTRA's official code (Clark et al.
2020, arXiv 2003.10555): argmax(logits / T - log(-log(u + 1e-9) + 1e-9)). It needs a uniform number per row and token.
`method="inverse_cdf"` draws from the same distribution with one uniform number per row, in a fifth of the time:
cumulative sums over blocks find the block, those inside it the token.

Split-invariant draws: with `seeds` (one per example) and `rows` (whose slot each row is) a row's draw depends on its
example's seed and its position only, not on the other rows, the batch, the process or the device. They come from an
integer hash used as a counter-based generator, which is as fast as torch's own uniform numbers; a reseeded
`torch.Generator` per slot is slower and differs between devices.
"""

import math

import torch
import torch.nn.functional as F


METHODS = ("gumbel", "inverse_cdf")
EPSILON = 1e-9
BLOCK = 256  # tokens per block of the two-level cumulative sum
CPU_CHUNK = 2**17  # values worked on at a time: half a megabyte stays in the cache
DEVICE_CHUNK = 2**26
BELOW_ONE = 1 - 2**-53


@torch.no_grad()
def sample_categorical(
    logits: torch.Tensor,
    *,
    method: str = "gumbel",
    temperature: float = 1.0,
    seeds: torch.Tensor | None = None,
    rows: tuple[torch.Tensor, torch.Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Draw one index per row from softmax(logits / temperature), in float32 and without gradient.

    Args:
        logits: (M, V), any floating type. Each row needs a finite maximum; -inf rules a token out.
        method: "gumbel" or "inverse_cdf".
        temperature: above 0.
        seeds: (B,) int64, one per example; needs `rows`.
        rows: (example (M,), position (M,)), both int64: row m is slot `position[m]` of example `example[m]`. No two
            rows may share a slot.
        generator: for draws without `seeds`; None is the global one.

    Returns:
        (M,) int64.

    Raises:
        ValueError: unknown method, temperature not above 0, seeds without rows or together with a generator, or
            (checked on CPU outside `torch.compile`) a row whose maximum is not finite.
    """
    if method not in METHODS:
        raise ValueError(f"sample_categorical: method must be one of {METHODS}, got {method!r}.")
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"sample_categorical: temperature must be above 0, got {temperature}; use argmax to be greedy."
        )
    if (seeds is None) != (rows is None) or (seeds is not None and generator is not None):
        raise ValueError(
            "sample_categorical: give seeds and rows together and without a generator, or neither of them."
        )
    keys = None if seeds is None else slot_keys(seeds, *rows)
    count, vocabulary = logits.shape
    device = logits.device
    compiling = torch.compiler.is_compiling()
    chunk = max(1, (CPU_CHUNK if device.type == "cpu" else DEVICE_CHUNK) // vocabulary)
    if compiling or chunk > count:
        chunk = max(1, count)  # one pass
    if method == "inverse_cdf":
        uniform = (
            torch.rand(count, dtype=torch.float64, device=device, generator=generator)
            if keys is None
            else _unit_float64(keys)
        )
    samples = []
    for start in range(0, max(1, count), chunk):
        part = slice(start, start + chunk)
        scores = logits[part].float()
        if temperature != 1:
            scores = scores / temperature
        if device.type == "cpu" and not compiling and not scores.amax(1).isfinite().all():
            raise ValueError(
                "sample_categorical: a row of logits has no finite maximum (NaN, +inf, or -inf for every token)."
            )
        if method == "inverse_cdf":
            samples.append(_inverse_cdf(scores, uniform[part]))
        elif keys is None:
            samples.append(_gumbel_argmax_(scores, torch.rand(scores.shape, device=device, generator=generator)))
        else:
            samples.append(_gumbel_argmax_(scores, unit_float32(keys[part], vocabulary)))
    return torch.cat(samples)


@torch.no_grad()
def gumbel_argmax(logits: torch.Tensor, uniform: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """The Gumbel draw for given noise: logits and uniform (M, V), uniform in [0, 1) -> (M,) int64. For parity with
    recorded draws."""
    return _gumbel_argmax_(logits.float() / temperature, uniform.float().clone())


def _gumbel_argmax_(scores: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    noise = (
        uniform.add_(EPSILON).log_().neg_().add_(EPSILON).log_()
    )  # (C, V), minus the Gumbel noise; overwrites `uniform`
    return (scores - noise).argmax(1)


def _inverse_cdf(scores: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """First token at which the cumulative probability exceeds `uniform`. scores (C, V), uniform (C,) float64 -> (C,).

    Both levels compare a fraction below 1 with cumulative sums that end at exactly 1, and look for the first one that
    is greater: that one has grown, so its block or token has a probability above 0, whatever the rounding and however
    close to 1 the uniform number is.
    """
    vocabulary = scores.shape[1]
    probabilities = scores.softmax(1)  # (C, V)
    whole = vocabulary // BLOCK  # blocks; the rest of the tokens forms one more
    blocks = probabilities[:, : whole * BLOCK].unflatten(1, (whole, BLOCK)).sum(2)
    rest = probabilities[:, whole * BLOCK :].sum(1, keepdim=True)
    edges = torch.cat([blocks, rest], 1).double().cumsum(1)  # (C, whole + 1)
    edges = edges / edges[:, -1:]
    uniform = uniform[:, None].clamp(max=BELOW_ONE)
    block = torch.searchsorted(edges, uniform, right=True).clamp(max=whole)  # (C, 1)
    low = F.pad(edges, (1, 0)).gather(1, block)
    fraction = ((uniform - low) / (edges.gather(1, block) - low)).clamp(max=BELOW_ONE)
    tokens = block * BLOCK + torch.arange(BLOCK, device=scores.device)  # (C, BLOCK)
    inside = probabilities.gather(1, tokens.clamp(max=vocabulary - 1)).double()
    inside = torch.where(tokens < vocabulary, inside, 0.0).cumsum(1)
    inside = inside / inside[:, -1:]
    sample = block * BLOCK + torch.searchsorted(inside, fraction, right=True)
    return sample.squeeze(1).clamp(max=vocabulary - 1)  # the clamps matter for NaN only


def slot_keys(seeds: torch.Tensor, example: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """64 random bits per slot from (seed of its example, position): (B,), (M,), (M,) int64 -> (M,) int64."""
    return _mix64(_mix64(seeds ^ _GOLDEN)[example] ^ position)


# Constants of splitmix64 as signed numbers; products wrap around. Counters (positions, tokens) enter by xor: a counter
# times a large constant becomes a signed overflow in the loop index of torch.compile's C++ code, and the C++ compiler
# may then drop the end of the loop (seen to crash).
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_A = 0xBF58476D1CE4E5B9 - 2**64
_MIX_B = 0x94D049BB133111EB - 2**64


def _mix64(x: torch.Tensor) -> torch.Tensor:
    """Finaliser of splitmix64 (Steele, Lea, Flood 2014), a bijection of 64-bit words."""
    x = (x ^ _shift(x, 30, 64)) * _MIX_A
    x = (x ^ _shift(x, 27, 64)) * _MIX_B
    return x ^ _shift(x, 31, 64)


def _shift(x: torch.Tensor, by: int, bits: int) -> torch.Tensor:
    """Logical right shift of a signed integer of so many bits."""
    return (x >> by) & ((1 << (bits - by)) - 1)


def _unit_float64(keys: torch.Tensor) -> torch.Tensor:
    return _shift(keys, 11, 64).double() * 2**-53


def unit_float32(keys: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Uniform numbers k / 2^24 for every (slot, token): keys (C,) int64 -> (C, V) float32.

    Three multiply-and-shift rounds of 32-bit words on a counter over the tokens; the two halves of the slot's key
    enter at two rounds.
    """
    low = keys.to(torch.int32)[:, None]
    high = (keys >> 32).to(torch.int32)[:, None]
    word = torch.arange(vocabulary, dtype=torch.int32, device=keys.device) ^ low  # (C, V); in place from here
    word ^= _shift(word, 16, 32)
    word *= 0x7FEB352D
    word ^= _shift(word, 15, 32)
    word ^= high
    word *= 0x846CA68B - 2**32
    word ^= _shift(word, 16, 32)
    word *= 0x7FEB352D
    return _shift(word, 8, 32).float() * 2**-24
