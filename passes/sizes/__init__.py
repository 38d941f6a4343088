"""One graph for all sizes of a call."""
