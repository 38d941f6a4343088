"""Loops hand spikes to one another as bits."""
