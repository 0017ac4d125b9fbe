"""Attention in linear time: similarities that are products of features, phi(q) . psi(k).

    out_i = sum_j phi(q_i) . psi(k_j) v_j / sum_j phi(q_i) . psi(k_j)

is re-associated, so that no (T, T) matrix exists. A column of ones beside the values gives numerator and denominator
in one product, and zeros in both at a padded key take it out of both. Causal sums go over chunks: inside a chunk the
masked product, before it a state (features, values + 1), which is also all that decoding keeps of the past.

Every fast path has its plain twin: `causal_product` on CPU is a loop that keeps the state in cache and stores no chunk
matrices for backward, elsewhere and under torch.compile all chunks at once; the attention backend "eager" is the
explicit (T, T) form, the reference of both, and the only one that returns attention weights. Sums, features and
denominators are in float32 (float64 for float64 inputs), under autocast too.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from transformers.cache_utils import Cache, CacheLayerMixin

from .attention import EncoderSelfAttention


CHUNK = 64
"""Best chunk length on CPU for heads of width 64; 256 is 1.6 to 1.9 times slower."""


LARGEST_EXPONENT = 30.0
"""Of bounded exponentials: float32 holds their sums, products and gradients."""


def bounded_exp(exponent: torch.Tensor) -> torch.Tensor:
    """exp of numbers cut at +-30."""
    return exponent.clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT).exp()


FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "elu": lambda x: F.elu(x) + 1,
    "exp": bounded_exp,
    "sigmoid": torch.sigmoid,
    "square": torch.square,
    "abs": torch.abs,
    "gelu": F.gelu,
    "identity": lambda x: x,
}
"""Features that are one function of each number. "gelu" and "identity" may be negative, and denominators vanish."""


def runs_eagerly_on_cpu(tensor: torch.Tensor) -> bool:
    """Whether hand-written loops with in-place steps may run: on CPU, not under torch.compile or torch.func."""
    return (
        tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32, or as it is in float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def rotate(states: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate the pairs (0, 1), (2, 3), ... of states (B, H, T, d) by angles given as cosine and sine, (B or 1, 1, T,
    d / 2) each (Su et al., 2021, arXiv 2104.09864).
    """
    cosine, sine = rotary
    even, odd = states.unflatten(-1, (-1, 2)).unbind(-1)  # (B, H, T, d / 2)
    return torch.stack((even * cosine - odd * sine, odd * cosine + even * sine), -1).flatten(-2)


# ------------------------------------------------------------------------------------------------------- causal sums


def causal_product(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    chunk_size: int = CHUNK,
    state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out_i = q_i . (S + sum_{j <= i} k_j v_j^T) and the sum over all j, by chunks.

    Args:
        query, key: features (B, H, T, m).
        value: (B, H, T, e).
        chunk_size: tokens whose products are formed directly.
        state: S (B, H, m, e) of earlier tokens, or None.

    Returns:
        out (B, H, T, e) and the new S. No gradient flows through states.
    """
    state = query.new_zeros(*key.shape[:2], key.shape[-1], value.shape[-1]) if state is None else state.detach()
    if query.shape[2] == 1 and not torch.is_grad_enabled():
        state = state + key.mT @ value
        return query @ state, state
    if runs_eagerly_on_cpu(query):
        heads = query.shape[:2]
        flat = [part.flatten(0, 1) for part in (query, key, value, state)]
        out, final = _CausalProduct.apply(*flat, chunk_size)
        return out.unflatten(0, heads), final.unflatten(0, heads)
    return causal_product_by_chunks(query, key, value, chunk_size, state)


def causal_product_by_chunks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, chunk_size: int, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`causal_product` with all chunks at once, by autograd and without loops."""
    length = query.shape[2]
    surplus = -length % chunk_size
    query, key, value = (
        F.pad(part, (0, 0, 0, surplus)).unflatten(2, (-1, chunk_size)) for part in (query, key, value)
    )  # (B, H, N, C, ...)
    inside = (query @ key.mT).tril() @ value
    sums = torch.cat((state.unsqueeze(2), key.mT @ value), 2).cumsum(2)  # (B, H, N + 1, m, e): S before each chunk
    out = inside + query @ sums[:, :, :-1]
    return out.flatten(2, 3)[:, :, :length], sums[:, :, -1].detach()


class _CausalProduct(torch.autograd.Function):
    """`causal_product` chunk after chunk, on (G, T, ...) for G heads of the batch. Backward runs through the chunks
    twice, forwards for the queries and backwards for keys and values, so that no chunk's state is kept.
    """

    @staticmethod
    def forward(ctx, query, key, value, state, chunk_size):
        out = torch.empty_like(value)
        initial, state = state, state.clone(memory_format=torch.contiguous_format)
        for start in range(0, query.shape[1], chunk_size):
            q, k, v = (part[:, start : start + chunk_size] for part in (query, key, value))
            out[:, start : start + chunk_size] = torch.bmm(torch.bmm(q, k.mT).tril_(), v).baddbmm_(q, state)
            state.baddbmm_(k.mT, v)
        ctx.save_for_backward(query, key, value, initial)
        ctx.chunk_size = chunk_size
        ctx.mark_non_differentiable(state)
        return out, state

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        query, key, value, state = ctx.saved_tensors
        chunks = [slice(start, start + ctx.chunk_size) for start in range(0, query.shape[1], ctx.chunk_size)]
        d_query, d_key, d_value = map(torch.empty_like, (query, key, value))
        state = state.clone(memory_format=torch.contiguous_format)
        for at in chunks:
            k, v, g = key[:, at], value[:, at], grad[:, at]
            d_query[:, at] = torch.bmm(torch.bmm(g, v.mT).tril_(), k).baddbmm_(g, state.mT)
            state.baddbmm_(k.mT, v)
        state.zero_()  # from here on sum_{j > chunk} q_j grad_j^T
        for at in reversed(chunks):
            q, k, v, g = query[:, at], key[:, at], value[:, at], grad[:, at]
            d_key[:, at] = torch.bmm(torch.bmm(g, v.mT).tril_().mT, q).baddbmm_(v, state.mT)
            d_value[:, at] = torch.bmm(torch.bmm(q, k.mT).tril_().mT, g).baddbmm_(k, state)
            state.baddbmm_(q.mT, g)
        return d_query, d_key, d_value, None, None


# ------------------------------------------------------------------------------------------------------------- cache


class KernelStateLayer(CacheLayerMixin):
    """What one layer keeps of the past: a state (B, H, m, e) of constant size, and how many tokens it has seen."""

    is_compileable = False
    supports_early_init = False

    def __init__(self):
        super().__init__()
        self.state: torch.Tensor | None = None
        self.seen = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the first update brings the state."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Refused: there are no keys and values to keep.

        Raises:
            ValueError: always.
        """
        raise ValueError("KernelCache keeps no keys and values; linear attention writes its state by `advance`.")

    def advance(self, state: torch.Tensor, tokens: int) -> None:
        """Replace the state by that after `tokens` more tokens."""
        self.state, self.seen, self.is_initialized = state.detach(), self.seen + tokens, True

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.seen

    def get_max_length(self) -> int:
        """-1: without limit."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask over all tokens."""
        return self.seen + query_length, 0

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.seen, self.is_initialized = None, 0, False

    def offload(self) -> None:
        """Nothing: the state is too small to move away."""

    def prefetch(self) -> None:
        """Nothing, as `offload`."""

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: a sum cannot be undone.

        Raises:
            ValueError: always.
        """
        raise ValueError("KernelCache cannot be cropped: its state is a sum; decode without assistant and rollback.")

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Beam search: row b becomes row beam_idx[b]."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows of the batch."""
        if self.state is not None:
            self.state = self.state.index_select(0, indices.to(self.state.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self.state is not None:
            self.state = self.state.repeat_interleave(repeats, 0)


class KernelCache(Cache):
    """The past of a decoder with linear attention: one state of constant size for each layer."""

    def __init__(self, num_hidden_layers: int):
        super().__init__(layers=[KernelStateLayer() for _ in range(num_hidden_layers)])


# --------------------------------------------------------------------------------------------------------- attention


class KernelSelfAttention(EncoderSelfAttention):
    """Self-attention whose similarity is a product of features.

    A paper overrides `features`, `normalise` if its denominator is not the plain sum, and `bidirectional` and `causal`
    if it need not keep the features. Dropout of probabilities has no meaning where there are none, and is not done.
    """

    has_denominator = True
    """Whether a sum of similarities divides the result."""
    mask_values_only = False
    """Whether padded keys stay in the denominator, as in several libraries."""
    denominator_eps = 0.0
    """Added to the denominator; a denominator of 0 gives 0."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.is_causal = config.is_decoder

    def features(
        self, query: torch.Tensor, key: torch.Tensor, key_mask: torch.Tensor | None, state: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """phi(q) and psi(k), (B, H, T, m) each; `key_mask` (B, 1, T, 1), True at tokens; `state` of earlier tokens.

        Features of padded keys may be anything finite.
        """
        raise NotImplementedError

    def normalise(self, sums: torch.Tensor) -> torch.Tensor:
        """Context (B, H, T, d) from weighted sums (B, H, T, d + 1), the last of which is the denominator."""
        values, total = sums[..., :-1], sums[..., -1:] + self.denominator_eps
        return values / total.masked_fill(total == 0, 1.0)

    def initial_state(self, value: torch.Tensor, width: int) -> torch.Tensor:
        """State (B, H, m, e) before the first token, for values (B, H, T, e) and m features."""
        return value.new_zeros(*value.shape[:2], width, value.shape[-1])

    def bidirectional(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, key_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """sum_j phi(q_i) . psi(k_j) v_j over all j, (B, H, T, e)."""
        query, key = self.features(query, key, key_mask, None)
        return query @ (key.mT @ value)

    def causal(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_mask: torch.Tensor | None,
        state: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same over j <= i, and the new state; `state` (B, H, m, e) of earlier tokens, None if there are none."""
        query, key = self.features(query, key, key_mask, state)
        state = self.initial_state(value, key.shape[-1]) if state is None else state
        return causal_product(query, key, value, self.config.chunk_size, state)

    def weighted(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, key_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Either sums through the (T, T) matrix, which is returned too."""
        query, key = self.features(query, key, key_mask, None)
        similarity = query @ key.mT  # (B, H, T, T)
        if not self.is_causal:
            return similarity @ value, similarity
        similarity = similarity.tril()
        return similarity @ value + query @ self.initial_state(value, key.shape[-1]), similarity

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: KernelCache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Context (B, T, D) of hidden states (B, T, D), and from the eager backend the weights (B, H, T, T).

        `attention_mask` is (B, 1, T, 1), True at tokens; `rotary` as in `rotate`; the cache is read and advanced.
        """
        query, key, value = self.project(hidden_states)
        dtype = value.dtype
        with torch.autocast(value.device.type, enabled=False):
            query, key, value = map(at_least_float32, (query, key, value))
            if rotary is not None:
                query, key = rotate(query, rotary), rotate(key, rotary)
            mask = attention_mask
            padded = value if mask is None else value.masked_fill(~mask, 0.0)
            if self.has_denominator:
                kept = None if self.mask_values_only else mask
                ones = value.new_ones(value.shape[:-1] + (1,))
                padded = torch.cat((padded, ones if kept is None else ones.masked_fill(~kept, 0.0)), -1)
            if self.mask_values_only:
                mask = None
            similarity = None
            if past_key_values is not None:
                layer = past_key_values.layers[self.layer_idx]
                sums, state = self.causal(query, key, padded, mask, layer.state)
                layer.advance(state, hidden_states.shape[1])
            elif self.config._attn_implementation == "eager":
                sums, similarity = self.weighted(query, key, padded, mask)
            elif self.is_causal:
                sums, _ = self.causal(query, key, padded, mask, None)
            else:
                sums = self.bidirectional(query, key, padded, mask)
            context = self.normalise(sums) if self.has_denominator else sums
            if similarity is not None:
                if attention_mask is not None:
                    similarity = similarity.masked_fill(~attention_mask.mT, 0.0)
                if self.has_denominator:
                    similarity = self.normalise(torch.cat((similarity, sums[..., -1:]), -1))
        return context.to(dtype).transpose(1, 2).flatten(-2), similarity
