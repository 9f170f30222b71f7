"""Empty on purpose: its modules load MLflow."""
