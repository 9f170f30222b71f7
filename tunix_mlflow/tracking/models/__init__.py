"""Empty on purpose: MLflow loads the flavor by its full name."""
