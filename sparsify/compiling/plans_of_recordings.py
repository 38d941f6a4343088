"""What a plan is told by a recording, and what was decided beyond it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from sparsify.choosing.choose import Choice
from sparsify.passes.recurrent_layers.rnn_cells import recurrent_op
from sparsify.plan import Plan, PlanDecision, RegionPlan
from sparsify.products.find_products import Product
from sparsify.products.place_sites import Placement


def measured_plan(plan: Plan, products: Sequence[Product]) -> Plan:
    """``plan`` with the measured activities it lacks; the graph is made to have those of the plan.

    Passes look at activities, and recordings of other inputs must come out the same.
    """
    measured = {p.name: p.activity for p in products if p.activity is not None}
    activity = {**measured, **plan.activity}
    for product in products:
        for node in product.nodes if product.name in activity else ():
            if recurrent_op(node) is None:
                node.meta["activity"] = activity[product.name]
    return replace(plan, activity=activity)


def decided_plan(
    plan: Plan,
    placements: Sequence[Placement],
    choices: Mapping[str, Choice],
    machine: str,
    whole: Iterable[str],
) -> Plan:
    """``plan`` with what was decided beyond it; ``whole`` names sites that torch's code keeps."""
    sites: dict[str, PlanDecision] = dict(plan.sites)
    regions, layouts = dict(plan.regions), dict(plan.layouts)
    for placement in placements:
        region = choices[placement.region].region
        if region is None:
            sites.setdefault(placement.product.name, "off")
            continue
        schedule = region.launchable.schedule
        sites[placement.product.name] = dict(schedule.gathers)[placement.gather]
        weight = region.lowered.kernel.weight_of(placement.gather)
        layouts[placement.product.name] = schedule.layout_of(weight)
        regions[placement.region] = RegionPlan(schedule.strategy, schedule.tile)
    for name in whole:
        sites.setdefault(name, "off")
    machine = plan.machine or machine
    return Plan(sites, regions, machine, plan.activity, layouts=layouts)
