"""Batching rules of attention for `torch.func.vmap`, where torch has none: the members of a stack join the batch dimension.

Without a rule vmap calls the operation once per member, so that a stack's program and its kernel launches grow with its
members. torch 2.6 to 2.13 has rules for the forward pass of fused attention on CUDA, but none for its backward pass, and none
at all on a CPU (pytorch#117016, pytorch#176265).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from scaling_lab.training.engine.memory import is_out_of_memory

log = logging.getLogger(__name__)

OPERATIONS = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
    "_scaled_dot_product_flash_attention_backward",
    "_scaled_dot_product_efficient_attention_backward",
    "_scaled_dot_product_cudnn_attention_backward",
)
# Arguments whose first dimension is the batch. The others (lengths, random state) are the same for all members.
PER_SEQUENCE = frozenset(
    ("grad_out", "grad_out_", "query", "key", "value", "attn_bias", "out", "logsumexp", "attn_mask")
)

_library: list[torch.library.Library] = []


@cache
def register_attention_rules() -> tuple[str, ...]:
    """Register the missing rules in this process; returns the names of their operations."""
    missing = tuple(name for name in OPERATIONS if lacks_rule(name))
    # A library that is freed takes its rules with it.
    _library.append(torch.library.Library("aten", "IMPL"))
    for name in missing:
        register(getattr(torch.ops.aten, name).default, _library[0])
    return missing


def lacks_rule(name: str) -> bool:
    """Whether this version of torch has the operation, but no batching rule for it."""
    return hasattr(torch.ops.aten, name) and not torch._C._dispatch_has_kernel_for_dispatch_key(
        f"aten::{name}", "FuncTorchBatched"
    )


def register(operation: Any, library: torch.library.Library) -> None:
    schema = operation._schema
    positional = [argument.name for argument in schema.arguments if not argument.kwarg_only]
    if not any(argument.name == "attn_mask" for argument in schema.arguments):
        torch.library.register_vmap(schema.name, partial(apply_rule, operation, positional), lib=library)
        return

    # `register_vmap` accepts no tensors that are keyword arguments (the CPU's mask): here the mask is the last position.
    from torch._functorch.autograd_function import custom_function_call_vmap_helper
    from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

    def with_mask(*args: Any, **options: Any) -> Any:
        return operation(*args[:-1], attn_mask=args[-1], **options)

    def kernel(*args: Any, attn_mask: Tensor | None = None, **options: Any) -> Any:
        rule = partial(apply_rule, with_mask, [*positional, "attn_mask"])
        interpreter: Any = retrieve_current_functorch_interpreter()
        # Arguments that are at their defaults are left out by the dispatcher.
        padded = [*args, *(a.default_value for a in schema.arguments[len(args) : len(positional)])]
        return custom_function_call_vmap_helper(interpreter, rule, with_mask, *padded, attn_mask, **options)

    library.impl(operation._schema.name.removeprefix("aten::"), kernel, "FuncTorchBatched")


def apply_rule(
    operation: Callable[..., Any],
    names: Sequence[str],
    info: Any,
    dims: Sequence[int | None],
    *args: Any,
    **options: Any,
) -> tuple[tuple[Any, ...], tuple[int | None, ...]]:
    """Call `operation` once for all members, and return its outputs and their dimension of members.

    `names` are those of `args`; `dims` holds the dimension of members of each, None for an argument that they share.
    """
    members = info.batch_size
    queries = args[names.index("query")], dims[names.index("query")]
    sequences = members_first(*queries, members).shape[1]

    def folded(name: str, value: Any, dim: int | None) -> Any:
        if name not in PER_SEQUENCE or not isinstance(value, Tensor):
            return value
        each = members_first(value, dim, members)
        if name == "attn_mask":  # (members, ...), of any shape that broadcasts to (batch, heads, T, T)
            each = each.reshape(members, *(1,) * (5 - each.dim()), *each.shape[1:])
            each = each.expand(members, sequences, *each.shape[2:])
        return each.flatten(0, 1)

    try:
        outputs = operation(*map(folded, names, args, dims), **options)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        warn_once(str(error).partition("\n")[0])
        each = [
            operation(*(v if d is None else v.select(d, k) for v, d in zip(args, dims)), **options)
            for k in range(members)
        ]
        stacked = tuple(None if o[0] is None else torch.stack(o) for o in zip(*each, strict=True))
        return stacked, tuple(None if o is None else 0 for o in stacked)
    unfolded = tuple(None if o is None else o.unflatten(0, (members, sequences)) for o in outputs)
    return unfolded, tuple(None if o is None else 0 for o in unfolded)


def members_first(value: Tensor, dim: int | None, members: int) -> Tensor:
    return value.expand(members, *value.shape) if dim is None else value.movedim(dim, 0)


@cache
def warn_once(reason: str) -> None:
    log.warning("attention is computed member by member in this stack: %s", reason)
