"""Graph to graph, one file a pass. `pipeline.py` lists them in order."""

if __name__ == "passes":
    raise ImportError("import this package as sparsify.passes, not as passes")
