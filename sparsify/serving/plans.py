"""The plans of one model: one for each backend that it was compiled for."""

from __future__ import annotations

from collections.abc import Collection, Set
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
        plan, given = self.of(backend), self._given(is_trained)
        if is_trained:
            plan = plan.training or Plan()
        off = [site for site in undecided if plan.sites.get(site) == "off"]
        return plan.reopen(off, given) if off else plan

    def has_given(self, sites: Set[str], is_trained: bool) -> bool:
        """Whether the user has decided all of ``sites`` for such calls."""
        return sites <= self._given(is_trained).sites.keys()

    def _given(self, is_trained: bool) -> Plan:
        return (self.given.training or Plan()) if is_trained else self.given

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
