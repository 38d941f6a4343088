"""Every way of writing to a tensor, as new values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.recorded import check, of, targets

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
Function = Callable[[Tensor], object]


def setitem(x: Tensor) -> Tensor:
    out = torch.zeros(4, 3)
    for t in range(2):
        out[:, t] = x[:, t] * 2
    return out


def relu_in_place(x: Tensor) -> Tensor:
    y = x * 1
    F.relu(y, inplace=True)
    return y


def out_argument(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    torch.mul(x, 2, out=y)
    return y


def out_argument_grows(x: Tensor) -> Tensor:
    y = torch.empty(0)
    torch.mul(x, 2, out=y)
    return y + 1


def out_argument_converts(x: Tensor) -> Tensor:
    y = torch.empty(4, 3, dtype=torch.float64)
    torch.mul(x, 2, out=y)
    return y


def out_pair(x: Tensor) -> tuple[Tensor, Tensor]:
    values, indices = torch.empty(4), torch.empty(4, dtype=torch.int64)
    torch.max(x, dim=1, out=(values, indices))
    return values, indices


def base_after_view(x: Tensor) -> Tensor:
    y = x * 1
    v = y[0]
    v.mul_(3)
    return y.sum()


def view_after_base(x: Tensor) -> Tensor:
    y = x * 1
    v = y[0]
    y.mul_(3)
    return v + 1


def overlapping_views(x: Tensor) -> tuple[Tensor, ...]:
    y = x * 1
    rows, columns, corner = y[1:3], y[:, :2], y[1, 1]
    rows.add_(1)
    columns.mul_(2)
    corner.fill_(7)
    y[0] = rows[0]
    return y, rows, columns, corner


def views_of_views(x: Tensor) -> tuple[Tensor, ...]:
    y = (x * 1).t()
    z = y.unsqueeze(0)[0, 1:].view(2, 2, 2)
    z[1].add_(5)
    return y, z, y.reshape(-1)


def flat_view(x: Tensor) -> Tensor:
    y = x * 1
    y.view(-1)[3:7] = 0.5
    return y


def transposed(x: Tensor) -> Tensor:
    y = x * 1
    y.t()[1].copy_(x[:, 0])
    y.permute(1, 0).mul_(2)
    y.transpose(0, 1)[:, 1].zero_()
    return y


def squeezed(x: Tensor) -> Tensor:
    y = (x * 1).unsqueeze(1)
    y.squeeze().add_(1)
    y.squeeze(1)[2].sub_(1)
    return y


def diagonal(x: Tensor) -> Tensor:
    y = x * 1
    y.diagonal().fill_(9)
    return y


def parts(x: Tensor) -> tuple[Tensor, ...]:
    y = x * 1
    a, b = y.split([1, 2], dim=1)  # type: ignore[no-untyped-call]
    b.mul_(2)
    rows = y.unbind(0)
    rows[2].add_(a[0])
    c, d = y.chunk(2)
    d.sub_(c)
    return y, a, b, rows[2]


def unsafe_parts(x: Tensor) -> tuple[Tensor, ...]:
    """How cells of torch take their gates apart and write to them."""
    y = x * 1
    a, b = torch.unsafe_chunk(y, 2, 0)
    b.mul_(a)
    c, d = torch.unsafe_split_with_sizes(y, [1, 2], 1)
    d.add_(c)
    return y, a, b, c, d


def strided_slice(x: Tensor) -> Tensor:
    y = x * 1
    y[::2, 1:] += 10
    return y


def detached(x: Tensor) -> Tensor:
    y = x * 1
    y.detach().add_(1)
    y.data.mul_(2)
    return y


def masked_number(x: Tensor) -> Tensor:
    y = x * 1
    y[y > 0] = 0
    y[y < -1] = -1.5
    return y


def masked_rows(x: Tensor) -> Tensor:
    y = x * 1
    y[y[:, 0] > 0] = 2
    y[:, y[0] > 0] = x[0, 0]
    return y


def masked_fill(x: Tensor) -> tuple[Tensor, ...]:
    y = x * 1
    y.masked_fill_(x > 0.5, 3)
    return y, x.masked_fill(x < 0, float("-inf")), x.masked_fill(x > 0, x[1, 1])


def masked_integer(x: Tensor) -> Tensor:
    y = (x * 4).long()
    y[x > 0] = 7
    return y


def indexed(x: Tensor) -> Tensor:
    y = x * 1
    y[torch.tensor([0, 2])] = x[:2]
    y[torch.arange(3), torch.tensor([0, 1, 2])] = 4
    y.index_add_(0, torch.tensor([1, 1]), x[:2])
    y.scatter_(1, torch.zeros(4, 1, dtype=torch.int64), 5.0)
    return y


def copied(x: Tensor) -> tuple[Tensor, ...]:
    y = torch.empty(4, 3)
    y.copy_(x[0])
    z = torch.empty(4, 3, dtype=torch.int64)
    z.copy_(x * 3)
    w = torch.empty(3, 4)
    w.copy_(x.t())
    return y, z, w.view(-1), w.view(2, 6)


def copy_stays(x: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.empty(4, 3)
    y.copy_(x)
    z = y * 1
    z.copy_(y)
    z.add_(1)
    return y, z


def cast_in_place(x: Tensor) -> tuple[Tensor, ...]:
    y = x * 1
    y.add_(x.double())
    z = x * 1
    z.gt_(0)
    w = (x * 4).int()
    w.mul_(2)
    return y, z, w


def shapes_in_place(x: Tensor) -> tuple[Tensor, ...]:
    y = x * 1
    v = y[0]
    y.t_()
    y.unsqueeze_(0)
    y[0, 1] = 3
    y.squeeze_()
    v.add_(1)
    return y, v


def augmented(x: Tensor) -> Tensor:
    out = torch.zeros(4, 5, 3)
    for t in range(5):
        out[:, t] += x * t
        out[:, t] -= 1
    return out


def filled(x: Tensor) -> tuple[Tensor, ...]:
    y = torch.empty(2, 3).fill_(2.5)
    z = x * 1
    z.zero_()
    z[1].fill_(x[0, 0])
    z[2:, 1] = x[0, 1]
    return y, z


def clamped(x: Tensor) -> Tensor:
    y = x * 1
    return y.clamp_(0, 1).sqrt_().neg_().addcmul_(x, x, value=0.5)


def self_overlap(x: Tensor) -> Tensor:
    y = x * 1
    y[1:] = y[:-1].clone()
    y[0] = y[0]
    return y


def foreach(x: Tensor) -> list[Tensor]:
    a, b = x * 1, x * 2
    torch._foreach_add_([a, b], 1.0)
    torch._foreach_mul_([a, b], [b, x])
    return [a, b]


def channels_last(x: Tensor) -> tuple[Tensor, ...]:
    y = x.reshape(1, 2, 2, 3).contiguous(memory_format=torch.channels_last)
    y = y * 1
    y[:, 0].add_(1)
    z = torch.empty_like(y)
    z.copy_(y)
    return z, z.permute(0, 2, 3, 1).reshape(4, 3), (z + 1).flatten()


ALL: tuple[Function, ...] = (
    *(setitem, relu_in_place, out_argument, out_argument_grows, out_argument_converts, out_pair),
    *(base_after_view, view_after_base, overlapping_views, views_of_views, flat_view, transposed),
    *(
        squeezed,
        diagonal,
        parts,
        unsafe_parts,
        strided_slice,
        detached,
        masked_number,
        masked_rows,
        masked_fill,
    ),
    *(masked_integer, indexed, copied, copy_stays, cast_in_place, shapes_in_place, augmented),
    *(filled, clamped, self_overlap, foreach, channels_last),
)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("function", ALL, ids=lambda f: str(f.__name__))
def test_writes_are_values(function: Function, mode: Callable[[], object]) -> None:
    def forward(x: Tensor) -> object:
        with mode():  # type: ignore[attr-defined]
            return function(x)

    check(of(forward), X.clone())


def test_masked_assignment_is_a_where() -> None:
    assert targets(check(of(masked_number), X.clone())).count("where.ScalarSelf") == 2


def test_slices_are_scattered() -> None:
    names = targets(check(of(setitem), X.clone()))
    assert names.count("select_scatter") == 2
    assert "as_strided_scatter" not in names
