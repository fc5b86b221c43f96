"""Settings of the training stages: meta-training, contrastive pre-training, and validation during training.

[paper: a, code: b] marks the settings in which the paper and its published code differ.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from metagmvae.configs.limits import (
    MAX_SIZE,
    Count,
    ExtensionName,
    NonNegativeFloat,
    Options,
    Positive,
    PositiveFloat,
    Repetitions,
    Section,
    Seed,
    Size,
    Temperature,
)


class TrainSettings(Section):
    """Meta-training: maximises Eq. 9, with EM (Eq. 7) in every step."""

    seed: Seed = 0
    """Seed of initialisation, data order and Monte Carlo samples."""
    steps: Count = 60_000
    """Steps of meta-training."""
    batch: Size = 4
    """Batch size B: episodes per step over all workers."""
    set_size: Size = 200
    """Data points M per episode."""
    samples: Repetitions = 32
    """Monte Carlo samples N per data point, all used by EM and the KL term."""
    decode_samples: Repetitions = 1
    """Decoded samples R <= N per data point. The expected objective does not depend on R, except through the batch
    statistics of the decoder and the calibrated variance."""
    prior: Literal["mixture", "normal"] = "mixture"
    """Prior of the latents: the mixture that EM fits to each episode (Eq. 7), or N(0, I), which is a VAE without
    episodic training (ablation "Ep" in Table 2, left)."""
    components: Size = 5
    """Mixture components K."""
    em_iterations: Repetitions = 10
    """Iterations of EM in each step."""
    learning_rate: PositiveFloat = 1e-3
    """Learning rate of Adam."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay in the coupled form of Adam [paper: 0, code: positive]."""
    objective_scale: Literal["sum", "mean"] = "sum"
    """Objective [paper: sum, code: mean]: sum or mean over the M data points of an episode."""
    beta: PositiveFloat = 1.0
    """Weight of the KL divergence (Higgins et al. 2017); 1 gives the lower bound of Eq. 9. A random set of many classes
    has no clear clusters; values below 1 weaken the pull of the latents towards K clusters."""
    denoise: bool = False
    """Denoising criterion (Im et al., AAAI 2017): the posterior is computed from a random view of each image (see
    `pretrain.views`), and the original image is reconstructed, so latents become invariant to the views."""
    start: Literal["random", "components"] = "random"
    """Initialisation of posterior and decoder in meta-training on features: `random`, or `components`: PCA of the
    features, which is the optimum of a linear VAE (`training.methods.pca_init`)."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate schedule."""
    clip_norm: NonNegativeFloat = 0.0
    """Gradient clipping: largest gradient norm; 0: no clipping."""
    precision: Literal["float32", "bfloat16", "auto"] = "float32"
    """Autocast precision of the networks; EM and densities always use float32. `auto`: bfloat16 if the device has
    instructions for it, else float32, because emulated bfloat16 is many times slower."""
    channels_last: bool = True
    """Memory format of the convolutions; channels last is faster on most devices."""
    compile: bool = False
    """Whether `torch.compile` compiles the networks; of `maml` only an encoder that stays frozen."""
    selection: Literal["last", "best", "best-first-shot"] = "last"
    """Model selection [paper: last, code: best; best-first-shot on Mini-ImageNet]. `last`: the last model; `best`: per
    shot, the best on validation; `best-first-shot`: the best at the first of `validation.shots`, for every shot."""
    checkpoint_every: Positive = 500
    """Steps between checkpoints."""
    log_every: Positive = 20
    """Steps between metric lines."""

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if self.decode_samples > self.samples:
            raise ValueError(f"decode_samples ({self.decode_samples}) exceeds samples ({self.samples})")
        if self.components > self.set_size:
            raise ValueError(f"components K ({self.components}) exceeds set_size M ({self.set_size})")
        return self


class PretrainSettings(Section):
    """Pre-training of the encoder without labels, encoder-only or before meta-training."""

    steps: Count = 0
    """Training steps; 0: no pre-training."""
    objective: ExtensionName = "nt-xent"
    """Objective. `nt-xent`: two views of each image attract each other (SimCLR, Chen et al. 2020); `prototypes`: views
    are classified by the nearest image, in squared Euclidean distance (ProtoCLR, Medina et al. 2020); `acai`: an
    autoencoder whose interpolations look real (Berthelot et al. 2019); `bigan`: a generator and an encoder that invert
    each other (Donahue et al. 2017); `deepcluster`: views are classified by the cluster of their image (Caron et al.
    2018); `psco`: contrast with pseudo-labelled tasks from a queue (Jang et al. 2023); or one that another package
    adds."""
    options: Options = Field(default_factory=dict)
    """Options of an objective that another package adds, such as `pretrain.options.margin=0.5`."""
    query_views: Size = 3
    """Views Q of each image for `prototypes`; `nt-xent` has two."""
    clusters: Size = 500
    """Clusters of `deepcluster`, about ten times the number of classes; 10,000 for ImageNet in the source."""
    shots: Size = 4
    """Pseudo-labelled images per class of `psco`; in the source 1 for Omniglot and 4 for Mini-ImageNet."""
    queue: Size = 16_384
    """Features of earlier batches that `psco` remembers; 16,384 in the source."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Momentum of the networks that give the features of the queue of `psco`; 0.99 in the source."""
    batch: Annotated[int, Field(ge=2, le=MAX_SIZE)] = 256
    """Batch size: images per step over all workers, each with all its views."""
    views: Literal["auto", "strokes", "photographs"] = "auto"
    """Augmentations for the views, also for `train.denoise`. `strokes`: affine, elastic, stroke width; `photographs`:
    crops, flips and colours of SimCLR; `auto`: strokes for one channel, photographs for three."""
    crop_area: Annotated[float, Field(gt=0, le=1)] = 0.08
    """Smallest crop of a photograph, as a fraction of its area."""
    crops: Literal["clipped", "torchvision"] = "clipped"
    """Crops larger than the photograph [paper, code: torchvision] are clipped to it, or redrawn as in torchvision."""
    elastic: Annotated[float, Field(ge=0, le=1)] = 0.12
    """Largest elastic displacement of strokes, in units of half the image width. Weak distortion trains faster, strong
    distortion reaches a higher accuracy."""
    projector: tuple[Size, ...] = ()
    """Projection head: layer sizes of the MLP between features and loss, (256, 128) in the paper; empty: none. For
    `acai` and `bigan` its output is the latent; `psco` has (4096, 256), with batch normalisation."""
    temperature: Temperature = 0.2
    """Temperature of the objective. For `prototypes` it divides the mean squared difference of two features; ProtoCLR
    has 1 / (number of features)."""
    optimizer: Literal["adamw", "adam", "lars", "sgd"] = "adamw"
    """Optimiser of pre-training: AdamW, Adam, LARS (SimCLR's, for large batches) or SGD with momentum (that of
    DeepCluster and PsCo)."""
    learning_rate: PositiveFloat = 3e-3
    """Learning rate; the peak for `one-cycle`."""
    weight_decay: NonNegativeFloat = 1e-4
    """Weight decay: decoupled for AdamW, coupled for the others."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the mean gradient in AdamW and Adam (0.5 for `bigan` in the source), and momentum of SGD."""
    schedule: Literal["one-cycle", "constant", "cosine", "published-code"] = "one-cycle"
    """Learning rate schedule [paper: constant, code: published-code, from epoch 10 a cosine, 75 epochs down, 75 up]."""

    @model_validator(mode="after")
    def _check_objective(self) -> Self:
        if self.optimizer == "lars" and self.beta1 != 0.9:
            raise ValueError(f"beta1 ({self.beta1}) is a setting of Adam and SGD, but optimizer is lars; leave it out")
        if self.objective == "psco":
            if not self.projector:
                raise ValueError("projector (none) must have at least one size for psco, such as [4096, 256]")
            for key, value in (("batch", self.batch), ("shots", self.shots)):
                if value > self.queue:
                    raise ValueError(f"{key} ({value}) exceeds queue ({self.queue}); raise queue")
        return self


class ValidationSettings(Section):
    """Evaluation on labelled episodes of validation classes during training; encoder-only: by nearest class mean."""

    every: Count = 1_000
    """Steps between validations; 0: no validation."""
    episodes: Annotated[int, Field(gt=0, le=10**7)] = 200
    """Episodes of each validation."""
    way: Annotated[int, Field(ge=2, le=MAX_SIZE)] = 5
    """Classes K per episode."""
    shots: tuple[Size, ...] = (1, 5)
    """Support images S per class; each value is evaluated separately."""
    query: Size = 15
    """Query images Q per class."""
    seed: Seed = 1
    """Seed of the validation episodes."""
    mix_groups: bool = False
    """Draw labelled images and queries regardless of the groups of a dataset, such as patients, also for the
    calibration, instead of from different groups."""
    probes: bool = True
    """Further probes of encoder-only runs: nearest neighbours and a linear classifier."""
    calibration_episodes: Annotated[int, Field(ge=0, le=10**6)] = 100
    """Episodes, of each number of shots and mode, on which the temperature of the probabilities is fitted after the
    training; of validation classes, or of augmented training images without them. 0: no calibration."""
