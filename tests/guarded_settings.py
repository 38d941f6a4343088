"""Settings as projects keep them: constants, an object and nested ones in a module."""

from __future__ import annotations

from types import SimpleNamespace

RATES = [0.1, 0.2]
UNREAD = 3


class Neuron:
    reset_value = 1.0


neuron = Neuron()
nested = SimpleNamespace(inner=SimpleNamespace(value=0.5))
