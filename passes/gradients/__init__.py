"""The gradient of a Scan: what is saved, and a loop from the last step to the first."""
