"""Configuration of an expert: latent space, network and training; imports no torch."""

from dataclasses import field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

from ddm_core.artifacts import STRICT, UNHASHED, UNHASHED_IF_DEFAULT
from ddm_core.seeds import Seed

Prediction = Literal["velocity", "noise", "clean"]
NoiseScheduleName = Literal["rectified_flow", "cosine", "linear_beta", "ddpm_linear", "scaled_linear"]
LossWeightName = Literal["uniform", "min_snr", "velocity"]
OptimizerName = Literal["adamw", "adamw_8bit", "muon"]
LRScheduleName = Literal["linear", "constant", "cosine", "warmup_stable_decay"]
Momentum = Annotated[float, Field(ge=0, lt=1)]

REFINED_SUFFIX = "_conv"
"""What the kind of a codec with a convolutional decoder adds to that of its encoder."""

MIN_INTERVAL = 0.125
"""Shortest interval of t that a network is trained on."""

DEFAULT_CACHE_GB = 10.0
"""Disk for streamed shards of a network that are read ahead."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ResidualMLPConfig:
    """A residual MLP on flattened latents; the fastest network on a CPU."""

    kind: Literal["residual_mlp"] = "residual_mlp"
    width: Annotated[int, Field(ge=8)] = 448
    """Features of every hidden layer."""
    depth: Annotated[int, Field(ge=1)] = 4
    """Residual blocks."""
    input_skip: bool = field(default=False, metadata=UNHASHED_IF_DEFAULT)
    """Whether every number of the noised latent is added to its prediction, times a factor that depends on t and the
    condition. A hidden layer narrower than the latents then need not carry their noise."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class UNetConfig:
    """diffusers' `UNet2DModel`."""

    kind: Literal["unet"] = "unet"
    channels: Annotated[tuple[int, ...], Field(min_length=1)] = (32, 64, 64)
    """Channels of each level; each level after the first halves the side."""
    layers_per_block: Annotated[int, Field(ge=1)] = 1
    """Residual layers in every level."""
    attention: bool = True
    """Whether the lowest level attends over all positions."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DiTConfig:
    """diffusers' `DiTTransformer2DModel`."""

    kind: Literal["dit"] = "dit"
    patch_size: Annotated[int, Field(ge=1)] = 2
    """Side of a token in latent pixels."""
    heads: Annotated[int, Field(ge=1)] = 4
    """Attention heads."""
    head_width: Annotated[int, Field(ge=4)] = 32
    """Features of one head."""
    depth: Annotated[int, Field(ge=1)] = 4
    """Transformer blocks."""


SettingValue = bool | int | float | str | None | list[Any]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DiffusersConfig:
    """One of diffusers' models of images, by its class."""

    kind: Literal["diffusers"] = "diffusers"
    class_name: str
    """Its name, such as `SD3Transformer2DModel`."""
    settings: dict[str, SettingValue] = Field(default_factory=dict)
    """Arguments of its constructor, except for those that follow from the data: channels, size, classes and text."""


NetworkConfig = Annotated[ResidualMLPConfig | UNetConfig | DiTConfig | DiffusersConfig, Field(discriminator="kind")]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainingConfig:
    """Optimizer, schedule and batch of a training, for experts and router."""

    steps: Annotated[int, Field(ge=1)] = 1500
    """Optimizer steps."""
    batch_size: Annotated[int, Field(ge=1)] = 240
    """Samples a step. For experts this is the *global* batch: each of K experts gets 1 / K of it."""
    accumulate: Annotated[int, Field(ge=1)] = field(default=1, metadata=UNHASHED_IF_DEFAULT)
    """Parts of a batch whose gradients are added up, one after the other, for less memory; each has at least one
    sample. The sum differs from the gradient of the whole batch by rounding, and by other bits of dropout."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate; `lr_schedule` says how it falls after the warm-up."""
    optimizer: OptimizerName = field(default="adamw", metadata=UNHASHED_IF_DEFAULT)
    """`adamw`: AdamW. `adamw_8bit`: with moments of eight bits, by torchao. `muon`: Muon for the matrices of linear
    layers inside blocks, AdamW for the other parameters."""
    betas: tuple[Momentum, Momentum] = field(default=(0.9, 0.999), metadata=UNHASHED_IF_DEFAULT)
    """Decay a step of both moments of AdamW."""
    momentum: Momentum = field(default=0.95, metadata=UNHASHED_IF_DEFAULT)
    """Decay a step of the momentum of `muon`."""
    lr_schedule: LRScheduleName = field(default="linear", metadata=UNHASHED_IF_DEFAULT)
    """After the warm-up, `linear` and `cosine` fall to zero, `constant` stays, `warmup_stable_decay` stays and then
    falls linearly to zero."""
    decay_share: Annotated[float, Field(gt=0, le=1)] = field(default=0.2, metadata=UNHASHED_IF_DEFAULT)
    """Share of all steps over which `warmup_stable_decay` falls."""
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    """Steps over which the learning rate rises from zero."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    """Maximum global norm of the gradients."""
    ema_width: Annotated[float, Field(gt=0, lt=0.28)] = 0.1
    """Relative width of the parameters' moving average, as a share of the finished steps."""
    ema_snapshots: Annotated[int, Field(ge=0)] = field(default=0, metadata=UNHASHED_IF_DEFAULT)
    """Snapshots of two further averages, of widths 0.05 and 0.1, that an expert keeps in `ema/`; from 16 of them
    `experts.training.optimizers.ema.rebuild_average` makes the average of any width after the training."""
    t_mean: float = 0.0
    """Mean of the normal distribution whose logistic is t."""
    t_std: Annotated[float, Field(gt=0)] = 1.0
    """Standard deviation of that normal distribution."""
    t_shift: Annotated[float, Field(gt=0)] = field(default=1.0, metadata=UNHASHED_IF_DEFAULT)
    """Factor s of the odds t / (1 - t) in training and sampling: t becomes s t / (1 + (s - 1) t). Larger images need
    more noise: the root of the ratio of their pixels to those of smaller ones, up to 3. The router has its own."""
    condition_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of samples that are trained with the null condition."""
    autocast: Literal["none", "bfloat16", "float16"] = "none"
    """Lower precision for the forward and backward pass."""
    compile: bool = False
    """Whether to call `torch.compile` on the network."""
    attention_backend: str | None = field(default=None, metadata=UNHASHED_IF_DEFAULT)
    """diffusers' attention backend of an expert's network, such as `flash` or `sage`; None: torch's own attention."""
    gradient_checkpointing: bool = field(default=False, metadata=UNHASHED_IF_DEFAULT)
    """Whether an expert's activations are computed again in the backward pass: less memory, a third more FLOPs."""
    parallel: Literal["ddp", "fsdp"] = field(default="ddp", metadata=UNHASHED_IF_DEFAULT)
    """How several workers train one network. `ddp`: each has all of it. `fsdp`: each keeps a part of every parameter,
    gradient, moment and average. It is no part of a checkpoint, so that a training resumes with the other one."""
    offload: tuple[Literal["optimizer", "average"], ...] = field(default=(), metadata=UNHASHED_IF_DEFAULT)
    """What stays in the host's memory. `optimizer`: the moments of `adamw`, whose steps run there. `average`: the
    moving averages. Gradients and parameters then travel at every step, and the device waits."""
    device: str = "cpu"
    """Torch device of the training."""
    shuffle_shards: Annotated[int, Field(ge=1)] = field(default=16, metadata=UNHASHED_IF_DEFAULT)
    """With `data.mode=stream`: the shards are read in a random order, and the samples of so many are shuffled."""
    cache_gb: Annotated[float, Field(ge=0)] | None = field(default=None, metadata=UNHASHED)
    """Most disk, in GB, for shards that are read ahead, with `data.mode=stream`; at least two blocks of
    `shuffle_shards`. 0: none, each image is one request. None: `DEFAULT_CACHE_GB`, and 0 for files of a disk."""
    readers: Annotated[int, Field(ge=1)] = field(default=4, metadata=UNHASHED)
    """Threads that read and decode the images of coming steps, with `data.mode=stream`."""
    log_every: Annotated[int, Field(ge=1)] = 25
    """Steps between two rows of `metrics.jsonl`."""
    held_out_every: Annotated[int, Field(ge=1)] | None = field(default=250, metadata=UNHASHED_IF_DEFAULT)
    """Steps between two measurements of an expert's error on held-out samples of its own cluster, at eight t and by
    the averaged parameters; of so many samples that this takes one hundredth of the FLOPs of the steps. None: never."""
    stop_after_no_gain: Annotated[int, Field(ge=1)] | None = field(default=None, metadata=UNHASHED_IF_DEFAULT)
    """Measurements in a row without a lower error after which the training ends early; None: it never does."""
    spike_factor: Annotated[float, Field(gt=1)] | None = field(default=10.0, metadata=UNHASHED_IF_DEFAULT)
    """An expert whose loss is over so many times the running median, or not finite, goes back to its last checkpoint
    once, with another order of the samples; None: only a loss that is not finite."""
    early_checkpoint: Annotated[float, Field(gt=0, lt=1)] | None = field(default=None, metadata=UNHASHED_IF_DEFAULT)
    """Share of an expert's steps after which a copy of it is kept in `early/`, as the weak model of a reflection."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 500
    """Steps between two checkpoints."""
    seed: Seed = 0
    """Noise, t and sample order are functions of (seed, step, row)."""

    @model_validator(mode="after")
    def _can_be_sharded(self) -> "TrainingConfig":
        """Check that nothing in a sharded training needs whole tensors."""
        needs = {
            f"optimizer={self.optimizer}": self.optimizer != "adamw",
            "autocast=float16": self.autocast == "float16",
            "ema_snapshots": self.ema_snapshots > 0,
        }
        if self.parallel == "fsdp" and (found := [name for name, is_set in needs.items() if is_set]):
            raise ValueError(
                f"training.parallel=fsdp gives every worker parts of the tensors, but training.{found[0]} needs whole "
                "ones; remove it, or set training.parallel=ddp"
            )
        return self

    @model_validator(mode="after")
    def _can_be_offloaded(self) -> "TrainingConfig":
        """Check that the optimizer can run on the host, and that no worker has parts only."""
        if "optimizer" in self.offload and self.optimizer != "adamw":
            raise ValueError(f"training.offload=[optimizer] needs training.optimizer=adamw, got {self.optimizer}")
        if self.offload and self.parallel == "fsdp":
            raise ValueError("training.offload needs whole tensors; remove it, or set training.parallel=ddp")
        return self

    @model_validator(mode="after")
    def _measures_before_it_stops(self) -> "TrainingConfig":
        """Check that a training that may end early measures what it ends by."""
        if self.stop_after_no_gain is not None and self.held_out_every is None:
            raise ValueError(
                "training.stop_after_no_gain needs training.held_out_every=<steps>, the measurements it counts"
            )
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CodecConfig:
    """The latent space."""

    kind: Literal[
        "pixels",
        "pca",
        "pca_conv",
        "patch_pca",
        "patch_pca_conv",
        "autoencoder",
        "autoencoder_tiny",
        "autoencoder_kl",
        "autoencoder_dc",
    ] = "pca"
    """`pixels`: images in [-1, 1]. `pca`: principal components, fitted on the training images. `patch_pca`: those of
    square patches, as a grid that every network accepts. `pca_conv`, `patch_pca_conv`: the same latents, with a small
    convolutional decoder, trained on slightly noised latents. `autoencoder`: a published
    one of diffusers, from `path`. `autoencoder_tiny`, `autoencoder_kl`, `autoencoder_dc`: one of diffusers' classes,
    trained on the images."""

    components: Annotated[int, Field(ge=2)] = 96
    """Principal components of `pca` and `pca_conv`."""

    patch_size: Annotated[int, Field(ge=1, le=32)] = field(default=4, metadata=UNHASHED_IF_DEFAULT)
    """Pixels a side of the patches of `patch_pca`, or of one latent position of a trained autoencoder, where it is a
    power of two; must divide the side of the images."""

    latent_channels: Annotated[int, Field(ge=1)] = field(default=12, metadata=UNHASHED_IF_DEFAULT)
    """Components of each patch of `patch_pca`, at most its values, which keep images exactly; channels of the latents
    of a trained autoencoder."""

    device: str = field(default="cpu", metadata=UNHASHED_IF_DEFAULT)
    """Torch device on which an autoencoder encodes the images, and a text encoder their captions."""

    path: str | None = field(default=None, metadata=UNHASHED_IF_DEFAULT)
    """Folder of the published `autoencoder`, or its name on the Hub: `owner/name`, or `owner/name/vae`."""

    path_checksum: str = field(default="", metadata=UNHASHED_IF_DEFAULT)
    """Checksum of that folder, or commit on the Hub, set when a run is composed; files that have changed since are an
    error."""

    kl_weight: Annotated[float, Field(ge=0)] = field(default=1e-6, metadata=UNHASHED_IF_DEFAULT)
    """Weight of the divergence from a unit Gaussian in the loss of `autoencoder_kl`."""

    whitening: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Exponent that flattens the spectrum of principal components: 0 keeps it, 1 gives each the same variance."""

    decoder_width: Annotated[int, Field(ge=8, multiple_of=4)] = 32
    """Channels of the convolutional decoder at half the images' side, of a trained autoencoder at their full side."""

    decoder_noise: Annotated[float, Field(ge=0)] = 0.1
    """Standard deviation of the noise on latents of unit scale in their decoder's training, because samples are never
    fully clean; `autoencoder_kl` has its own."""

    decoder_training: TrainingConfig = TrainingConfig(
        steps=1000, batch_size=64, lr=2e-3, warmup_steps=50, weight_decay=1e-3
    )
    """Training of the decoder, or of the whole autoencoder."""

    @property
    def encoder(self) -> "CodecConfig":
        """Return the codec that encodes: the same, or principal components without their convolutional decoder."""
        if not self.kind.endswith(REFINED_SUFFIX):
            return self
        return CodecConfig(
            kind="pca" if self.kind == "pca_conv" else "patch_pca",
            components=self.components,
            patch_size=self.patch_size,
            latent_channels=self.latent_channels,
            whitening=self.whitening,
        )


def _make_absolute(path: str | None) -> str | None:
    folder = Path(path or "").expanduser()
    return str(folder.absolute()) if path and (folder.is_dir() or path.startswith((".", "~"))) else path


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TextConfig:
    """The encoder of captions; its length is part of every model that reads its texts."""

    kind: Literal["none", "number", "minilm", "clip", "t5", "transformers", "diffusers"] = "none"
    """`none`: models read no text. `number`: captions are numbers, such as a reward. `minilm`: sentence embeddings from
    a small package. `clip`, `t5`: encoders of published image models; networks read the padding of `clip` like tokens,
    as Stable Diffusion does. `transformers`: any other encoder of that library. `diffusers`: all encoders of a pipeline
    together, as Stable Diffusion XL and 3 and Flux have them; networks read their padding too."""

    path: str | None = None
    """Folder of the encoder and its tokenizer, or its id on the Hugging Face Hub; None: the package of `minilm`."""

    length: Annotated[int, Field(ge=2, le=512)] = 16
    """Tokens of every text: shorter ones are padded, longer ones are cut."""

    classes: bool = True
    """Whether models read the classes beside the texts; if not, classes serve scores and partitions only."""

    stored_as: Literal["encodings", "captions"] = field(default="encodings", metadata=UNHASHED_IF_DEFAULT)
    """What is kept and sent to islands: encoded captions, or the captions, a hundredth of the bytes, which every stage
    that reads them then encodes, with the encoder on its own machine."""

    checksum: str = ""
    """Checksum of the encoder's files, recorded when it encodes; an encoder that has changed since is an error."""

    @field_validator("path")
    @classmethod
    def _absolute(cls, path: str | None) -> str | None:
        """Make the path of a folder absolute; leave an id of the Hub as it is."""
        return _make_absolute(path)

    @model_validator(mode="after")
    def _has_a_path(self) -> "TextConfig":
        """Check that an encoder outside the package has a path."""
        if self.path is None and self.kind not in ("none", "number", "minilm"):
            raise ValueError(f"text={self.kind} needs text.path=…, the folder or Hub id of the encoder")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ExpertConfig:
    """Network, prediction type, noise schedule and training of one expert."""

    network: NetworkConfig = ResidualMLPConfig()
    """The diffusers model and its size."""
    prediction: Prediction = "velocity"
    """Prediction type of the network."""
    noise_schedule: NoiseScheduleName = "rectified_flow"
    """The noise schedule: alpha(t) and sigma(t)."""
    loss_weight: LossWeightName = field(default="uniform", metadata=UNHASHED_IF_DEFAULT)
    """Weight of t in the loss. `uniform`: 1 on the error of the prediction. `min_snr`: the smaller of signal-to-noise
    ratio and `min_snr_gamma`, on the error of the clean sample. `velocity`: 1 on the error of the velocity, for experts
    whose prediction is another."""
    min_snr_gamma: Annotated[float, Field(gt=0)] = field(default=5.0, metadata=UNHASHED_IF_DEFAULT)
    """Largest weight of `min_snr`."""
    align_weight: Annotated[float, Field(ge=0)] = field(default=0.0, metadata=UNHASHED_IF_DEFAULT)
    """Weight of the alignment of a transformer's tokens with features of the clean image (REPA), 0.5 in its paper; 0:
    none. The images are decoded from the latents in every step."""
    align_teacher: Literal["random_conv", "efficientnet_lite0", "transformers"] = field(
        default="efficientnet_lite0", metadata=UNHASHED_IF_DEFAULT
    )
    """The network whose features these are: one that can cluster the data and has features at positions.
    `transformers`: that of `align_path`, such as DINOv2, the teacher of the paper."""
    align_path: str | None = field(default=None, metadata=UNHASHED_IF_DEFAULT)
    """Folder or Hub repository of that vision network; on islands, the folder lies on each of them."""
    align_block: Annotated[int, Field(ge=1)] = field(default=2, metadata=UNHASHED_IF_DEFAULT)
    """The block, counted from 1, after which the tokens are aligned."""
    align_until: Annotated[float, Field(gt=0, le=1)] = field(default=0.5, metadata=UNHASHED_IF_DEFAULT)
    """Share of the steps after which there is no alignment."""
    task_share: Annotated[float, Field(gt=0, le=1)] = field(default=1.0, metadata=UNHASHED_IF_DEFAULT)
    """Share of the channels of every block that a t activates, 0.8 in its paper (Denoising Task Routing); the others
    pass the block by. 1: all of them."""
    task_power: Annotated[float, Field(gt=0)] = field(default=4.0, metadata=UNHASHED_IF_DEFAULT)
    """Exponent of t in the place of these channels: the higher, the more of them small t have in common."""
    time_bounds: tuple[float, ...] = field(default=(), metadata=UNHASHED_IF_DEFAULT)
    """The t at which one network hands over to the next: with [0.25, 0.75] an expert is three networks, each trained
    on its own interval of t with a third of the batch. Intervals have a length of an eighth at least. Empty: one."""
    training: TrainingConfig = TrainingConfig()
    """Steps, batch, learning rate and other training settings."""
    init: str | None = field(default=None, metadata=UNHASHED_IF_DEFAULT)
    """Folder of a checkpoint to start from: a supported diffusers model, or one of our experts. Its network replaces
    `network`, and must have the same latents and classes."""
    init_prediction: Prediction = field(default="noise", metadata=UNHASHED_IF_DEFAULT)
    """Prediction type of a checkpoint without an `expert.json`."""
    init_noise_schedule: NoiseScheduleName = field(default="ddpm_linear", metadata=UNHASHED_IF_DEFAULT)
    """Noise schedule of such a checkpoint. `ddpm_linear`: DDPM's table, also of DiT and PixArt. `scaled_linear`: Stable
    Diffusion 1.5 and SDXL. `rectified_flow`: most transformers of text, which predict the velocity."""
    init_loss: Literal["own", "converted"] = field(default="own", metadata=UNHASHED_IF_DEFAULT)
    """`own`: the loss is on the checkpoint's prediction type and noise schedule. `converted`: the loss is on
    `prediction` and `noise_schedule` above, to which outputs are converted at equal noise-to-signal ratio."""
    init_checksum: str = field(default="", metadata=UNHASHED_IF_DEFAULT)
    """Checksum of that folder, set when a run is composed; a folder that has changed since is an error."""

    @field_validator("align_path")
    @classmethod
    def _absolute(cls, path: str | None) -> str | None:
        """Make the path of a folder absolute; leave an id of the Hub as it is."""
        return _make_absolute(path)

    @model_validator(mode="after")
    def _names_its_teacher(self) -> "ExpertConfig":
        """Check that a vision network has a path, and no other teacher has one."""
        if (self.align_teacher == "transformers") != (self.align_path is not None):
            raise ValueError(
                "expert.align_teacher=transformers needs expert.align_path=…, a folder or a repository of the Hub, and "
                f"other teachers have none; got align_teacher={self.align_teacher} with align_path={self.align_path}"
            )
        return self

    @field_validator("time_bounds")
    @classmethod
    def _divides_time(cls, bounds: tuple[float, ...]) -> tuple[float, ...]:
        """Check that every interval has one of the t at which held-out samples are measured."""
        if any(high - low < MIN_INTERVAL for low, high in pairwise((0.0, *bounds, 1.0))):
            raise ValueError(
                f"time_bounds rise from 0 to 1 in steps of at least {MIN_INTERVAL}, so that each interval has held-out "
                "losses; write [0.5], or [0.25,0.75]"
            )
        return bounds

    @model_validator(mode="after")
    def _aligns_whole_blocks(self) -> "ExpertConfig":
        """Check that an alignment has whole blocks."""
        if self.align_weight and self.training.parallel == "fsdp":
            raise ValueError("align_weight needs whole blocks; set training.parallel=ddp, or align_weight=0")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DistilledMonolithConfig:
    """One network that is distilled from the experts; all other settings are the monolith's."""

    from_expert: Annotated[int, Field(ge=0)] | None = None
    """The expert that provides the initial parameters; empty starts from scratch."""
    from_mean: bool = field(default=False, metadata=UNHASHED_IF_DEFAULT)
    """Whether the initial parameters are the mean of all experts', which have one common start (`expert.init`)."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps; empty uses the experts'."""
    batch_size: Annotated[int, Field(ge=1)] | None = None
    """Samples a step; empty uses the experts' global batch."""

    @model_validator(mode="after")
    def _starts_once(self) -> "DistilledMonolithConfig":
        """Check that there is one source of the initial parameters."""
        if self.from_mean and self.from_expert is not None:
            raise ValueError(f"from_mean=true starts from all experts; leave from_expert={self.from_expert} out")
        return self
