"""Scans become kernels of the IR, or it is said which operation has no place in one."""
