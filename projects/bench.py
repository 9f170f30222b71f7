"""Measure this machine: the training step, what surrounds it, other trainers, the catalog.

    mlflow run . -e bench --env-manager local
    tunix-mlflow bench column-addition benchmark.repeats=5
    tunix-mlflow bench shape-s --suite tracking

Half a minute on two cores; the suites data and peers take some minutes.
"""

from tunix_mlflow.cli.main import run_command

if __name__ == "__main__":
    run_command("bench")
