"""The entry points of MLproject, one script each. Importing one loads neither jax nor mlflow."""
