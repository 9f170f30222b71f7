"""Store a built-in deterministic dataset in the catalog; seconds.

    mlflow run . -e seed --env-manager local -P dataset=golden-v2
    tunix-mlflow seed golden-v2
    tunix-mlflow seed golden-v2 --num-traces 50 --key golden-v3

Seeding the same dataset again changes nothing.
"""

from tunix_mlflow.cli.main import run_command

if __name__ == "__main__":
    run_command("seed")
