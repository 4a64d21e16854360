"""Load an exported folder the way anybody would, with transformers and peft alone, and score it.

Imports nothing of this package: it is the check that an export needs nothing of it. Run as
``python -m pomona.coordinator.rescore BASE_FOLDER ADAPTER_FOLDER DATA.jsonl``; prints ``{"accuracy": …}``.
"""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

_BATCH = 64


def score(base: str, adapter: str, data: Path, *, max_length: int) -> float:
    """Return the accuracy of an exported classifier on a JSONL file of ``text`` and ``label``."""
    labels = json.loads((Path(adapter) / "labels.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    rows.sort(key=lambda row: len(row["text"]))
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(labels))
    model = PeftModel.from_pretrained(model, adapter).eval()
    right = 0
    for i in range(0, len(rows), _BATCH):
        part = rows[i : i + _BATCH]
        inputs = tokenizer(
            [row["text"] for row in part],
            truncation=True,
            max_length=max_length,
            padding=True,
            return_tensors="pt",
        )
        with torch.inference_mode():
            chosen = model(**inputs).logits.argmax(-1).tolist()
        right += sum(labels[index] == row["label"] for index, row in zip(chosen, part, strict=True))
    return right / len(rows)


if __name__ == "__main__":
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    _, base_folder, adapter_folder, data_file, length = sys.argv
    accuracy = score(base_folder, adapter_folder, Path(data_file), max_length=int(length))
    print(json.dumps({"accuracy": accuracy}))
