"""Entry file of every logged model. MLflow runs it to load the model; it names the class of the installed package."""

from __future__ import annotations

from mlflow.models import set_model

from metagmvae.infra.registry.pyfunc_model import FewShotModel

set_model(FewShotModel())
