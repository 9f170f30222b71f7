"""Empty on purpose: `import mlflow` imports the plugin modules below, and must stay cheap."""
