"""A recurrent spiking layer against everything dense.

python examples/benchmarks/recurrent.py                                # the table of sizes
python examples/benchmarks/recurrent.py --hidden 1024 --activity 0.01 0.02 0.05 0.15 0.3
"""

from __future__ import annotations

from command_line import run
from compare import Size
from networks import Recurrent

SIZES = (
    Size(hidden=256, batch=1),
    Size(hidden=1024, batch=1),
    Size(hidden=1024, batch=128),
    Size(hidden=1024, batch=128, activity=0.05),
    Size(hidden=2048, batch=16),
    Size(hidden=8192, batch=1),
)

if __name__ == "__main__":
    run(__doc__, Recurrent, SIZES)
