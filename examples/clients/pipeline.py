"""Let transformers' pipeline choose the next word, without xgblora: python pipeline.py MERGED rows.csv."""

import csv
import sys
from pathlib import Path

import torch
from transformers import pipeline

OPTIONS = ["games", "science", "sound"]


def main(model: str, rows_file: str) -> None:
    """Print how often the option that the merged model writes is the right one. All options are one token."""
    write = pipeline("text-generation", model=model, dtype=torch.float32)
    words = [write.tokenizer(f" {option}", add_special_tokens=False)["input_ids"][0] for option in OPTIONS]
    settings = {"max_new_tokens": 1, "do_sample": False, "prefix_allowed_tokens_fn": lambda batch, ids: words}
    with Path(rows_file).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    right = 0
    for row in rows:
        prompt = f"\n{row['description']}. This is software for"
        (answer,) = write(prompt, return_full_text=False, **settings)
        right += answer["generated_text"].strip() == row["section"]
    print(f"pipeline: {right} of {len(rows)} right")


if __name__ == "__main__":
    main(*sys.argv[1:])
