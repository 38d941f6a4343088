"""Why a loop's gradient cannot be traced, by the Function of the user that is in the way."""

from __future__ import annotations

import re
from typing import Any

from torch import fx

from sparsify.errors import Refusal, TraceError
from sparsify.passes.events.without_gradients import is_application
from sparsify.passes.gradients.joint_graph import JointGraph
from sparsify.passes.lowering.lower_refusals import refuse
from sparsify.passes.nodes.classify_ops import CONVOLUTION, draws_random
from sparsify.passes.nodes.find_origins import find_origins
from sparsify.recording.application import Application
from sparsify.scans.scan import Scan

# What running Python on tensors without values raises: torch's own errors are RuntimeErrors.
TRACING_ERRORS = (RuntimeError, AssertionError, TypeError, ValueError)
_WRONG = re.compile(r"(?i)function (\w+)Backward returned an (invalid gradient|incorrect number)")


def why_not_body(scan: Scan) -> Refusal | None:
    """A loop inside of the loop has no gradient here."""
    for node in scan.body.graph.nodes:
        if node.op in ("call_module", "get_attr"):
            reason = "The step of the loop runs another loop, and only innermost ones have kernels."
            remedy = "Its gradient is computed by torch, step by step."
            return refuse("unsupported-op", reason, remedy, node)
    return None


def why_not_trained(scan: Scan) -> Refusal | None:
    """A convolution of the own state, whose gradient would be computed in every step."""
    carries = set(scan.placeholders[: scan.carries])
    for node in scan.body.graph.find_nodes(op="call_function", target=CONVOLUTION):
        if carries & find_origins(node.all_input_nodes[:1]):
            reason = "The convolution reads the loop's own state, and the gradient has no kernel."
            remedy = "Training runs the loop as before; calls without gradients run it as events."
            return refuse("unsupported-layout", reason, remedy, node)
    return None


def why_not_traced(scan: Scan, error: Exception) -> Refusal:
    """What a Function did while its gradient was traced.

    Raises TraceError where eager raises too: a backward that returns the wrong gradients.
    """
    node = _culprit(scan, error)
    name = _name(node)
    wrong = _WRONG.search(str(error))
    if wrong is not None:
        message = (
            f"{wrong[1]}.backward is wrong: {error}. It must return one gradient for each argument "
            "of forward, of that argument's shape, and None for what is no tensor."
        )
        raise TraceError(message, node.meta.get("location")) from error
    [first, *_] = str(error).splitlines() or [type(error).__name__]
    reason = f"The backward of {name} cannot be traced without values: {first[:200]}"
    remedy = (
        "Write it with tensor operations that depend on no values (torch.where instead of if), and "
        "pass every tensor that it needs as an argument."
    )
    return refuse("unsupported-op", reason, remedy, node)


def why_not_joint(joint: JointGraph) -> Refusal | None:
    """What a gradient does that a kernel must not."""
    known = set(joint.values.values())
    applications = [n for n in joint.scan.body.graph.nodes if is_application(n)]
    names = " or ".join(dict.fromkeys(_name(node) for node in applications))
    whose = f"The backward of {names}" if names else "A gradient of the step"
    for node in joint.graph.nodes:
        at = applications[0] if applications else node
        if draws_random(node) and node not in known:
            reason = f"{whose} draws random numbers in every step."
            return refuse("random", reason, "Use a deterministic surrogate gradient.", at)
        if node.op == "get_attr":
            reason = f"{whose} makes a tensor of numbers in every step."
            return refuse("unsupported-op", reason, "Pass it to the Function as an argument.", at)
    return None


def _culprit(scan: Scan, error: Exception) -> fx.Node:
    """The application whose code raised the error, else the first one, else the last operation."""
    applications: list[fx.Node] = [n for n in scan.body.graph.nodes if is_application(n)]
    trace, running = error.__traceback__, set()
    while trace is not None:
        running.add(trace.tb_frame.f_code)
        trace = trace.tb_next
    for node in applications:
        assert isinstance(node.target, Application)
        function: Any = node.target.function
        methods = (function.backward, function.forward, function.setup_context)
        if any(getattr(method, "__code__", None) in running for method in methods):
            return node
    last = scan.results[0]
    return applications[0] if applications else last


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))
