"""Weights made zero: which, when, and how they stay zero while the others are trained."""
