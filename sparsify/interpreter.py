"""``fx.Interpreter`` without its progress bar.

tqdm starts a thread that stays for good, and loads multiprocessing, for a bar that nobody sees.
"""

from __future__ import annotations

from typing import Any

from torch import fx


class Interpreter(fx.Interpreter):
    """Runs a graph node by node. What a node raises is raised as it is."""

    def run(self, *args: Any) -> Any:  # type: ignore[override]
        self.env = {}
        self.args_iter = iter(args)
        for node in self.graph.nodes:
            self.env[node] = self.run_node(node)
            if self.garbage_collect_values:
                for last in self.user_to_last_uses.get(node, ()):
                    del self.env[last]
            if node.op == "output":
                return self.env[node]
        raise ValueError("the graph has no output")
