"""How the emulated device runs kernels, as the environment says."""

from __future__ import annotations

import os

from sparsify.codegen.emulator.device import SCHEDULES, EmulatedDevice, Schedule

VARIABLE = "SPARSIFY_EMULATOR"
UNCHECKED = "unchecked"


def emulated_device() -> EmulatedDevice:
    """The device of ``SPARSIFY_EMULATOR``: a schedule, ``unchecked``, or both with a comma.

    ``random:7`` is the random schedule with the seed 7. Unless it says otherwise, threads run in
    their order and every access to memory is checked. Raises ValueError for anything else.
    """
    schedule: Schedule = "forward"
    seed, checks = 0, True
    for word in filter(None, os.environ.get(VARIABLE, "").replace(" ", "").split(",")):
        name, _, number = word.partition(":")
        if word == UNCHECKED:
            checks = False
        elif name == "random" and number.isdigit():
            schedule, seed = "random", int(number)
        elif word in SCHEDULES:
            schedule = next(known for known in SCHEDULES if known == word)
        else:
            known = ", ".join((*SCHEDULES, "random:SEED", UNCHECKED))
            raise ValueError(f"{VARIABLE}: unknown word {word!r}; known: {known}")
    return EmulatedDevice(schedule, seed, checks)
