"""What is compiled or imported while a model is recorded sees nothing of that."""

from __future__ import annotations

import builtins
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify.api import sparsify
from sparsify.errors import TraceError
from sparsify.recording.uncompiled import HIGHER_ORDER
from tests.models.small_nets import spikes

X = spikes()
LENGTH, IMPORT = len, builtins.__import__

# As torch's `scan`, whose first use in a process imports torch's compiler for three seconds.
SCAN = """
def scan(function, x):
    return torch.compile(function)(x)
"""


class Scanned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        of_torch: dict[str, Any] = {"torch": torch}
        exec(compile(SCAN, f"{HIGHER_ORDER}scan.py", "exec"), of_torch)
        self.scan = of_torch["scan"]

    def forward(self, x: Tensor) -> Any:
        return self.scan(lambda x: x.cumsum(0), x)


def compile_alone(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def compiled(x: Tensor) -> Tensor:
        assert not torch._C._len_torch_dispatch_stack()
        assert not torch._C._len_torch_function_stack()
        assert LENGTH is len and builtins.__import__ is IMPORT
        return function(x)

    return compiled


def test_loops_that_torch_compiles_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", compile_alone)
    fast = sparsify(Scanned())
    message = r"test_uncompiled\.py:\d+  return self\.scan\(.*: scan compiles .* it in Python"
    with pytest.warns(UserWarning, match=message) as told:
        for _ in range(2):
            assert torch.equal(fast(X), X.cumsum(0))
    assert LENGTH(told) == 1
    with pytest.raises(TraceError, match=message):
        sparsify(Scanned(), X)
    assert torch.compile is compile_alone


@pytest.mark.parametrize("importer", ["import keeps_builtins", "import_module('keeps_builtins')"])
def test_modules_that_forward_imports_keep_pythons_builtins(
    importer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "keeps_builtins.py").write_text("import keeps_too\n")
    (tmp_path / "keeps_too.py").write_text("KEPT = len, __import__\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("keeps_builtins", "keeps_too"):
        monkeypatch.delitem(sys.modules, name, raising=False)

    class Imports(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            exec(importer, {"import_module": importlib.import_module})
            return x * len(x)

    fast = sparsify(Imports(), X)
    assert sys.modules["keeps_too"].KEPT == (LENGTH, IMPORT)
    assert torch.equal(fast(X[:2]), X[:2] * 2)
