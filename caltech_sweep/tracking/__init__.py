"""The tracking store: MLflow, its records, and what waits for it."""
