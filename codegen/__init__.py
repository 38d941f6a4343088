"""Kernel IR to source to callable. Never imports torch.fx or passes."""

if __name__ == "codegen":
    raise ImportError("import this package as sparsify.codegen, not as codegen")
