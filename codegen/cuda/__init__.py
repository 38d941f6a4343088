"""Kernel IR to CUDA text to cubin to launch. Never imports torch.fx or passes.

CuPy is asked for where it is used: all but compiling and launching works without it.
"""

if __name__ != "sparsify.codegen.cuda":
    raise ImportError(f"import this package as sparsify.codegen.cuda, not as {__name__}")
