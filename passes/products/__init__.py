"""Products with weights: one spelling for all, and those with kernels become Scans."""
