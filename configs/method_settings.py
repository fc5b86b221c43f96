"""Settings of the method that is meta-trained: Meta-GMVAE, or one of those that the paper compares with."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from metagmvae.configs.limits import MAX_SIZE, ExtensionName, Options, PositiveFloat, Section, Size


class MethodSettings(Section):
    """The method, and for the methods that learn from tasks where the classes of its training tasks come from.

    `train.steps`, `train.batch` (tasks per step) and `train.learning_rate` are those of the outer loop.
    """

    name: ExtensionName = "meta-gmvae"
    """Method: `meta-gmvae`; `maml` (Finn et al. 2017); `protonets` (Snell et al. 2017); `scratch`: a new network
    trained on the labelled images alone; or a method that another package adds."""
    tasks: Literal["labels", "clusters", "images"] = "clusters"
    """Classes of the training tasks. `labels`: those of the dataset (supervised oracle); `clusters`: clusters of the
    encoder's features (CACTUs, Hsu et al. 2019); `images`: each image is a class, and augmented views of it are its
    queries (UMTRA, Khodadadeh et al. 2019)."""
    network: Literal["encoder", "mlp"] = "encoder"
    """What is meta-trained: a network of its own on images, like `model.encoder`, or a perceptron with one hidden layer
    on the features of the frozen encoder."""
    way: Annotated[int, Field(ge=2, le=MAX_SIZE)] = 5
    """Classes of a training task. A model of `maml` classifies tasks of up to this many classes, others of any."""
    shot: Size = 1
    """Labelled images of each class of a training task."""
    query: Size = 5
    """Queries of each class of a training task."""
    inner_steps: Size = 5
    """Gradient steps on the labelled images of a training task (`maml`)."""
    inner_rate: PositiveFloat = 0.05
    """Learning rate of the gradient steps, on the mean cross-entropy of the labelled images (`maml`, `scratch`)."""
    first_order: bool = False
    """Whether `maml` ignores second derivatives (first-order MAML)."""
    test_steps: Size = 50
    """Gradient steps on the labelled images of a test task (`maml`, `scratch`)."""
    clusters: Annotated[int, Field(ge=2, le=MAX_SIZE)] = 500
    """Clusters of each partition for `tasks = "clusters"`."""
    partitions: Size = 50
    """Partitions for `tasks = "clusters"`: k-means on the features, each with other random scales of the dimensions;
    with one partition the dimensions are not scaled."""
    options: Options = Field(default_factory=dict)
    """Options of a method that another package adds, such as `method.options.freedom=4`."""

    @model_validator(mode="after")
    def _check_tasks(self) -> Self:
        if self.tasks == "images" and self.shot > 1:
            raise ValueError(f'shot ({self.shot}) must be 1 for tasks = "images": each image is a class of its own')
        if self.tasks == "clusters" and self.clusters < self.way:
            raise ValueError(f"way ({self.way}) exceeds clusters ({self.clusters}); change one of them")
        return self
