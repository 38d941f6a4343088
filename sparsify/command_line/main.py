"""The command ``sparsify``: demo, explain, verify, bench, show."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence

import torch

from sparsify.command_line import demo
from sparsify.command_line.commands import run_bench, run_explain, run_show, run_verify
from sparsify.command_line.target import UsageError
from sparsify.errors import SparsifyError
from sparsify.options import BACKENDS

EPILOG = """\
FILE.py:factory names a function of the file that returns (model, example_inputs); the inputs are a
tensor, a tuple of arguments, or a dict of keyword arguments.

exit status: 0 all is well, 1 a mismatch, a refusal under --strict or a contended measurement,
2 wrong use
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["demo"]:
        return demo.main(given[1:])
    try:
        options = build_parser().parse_args(given)
    except SystemExit as done:  # argparse has printed why
        return int(done.code or 0)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(options.threads or threads)
        with torch.no_grad():
            status: int = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        return _end_unread()
    except UsageError as error:
        print(f"sparsify: {error}", file=sys.stderr)
        return 2
    except SparsifyError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    finally:
        torch.set_num_threads(threads)
    return status


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sparsify",
        description="Compile spiking and event-based PyTorch networks into event-driven kernels.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    commands.add_parser("demo", help="train, sparsify, verify and time a digit classifier")
    explained = _add(commands, "explain", "say what would be compiled and what not, with reasons")
    explained.set_defaults(run=run_explain)
    verified = _add(commands, "verify", "check the kernels against the original, step by step")
    verified.add_argument(
        "--events",
        type=_count,
        metavar="N",
        help="sites that must run as events; otherwise on cuda-emulated all that can",
    )
    verified.set_defaults(run=run_verify)
    timed = _add(commands, "bench", "time the model against its original")
    timed.add_argument(
        "--rounds", type=_positive, default=30, metavar="N", help="interleaved pairs"
    )
    timed.set_defaults(run=run_bench)
    shown = _add(commands, "show", "print stages, graphs, kernels or the report")
    what = shown.add_mutually_exclusive_group()
    what.add_argument("--stage", metavar="NAME", help="print the graph after this pass")
    what.add_argument("--kernel", metavar="NAME", help="print the source of this kernel")
    what.add_argument("--report", action="store_true", help="print the decision for every site")
    shown.set_defaults(run=run_show)
    return parser


def _end_unread() -> int:
    """Whoever reads the output, such as ``head``, has enough: end as other commands then do."""
    # Python flushes once more when it exits.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE


def _add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, help: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=help, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", metavar="FILE.py:factory")
    parser.add_argument(
        "--batch", type=_positive, metavar="N", help="passed to the factory as batch=N"
    )
    parser.add_argument(
        "--backend", choices=BACKENDS, help="where kernels run; show needs no device for any"
    )
    parser.add_argument("--threads", type=_positive, metavar="N", help="threads of torch")
    parser.add_argument("--strict", action="store_true", help="a refused site is an error")
    parser.add_argument(
        "--gradients", action="store_true", help="of calls of training: forward and backward"
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return int(text)


if __name__ == "__main__":
    raise SystemExit(main())
