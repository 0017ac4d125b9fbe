"""Floating-point operations of a piece of code, counted while it runs.

torch's counter, with the operations added that it does not know and that models on a CPU are full of: the fused kernel
of attention, and products that are added into their output. Counted are products of matrices and attention as they
are performed: a fused backward pass that computes the scores again is charged for it. What is element-wise, the
optimizer included, is left out, as is usual.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


def count_flops(function: Callable[[], Any]) -> int:
    """Run `function` and return its floating-point operations; a multiplication and an addition are two.

    Backward passes inside it are counted. Code that `torch.compile` made is not: count the model uncompiled.
    """
    with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
        function()
    return counter.get_total_flops()


# The counter passes the shape of every tensor in the tensor's place.


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


def _added_product(output: Any, left: Any, right: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(left) * right[-1]  # (..., M, K) x (..., K, N)


_FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.aten.addmm_: _added_product,
    torch.ops.aten.baddbmm_: _added_product,
}
