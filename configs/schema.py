"""Typed, immutable and validated settings of a run.

Unknown keys, wrong types and impossible values are refused at construction with the dotted key; `configs.load` turns
the error into one line. [paper: a, code: b] marks the settings in which the paper and its published code differ; the
presets `…-paper` and `…-published-code` differ in these settings only.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from metagmvae.configs.limits import (
    MAX_PCA_LATENT,
    MAX_THREADS,
    Count,
    DataUri,
    Folder,
    Options,
    Positive,
    Repetitions,
    Section,
    Size,
    Temperature,
)
from metagmvae.configs.method_settings import MethodSettings
from metagmvae.configs.mlflow_names import Alias, ExperimentName, ModelName, TrackingUri, default_experiment
from metagmvae.configs.training_settings import PretrainSettings, TrainSettings, ValidationSettings

Average = Literal["none", "mirror", "crops", "affine"]
"""Views of an image for multi-crop averaging of features (`training.models.multi_crop`)."""


class DataSettings(Section):
    """The dataset and its reader."""

    uri: DataUri = "data/omniglot"
    """Dataset: folder or prefix (`s3://…`) with `dataset.json`."""
    train_split: str = "train"
    """Split whose images train the model; its labels are not read."""
    validation_split: str = "validation"
    """Split whose labelled episodes are evaluated during training."""
    reader: Literal["auto", "memory", "mmap", "device", "stream"] = "auto"
    """Reader of the training data. `memory`: the split in memory; `mmap`: memory-mapped shards; `auto`: memory up to
    `memory_limit_mb`, else mmap; `device`: the split in the memory of the training device; `stream`: sequential reading
    through a shuffle buffer without a local copy, approximate (`pipelines.sampling.sequential`)."""
    shuffle_buffer: Positive = 16_384
    """Rows in the shuffle buffer of `stream`."""
    memory_limit_mb: Positive = 4096
    """Largest split that `auto` reads into memory, in MiB."""


class ModelSettings(Section):
    """The networks q(z|x, D) and p(x|z): Tables 3, 4 and 6 to 8 of the paper."""

    encoder: Annotated[str, Field(pattern=r"^((torchvision|timm):)?[a-z0-9_.]+$")] = "conv4"
    """Encoder: `conv4` (Table 3), `conv5` (Table 6), `resnet12`, or `torchvision:NAME` or `timm:NAME` without its last
    layer, newly initialised. If the dataset contains features, the encoder is the one that computed them, and if it
    contains vectors (`prepare vectors`), `vectors`, which returns them as they are."""
    image_size: Annotated[int, Field(ge=0, le=2**14)] = 0
    """Image size: side to which images are resized before the encoder, in pixels; 0: as stored."""
    rectified: bool = True
    """Final ReLU of Conv4 and Conv5, as in Tables 3 and 6. Without it features have both signs, and contrastive
    pre-training gives much better ones."""
    average: Average = "none"
    """Multi-crop averaging of features: mean over `mirror`: the image and its mirror image; `crops`: twelve views, with
    crops of the four corners and the centre (85% of the side), both for photographs; `affine`: five views, four of them
    slightly turned and shifted, for strokes on black. Costs two, twelve or five times the time."""
    reconstruct: Literal["pixels", "features"] = "pixels"
    """Reconstruction target of p(x|z): pixels (Bernoulli, Tables 3 and 4), or features of the frozen encoder (Gaussian,
    "Visual feature reconstruction" of section 3.2, Tables 7 and 8)."""
    features: Literal["standard", "whitened", "view-whitened", "raw"] = "standard"
    """Feature scaling before reconstruction. `standard`: centred, divided by the standard deviation, of equal length;
    `whitened`: signed square root, centred, half-whitened, of equal length; `view-whitened`: of equal length, centred,
    half-whitened by the covariance between random views of an image; `raw`: unscaled, final ReLU of Table 8."""
    normalise: Literal["none", "imagenet"] = "none"
    """Input normalisation of Conv4, Conv5 and ResNet-12 [code of SimCLR: imagenet]: none, or subtract ImageNet's mean
    colour and divide by its standard deviation. Networks of torchvision and timm have that of their weights."""
    variance: Literal["calibrated", "unit", "half"] = "calibrated"
    """Variance of p(x|z) for features [paper: calibrated, code: half]: the optimum of each episode (Rybkin et al.
    2020), or 1, or 1/2. -log p(x|z) is half the sum of squared errors for `unit`, the whole sum for `half`."""
    latent: Size = 64
    """Latent size D."""
    channels: Size = 64
    """Channels of each block of Conv4 and Conv5, and of the decoder."""
    width: Size = 256
    """Width of the set attention, d_model = d_ff."""
    heads: Size = 4
    """Heads of the set attention; a divisor of the width."""
    layers: Annotated[int, Field(ge=0, le=1000)] = 2
    """Set-attention layers; 0 makes the posterior independent of the set (ablation "Set" in Table 2, left)."""
    attention_scale: Literal["head", "model"] = "head"
    """Scale of the attention scores [paper: head, code: model]: 1/sqrt(width/heads), or 1/sqrt(width)."""
    attention_block: Literal["transformer", "set-attention"] = "transformer"
    """Attention block [paper: transformer, code: set-attention]: transformer encoder layer without LayerNorm, or a
    residual connection from the projected query followed by x + act(Wx)."""
    attention_activation: Literal["elu", "relu"] = "elu"
    """Activation function of the attention block [paper: elu on Omniglot, code: relu]."""
    posterior: Literal["isotropic", "diagonal"] = "diagonal"
    """Posterior covariance: one variance per dimension (Tables 3 and 7), or one per point (text of the paper)."""
    options: Options = Field(default_factory=dict)
    """Options of an encoder that another package adds, such as `model.options.depth=4`."""

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) must be a multiple of heads ({self.heads})")
        return self


class AdaptSettings(Section):
    """Adaptation at meta-test: semi-supervised EM on support and queries (Eq. 10), class posterior (Eq. 11)."""

    e_step: Literal["diagonal", "identity"] = "diagonal"
    """Covariance in the E-steps [paper: diagonal, code: identity]: diagonal sigma_k^2 as in Eq. 10, or the identity."""
    final_covariance: Literal["diagonal", "identity"] = "diagonal"
    """Covariance in the final posterior. `identity` here and in `e_step` is the ablation without sigma^2. One labelled
    image gives no estimate of a class variance, so `identity` is much better for inductive 1-shot evaluation."""
    temperature: Temperature = 1.0
    """Temperature of the log-likelihoods in the E-steps and the final posterior; 1 gives Eq. 10 and 11. EM assumes
    independent latent dimensions, so it is overconfident for similar classes. Select it on validation classes."""
    iterations: Repetitions = 10
    """Iterations of EM."""
    samples: Repetitions = 32
    """Monte Carlo samples N of the posterior of each data point."""
    inductive: Literal["latents", "features"] = "latents"
    """Space of the class means and variances in inductive mode, which fits them to the support alone. `latents`: as in
    transductive mode, in a set of the support and one query. `features`: the scaled features of the encoder; more
    accurate for single queries, and much faster. Transductive mode always uses the latents."""
    proportions: Literal["equal", "estimated", "balanced"] = "equal"
    """Class weights in EM and in the final posterior. `equal`: 1/K as in Eq. 10, for balanced queries. `estimated`:
    from the queries, under a Dirichlet prior; for transductive use where the classes may be unbalanced. `balanced`:
    such that every class gets the same number of queries (optimal transport); best if they are balanced, bad if not."""
    proportions_prior: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)] = 1.0
    """Strength of the prior of `estimated` proportions: images per class that it is worth. 0: none; large: equal."""
    diffusion: Annotated[float, Field(ge=0, le=0.99, allow_inf_nan=False)] = 0.0
    """Transductive mode: the features of support and queries first move towards those that are like them, set attention
    without weights (`training.objectives.feature_diffusion`). Up to 0.99, the larger the farther; 0: not. Needs
    scaled features (`model.reconstruct = "features"`). Select it and `temperature` on validation classes: it helps on
    photographs with few labels, and not on Omniglot."""
    whitening: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] = 0.0
    """Features are first whitened by their covariance within classes, estimated from the labelled images of an episode
    and shrunk to the identity (`training.objectives.class_whitening`): the larger, the less shrunk; 0: not. Needs
    scaled features, as `diffusion`, and helps from a few labelled images per class on; with one it changes nothing."""


class RunSettings(Section):
    """Place and resources of the run."""

    out: Folder = "runs/omniglot-5way"
    """Run folder: checkpoint, metrics, settings, figures and results."""
    engine: Literal["local", "ray"] = "local"
    """`local`: this process; `ray`: data-parallel workers of a Ray cluster."""
    workers: Size = 1
    """Data-parallel workers with Ray."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Training device; `auto`: a GPU if there is one."""
    threads: Annotated[int, Field(ge=0, le=MAX_THREADS)] = 0
    """Torch threads per worker; 0: the default of torch (with Ray: the CPUs of the worker)."""
    cpus_per_worker: Annotated[int, Field(gt=0, le=MAX_THREADS)] = 1
    """CPUs that each worker reserves on the Ray cluster."""
    max_failures: Count = 3
    """Restarts of the Ray workers before the run fails."""
    figures: bool = True
    """Figures in the run folder at the end: curves, reconstructions, mixture modes, latent map."""
    address: str = ""
    """Address of a Ray cluster; empty: RAY_ADDRESS if set, else a new cluster on this machine."""


class TrackingSettings(Section):
    """Tracking with MLflow."""

    enabled: bool = True
    """Whether the run is recorded in MLflow."""
    uri: TrackingUri = ""
    """Tracking URI; empty: MLFLOW_TRACKING_URI if set, else a SQLite database in `store`."""
    store: Folder = "runs/mlflow"
    """Folder of the default SQLite database and its artifacts."""
    experiment: ExperimentName = Field(default_factory=default_experiment, validate_default=True)
    """Name of the MLflow experiment; not given: MLFLOW_EXPERIMENT_NAME if set, else `metagmvae`."""
    register_as: ModelName = ""
    """Name of the registered model; empty: not registered. An encoder-only model is registered as `NAME-encoder`.
    `{data}` stands for the last part of `data.uri`."""
    alias: Alias = "champion"
    """Alias of the best version; empty: none."""


class Settings(Section):
    """All settings of a run."""

    name: str = "run"
    """Name of the settings, shown in tables and figures."""
    data: DataSettings = DataSettings()
    method: MethodSettings = MethodSettings()
    model: ModelSettings = ModelSettings()
    adapt: AdaptSettings = AdaptSettings()
    pretrain: PretrainSettings = PretrainSettings()
    train: TrainSettings = TrainSettings()
    validation: ValidationSettings = ValidationSettings()
    run: RunSettings = RunSettings()
    tracking: TrackingSettings = TrackingSettings()

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.train.selection == "best-first-shot" and not self.validation.every:
            raise ValueError('train.selection ("best-first-shot") needs validation: set validation.every above 0')
        if self.model.reconstruct == "features" and self.data.reader == "stream":
            raise ValueError(
                'data.reader ("stream") reads images sequentially, but model.reconstruct ("features") encodes all of '
                "them before meta-training; set data.reader to mmap"
            )
        if self.train.denoise and self.model.reconstruct == "features":
            raise ValueError('train.denoise (true) augments images, but model.reconstruct is "features": change one')
        for key in ("diffusion", "whitening"):
            value = getattr(self.adapt, key)
            if value and (self.model.reconstruct != "features" or self.model.features == "raw"):
                raise ValueError(
                    f"adapt.{key} ({value:g}) is for scaled features, and the model has none: set it to 0, or "
                    'model.reconstruct to "features" and model.features to another value than "raw"'
                )
        return self

    @model_validator(mode="after")
    def _check_pretraining(self) -> Self:
        pretrain = self.pretrain
        if pretrain.objective == "deepcluster" and self.data.reader == "stream":
            raise ValueError(
                'data.reader ("stream") reads images sequentially, but pretrain.objective ("deepcluster") clusters all '
                "of them; set data.reader to mmap"
            )
        if pretrain.objective == "bigan" and self.model.rectified and not pretrain.projector:
            raise ValueError(
                "model.rectified (true) gives features above 0, but pretrain.objective (bigan) compares them with "
                "latents in [-1, 1]; set model.rectified to false, or pretrain.projector to the size of the latent"
            )
        return self

    @model_validator(mode="after")
    def _check_pca_initialisation(self) -> Self:
        if self.train.start != "components":
            return self
        model, reason = self.model, 'because train.start is "components"'
        if model.reconstruct != "features":
            raise ValueError(f'model.reconstruct ("{model.reconstruct}") must be "features", {reason}')
        if model.layers and model.attention_block != "transformer":
            raise ValueError(f'model.attention_block ("{model.attention_block}") must be "transformer", {reason}')
        if model.latent > (limit := min(model.width, MAX_PCA_LATENT)):
            raise ValueError(f"model.latent ({model.latent}) must be at most {limit} (model.width or 256), {reason}")
        return self

    @model_validator(mode="after")
    def _check_workers(self) -> Self:
        for key, batch in (("train.batch", self.train.batch), ("pretrain.batch", self.pretrain.batch)):
            if self.run.engine == "ray" and batch % self.run.workers:
                raise ValueError(f"{key} ({batch}) must be a multiple of run.workers ({self.run.workers})")
        return self
