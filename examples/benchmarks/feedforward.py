"""Three layers of spiking neurons, written step by step, against everything dense.

python examples/benchmarks/feedforward.py                              # the table of sizes
python examples/benchmarks/feedforward.py --hidden 1024 --activity 0.01 0.02 0.05 0.15 0.3
"""

from __future__ import annotations

from command_line import run
from compare import Size
from networks import FeedForward

SIZES = (
    Size(hidden=256, batch=1),
    Size(hidden=1024, batch=1),
    Size(hidden=1024, batch=128),
    Size(hidden=1024, batch=128, activity=0.05),
)

if __name__ == "__main__":
    run(__doc__, FeedForward, SIZES)
