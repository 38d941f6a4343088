"""Kernel IR to source to callable. Never imports torch.fx or passes.

Here lies what backends share: what a backend is, the cache of what was compiled, weights and their
layouts, the support library of C++ and Python. The backends are ``cpp`` and ``cuda``; ``emulator``
runs what the latter writes on the processor.
"""

if __name__ == "codegen":
    raise ImportError("import this package as sparsify.codegen, not as codegen")
