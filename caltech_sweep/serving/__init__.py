"""Promoting trials, asking models, and the model that MLflow serves."""

import warnings

import caltech_sweep.tracking  # noqa: F401  it sets MLflow up before its first import

with warnings.catch_warnings():  # about type hints of MLflow's own, when this module is first imported
    warnings.filterwarnings("ignore", message=".*Any type hint is inferred as AnyType")
    import mlflow.pyfunc  # noqa: F401
