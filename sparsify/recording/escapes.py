"""What the dispatcher does not see: values that leave torch, and recurrent layers kept whole."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import BuiltinFunctionType, MethodDescriptorType, WrapperDescriptorType
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from sparsify.recording.calls import Call, CannotRecord
from sparsify.recording.creation import detach
from sparsify.recording.operations import operation_of
from sparsify.recording.recorder import Recorder

aten = torch.ops.aten

_VALUES = "a tensor's values leave torch through {}(); compute with tensors instead"
_MEMORY = "a tensor's memory is handed out by {}, so writes to it could not be seen"
_TEXT = "a tensor's values become text by {}; print outside forward"
# Calls whose results depend on values. What is made of literals only may still pass.
REVEALING: dict[Any, str] = {
    Tensor.tolist: _VALUES.format("tolist"),
    Tensor.__repr__: _TEXT.format("repr()"),
    Tensor.__format__: _TEXT.format("format()"),
}
REFUSED: dict[Any, str] = {
    Tensor.numpy: _VALUES.format("numpy"),
    Tensor.__array__: _VALUES.format("numpy"),
    Tensor.__dlpack__: _VALUES.format("__dlpack__"),
    Tensor.data_ptr: _MEMORY.format("data_ptr()"),
    Tensor.untyped_storage: _MEMORY.format("untyped_storage()"),
    Tensor.storage: _MEMORY.format("storage()"),
    Tensor._typed_storage: _MEMORY.format("_typed_storage()"),
    Tensor.share_memory_: _MEMORY.format("share_memory_()"),
    Tensor.__reduce_ex__: _VALUES.format("pickle"),
    Tensor.data.__set__:  # type: ignore[attr-defined]
    "a tensor's .data is replaced; write to the tensor instead",
    Tensor.backward: "backward() is called inside forward",
    Tensor.register_hook: "a hook is put on a tensor inside forward",
    Tensor.is_set_to: _MEMORY.format("is_set_to()"),
    Tensor.map_: "map_() calls Python for every element",
    Tensor.apply_: "apply_() calls Python for every element",
}
_PROPERTIES: Any = Tensor
GRAD = _PROPERTIES.grad.__get__
REFUSED_IN_TRAINING: dict[Any, str] = {
    Tensor.retain_grad: "retain_grad() is called inside forward; return the tensor and call it "
    "outside",
    _PROPERTIES.grad_fn.__get__: "forward looks at a tensor's grad_fn, which is another one where "
    "kernels run; look at requires_grad",
    Tensor.register_post_accumulate_grad_hook: "a hook is put on a tensor inside forward",
}
_FROM_DATA = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)
ONE_HOT: Any = torch.nn.functional.one_hot
_RECURRENT = ("rnn_relu", "rnn_tanh", "gru", "lstm")
Rule = Callable[..., Any]
# Functions in C, and arguments of which they ask nothing that Python would answer.
IN_C = (BuiltinFunctionType, MethodDescriptorType, WrapperDescriptorType)
WITHOUT_CODE = frozenset(
    (
        *(Tensor, torch.nn.Parameter, torch.nn.Buffer, bool, int, float, complex, str, type(None)),
        *(torch.dtype, torch.device, torch.layout, torch.memory_format),
    )
)
# Where torch itself has kernels in Python: for vmap once it was used, and from 2.14 on for tensors
# without elements.
OF_TORCH = (
    *("/Meta", "/MPS", "/CUDA", "/FuncTorchBatched"),
    *("/PythonTLSSnapshot", "/FuncTorchDynamicLayerFrontMode"),
)
RECURRENT: dict[Any, str] = {getattr(torch._C._VariableFunctions, n): n for n in _RECURRENT}


class Escapes(TorchFunctionMode):
    """Tells the recorder of calls that its dispatch mode does not see, or sees too late.

    ``rules`` are more functions that run in place of others: ``rule(func, args, kwargs)``.
    """

    def __init__(self, recorder: Recorder, rules: Mapping[Any, Rule] | None = None) -> None:
        super().__init__()
        self._recorder = recorder
        self._is_free = not _has_kernels()
        self._rules: dict[Any, Rule] = dict(rules or {})
        self._rules.update(dict.fromkeys(REVEALING, self._reveal))
        self._rules.update(dict.fromkeys(REFUSED, self._refuse))
        self._rules.update(dict.fromkeys(_FROM_DATA, self._from_data))
        self._rules.update(dict.fromkeys(RECURRENT, self._keep_whole))
        self._rules[Tensor.__deepcopy__] = self._deepcopy
        self._rules[ONE_HOT] = self._one_hot
        if recorder.histories is not None:
            self._rules.update(dict.fromkeys(REFUSED_IN_TRAINING, self._refuse))
            self._rules[Tensor.detach_] = self._detach_in_place
            self._rules[GRAD] = self._gradient
            self._rules[torch._C._set_grad_enabled] = self._switch_gradients

    def __enter__(self) -> Self:
        self._modes = torch._C._len_torch_dispatch_stack() if self._is_free else None
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        recorder = self._recorder
        if recorder.error or recorder.is_suspended or recorder.is_busy:
            return func(*args, **(kwargs or {}))
        if recorder.unread:
            for argument in (*args, *kwargs.values()) if kwargs else args:
                if id(argument) in recorder.unread:
                    recorder.look_at(argument)
        # All this is traced, where operators cost less than calls.
        if func in self._rules:
            return self._rules[func](func, args, kwargs or {})
        if type(func) not in IN_C:
            return func(*args, **(kwargs or {}))
        for argument in (*args, *kwargs.values()) if kwargs else args:
            if type(argument) not in WITHOUT_CODE:
                return func(*args, **(kwargs or {}))
        # What runs no Python but ours and torch's, and of that nothing is to be noticed.
        positions = recorder.positions
        is_first = positions.pause()
        try:
            if torch._C._len_torch_dispatch_stack() == self._modes:
                return func(*args, **(kwargs or {}))
        finally:
            if is_first:
                positions.resume()
        return func(*args, **(kwargs or {}))  # a mode or a kernel of the user's is Python, too

    def _refuse(self, func: Any, args: Any, kwargs: Any) -> Any:
        self._recorder.fail(REFUSED.get(func) or REFUSED_IN_TRAINING[func])
        return func(*args, **kwargs)

    def _reveal(self, func: Any, args: Any, kwargs: Any) -> Any:
        recorder = self._recorder
        try:
            origin = recorder.origin_of(a for a in args if isinstance(a, Tensor))
        except CannotRecord as reason:
            recorder.fail(str(reason))
        else:
            if not recorder.may_reveal(origin):
                recorder.fail(REVEALING[func])
        return self._unrecorded(func, args, kwargs)

    def _from_data(self, func: Any, args: Any, kwargs: Any) -> Any:
        numpy = sys.modules.get("numpy")
        if numpy is not None and any(isinstance(a, numpy.ndarray) for a in _flat((args, kwargs))):
            self._recorder.fail(
                "a tensor is made of a numpy array, whose content may change unseen; keep it as a "
                "tensor of the model"
            )
        return func(*args, **kwargs)

    def _keep_whole(self, func: Any, args: Any, kwargs: Any) -> Any:
        """One node for a recurrent layer of torch."""
        if kwargs or len(args) != 9:
            return func(*args, **kwargs)
        is_packed = isinstance(args[3], (tuple, list))
        packet = getattr(aten, RECURRENT[func])
        op = packet.data if is_packed else packet.input
        return self._whole(op, func, args)

    def _deepcopy(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What torch does by copying memory, for tensors that have nothing else."""
        tensor, memo = args
        if type(tensor) is not Tensor or vars(tensor) or not tensor.is_leaf:
            return func(tensor, memo)
        if id(tensor) not in memo:
            copied = tensor.detach().clone()
            memo[id(tensor)] = copied.requires_grad_(tensor.requires_grad)
        return memo[id(tensor)]

    def _one_hot(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Torch looks at the largest class, to check it; a scatter does so as well."""
        index, classes = _classes_of(*args, **kwargs)
        if classes < 0:
            self._recorder.fail("one_hot counts the classes of its input; give it num_classes")
        if classes <= 0 or index.dtype is not torch.int64:
            return func(*args, **kwargs)
        zeros = index.new_zeros(*index.shape, classes)
        return zeros.scatter(-1, index.unsqueeze(-1), 1)

    def _detach_in_place(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Autograd does this one without an operation."""
        recorder = self._recorder
        result = func(*args, **kwargs)
        recorder.arrive()
        try:
            value = recorder.value_of(args[0])
            value.node = recorder.read(value)
            assert recorder.histories is not None
            detach(recorder.histories, value)
        except CannotRecord as reason:
            recorder.fail(str(reason))
        return result

    def _gradient(self, func: Any, args: Any, kwargs: Any) -> Any:
        result = func(*args, **kwargs)
        if result is not None:
            self._recorder.fail("forward reads a tensor's .grad; pass it in as a tensor")
        return result

    def _switch_gradients(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Note a change; where torch has switched them off itself, a ``no_grad`` inside is none."""
        before = torch.is_grad_enabled()
        result = func(*args, **kwargs)
        assert self._recorder.histories is not None
        if torch.is_grad_enabled() is not before:
            self._recorder.histories.is_grad_enabled = not before
        return result

    def _whole(self, op: Any, func: Any, args: Any) -> Any:
        recorder = self._recorder
        call = Call(op, operation_of(op), args, {})
        try:
            return recorder.record_whole(call, lambda: self._unrecorded(func, args, {}))
        except CannotRecord as reason:
            recorder.fail(str(reason))
        return call.result if call.has_run else func(*args)

    def _unrecorded(self, func: Any, args: Any, kwargs: Any) -> Any:
        self._recorder.is_suspended = True
        try:
            return func(*args, **kwargs)
        finally:
            self._recorder.is_suspended = False


def _has_kernels() -> bool:
    """Whether an operation of torch may run Python that somebody has registered for it."""
    kernels: Iterable[str] = getattr(torch.library, "_impls", ["aten/"])
    return any(k.startswith("aten/") and not k.endswith(OF_TORCH) for k in kernels)


def _classes_of(tensor: Tensor, num_classes: int = -1) -> tuple[Tensor, int]:
    return tensor, num_classes


def _flat(value: Any) -> Iterator[Any]:
    return iter(pytree.tree_leaves(value))
