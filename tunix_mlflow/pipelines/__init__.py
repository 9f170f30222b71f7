"""Empty on purpose: a pipeline loads jax and MLflow when it is imported."""
