"""What an expert is trained on."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from experts.config import Prediction
from experts.diffusion.noise_schedule import NoiseSchedule, to_schedule
from experts.diffusion.predictions import clamp_noise_level, clean_and_noise_at, training_target
from experts.networks.registry import call_network
from experts.training.latent_dataset import Batch


def expert_loss(model: nn.Module, batch: Batch, prediction: Prediction, path: NoiseSchedule) -> Float[Tensor, ""]:
    """Mean squared distance between the network's prediction and its target."""
    # Flow matching (Lipman et al. 2023, arXiv:2210.02747, equation 9), on the samples of one cluster only:
    # E || v_k(x, t, c) - u(x | clean) ||^2, x = alpha clean + sigma noise, u = alpha' clean + sigma' noise.
    noised = path.add_noise(batch.clean, batch.noise, batch.t)
    predicted = call_network(model, noised, batch.t, batch.condition)
    target = training_target(prediction, batch.clean, batch.noise, batch.t, path)
    return functional.mse_loss(predicted.float(), target)


def converted_loss(
    model: nn.Module,
    batch: Batch,
    own: tuple[Prediction, NoiseSchedule],
    wanted: tuple[Prediction, NoiseSchedule],
) -> Float[Tensor, ""]:
    """The same in another prediction and on another path than the network's own, matched at equal noise-to-signal."""
    prediction, path = wanted
    noised = path.add_noise(batch.clean, batch.noise, batch.t)
    sample = to_schedule(noised, batch.t, path, own[1])
    seen = clamp_noise_level(own[0], sample, own[1])
    predicted = call_network(model, seen.noised, seen.t, batch.condition).float()
    parts = clean_and_noise_at(own[0], predicted, seen, sample, own[1])
    said = training_target(prediction, parts.clean, parts.noise, batch.t, path)
    return functional.mse_loss(said, training_target(prediction, batch.clean, batch.noise, batch.t, path))
