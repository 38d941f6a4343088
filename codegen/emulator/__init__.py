"""CUDA C++ on the processor of the host, with checks of every access to memory."""

if __name__ != "sparsify.codegen.emulator":
    raise ImportError(f"import this package as sparsify.codegen.emulator, not as {__name__}")
