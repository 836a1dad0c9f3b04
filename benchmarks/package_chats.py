"""Conversations about Debian packages, as a task file and rows of its own.

    python benchmarks/package_chats.py FOLDER
    xgblora train --task_file FOLDER/chats.yaml --recipe boost ...

A user shows what a package is about and asks for a line on it, then who looks after it and where it is filed; an
assistant answers in the words of its record. The texts are there after ``apt-get update -o Acquire::Languages=en``.
"""

import argparse
import json
from pathlib import Path

import torch
from more_tasks import MOST_WRITTEN, WRITTEN_ABOUT, listed, source_of, translated

from xgblora.randomness import Stream, generator

TASK = """\
chat: messages
data: {train: train.jsonl, test: test.jsonl}
metric: rouge_l
generate: {max_new_tokens: 40}
"""
TEST_ROWS = 1000


def conversations() -> list[list[dict[str, str]]]:
    """One of each source, in a fixed random order."""
    texts = {name: (synopsis, text) for name, synopsis, text in translated()}
    sources, kept = set(), []
    for package in listed():
        name, source = package["Package"], source_of(package)
        synopsis, text = texts.get(name, ("", ""))
        if source in sources or len(text.split()) < WRITTEN_ABOUT // 3 or not package["Maintainer"]:
            continue
        sources.add(source)
        asked = (
            f"A package called {name}: {' '.join(text.split()[:WRITTEN_ABOUT])}\nIts record says: {package['Section']}"
        )
        asked += f", {package['Maintainer']}, version {package['Version']}.\nWhat is it, in a line?"
        turns = [asked, synopsis, "Who looks after it, and where is it filed?"]
        turns.append(f"{package['Maintainer'].split('<')[0].strip()}, under {package['Section']}.")
        kept.append([{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)])
    order = torch.randperm(len(kept), generator=generator(0, Stream.SPLIT, 9)).tolist()[:MOST_WRITTEN]
    return [kept[place] for place in order]


def main() -> None:
    """Write the task file and its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"messages": messages}) for messages in conversations()]
    for name, lines in (("test", rows[:TEST_ROWS]), ("train", rows[TEST_ROWS:])):
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "chats.yaml").write_text(TASK, encoding="utf-8")
    print(f"{len(rows):,} conversations in {folder}")


if __name__ == "__main__":
    main()
