"""Makes smollm2.json: what transformers computes of SmolLM2-135M-Instruct, read from its GGUF.

Runs in the environment of other trainers, with the package gguf beside: `python make.py FILE.gguf`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

TEXT = (
    "The Atlantic puffin is a species of seabird in the auk family. It is the only puffin native"
    " to the Atlantic Ocean; two related species are found in the northeastern Pacific. The puffin"
    " breeds in Iceland, Norway, Greenland, Newfoundland and the British Isles, nesting in"
    " colonies in holes in the ground or among rocks on the cliffs. In 2019, some 4,500,000 pairs"
    " were counted."
)
PROMPT = "The capital of France is"
GREEDY = 24


def main(file: Path) -> None:
    """Write smollm2.json."""
    import torch
    import transformers

    torch.set_num_threads(2)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ids = tokenizer(TEXT, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        loss = float(model(ids, labels=ids).loss)
        prompt = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False).input_ids
        greedy = model.generate(
            prompt, max_new_tokens=GREEDY, do_sample=False, attention_mask=torch.ones_like(prompt)
        )
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 12 + 30?"}],
        add_generation_prompt=True,
        tokenize=False,
    )
    about = {
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
        "ids": ids[0].tolist(),
        "loss": loss,
        "greedy": greedy[0, prompt.shape[1] :].tolist(),
        "chat": chat,
        "chat_ids": tokenizer(chat, add_special_tokens=False).input_ids,
    }
    path = Path(__file__).with_name("smollm2.json")
    path.write_text(json.dumps(about, indent=1, sort_keys=True) + "\n")
    print(loss, tokenizer.decode(about["greedy"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
