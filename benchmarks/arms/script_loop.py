"""Flow matching as an example script of diffusers trains: with accelerate; this file imports nothing of ours.

It has what those scripts have in a step: a data loader, `accumulate`, the gathered loss, clipping, a schedule of the
learning rate, diffusers' average of the parameters, a progress bar with figures, and a call of the tracker.
"""

import os
from collections.abc import Callable

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, compute_density_for_timestep_sampling
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

Call = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
"""(network, noised, t in [0, 1], class index) to the prediction."""

LR = 1e-3


def train(
    model: nn.Module,
    call: Call,
    latents: Tensor,
    labels: Tensor,
    *,
    steps: int,
    batch_size: int,
    warmup: int,
    accumulate: int = 1,
) -> EMAModel:
    """Train a network on latents and return the average of its parameters; the last class is the null class.

    No tracker is named, so `accelerator.log` writes nothing.
    """
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    null, average = int(labels.max()) + 1, EMAModel(model.parameters(), use_ema_warmup=True, foreach=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
    loader = DataLoader(TensorDataset(latents, labels), batch_size=batch_size, shuffle=True)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    done, total = 0, 0.0
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        bar = tqdm(total=steps, desc="Steps", disable=not accelerator.is_local_main_process, file=nowhere)
        model.train()
        while done < steps:
            for clean, label in loader:
                with accelerator.accumulate(model):
                    noise = torch.randn_like(clean)
                    t = compute_density_for_timestep_sampling("logit_normal", len(clean), 0.0, 1.0)
                    shaped = t.view(-1, *[1] * (clean.ndim - 1))
                    noised = (1 - shaped) * clean + shaped * noise
                    label = torch.where(torch.rand(len(label)) < 0.1, null, label)
                    predicted = call(model, noised, t, label)
                    loss = functional.mse_loss(predicted.float(), (noise - clean).float(), reduction="mean")
                    gathered = accelerator.gather(loss.repeat(batch_size)).mean()
                    total += gathered.item() / accumulate
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
                if accelerator.sync_gradients:
                    average.step(model.parameters())
                    bar.update(1)
                    done += 1
                    accelerator.log({"train_loss": total}, step=done)
                    total = 0.0
                bar.set_postfix(step_loss=loss.detach().item(), lr=schedule.get_last_lr()[0])
                if done >= steps:
                    break
    accelerator.end_training()
    return average
