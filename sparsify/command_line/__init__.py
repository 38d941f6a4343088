"""The command ``sparsify`` and its demo."""
