"""Typed, frozen, validated settings: what a run is, in one tree.

Every key has one meaning and one place. Unknown keys, wrong types and impossible values are refused at
construction, naming the dotted key (`configs.load` turns them into one line). Nothing here imports torch.
"Row n" refers to the table of places where the paper and its published code differ; the presets `paper` and
`published-code` differ in those settings and nowhere else.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]

Average = Literal["none", "mirror", "crops"]
"""Views of an image that features are the mean over (`training.models.multi_crop`)."""
LARGEST_START = 256
"""Components that fit through the decoder of Table 8, whose ReLUs need two of its 512 units for each."""


class Section(BaseModel):
    """Base of all sections: immutable, strict about types, closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class DataSettings(Section):
    """Which shards are read."""

    uri: str = "data/omniglot"
    """Prefix (path) that holds `dataset.json`."""
    train_split: str = "train"
    validation_split: str = "validation"
    reader: Literal["auto", "memory", "mmap", "device", "stream"] = "auto"
    """`memory`: decoded once; `mmap`: by offset from local shards; `auto`: memory where it fits; `device`: on the
    training device (a GPU's memory), sampled there; `stream`: shard after shard through a shuffle buffer, nothing
    kept, approximate (`pipelines.sampling.sequential`)."""
    shuffle_buffer: Positive = 16_384
    """Rows that `stream` shuffles among each other, in memory."""
    memory_limit_mb: Positive = 4096
    """Largest split (MiB, decoded) that `auto` keeps in memory."""


class ModelSettings(Section):
    """The network q(z|x, D) and p(x|z): Tables 3, 4 and 6 to 8."""

    encoder: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")] = "conv4"
    """`conv4` (Table 3), `conv5` (Table 6), or any classification network of torchvision by its name, without its
    last layer. Where the data set holds features, the encoder is the one that made them."""
    image_size: NonNegative = 0
    """Side that images are resized to before the encoder; 0: as they are stored."""
    rectified: bool = True
    """`conv4` and `conv5` end in a ReLU, as in Tables 3 and 6. Without it features have both signs, of which a
    contrastive loss makes much better ones."""
    average: Average = "none"
    """Features of a trained encoder are the mean over these views of an image: itself and its mirror image, or twelve,
    with four corners and the centre (85% of the side). For photographs, at two or twelve times the time."""
    reconstruct: Literal["pixels", "features"] = "pixels"
    """What p(x|z) explains: pixels (Bernoulli, Tables 3 and 4), or features of the frozen encoder
    (Gaussian; "Visual feature reconstruction", section 3.2, Tables 7 and 8)."""
    features: Literal["standard", "whitened", "raw"] = "standard"
    """Features that are reconstructed: centred, divided by their deviation and of one length; or evened out by a square
    root, centred, half-whitened and of one length; or as they are, which ends the decoder in the ReLU of Table 8."""
    variance: Literal["calibrated", "unit"] = "calibrated"
    """Row 6: variance of p(x|z) over features: the best for each episode (Rybkin et al. 2020), or 1, that is half
    the summed squared error."""
    latent: Positive = 64
    """D, the latent size."""
    channels: Positive = 64
    """Channels of each block of `conv4` and `conv5`, and of the decoder."""
    width: Positive = 256
    """d_model = d_ff of the set attention."""
    heads: Positive = 4
    layers: NonNegative = 2
    """Set-attention layers; 0 removes the set from the posterior ("Set" in Table 2, left)."""
    attention_scale: Literal["head", "model"] = "head"
    """Row 2: 1/sqrt(width/heads), or 1/sqrt(width)."""
    attention_block: Literal["transformer", "set-attention"] = "transformer"
    """Row 3: TransformerEncoder without LayerNorm, or residual on the projected query with x + act(Wx)."""
    attention_activation: Literal["elu", "relu"] = "elu"
    """Row 4."""
    posterior: Literal["isotropic", "diagonal"] = "diagonal"
    """Row 12: one variance per point, or one per latent dimension."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) must be a multiple of heads ({self.heads})")
        return self


class AdaptSettings(Section):
    """Meta-test: semi-supervised EM over support and query (Eq. 10) and the final posterior (Eq. 11)."""

    e_step: Literal["diagonal", "identity"] = "diagonal"
    """Row 1: sigma_k^2 in every E-step as in Eq. 10, or the identity in all of them."""
    final_covariance: Literal["diagonal", "identity"] = "diagonal"
    """Covariance in the final posterior; `identity` here and in `e_step` is the ablation without sigma^2. One labelled
    image has no variance that could be estimated: for queries that are judged alone `identity` is much better."""
    temperature: PositiveFloat = 1.0
    """Log-likelihoods are divided by it, in the E-steps and in the final posterior; 1: Eq. 10 and 11. The dimensions of
    a latent are taken as independent, which they are not: where classes lie close together EM is surer than it should
    be, and hardens onto mistakes. Chosen on validation classes."""
    iterations: Positive = 10
    samples: Positive = 32
    """N Monte Carlo samples of each point's posterior."""


class TrainSettings(Section):
    """Meta-training by Eq. 9 with EM (Eq. 7) inside."""

    seed: NonNegative = 0
    steps: NonNegative = 60_000
    batch: Positive = 4
    """B, episodes per step over all workers."""
    set_size: Positive = 200
    """M, points per episode."""
    samples: Positive = 32
    """N, Monte Carlo samples per point, all used by EM and the KL term."""
    decode_samples: Positive = 1
    """R <= N, samples that are decoded. The expectation of the objective does not depend on it where each sample is
    decoded by itself: exactly so but for batch statistics of the decoder and the calibrated variance."""
    components: Positive = 5
    """K."""
    em_iterations: Positive = 10
    learning_rate: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.0
    """Row 8: Adam's coupled form."""
    objective_scale: Literal["sum", "mean"] = "sum"
    """Row 11: sum or mean over the M points of an episode."""
    beta: PositiveFloat = 1.0
    """Weight of the divergence from the prior (Higgins et al. 2017); 1: the lower bound of Eq. 9. A set of many classes
    drawn at random has few clusters to speak of: below 1 the prior does not press it into K all the same."""
    denoise: bool = False
    """The posterior sees a random view of each image (those of `pretrain.views`), and the image itself is reconstructed
    (the denoising criterion of Im et al., AAAI 2017): what a view changes has no place in a latent."""
    start: Literal["random", "components"] = "random"
    """Where meta-training on features begins: at random, or at their principal components, as a linear VAE would end
    (`training.models.pca_init`)."""
    schedule: Literal["constant", "cosine"] = "constant"
    clip_norm: NonNegativeFloat = 0.0
    """Largest gradient norm; 0 does not clip."""
    precision: Literal["float32", "bfloat16", "auto"] = "float32"
    """Autocast of the networks; EM and the densities are float32 always. `auto`: bfloat16 where the device computes it
    by instructions of its own, else float32 (elsewhere bfloat16 is emulated, many times slower)."""
    channels_last: bool = True
    compile: bool = False
    selection: Literal["last", "best"] = "last"
    """Row 13: the last model, or the best validation accuracy per shot."""
    checkpoint_every: Positive = 500
    log_every: Positive = 20

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.decode_samples > self.samples:
            raise ValueError(f"decode_samples ({self.decode_samples}) exceeds samples ({self.samples})")
        if self.components > self.set_size:
            raise ValueError(f"components K ({self.components}) exceeds set_size M ({self.set_size})")
        return self


class PretrainSettings(Section):
    """Contrastive training of the encoder (SimCLR, Chen et al. 2020): before meta-training, or alone by
    `metagmvae pretrain`; 0 steps: none."""

    steps: NonNegative = 0
    batch: Annotated[int, Field(ge=2)] = 256
    """Images per step over all workers; each gives two views."""
    views: Literal["auto", "strokes", "photographs"] = "auto"
    """Distortions that make the views, those of `train.denoise` too: of strokes (affine, elastic, thickness), of
    photographs (SimCLR's crops, flips and colours); `auto` goes by the channels, 1 or 3."""
    crop_area: Annotated[float, Field(gt=0, le=1)] = 0.08
    """Smallest share of a photograph that a view of it shows."""
    elastic: Annotated[float, Field(ge=0, le=1)] = 0.12
    """How far strokes are bent at most, in half widths. Weak bending learns faster, strong bending gets further."""
    projector: tuple[Positive, ...] = ()
    """Sizes of the MLP between features and loss, (256, 128) in the paper; empty: none."""
    temperature: PositiveFloat = 0.2
    optimizer: Literal["adamw", "adam", "lars"] = "adamw"
    learning_rate: PositiveFloat = 3e-3
    weight_decay: NonNegativeFloat = 1e-4
    """Decoupled for AdamW, coupled for Adam and LARS."""
    schedule: Literal["one-cycle", "constant", "cosine", "published-code"] = "one-cycle"
    """`published-code`: row 7, from epoch 10 on a cosine over the epochs, 75 down and 75 up."""


class ValidationSettings(Section):
    """Labelled episodes judged during training, on validation classes only.

    An encoder alone is judged by the nearest class mean on its features, by its nearest neighbours, and by a linear
    probe."""

    every: NonNegative = 1_000
    """Steps between validations; 0: never."""
    episodes: Positive = 200
    way: Annotated[int, Field(ge=2)] = 5
    shots: tuple[Positive, ...] = (1, 5)
    query: Positive = 15
    seed: NonNegative = 1
    probes: bool = True
    """Of an encoder alone: nearest neighbours (they need faiss) and a linear classifier."""


class RunSettings(Section):
    """Where it runs."""

    out: str = "runs/omniglot-5way"
    engine: Literal["local", "ray"] = "local"
    workers: Positive = 1
    """Data-parallel workers under Ray."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: NonNegative = 0
    """Torch threads per worker; 0: torch's own choice (Ray: the CPUs of the worker)."""
    cpus_per_worker: Positive = 1
    max_failures: NonNegative = 3
    """Worker-group restarts that are tried before the run fails."""
    figures: bool = True
    """Draw curves, reconstructions, modes and the latent map into the run folder at the end."""
    address: str = ""
    """Ray cluster to join; empty: RAY_ADDRESS if set, else a cluster on this machine."""


class TrackingSettings(Section):
    """MLflow."""

    enabled: bool = True
    uri: str = ""
    """Empty: MLFLOW_TRACKING_URI if set, else SQLite in `store`."""
    store: str = "runs/mlflow"
    """Folder of the default SQLite store and its artifacts."""
    experiment: str = "metagmvae"
    register_as: str = ""
    """Registered model name; empty: do not register. An encoder alone is registered as `NAME-encoder`."""
    alias: str = "champion"


class Settings(Section):
    """One run."""

    name: str = "run"
    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    adapt: AdaptSettings = AdaptSettings()
    pretrain: PretrainSettings = PretrainSettings()
    train: TrainSettings = TrainSettings()
    validation: ValidationSettings = ValidationSettings()
    run: RunSettings = RunSettings()
    tracking: TrackingSettings = TrackingSettings()

    @model_validator(mode="after")
    def _features_need_all_images(self) -> Self:
        if self.model.reconstruct == "features" and self.data.reader == "stream":
            raise ValueError(
                'data.reader ("stream") reads images once, and model.reconstruct ("features") encodes them all '
                "before meta-training: set data.reader to mmap"
            )
        return self

    @model_validator(mode="after")
    def _views_are_of_images(self) -> Self:
        if self.train.denoise and self.model.reconstruct == "features":
            raise ValueError(
                'train.denoise (true) distorts images, and model.reconstruct ("features") trains on features: set one '
                "of them otherwise"
            )
        return self

    @model_validator(mode="after")
    def _components_have_a_place(self) -> Self:
        if self.train.start != "components":
            return self
        model, why = self.model, 'and train.start is "components"'
        if model.reconstruct != "features":
            raise ValueError(f'model.reconstruct ("{model.reconstruct}") must be "features", {why}')
        if model.layers and model.attention_block != "transformer":
            raise ValueError(f'model.attention_block ("{model.attention_block}") must be "transformer", {why}')
        if model.latent > min(model.width, LARGEST_START):
            raise ValueError(
                f"model.latent ({model.latent}) must be at most model.width ({model.width}) and {LARGEST_START}, {why}"
            )
        return self

    @model_validator(mode="after")
    def _workers_divide_batches(self) -> Self:
        for key, batch in (("train.batch", self.train.batch), ("pretrain.batch", self.pretrain.batch)):
            if self.run.engine == "ray" and batch % self.run.workers:
                raise ValueError(f"{key} ({batch}) must be a multiple of run.workers ({self.run.workers})")
        return self
