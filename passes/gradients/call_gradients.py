"""Let modules compute the gradients of what convolutions read, of all steps at once.

Before::

    d_z = sender_gradient(d, w, z, only, ...)

After::

    d_z = read_gradient_0(d, w, z, only)
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from sparsify.passes.nodes.copy_graph import copy_graph
from sparsify.regions.convolution_backward import ReadGradient, sender_gradient


def call_gradients(gm: fx.GraphModule) -> fx.GraphModule:
    """Put a ReadGradient in the place of every ``sender_gradient`` of ``gm`` itself."""
    graph = copy_graph(gm.graph)
    modules: dict[str, nn.Module] = dict(gm.named_children())
    found = graph.find_nodes(op="call_function", target=sender_gradient)
    for number, node in enumerate(found):
        args: Any = node.args
        name = f"read_gradient_{number}"
        source = args[1].meta.get("source")
        layer = "" if source is None else source.name
        modules[name] = ReadGradient(tuple(args[4:]), layer=layer)
        with graph.inserting_before(node):
            module = graph.create_node("call_module", name, args[:4], name=name)
        module.meta.update(node.meta)
        node.replace_all_uses_with(module)
        graph.erase_node(node)
    return fx.GraphModule(modules, graph, class_name=type(gm).__name__) if found else gm
