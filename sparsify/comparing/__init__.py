"""Compare what kernels compute with what they replace, and keep the figures."""
