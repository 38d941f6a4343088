"""Kernel IR to C++ text to a shared library to a call. Never imports torch.fx or passes."""

if __name__ != "sparsify.codegen.cpp":
    raise ImportError(f"import this package as sparsify.codegen.cpp, not as {__name__}")
