"""Empty on purpose: what a run writes locally needs no MLflow."""
