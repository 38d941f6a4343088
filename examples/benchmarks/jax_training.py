"""The training step of the benchmark's networks as ``jax.jit(value_and_grad(scan))``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from networks import LEAK
from training_cases import Batch, Case
from training_networks import EGRULanguageModel, RecurrentClassifier


def jax_step(case: Case) -> Callable[[Batch], Mapping[str, Any]]:
    """One step: the gradients by the names of the model's parameters.

    Weights and batches are handed over once, outside of what is timed.
    """
    import jax
    import jax.numpy as jnp

    model = case.model
    params = {name: jnp.asarray(p.detach().numpy()) for name, p in model.named_parameters()}
    if isinstance(model, EGRULanguageModel):
        logits = _language_model(model)
    else:
        spike = _spike(model.surrogate, model.width, 1.0)
        recurrent = isinstance(model, RecurrentClassifier)
        logits = (_recurrent if recurrent else _feed_forward)(spike, model.theta)

    def loss(params: Any, x: Any, targets: Any) -> Any:
        scores = jax.nn.log_softmax(logits(params, x))
        return -jnp.take_along_axis(scores, targets[..., None], axis=-1).mean()

    run = jax.jit(jax.value_and_grad(loss))
    given: dict[int, Any] = {}

    def step(batch: Batch) -> Mapping[str, Any]:
        x, targets = batch
        if id(x) not in given:
            given[id(x)] = (jnp.asarray(x.numpy()), jnp.asarray(targets.numpy()))
        gradients: Mapping[str, Any] = jax.block_until_ready(run(params, *given[id(x)]))[1]
        return gradients

    return step


def _spike(surrogate: str, width: float, height: float) -> Callable[[Any], Any]:
    import jax
    import jax.numpy as jnp

    def forward(above: Any) -> Any:
        return (above > 0).astype(above.dtype)

    def backward(above: Any, grad: Any) -> tuple[Any]:
        if surrogate == "atan":
            return (grad / (1 + (math.pi * above) ** 2),)
        return (grad * height * jnp.maximum(1 - jnp.abs(above) / width, 0),)

    spike: Callable[[Any], Any] = jax.custom_vjp(forward)
    spike.defvjp(lambda above: (forward(above), above), backward)  # type: ignore[attr-defined]
    return spike


def _recurrent(spike: Callable[[Any], Any], theta: float) -> Callable[[Any, Any], Any]:
    import jax
    import jax.numpy as jnp

    def logits(params: Any, x: Any) -> Any:
        def step(carry: tuple[Any, Any], current: Any) -> tuple[tuple[Any, Any], Any]:
            v, z = carry
            v = LEAK * v + current + z @ params["rec.weight"].T
            z = spike(v - theta)
            return (v - z * theta, z), z

        currents = x @ params["inp.weight"].T
        zeros = jnp.zeros_like(currents[0])
        spikes = jax.lax.scan(step, (zeros, zeros), currents)[1]
        return (spikes.mean(0) @ params["out.weight"].T + params["out.bias"])[None]

    return logits


def _feed_forward(spike: Callable[[Any], Any], theta: float) -> Callable[[Any, Any], Any]:
    import jax
    import jax.numpy as jnp

    def logits(params: Any, x: Any) -> Any:
        def hidden(v: Any, current: Any) -> tuple[Any, Any]:
            v = LEAK * v + current
            z = spike(v - theta)
            return v - z * theta, z

        def read(membrane: Any, vote: Any) -> tuple[Any, Any]:
            membrane = LEAK * membrane + vote
            return membrane, membrane

        currents = x @ params["inp.weight"].T
        spikes = jax.lax.scan(hidden, jnp.zeros_like(currents[0]), currents)[1]
        votes = spikes @ params["out.weight"].T
        return jax.lax.scan(read, jnp.zeros_like(votes[0]), votes)[1]

    return logits


def _language_model(model: EGRULanguageModel) -> Callable[[Any, Any], Any]:
    import jax
    import jax.numpy as jnp

    spikes = [_spike("triangle", layer.width, layer.height) for layer in model.egru_layers()]

    def layer(params: Any, index: int, x: Any) -> Any:
        def get(name: str) -> Any:
            return params[f"layers.{index}.{name}"]

        theta = jnp.clip(get("theta"), 0, 1)

        def step(carry: tuple[Any, Any], current: Any) -> tuple[tuple[Any, Any], Any]:
            h, y = carry
            p_z, p_r, p_g = jnp.split(current, 3, axis=1)
            q_z, q_r, q_g = jnp.split(y @ get("rec.weight").T + get("rec.bias"), 3, axis=1)
            z = jax.nn.sigmoid(p_z + q_z)
            c = z * h + (1 - z) * jnp.tanh(p_g + jax.nn.sigmoid(p_r + q_r) * q_g)
            o = spikes[index](c - theta)
            y = o * c
            return (c - o * theta, y), y

        currents = x @ get("inp.weight").T + get("inp.bias")
        zeros = jnp.zeros((x.shape[1], theta.shape[0]), x.dtype)
        return jax.lax.scan(step, (zeros, zeros), currents)[1]

    def logits(params: Any, tokens: Any) -> Any:
        x = params["embed.weight"][tokens]
        for index in range(len(spikes)):
            x = layer(params, index, x)
        return x @ params["decode.weight"].T + params["decode.bias"]

    return logits
