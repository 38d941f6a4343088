"""What sparsify is compared with: the same network on the libraries at hand."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from networks import LEAK, Network, Product, Recurrent
from torch import Tensor

Peer = Callable[[Tensor], Any]
# A library's bfloat16 product that takes this much longer than float32 has no hardware under it.
EMULATED = 3.0


def float32(weight: Tensor) -> Product:
    """The product as PyTorch computes it."""
    return partial(F.linear, weight=weight)


def bfloat16(weight: Tensor) -> Product:
    """The product in bfloat16; spikes lose nothing, sums are rounded to eight bits."""
    rounded = weight.bfloat16()
    return lambda z: F.linear(z.bfloat16(), rounded).float()


def split_bfloat16(weight: Tensor) -> Product:
    """Two products with the high and the low part of the weights."""
    high = weight.bfloat16()
    low = (weight - high.float()).bfloat16()

    def product(z: Tensor) -> Tensor:
        rounded = z.bfloat16()
        return F.linear(rounded, high).float() + F.linear(rounded, low).float()

    return product


def dense_peers(model: Network, x: Tensor, *, compiled: bool) -> dict[str, Peer]:
    """Eager and every faster way to run the network densely that works on this machine."""

    def hoisted(product: Callable[[Tensor], Product]) -> Peer:
        return partial(_hoisted, model, [product(weight) for weight in model.products()])

    peers: dict[str, Peer] = {"eager": model, "hoisted": hoisted(float32)}
    if _bfloat16_is_fast(model.products()[-1], x.shape[1]):
        peers |= {"bfloat16": hoisted(bfloat16), "split bfloat16": hoisted(split_bfloat16)}
    else:
        print("bfloat16 products are emulated on this machine: left out")
    if compiled:
        peers["torch.compile"] = torch.compile(hoisted(float32), dynamic=False)
    if importlib.util.find_spec("jax") and isinstance(model, Recurrent):
        peers["jax.lax.scan"] = _jax_scan(model)
    return peers


def _hoisted(model: Network, products: list[Product], x: Tensor) -> Tensor:
    return model.hoisted(x, *products)


def _bfloat16_is_fast(weight: Tensor, batch: int) -> bool:
    z = (torch.rand(batch, weight.shape[1]) < 0.1).float()
    slow, fast = _seconds(bfloat16(weight), z), _seconds(float32(weight), z)
    return slow < EMULATED * fast


def _seconds(product: Product, z: Tensor) -> float:
    product(z)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        product(z)
        times.append(time.perf_counter() - start)
    return min(times)


def _jax_scan(model: Recurrent) -> Peer:
    """``jax.jit(lax.scan)`` over the recurrent step, input product hoisted."""
    import jax
    import jax.numpy as jnp

    inp, rec = (jnp.asarray(weight.detach().numpy()) for weight in model.products())
    theta = model.theta

    def step(carry: tuple[Any, Any], current: Any) -> tuple[tuple[Any, Any], Any]:
        v, z = carry
        v = LEAK * v + current + z @ rec.T
        z = (v > theta).astype(v.dtype)
        return (v - z * theta, z), z

    def loop(x: Any) -> Any:
        zeros = jnp.zeros((x.shape[1], rec.shape[0]), x.dtype)
        return jax.lax.scan(step, (zeros, zeros), x @ inp.T)[1]

    run = jax.jit(loop)

    # The inputs rotate among a few tensors; each is handed over once, outside of what is timed.
    given: dict[int, Any] = {}

    def peer(x: Tensor) -> Any:
        if x.data_ptr() not in given:
            given[x.data_ptr()] = jnp.asarray(x.numpy())
        return run(given[x.data_ptr()]).block_until_ready()

    return peer
