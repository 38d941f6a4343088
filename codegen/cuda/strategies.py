"""The strategies of the CUDA backend for one device, in the order in which a tie is decided."""

from __future__ import annotations

from sparsify.codegen.cuda.dense_tiles import DenseTiles
from sparsify.codegen.cuda.device import Limits
from sparsify.codegen.cuda.divided_tiles import DividedTiles
from sparsify.codegen.cuda.event_tiles import EventTiles
from sparsify.codegen.cuda.neurons_per_block import NeuronsPerCluster, NeuronsPerGrid
from sparsify.codegen.cuda.row_per_block import RowPerBlock
from sparsify.codegen.cuda.strategy import CudaStrategy


def make_strategies(limits: Limits) -> tuple[CudaStrategy, ...]:
    teams = (NeuronsPerCluster(limits), NeuronsPerGrid(limits))
    tiles = (DenseTiles(limits), DividedTiles(limits), EventTiles(limits))
    return (RowPerBlock(limits), *teams, *tiles)
