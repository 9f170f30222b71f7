"""Score a logged model on the test split of a dataset.

    mlflow run . -e evaluate --env-manager local -P model=models:/m-... -P dataset=golden-v2
    tunix-mlflow evaluate models:/column-addition@champion --dataset column-addition-v1

About ten seconds for 200 short answers on two cores.
"""

from tunix_mlflow.cli.main import run_command

if __name__ == "__main__":
    run_command("evaluate")
