"""Two processes that share their gradients over loopback train as one on the joined batch."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from sparsify.plan import Plan
from tests.models.training_nets import net
from tests.training_harness import assert_close, assert_trained, sparsify_training, weighted_sum

RANKS, UPDATES, BATCH = 2, 3, 4
ENTRY = net("learnable neuron")


def train_rank(rank: int, folder: str) -> None:
    """Rank 0 chooses the plan, all follow it; each trains on its half and saves what it has."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=120),
    )
    model, x = ENTRY.model(), ENTRY.inputs(batch=BATCH)[:, rank::RANKS]
    plans: list[Plan | None] = [sparsify_training(model, x).plan if rank == 0 else None]
    dist.broadcast_object_list(plans)
    fast = sparsify_training(model, x, plan=plans[0])
    assert fast.plan == plans[0]
    parallel = DistributedDataParallel(fast)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=1e-3, momentum=0.9)
    for _ in range(UPDATES):
        optimizer.zero_grad()
        weighted_sum_of(parallel(x), rank).backward()
        optimizer.step()
    assert_trained(fast, ENTRY.sites)
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def weighted_sum_of(logits: Tensor, rank: int) -> Tensor:
    """The loss of one rank's samples, as they weigh in the joined batch."""
    whole = torch.zeros(BATCH, logits.shape[1], dtype=logits.dtype)
    whole[rank::RANKS] = logits
    return RANKS * weighted_sum(whole)  # DDP takes the mean over ranks, the joined loss is a sum


def test_two_ranks_train_as_one(tmp_path: Path) -> None:
    eager = ENTRY.model()
    optimizer = torch.optim.SGD(eager.parameters(), lr=1e-3, momentum=0.9)
    for _ in range(UPDATES):
        optimizer.zero_grad()
        weighted_sum(eager(ENTRY.inputs(batch=BATCH))).backward()
        optimizer.step()
    spawn(train_rank, args=(str(tmp_path),), nprocs=RANKS)
    for rank in range(RANKS):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert_close(found, dict(eager.named_parameters()))
