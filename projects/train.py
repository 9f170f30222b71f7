"""Train a model on a dataset: from scratch, from a pretrained base, or resumed.

    mlflow run . -e train --env-manager local -P dataset=golden-v2
    tunix-mlflow train column-addition training.steps=200
    tunix-mlflow train golden-v2 --resume auto tracking.key=job-17

Two cores: golden-v2 takes half a minute, column-addition one and a half.
"""

from tunix_mlflow.cli.main import run_command

if __name__ == "__main__":
    run_command("train")
