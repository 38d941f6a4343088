"""What the recorder must know of an ATen operation, read from its schema and tags."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

aten = torch.ops.aten
Op = torch._ops.OpOverload

# Tensors filled with one number, and the number; None where it is the argument ``fill_value``.
FILLS: dict[Op, int | None] = {
    aten.zeros.default: 0,
    aten.zeros_like.default: 0,
    aten.new_zeros.default: 0,
    aten.ones.default: 1,
    aten.ones_like.default: 1,
    aten.new_ones.default: 1,
    aten.full.default: None,
    aten.full_like.default: None,
    aten.new_full.default: None,
    aten.scalar_tensor.default: None,
}
# Tensors whose content is not defined until it is written; recorded as zeros.
EMPTIES = frozenset(
    {aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default}
    | {aten.new_empty.default, aten.new_empty_strided.default, aten.empty_permuted.default}
)
# Views of the same elements in the same order; they add no operation.
SAME = frozenset(
    {aten.detach.default, aten.alias.default, aten.lift_fresh.default, aten.detach_.default}
)
# Views whose schemas do not say so, and what is recorded instead of them.
UNSAFE_VIEWS: dict[Op, Op] = {
    aten._unsafe_view.default: aten._unsafe_view.default,
    aten.unsafe_split.Tensor: aten.split.Tensor,
    aten.unsafe_split_with_sizes.default: aten.split_with_sizes.default,
}
# Write to arguments although their schemas do not say so, when asked to train. On GPUs, norms of
# three and more dims are those of the vendor's library.
BATCH_NORMS = frozenset(
    {aten.native_batch_norm.default, aten.cudnn_batch_norm.default, aten.miopen_batch_norm.default}
)
# Also write to running statistics: parts of synchronized norms, and results of norms as ``out=``.
UPDATE_STATISTICS = frozenset(
    {aten.batch_norm_update_stats.default, aten.batch_norm_gather_stats.default}
    | {aten.batch_norm_gather_stats_with_counts.default, aten.native_batch_norm.out}
    | {aten.cudnn_batch_norm.out, aten.miopen_batch_norm.out}
)
REPLACES_STORAGE = frozenset(
    {aten.set_.default, aten.set_.source_Storage, aten.set_.source_Storage_storage_offset}
    | {aten.set_.source_Tensor, aten.resize_.default, aten.resize_as_.default}
)
# Names of parts of a run, as ``torch.profiler.record_function`` tells them; no operations.
LABELS = frozenset(
    {torch.ops.profiler._record_function_enter.default}
    | {torch.ops.profiler._record_function_enter_new.default}
    | {torch.ops.profiler._record_function_exit.default}
    | {torch.ops.profiler._record_function_exit._RecordFunction}
)
# The activation of a product: the index of its argument.
PRODUCTS: dict[Op, int] = {
    aten.mm.default: 0,
    aten.bmm.default: 0,
    aten.addmm.default: 1,
    aten.baddbmm.default: 1,
    aten.convolution.default: 0,
    aten.mv.default: 1,
    aten.addmv.default: 2,
}


@dataclass(frozen=True)
class Operation:
    """Facts about one overload.

    ``written`` names the arguments that it writes to. ``activation`` is the index of the argument
    of a product that weights are multiplied with.
    """

    written: tuple[str, ...]
    is_view: bool
    is_inplace_view: bool
    is_composite: bool
    is_random: bool
    gives_number: bool
    shape_depends_on_values: bool
    is_pointwise: bool
    activation: int | None


NOTHING_KNOWN = Operation((), False, False, False, False, False, False, False, None)


@functools.cache
def operation_of(op: Op) -> Operation:
    written = tuple(a.name for a in op._schema.arguments if _is_write(a.alias_info))
    tags = op.tags
    has_tensor_result = any("Tensor" in str(r.type) for r in op._schema.returns)
    return Operation(
        written=written,
        is_view=(op.is_view and not written) or op in UNSAFE_VIEWS,
        is_inplace_view=torch.Tag.inplace_view in tags,
        is_composite=_is_composite(op),
        is_random=torch.Tag.nondeterministic_seeded in tags,
        gives_number=torch.Tag.data_dependent_output in tags and not has_tensor_result,
        shape_depends_on_values=torch.Tag.dynamic_output_shape in tags,
        is_pointwise=torch.Tag.pointwise in tags,
        activation=PRODUCTS.get(op),
    )


def _is_write(alias: Any) -> bool:
    return alias is not None and bool(alias.is_write)


def _is_composite(op: Op) -> bool:
    name = op.name()  # type: ignore[no-untyped-call]
    key = "CompositeImplicitAutograd"
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(name, key))


@functools.cache
def functional_of(op: Op) -> Op | None:
    """The overload that computes what ``op`` writes and returns it instead; None without one.

    It takes the same arguments, less those that only receive results (``out=``).
    """
    signature = [_typed(a) for a in op._schema.arguments if not _only_receives(a)]
    for name in _functional_names(op._schema.name.removeprefix("aten::")):
        packet = getattr(aten, name, None)
        if packet is None:
            continue
        for overload in packet.overloads():
            found = getattr(packet, overload)
            if found._schema.is_mutable or found.is_view:
                continue
            if [_typed(a) for a in found._schema.arguments] == signature:
                return found  # type: ignore[no-any-return]
    return None


def _functional_names(name: str) -> Iterator[str]:
    pure = name[:-1] if name.endswith("_") and not name.endswith("__") else name
    yield pure
    yield f"{pure}_functional"


def _only_receives(argument: Any) -> bool:
    return bool(argument.kwarg_only) and _is_write(argument.alias_info)


def _typed(argument: Any) -> tuple[str, str]:
    return argument.name, str(argument.type)


def name_of_op(target: Any) -> str:
    """What nodes of this operation are called, before a number is added."""
    # Uses of Functions hold their arguments, which no cache may keep alive.
    return _name(target) if isinstance(target, Op) else str(target.__name__).lower()


@functools.cache
def _name(target: Op) -> str:
    name = target._schema.name.partition("::")[2]
    return f"{name}_{target._overloadname}".lower()


def receivers(op: Op) -> tuple[str, ...]:
    """The ``out=`` arguments of ``op``."""
    return tuple(a.name for a in op._schema.arguments if _only_receives(a))


def bind(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, as far as they were given."""
    names = [a.name for a in op._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def functional_arguments(
    functional: Op, op: Op, given: dict[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """What ``functional``, which is that of ``op``, takes where ``op`` was given ``given``.

    In the order of its schema, positional as far as they go.
    """
    received = receivers(op)
    defaults = {a.name: a.default_value for a in op._schema.arguments}
    wanted = {a.name for a in functional._schema.arguments if not a.has_default_value()}
    pure = {name: value for name, value in given.items() if name not in received}
    pure.update({name: defaults[name] for name in wanted - given.keys()})
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for position, argument in enumerate(functional._schema.arguments):
        if argument.name not in pure:
            continue
        if argument.kwarg_only or len(args) < position:
            kwargs[argument.name] = pure[argument.name]
        else:
            args.append(pure[argument.name])
    return args, kwargs
