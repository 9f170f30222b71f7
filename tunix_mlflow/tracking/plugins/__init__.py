"""Empty on purpose: every `import mlflow` imports this package."""
