"""Register a logged model as challenger, and make it champion if it passes the gate; seconds.

    mlflow run . -e promote --env-manager local -P model=RUN_ID -P name=support
    tunix-mlflow promote RUN_ID support promotion.thresholds.exact_match=0.9

Exit code 3 when the gate refuses.
"""

from tunix_mlflow.cli.main import run_command

if __name__ == "__main__":
    run_command("promote")
