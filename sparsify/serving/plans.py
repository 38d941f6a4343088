"""The plans of one model: one for each backend that it was compiled for."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from sparsify.codegen.backend import Backend
from sparsify.plan import Plan


class Plans:
    """What was decided for each backend, on top of the plan that the user gave."""

    def __init__(self, given: Plan) -> None:
        self.given = given
        self._of: dict[Backend, Plan] = {}

    def of(self, backend: Backend) -> Plan:
        return self._of.get(backend, self.given)

    def for_call(self, backend: Backend, is_trained: bool, undecided: Collection[str] = ()) -> Plan:
        """The plan of calls with gradients, which are decided on their own, or of those without.

        Sites that are ``undecided`` for such a call are in it only if the user has decided them.
        """
        plan, given = self.of(backend), self.given
        if is_trained:
            plan, given = plan.training or Plan(), given.training or Plan()
        return plan.reopen(undecided, given) if undecided else plan

    def adopt(self, backend: Backend, plan: Plan, is_trained: bool) -> None:
        """``plan`` is what was decided for such calls."""
        known = self.of(backend)
        if is_trained:
            self._of[backend] = replace(known, training=plan)
        else:
            self._of[backend] = replace(plan, training=known.training)

    def reopen(self, backend: Backend, sites: Collection[str]) -> None:
        """``sites`` are to be decided again, unless the user has."""
        self._of[backend] = self.of(backend).reopen(sites, self.given)
