"""Kernels of the IR that tests run, written by hand or drawn at random."""
