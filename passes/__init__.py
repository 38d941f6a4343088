"""Graph to graph, one file a pass. ``pipeline.py`` lists them in order.

Passes know only what stands above them here:

    nodes             what all passes know of nodes and values, and how they write new ones
    events            which values are zero unless a threshold was passed
    lowering          Scans become kernels of the IR, or it is said what has no place in one
    hoisting          what no recurrence needs leaves the loop, for all steps at once
    products          one spelling for products with weights; those with kernels become Scans
    recurrent_layers  torch's own recurrent layers, step by step
    loops             the time loop that Python unrolled becomes one Scan
    gradients         what a Scan saves, and the loop from its last step to its first
    pipeline.py
    packing           loops hand spikes to one another as bits
    sizes             one graph for all sizes of a call
    results           what the model returns, and who else may write to it
"""

if __name__ == "passes":
    raise ImportError("import this package as sparsify.passes, not as passes")
