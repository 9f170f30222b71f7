"""Empty on purpose: importing a model's module is what loads jax."""
