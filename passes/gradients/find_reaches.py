"""Which gradients flow where: in a step, and through all steps of a loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import torch
from torch import Tensor

from sparsify.passes.gradients.joint_graph import blank_like, is_float, operand_places
from sparsify.recording.saved import random_states_kept
from sparsify.scans.differentiated import Operand
from sparsify.scans.scan import Scan
from sparsify.training_step import propagate


def find_dependences(scan: Scan) -> list[set[Operand]]:
    """For each result of a step, the operands that have a gradient through it in that step."""
    places = operand_places(scan)
    with random_states_kept(), torch.enable_grad():
        operands = [blank_like(place).requires_grad_(is_float(place)) for place in places.values()]
        results = scan.body(*operands)
        named = dict(zip(places, operands, strict=True))
        found = {id(result): _operands_of(result, named) for result in results}
    return [found[id(result)] for result in results]


def _operands_of(result: Tensor, operands: Mapping[Operand, Tensor]) -> set[Operand]:
    taking = {key: tensor for key, tensor in operands.items() if tensor.requires_grad}
    if not result.requires_grad or not taking:
        return set()
    gradients = propagate([result], [torch.ones_like(result)], list(taking.values()))
    pairs = zip(taking, gradients, strict=True)
    return {key for key, gradient in pairs if gradient is not None}


def find_active(
    scan: Scan, required: Set[Operand], dependences: Sequence[Set[Operand]]
) -> set[Operand]:
    """The operands that gradients flow to in a step: the required ones, and carries between."""
    places = operand_places(scan)
    active = {key for key in required if is_float(places[key])}
    while True:
        found = {("carry", i) for i in range(scan.carries) if dependences[i] & active}
        if found <= active:
            return active
        active |= found


def find_reaches(
    scan: Scan, dependences: Sequence[Set[Operand]], required: Set[Operand], steps: int
) -> frozenset[tuple[int, Operand]]:
    """(result, required operand) where a gradient flows within ``steps`` steps."""
    found: set[tuple[int, Operand]] = set()
    for index in range(len(scan.results)):
        is_carry = index < scan.carries
        now: Set[Operand] = {("carry", index)} if is_carry else dependences[index]
        # A y of step t is t steps behind the initial carries, a final carry all steps.
        reached = set[Operand]() if is_carry else set(now)
        for _ in range(steps if is_carry else steps - 1):
            now = {key for role, i in now if role == "carry" for key in dependences[i]}
            reached |= {key for key in now if not is_carry or key[0] != "carry"}
        if is_carry:
            reached |= {key for key in now if key[0] == "carry"}
        found |= {(index, key) for key in reached & required}
    return frozenset(found)
