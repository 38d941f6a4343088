"""Kernels for gradients of convolutions that will be called: they are compiled ahead."""

from __future__ import annotations

from dataclasses import dataclass

from sparsify import ir
from sparsify.codegen.cpp import convolution_gradient as cpp_convolution_gradient
from sparsify.codegen.cpp import sender_gradient as cpp_sender_gradient


@dataclass(frozen=True)
class ForeseenConvolution:
    """Gradients of ``convolution``, of a ``d`` of the C++ type ``value``, as many times as they
    take ``multiplications`` where none is left out.

    Those of weights and of pools read an activity of the C++ type ``source``. Without one, they are
    those of wanted senders.
    """

    convolution: ir.Convolution
    value: str
    source: str | None
    multiplications: int

    @property
    def kind(self) -> object:
        """What the kernel depends on."""
        return self.convolution, self.value, self.source

    def compile(self) -> None:
        """Raises BackendUnavailable and CompileError."""
        if self.source is None:
            cpp_sender_gradient.compile_function(self.convolution, self.value)
        else:
            cpp_convolution_gradient.compile_function(self.convolution, self.value, self.source)
