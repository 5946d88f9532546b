"""Principal components as latents, with a small convolutional network as decoder."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ddm_core.artifacts import Workspace, write_json
from experts.architectures.conv_decoder import ConvDecoder, decoder_loss
from experts.codec import PixelCodec
from experts.codecs.pca import PCACodec, fit_pca_codec, load_pca_codec
from experts.config import CodecConfig
from experts.networks.model_io import load_model, save_model
from experts.training.flops import forward_flops, training_flops
from experts.training.latent_dataset import Batch, encode_latents
from experts.training.trainer import fit, write_rows
from experts.types import DecodedImages, Images, ImageTensor, Latents

DECODE_BATCH = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class PCAConvCodec:
    """Encodes with its `PCACodec`, decodes with its network."""

    linear: PCACodec
    decoder: ConvDecoder

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Return the number of components."""
        return self.linear.latent_shape

    def encode(self, images: Images) -> Latents:
        """Return the latents of images, float32."""
        return self.linear.encode(images)

    @torch.inference_mode()
    def decode(self, latents: Latents) -> DecodedImages:
        """Return the images of latents, clipped to [0, 1]."""
        images = [self.decoder(rows) for rows in torch.split(latents.float().cpu(), DECODE_BATCH)]
        return torch.cat(images).permute(0, 2, 3, 1).add(1).div(2).clamp(0, 1)

    def save(self, folder: Path) -> None:
        """Write the linear codec and, below `decoder/`, the network."""
        self.linear.save(folder)
        metadata = {"kind": "pca_conv", "image_shape": self.linear.image_shape, "whitening": self.linear.whitening}
        write_json(folder / "codec.json", metadata)
        save_model(self.decoder, folder / "decoder")


def fit_pca_conv(config: CodecConfig, shards: Path, out: Path, workspace: Workspace) -> float:
    """Fit the components, then train the network on noised latents; write the codec to `out`, return the FLOPs."""
    linear, training = fit_pca_codec(config, shards), config.decoder_training
    pixels = PixelCodec(image_shape=linear.image_shape)
    pixels.save(workspace.scratch / "pixels")
    images = encode_latents([shards], pixels, workspace.scratch / "pixels", workspace)
    project = _create_projection(linear)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        decoder = ConvDecoder(linear.latent_shape[0], linear.image_shape, config.decoder_width)
    forward = forward_flops(lambda: decoder(torch.zeros(1, *linear.latent_shape)))

    def loss(model: nn.Module, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        latents = project(batch.clean)
        noise = batch.noise.flatten(1)[:, : latents.shape[1]]
        return {"loss": decoder_loss(model(latents + config.decoder_noise * noise), batch.clean)}

    trained = fit(decoder, loss, images, training, workspace)
    PCAConvCodec(linear=linear, decoder=_check_decoder(trained.model)).save(out)
    write_rows(out / "metrics.jsonl", trained.rows)
    return training_flops(forward, training.batch_size, training.steps)


def load_pca_conv(folder: Path, metadata: dict[str, Any]) -> PCAConvCodec:
    """Load a folder that `PCAConvCodec.save` wrote; `metadata` is its `codec.json`."""
    decoder = load_model((ConvDecoder,), folder / "decoder")
    return PCAConvCodec(linear=load_pca_codec(folder, metadata), decoder=_check_decoder(decoder))


def _check_decoder(model: nn.Module) -> ConvDecoder:
    """Return the model as a decoder for inference; raise `TypeError` for another class."""
    if not isinstance(model, ConvDecoder):
        raise TypeError(f"a decoder must be a ConvDecoder, not a {type(model).__name__}")
    decoder: ConvDecoder = model.eval()
    return decoder


def _create_projection(linear: PCACodec) -> Callable[[ImageTensor], Latents]:
    """Return `linear.encode` as a function of images in [-1, 1] with channels first."""
    mean = torch.from_numpy(linear.pca.mean).float()
    axes = torch.from_numpy(linear.pca.components).float() / linear.scale[:, None]

    def project(images: ImageTensor) -> Latents:
        flat = images.permute(0, 2, 3, 1).flatten(1).add(1).div(2)
        return (flat - mean.to(flat.device)) @ axes.T.to(flat.device)

    return project
