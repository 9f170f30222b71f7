"""Exports of every family, loaded by transformers: `make exports`.

    python -m tests.golden.exports write FOLDER    # our environment: the models beside this file
    python -m tests.golden.exports check FOLDER    # one with transformers: their logits

A model goes through ours, from its first weights to the exported folder; its logits in
transformers must be those that transformers had of the first weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
CLOSE = 1e-5  # of logits whose spread is about 1


def write(folder: Path) -> None:
    """Export each model into a folder of its own, as float32."""
    from tests.test_pretrained import MODELS, folder_of, imported
    from tunix_mlflow.models.hub import pretrained

    folder.mkdir()
    for name in MODELS:
        config, params = imported(folder_of(name, folder / "first" / name))
        pretrained.save(folder / name, config, params)


def check(folder: Path) -> bool:
    """Print how far the logits of each export are from the golden ones; return whether all hold."""
    import torch
    import transformers

    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    held = []
    for path in sorted(HERE.glob("*.npz")):
        golden = np.load(path)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder / path.stem, attn_implementation="eager", torch_dtype="float32"
        ).eval()
        with torch.no_grad():
            logits = model(torch.tensor(golden["tokens"].astype(np.int64))).logits.numpy()
        difference = float(np.abs(logits - golden["logits"]).max())
        held.append(difference < CLOSE)
        verdict = "equal" if held[-1] else "DIFFERENT"
        print(f"{path.stem}: {verdict}, largest difference {difference:.1e}")
    print(f"{sum(held)} of {len(held)} equal")
    return all(held)


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]))
    elif not check(Path(sys.argv[2])):
        sys.exit("exports differ")
