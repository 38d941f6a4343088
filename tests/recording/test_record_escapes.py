"""Values that leave torch, tensors that come from elsewhere: refused with the line, or right."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparsify.recording.record import record
from sparsify.recording.recording import Unrecorded
from tests.recorded import Of, call, check, of, recorded, refused, same, sources, targets

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
BEFORE = torch.randn(4, 3)
Function = Callable[[Tensor], object]


@torch.jit.script
def scripted_branch(v: Tensor) -> Tensor:
    if bool((v > 1).any()):
        v = v * 0
    return v


@torch.jit.script
def scripted(a: Tensor, b: Tensor) -> Tensor:
    return a * b + a


REFUSED: dict[str, tuple[Function, str]] = {
    "item": (lambda x: x * x[0, 0].item(), "item()"),
    "bool": (lambda x: x * 2 if x.sum() > 0 else x * 3, "bool()"),
    "int": (lambda x: x * int(x[0, 0]), "int()"),
    "index": (lambda x: x * range(9)[(x > 9).sum()], "index"),
    "tolist": (lambda x: x * sum(x[0].tolist()), "tolist"),
    "equal": (lambda x: x * 2 if torch.equal(x, x) else x, "equal"),
    "allclose": (lambda x: x * 2 if torch.allclose(x, x) else x, "allclose"),
    "nonzero": (lambda x: x * (x > 0).nonzero().shape[0], "nonzero"),
    "mask": (lambda x: x[x > 0].sum(), "shape of index"),
    "one_hot": (lambda x: torch.nn.functional.one_hot(x.argmax(1)).sum(), "num_classes"),
    "unique": (lambda x: torch.unique(x.round()).sum(), "unique"),
    "masked assignment": (lambda x: x.clone().masked_scatter_(x > 0, x[x > 0]), "shape of index"),
    "numpy": (lambda x: x * torch.from_numpy(np.tanh(x.numpy())), "numpy"),
    "asarray": (lambda x: x * float(np.asarray(x).sum()), "numpy"),
    "numpy function": (lambda x: x * np.tanh(x), "numpy"),
    "from_numpy": (lambda x: x * torch.from_numpy(np.ones((4, 3), np.float32)), "numpy"),
    "as_tensor": (lambda x: x * torch.as_tensor(np.ones((4, 3), np.float32)), "numpy"),
    "tensor of array": (lambda x: x * torch.tensor(np.ones((4, 3), np.float32)), "numpy"),
    "frombuffer": (
        lambda x: x[0] * torch.frombuffer(bytearray(12), dtype=torch.float32),
        "no recorded operation made",
    ),
    "dlpack": (lambda x: x * torch.utils.dlpack.from_dlpack(x), "__dlpack__"),
    "dlpack of array": (
        lambda x: x * torch.utils.dlpack.from_dlpack(np.ones((4, 3), np.float32)),
        "no recorded operation made",
    ),
    "data_ptr": (lambda x: x * (x.data_ptr() != 0), "data_ptr"),
    "storage": (lambda x: x * len(x.untyped_storage()), "untyped_storage"),
    "format": (lambda x: x * len(f"{x[0, 0]:.3f}"), "text"),
    "repr": (lambda x: x * (len(repr(x)) > 0), "text"),
    "scripted branch": (lambda x: scripted_branch(x) * 2, "bool()"),
    "sparse": (lambda x: x.to_sparse().to_dense() * 1, "sparse"),
    "set data": (lambda x: setattr(y := x * 1, "data", x * 3) or y, ".data"),  # type: ignore[func-returns-value]
}


@pytest.mark.parametrize("name", REFUSED)
def test_escapes_are_refused_with_the_line(name: str) -> None:
    function, reason = REFUSED[name]
    error = refused(of(function), X.clone())
    assert reason in str(error)
    assert error.location is not None
    assert error.location.file == __file__
    assert name in error.location.code or error.location.code


def test_the_line_is_the_users_and_not_that_of_pythons_library() -> None:
    error = refused(of(lambda x: x * len(copy.copy(nn.Parameter(x)))), X.clone())
    assert error.location is not None
    assert (error.location.file, "copy.copy(nn" in error.location.code) == (__file__, True)


ALLOWED: dict[str, Function] = {
    "shapes": lambda x: x * x.shape[0] + x.size(1) + len(x) + x.numel() + x.dim(),
    "scripted": lambda x: scripted(x, x) * 2,
    "vmap": lambda x: torch.vmap(lambda a: a.sin() * a.sum())(x),
    "torch.ops": lambda x: torch.ops.aten.mul.Tensor(x, x) + torch.ops.aten.sin(x),
    "constants": lambda x: x + torch.tensor(3.0) + torch.Tensor([1.0, 2.0, 3.0]) + BEFORE,
    "as_tensor": lambda x: x + torch.as_tensor([1.0, 2, 3]),
    "arange": lambda x: torch.stack([x[i] for i in torch.arange(2)]),
    "literal": lambda x: x * torch.linspace(0, 1, 5)[2].item() + torch.tensor([4, 5]).tolist()[1],
    "index": lambda x: x[:, int(torch.tensor(2))] * range(5)[torch.tensor(2)],
    "data": lambda x: x.data * 2,
    "iteration": lambda x: torch.stack([a * 2 for a in x]),
    "numpy scalar": lambda x: x * np.float32(0.1) + np.float64(0.1) * x,  # type: ignore[operator]
    "einsum": lambda x: torch.einsum("ij,kj->ik", x, x),
    "one_hot": lambda x: x * torch.nn.functional.one_hot(x.argmax(1), num_classes=3),
    "copy": lambda x: copy.copy(x * 2) + x,
    "copies share memory": lambda x: (y := x * 2) + copy.copy(y[1:]).add_(1).sum() + y,
    "copied input": lambda x: copy.copy(x),
    "copied container": lambda x: copy.copy([x, x * 2])[1],
    "deepcopy": lambda x: copy.deepcopy(x * 2).add_(1) + x,
    "linear": lambda x: torch.nn.functional.linear(x, BEFORE, BEFORE[:, 0]),
    "no grad": lambda x: torch.no_grad()(lambda y: y * 2)(x) + x,
    "complex": lambda x: torch.fft.rfft(x).abs(),
    "nothing": lambda x: x,
    "parameter": lambda x: nn.Parameter(torch.ones(3)) * x + nn.Parameter(x),
    "module": lambda x: nn.init.ones_(nn.Linear(3, 3, bias=False).weight) * x[:3],
    "structure": lambda x: {"a": [x, (x * 1, None)], "b": 3, "c": "text"},
}


@pytest.mark.parametrize("name", ALLOWED)
def test_what_is_no_escape_is_recorded(name: str) -> None:
    check(of(ALLOWED[name]), X.clone())


def test_deep_copies_of_what_has_a_gradient_raise_as_in_eager() -> None:
    x = X.clone().requires_grad_()
    with torch.enable_grad(), pytest.raises(RuntimeError, match="deepcopy protocol"):
        record(of(lambda x: copy.deepcopy(x * 2)), (x,), {})


def test_copies_of_other_kinds_of_tensors_are_made_by_torch() -> None:
    tagged: Any = X.clone().as_subclass(type("Tagged", (Tensor,), {}))
    tagged.note = "kept"
    made: list[Any] = []

    def forward(x: Tensor) -> Tensor:
        made.append(copy.copy(tagged))
        return x * 2

    record(of(forward), (X,), {})
    assert type(made[0]) is type(tagged) and made[0].note == "kept"
    assert made[0].data_ptr() == tagged.data_ptr()


def test_a_class_beyond_the_number_of_classes_raises_as_in_eager() -> None:
    def forward(x: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(x.long(), 3)

    recording = recorded(of(forward), torch.tensor([0.0, 2.0]))
    for run in (lambda x: call(recording, x), forward):
        with pytest.raises(RuntimeError):
            run(torch.tensor([0.0, 3.0]))


def test_composites_are_taken_apart_in_inference_mode() -> None:
    def forward(x: Tensor) -> Tensor:
        with torch.inference_mode():
            return torch.nn.functional.linear(x.float(), BEFORE, BEFORE[:, 0])

    names = targets(check(of(forward), X.clone()))
    assert names[-2:] == ["t", "addmm"] or names == ["select.int", "t", "addmm"]


def test_numbers_stay_literals_and_constants_are_shared() -> None:
    def forward(x: Tensor) -> Tensor:
        for _ in range(3):
            x = x * torch.tensor(0.5) + torch.tensor([1.0, 2.0, 3.0])
        return x

    recording = check(of(forward), X.clone())
    assert [kind for kind, _ in sources(recording)] == ["input", "constant"]
    assert targets(recording).count("full") == 3


def test_an_unreachable_tensor_is_a_constant_whose_content_may_change() -> None:
    class Hidden:
        __slots__ = ("__weakref__", "get")

    hidden = Hidden()
    hidden.get = iter([BEFORE.clone(), BEFORE.clone()]).__next__  # type: ignore[attr-defined]
    kept = [hidden.get()]  # type: ignore[attr-defined]
    model = of(lambda x: x * kept[0])
    recording = recorded(model, X.clone())
    kept[0].fill_(2)
    assert same(call(recording, X), X * 2)


def test_values_of_small_states_may_reach_python_and_are_guarded() -> None:
    model = Of(lambda self, x: x * 2 if self.mode == 1 else x * 3, mode=torch.tensor(1))
    recording = recorded(model, X.clone())
    assert same(call(recording, X), X * 2)
    model.mode.fill_(0)  # type: ignore[operator]
    with torch.no_grad():
        assert not recording.guard.matches((X,), {})
        assert "mode was 1" in recording.guard.explain((X,), {})


def test_a_state_that_python_reads_and_forward_changes_is_refused() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.count += 1
        return x * 2 if self.count > 2 else x

    assert "count" in str(refused(Of(forward, count=torch.zeros(())), X.clone()))


def test_exceptions_of_forward_are_raised_and_everything_is_restored() -> None:
    def forward(x: Tensor) -> Tensor:
        raise KeyError("mine")

    before = sys.gettrace(), sys.getprofile()
    with torch.no_grad(), pytest.raises(KeyError, match="mine"):
        record(of(forward), (X,), {})
    assert (sys.gettrace(), sys.getprofile()) == before
    recorded(of(lambda x: x * 2), X)


def test_the_first_reason_is_told_and_the_run_goes_through() -> None:
    def forward(x: Tensor) -> Tensor:
        y = x * x.sum().item()
        for _ in range(int(y.sum().abs()) % 3 + 1):
            y = y + 1
        return y

    with torch.no_grad():
        found = record(of(forward), (X,), {})
        assert isinstance(found, Unrecorded)
        assert same(found.result, forward(X))
    assert found.error.location is not None
    assert "x.sum().item()" in found.error.location.code


class ReadsPacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(3, 5, nonlinearity="relu")

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        last: Tensor = self.rnn(packed)[1]
        return last


def test_packed_sequences_are_refused_with_a_way_out() -> None:
    error = refused(ReadsPacked(), torch.randn(6, 2, 3), torch.tensor([4, 6]))
    assert "self.rnn(packed)" in str(error.location)
    assert "the lengths of a packed sequence reach Python; give padded tensors" in str(error)


def test_sparse_arguments_are_refused_with_a_way_out() -> None:
    error = refused(of(lambda x: x.to_dense() * 2), X.to_sparse())
    assert "torch.sparse_coo is used; make it dense (to_dense) before the call" in str(error)


@pytest.mark.parametrize("kind", ["relu", "tanh", "gru", "lstm"])
def test_recurrent_layers_are_kept_whole(kind: str) -> None:
    torch.manual_seed(0)
    layers: dict[str, nn.Module] = {
        "relu": nn.RNN(3, 5, 2, nonlinearity="relu"),
        "tanh": nn.RNN(3, 5, batch_first=True),
        "gru": nn.GRU(3, 5),
        "lstm": nn.LSTM(3, 5),
    }
    recording = check(layers[kind], torch.randn(6, 4, 3))
    name = {"relu": "rnn_relu", "tanh": "rnn_tanh"}.get(kind, kind)
    assert targets(recording).count(f"{name}.input") == 1
    assert not any("mm" in target for target in targets(recording))


def test_a_layer_inside_of_a_recorded_model_is_not_recorded_again() -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            found = record(of(lambda y: y * 3), (x,), {})
            assert isinstance(found, Unrecorded)
            assert isinstance(found.result, Tensor)
            return found.result

    assert targets(recorded(Inner(), X)) == ["mul.Tensor"]
