"""Fingerprints: equal for equal elements, whatever the strides, and for no others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsify.checking.fingerprint import PART, Fingerprint
from tests.live_bytes import peak_of

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64]
DTYPES = [*FLOATS, torch.int64, torch.uint8, torch.bool]
SHAPES = [(), (0, 3), (5,), (3, PART // 2), (2, 3 * PART + 1), (PART + 1, 1), (2, 3, PART)]


def drawn(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randint(0, 2, shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_copy_has_the_same_one(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = drawn(shape, dtype)
    assert Fingerprint.of(tensor.clone()) == Fingerprint.of(tensor)
    assert Fingerprint.of(tensor).why_not(Fingerprint.of(tensor)) == ""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if 0 not in shape])
def test_any_other_element_is_seen(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = drawn(shape, dtype)
    count = tensor.numel()
    for index in {0, count // 2, count - 1}:
        other = tensor.clone()
        flat = other.view(-1)
        flat[index] = 1 - flat[index].to(torch.float32 if dtype is torch.bool else dtype)
        why = Fingerprint.of(other).why_not(Fingerprint.of(tensor))
        assert why.startswith(f"{dtype} {list(shape)} with other elements")
        assert ("in 1 of " in why) == (count > PART)


def test_strides_do_not_matter() -> None:
    tensor = torch.randn(70, 40, 50)
    for order in [(0, 2, 1), (2, 1, 0), (1, 2, 0)]:
        back = [order.index(dim) for dim in range(3)]
        strided = tensor.permute(order).contiguous().permute(back)
        assert strided.stride() != tensor.stride()
        assert Fingerprint.of(strided) == Fingerprint.of(tensor)
    row = torch.randn(4)
    assert Fingerprint.of(row.expand(3, 4)) == Fingerprint.of(row.repeat(3, 1))


def test_zeros_and_nans_are_each_the_same() -> None:
    ours, theirs = torch.tensor([0.0, torch.nan, 1.0]), torch.tensor([-0.0, -torch.nan, 1.0])
    theirs.view(torch.int32)[1] += 1  # another payload
    assert theirs.isnan()[1]
    assert Fingerprint.of(ours) == Fingerprint.of(theirs)
    assert Fingerprint.of(ours) != Fingerprint.of(torch.tensor([torch.nan, 0.0, 1.0]))


def test_lazy_conjugates_and_negatives() -> None:
    tensor = torch.tensor([1 + 2j, 3 - 4j])
    lazy = tensor.conj()
    assert lazy.is_conj() and lazy.imag.is_neg()
    assert Fingerprint.of(lazy) == Fingerprint.of(lazy.resolve_conj())
    assert Fingerprint.of(lazy.imag) == Fingerprint.of(torch.tensor([-2.0, 4.0]))


def test_kinds_are_told() -> None:
    ours, theirs = Fingerprint.of(torch.zeros(2, 3)), Fingerprint.of(torch.zeros(3, 2).double())
    assert ours.why_not(theirs) == "torch.float32 [2, 3] instead of torch.float64 [3, 2]"


def test_sparse_tensors_have_the_one_of_their_elements() -> None:
    tensor = torch.tensor([[0.0, 2.0], [0.0, 0.0]])
    assert Fingerprint.of(tensor.to_sparse()) == Fingerprint.of(tensor)


def test_it_takes_no_memory_of_the_tensors_size() -> None:
    tensor = torch.randn(64, PART)
    # The canonical copy of a part: the sum, the mask of NaNs and what is chosen of both.
    assert peak_of(lambda: Fingerprint.of(tensor)) <= 3 * 4 * PART
    assert peak_of(lambda: Fingerprint.of(tensor.t())) <= 4 * 4 * PART
