"""Seed, train, evaluate and promote, as one run with linked children.

    mlflow run . --env-manager local
    tunix-mlflow main column-addition

Two cores: about a minute and a half for column-addition; exact match 0.95 or better.
"""

from tunix_mlflow.cli.main import run_command

if __name__ == "__main__":
    run_command("main")
