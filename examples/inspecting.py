"""See what was done with a model, change a decision, and keep the decisions for the next run."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from quickstart import BATCH, INPUTS, STEPS, SpikingNet

import sparsify


def main() -> None:
    torch.manual_seed(0)
    model = SpikingNet().eval()
    x = (torch.rand(STEPS, BATCH, INPUTS) < 0.02).float()
    print("What would be done, without doing it:\n")
    print(sparsify.explain(model, x))

    with torch.no_grad():
        fast = model.sparsify(x)
    print("\nThe stages, each a graph that can be printed and run:\n")
    for stage in fast.stages:
        print(f"{stage.name:<16} {len(stage.graph.graph.nodes):>6} nodes")
    print("\nThe graph that runs:\n")
    print(fast.code)
    for name, kernel in fast.kernels.items():
        print(f"The first lines of kernel {name}:\n")
        print("\n".join(kernel.source.splitlines()[:12]))

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        fast.plan.save(path)
        plan = sparsify.Plan.load(path)
    print("\nThe decisions, as a value that can be saved and changed:\n")
    print(plan)
    site = fast.report.sites[-1].name
    with torch.no_grad():
        changed = model.sparsify(x, plan=plan.pin(site, "off"))
    print(f"\nWith {site} turned off:\n")
    print(changed.report)


if __name__ == "__main__":
    main()
