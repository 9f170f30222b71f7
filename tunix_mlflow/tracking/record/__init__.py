"""Empty on purpose: what a run writes locally; only system_metrics needs MLflow."""
