"""Logged with every MLflow model and run when MLflow loads one: names the class of the installed package."""

from __future__ import annotations

from mlflow.models import set_model

from metagmvae.infra.registry.pyfunc_model import FewShotModel

set_model(FewShotModel())
