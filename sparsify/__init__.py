"""Event-driven compilation of PyTorch spiking and event-based networks."""
