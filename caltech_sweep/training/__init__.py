"""One trial: model, augmentation, training loop and evaluation. Knows neither Optuna nor MLflow."""
