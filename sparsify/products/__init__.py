"""The linear products of a model: found, placed, their zeros, and their rows in the report."""
