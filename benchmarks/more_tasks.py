"""Two tasks beside the package's own, from text that comes with package registries.

IMDB40: the first 40 words of 25,000 film reviews, negative or positive, from the wheel that holds Rotten Tomatoes.
DebianSections: one-line descriptions of Debian packages, and which of five sections the package is in; from the
package index of a Debian machine (``apt-cache dumpavail``). One package a source, at most 600 a section.
"""

import subprocess
from collections.abc import Mapping
from email import message_from_string
from typing import Any

import torch
from datasets import Dataset

from xgblora.randomness import generator
from xgblora.tasks import TASKS
from xgblora.tasks.rotten_tomatoes import hold_out, reviews
from xgblora.tasks.task import Task

WORDS = 40
SECTIONS = ("games", "sound", "science", "net", "fonts")
MOST_OF_A_SECTION = 600


def _imdb() -> Mapping[str, Dataset]:
    return hold_out(reviews("imdb").map(lambda row: {"text": " ".join(row["text"].split()[:WORDS])}), 2000)


def _sections() -> Mapping[str, Dataset]:
    listing = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, check=True, encoding="utf-8").stdout
    packages = [message_from_string(block) for block in listing.split("\n\n")]
    sources, texts = set(), set()
    rows: dict[str, list[dict[str, Any]]] = {section: [] for section in SECTIONS}
    for package in sorted(packages, key=lambda package: package["Package"] or ""):
        section, text = package["Section"], package["Description"]
        source = (package["Source"] or package["Package"] or "").split(" ")[0]
        if section in rows and text and source not in sources and text not in texts:
            sources.add(source)
            texts.add(text)
            rows[section].append({"text": text, "label": SECTIONS.index(section)})
    kept = []
    for number, those in enumerate(rows.values()):
        order = torch.randperm(len(those), generator=generator(0, "split", number)).tolist()
        kept += [those[i] for i in order[:MOST_OF_A_SECTION]]
    return hold_out(Dataset.from_list(kept), 1000)


IMDB40 = Task("IMDB40", "{{ text | trim }} It was", ("terrible", "great"), "label", _imdb)
DEBIAN_SECTIONS = Task(
    "DebianSections",
    "{{ text | trim }}. This is software for",
    ("games", "sound", "science", "networks", "fonts"),
    "label",
    _sections,
)

for task in (IMDB40, DEBIAN_SECTIONS):
    TASKS[task.name] = task
