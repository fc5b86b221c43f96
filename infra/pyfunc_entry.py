"""Logged with every MLflow model and run when MLflow loads one: names the class of the installed package."""

from mlflow.models import set_model

from infra.pyfunc_model import FewShotModel

set_model(FewShotModel())
