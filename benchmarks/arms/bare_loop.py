"""Flow matching as a plain PyTorch loop, and sampling as a plain loop of diffusers; this file imports nothing of ours.

It is what a practitioner would write by hand: shuffled epochs, logit-normal t, dropped classes, fused AdamW with a
linear schedule, clipping, an average of the parameters, and a printed loss now and then.
"""

import math
import time
from collections.abc import Callable

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from torch.nn import functional

Call = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
"""(network, noised, t in [0, 1], class index) to the prediction."""

LR = 1e-3


def calling_with_text(sequence: Tensor, pooled: Tensor) -> Call:
    """Return a call of diffusers' SD3 that takes the number of a text for a class; the last text is the null text."""
    return lambda model, x, t, label: model(
        x,
        timestep=1000 * t,
        encoder_hidden_states=sequence[label],
        pooled_projections=pooled[label],
        return_dict=False,
    )[0]


CALLS: dict[str, Call] = {
    "mlp": lambda model, x, t, label: model(x, t, label),
    "unet": lambda model, x, t, label: model(x, 1000 * t, class_labels=label, return_dict=False)[0],
    "dit": lambda model, x, t, label: model(x, timestep=1000 * t, class_labels=label, return_dict=False)[0],
}


def train(
    model: nn.Module,
    call: Call,
    latents: Tensor,
    labels: Tensor,
    *,
    steps: int,
    batch_size: int,
    warmup: int,
    device: str = "cpu",
    log_every: int = 25,
) -> list[float]:
    """Train a network on latents and return the seconds of every `log_every` steps; the last class is the null class.

    The loss is read after so many steps, as for a log.
    """
    model.to(device).train()
    null = int(labels.max()) + 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
    parameters = [parameter.detach() for parameter in model.parameters()]
    average = [parameter.clone() for parameter in parameters]
    order, position = torch.randperm(len(latents)), 0
    seconds, total, started = list[float](), torch.zeros((), device=device), time.perf_counter()
    for step in range(steps):
        if position + batch_size > len(order):
            order, position = torch.cat([order[position:], torch.randperm(len(latents))]), 0
        rows = order[position : position + batch_size]
        position += batch_size
        clean, label = latents[rows].to(device, non_blocking=True), labels[rows]
        label = torch.where(torch.rand(batch_size) < 0.1, null, label).to(device, non_blocking=True)
        noise = torch.randn(clean.shape).to(device, non_blocking=True)
        t = torch.randn(batch_size).sigmoid().to(device, non_blocking=True)
        shaped = t.view(-1, *[1] * (clean.ndim - 1))
        noised = (1 - shaped) * clean + shaped * noise
        for group in optimizer.param_groups:
            group["lr"] = LR * min((step + 1) / warmup, (steps - step) / max(steps - warmup, 1))
        optimizer.zero_grad(set_to_none=True)
        loss = functional.mse_loss(call(model, noised, t, label), noise - clean)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        torch._foreach_lerp_(average, parameters, 1 - (1 - 1 / (step + 1)) ** 17)
        total += loss.detach()
        if (step + 1) % log_every == 0:
            if not math.isfinite(float(total)):
                raise ValueError(f"the loss is {float(total)} at step {step}")
            total.zero_()
            seconds.append(time.perf_counter() - started)
            started = time.perf_counter()
    return seconds


def sample(
    model: nn.Module, call: Call, *, count: int, batch_size: int, shape: tuple[int, ...], steps: int, null: int
) -> Tensor:
    """Return latents of a dense model, by Euler steps of diffusers' scheduler, with the class `null`."""
    parts = []
    with torch.inference_mode():
        for start in range(0, count, batch_size):
            rows = min(batch_size, count - start)
            scheduler = FlowMatchEulerDiscreteScheduler()
            scheduler.set_timesteps(steps)
            latents = torch.randn(rows, *shape, generator=torch.Generator().manual_seed(start))
            label = torch.full((rows,), null)
            for timestep in scheduler.timesteps:
                velocity = call(model, latents, (timestep / 1000).expand(rows), label)
                latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
            parts.append(latents)
    return torch.cat(parts)
