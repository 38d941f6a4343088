"""The scalar operations of kernels: what each one computes, to the last bit."""
