"""What calls are told apart by before anything else."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from sparsify.serving.call_key import ENDLESS, call_key, kinds

MODEL, X = nn.Identity(), torch.zeros(2, 3)


class State(NamedTuple):
    v: Any
    z: Any


def key(*args: Any, **kwargs: Any) -> object:
    return call_key(MODEL, args, kwargs)


@pytest.mark.parametrize(
    ("call", "others"),
    [
        ((X, (X, X)), [(X, [X, X]), (X, X, X), (X, (X,)), (X, State(X, X)), (X, (X, X[0]))]),
        ((X, {"v": X}), [(X, {"z": X}), (X, {"v": X.double()}), (X, OrderedDict(v=X))]),
        ((X, State(X, {"a": [X, None]})), [(X, State(X, {"a": [None, X]}))]),
        ((X, deque([X, X])), [(X, deque([X])), (X, deque([X, X[0]])), (X, [X, X])]),
        ((X, None), [(X,), (X, 1), (X, X)]),
        ((X,), [(X.clone().requires_grad_(),), (X.double(),), (X.to_sparse(),), (X.t(),)]),
    ],
)
def test_calls_of_other_structure_or_kinds_have_other_keys(call: Any, others: Any) -> None:
    assert key(*call) == key(*call) and hash(key(*call)) == hash(key(*call))
    assert key(*call) not in [key(*other) for other in others]


def test_values_of_tensors_and_numbers_make_no_difference() -> None:
    assert key(X, (X, 1)) == key(X + 1, (X - 1, 2))


def test_arguments_by_name_are_told_from_those_by_place() -> None:
    assert key(X) != key(x=X) != key(y=X)


def test_modes_make_a_difference() -> None:
    with torch.no_grad():
        without = key(X)
    assert without != key(X)


def test_what_contains_itself_has_a_key() -> None:
    endless: list[Any] = []
    endless.append({"more": endless})
    assert kinds((X, endless), {}) is kinds((X,), {"named": endless}) is ENDLESS
    assert hash(key(X, endless)) == hash(key(X, endless))


def test_nested_tensors_have_a_key() -> None:
    nested = torch.nested.nested_tensor([X[0], X[1, :2]])
    assert key(nested) == key(nested.clone()) != key(nested.double())
