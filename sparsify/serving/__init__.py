"""What runs behind a sparsified module: which recording serves a call, and what is told of it."""
