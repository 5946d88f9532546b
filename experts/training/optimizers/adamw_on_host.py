"""AdamW whose moments stay in the host's memory, and whose steps run there (Ren et al. 2021, arXiv:2101.06840)."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from experts.config import TrainingConfig

HOST = torch.device("cpu")


class AdamWOnHost(torch.optim.Optimizer):
    """Takes the step of `torch.optim.AdamW` on the host; parameters and gradients may be on any device."""

    def __init__(self, parameters: Iterable[nn.Parameter], config: TrainingConfig) -> None:
        defaults = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay, "eps": 1e-8}
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, one after the other; `closure` is not supported."""
        if closure is not None:
            raise ValueError("AdamWOnHost takes no closure; compute the gradients before the step")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, parameter.grad, group)

    def _step_one(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        values = parameter.detach().to(HOST)
        moments = self._moments(parameter, values)
        beta1, beta2 = group["betas"]
        adamw(
            [values],
            [gradient.to(HOST)],
            [moments["exp_avg"]],
            [moments["exp_avg_sq"]],
            [],
            [moments["step"]],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        parameter.copy_(values)

    def _moments(self, parameter: Tensor, values: Tensor) -> dict[str, Tensor]:
        """Return the state of a parameter on the host; that of a checkpoint was read to the parameter's device."""
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state |= {name: torch.zeros_like(values) for name in ("exp_avg", "exp_avg_sq")} | {"step": torch.zeros(())}
        for name, moment in state.items():
            state[name] = moment.to(HOST)
        return state
