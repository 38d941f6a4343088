"""The time loop that Python unrolled becomes one Scan."""
