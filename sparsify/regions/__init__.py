"""The modules that run time loops by kernels, forward and backward."""
