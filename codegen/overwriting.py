"""Whether a kernel may write an output to the memory of one of its operands."""

from __future__ import annotations

from sparsify import ir
from sparsify.codegen.usage import neuron_reads

FLOATS = ("float32", "float64")


def may_overwrite(kernel: ir.Kernel, operand: str, output: str) -> bool:
    """True if ``output[t, b, n]`` is written when ``operand[t, b, n]`` has been read for good.

    Cells read and write in the order of statements, and phases come after one another. Products
    read other neurons, and those of inputs other steps: what a Gather reads stays as it is.
    """
    read = next((o for o in kernel.operands if o.name == operand), None)
    written = next((o for o in kernel.outputs if o.name == output), None)
    if read is None or written is None or read.axes != written.axes or read.axes[:1] != ("T",):
        return False
    is_alike = (read.population, read.dtype) == (written.population, written.dtype)
    is_gathered = any(operand in (g.source, g.only) for g in kernel.gathers)
    if not is_alike or read.dtype not in FLOATS or is_gathered:
        return False
    if any(state.init == operand for state in kernel.states):
        return False
    statements = [s for phase in kernel.phases for s in phase.body]
    reads = [i for i, s in enumerate(statements) if operand in neuron_reads(s)]
    stores = [i for i, s in enumerate(statements) if isinstance(s, ir.Store) and s.output == output]
    return len(stores) == 1 and all(i <= stores[0] for i in reads)
