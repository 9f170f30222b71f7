"""Fine-tune on your own JSONL file and promote the model: python docs/own_data.py FILE NAME."""

import sys

import tunix_mlflow as tm

path, name = sys.argv[1:]
dataset = tm.load_dataset(path, key=f"{name}-v1")
config = tm.load_config(
    "golden-v2", {"dataset": dataset.key, "training.steps": 20, "training.save_every_steps": 10}
)
trained = tm.train(config)
scored = tm.evaluate(trained.run_id, dataset=dataset.key)
print(f"exact match {scored.exact_match:.2f} ({scored.low:.2f} to {scored.high:.2f})")
gate = tm.load_config("golden-v2", {"promotion.thresholds": {"exact_match": 0.0}})
promoted = tm.promote(trained.run_id, name, dataset=dataset.key, config=gate)
print(f"{promoted.name} version {promoted.version}: {promoted.verdict}")
model = tm.load_model(f"models:/{name}@champion")
