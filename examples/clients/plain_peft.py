"""Ask an adapter in plain PEFT: python plain_peft.py BASE ADAPTER rows.csv. Nothing of xgblora is imported."""

import csv
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

OPTIONS = ["games", "science", "sound"]


def main(base: str, adapter: str, rows_file: str) -> None:
    """Print accuracy and mean loss of the options, as ``xgblora eval`` defines them."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
    with Path(rows_file).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    right, loss = 0, 0.0
    for row in rows:
        prompt = tokenizer(f"\n{row['description']}. This is software for")["input_ids"]
        scores = []
        for option in OPTIONS:
            words = tokenizer(f" {option}", add_special_tokens=False)["input_ids"]
            with torch.inference_mode():
                logits = model(torch.tensor([[*prompt, *words]])).logits[0, len(prompt) - 1 : -1]
            scores.append(logits.log_softmax(-1)[range(len(words)), words].mean())
        likely = torch.stack(scores).log_softmax(0)
        label = OPTIONS.index(row["section"])
        right += int(likely.argmax()) == label
        loss -= likely[label].item()
    print(f"plain PEFT: {right} of {len(rows)} right, loss {loss / len(rows):.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
