"""Three tasks beside the package's own, from text that comes with package registries.

IMDB40: the first 40 words of 25,000 film reviews, negative or positive, from the wheel that holds Rotten Tomatoes.
DebianSections: one-line descriptions of Debian packages, and which of five sections the package is in; from the
package index of a Debian machine (``apt-cache dumpavail``). One package a source, at most 600 a section.
PackageNames: the same descriptions, and which of four packages of its section each is of; none that names its package.
"""

import re
import subprocess
from collections.abc import Mapping
from email import message_from_string
from typing import Any

import torch
from datasets import Dataset

from xgblora.randomness import Stream, generator
from xgblora.tasks import TASKS
from xgblora.tasks.rotten_tomatoes import hold_out, reviews
from xgblora.tasks.task import Task

WORDS = 40
SECTIONS = ("games", "sound", "science", "net", "fonts")
MOST_OF_A_SECTION = 600


def _imdb() -> Mapping[str, Dataset]:
    return hold_out(reviews("imdb").map(lambda row: {"text": " ".join(row["text"].split()[:WORDS])}), 2000)


def _packages() -> list[dict[str, Any]]:
    """Name, description and section (its number) of packages, section by section in a fixed random order."""
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
            rows[section].append({"name": package["Package"], "text": text, "label": SECTIONS.index(section)})
    kept = []
    for number, those in enumerate(rows.values()):
        order = torch.randperm(len(those), generator=generator(0, Stream.SPLIT, number)).tolist()
        kept += [those[i] for i in order[:MOST_OF_A_SECTION]]
    return kept


def _sections() -> Mapping[str, Dataset]:
    return hold_out(Dataset.from_list(_packages()), 1000)


def _names() -> Mapping[str, Dataset]:
    rows = [row for row in _packages() if not _named(row)]
    for number, row in enumerate(rows):
        others = [other["name"] for other in rows if other["label"] == row["label"] and other is not row]
        draw = generator(0, Stream.SPLIT, len(SECTIONS), number)
        shown = [row["name"], *(others[i] for i in torch.randperm(len(others), generator=draw).tolist()[:3])]
        row["names"] = [shown[i] for i in torch.randperm(4, generator=draw).tolist()]
    return hold_out(Dataset.from_list(rows), 1000)


def _named(row: Mapping[str, Any]) -> bool:
    """Whether a part of the name that is a word stands in the description."""
    return bool(set(re.findall(r"[a-z]{3,}", row["name"])) & set(re.findall(r"[a-z]{3,}", row["text"].lower())))


IMDB40 = Task("IMDB40", "{{ text | trim }} It was", ("terrible", "great"), "label", _imdb)
DEBIAN_SECTIONS = Task(
    "DebianSections",
    "{{ text | trim }}. This is software for",
    ("games", "sound", "science", "networks", "fonts"),
    "label",
    _sections,
)

PACKAGE_NAMES = Task(
    "PackageNames",
    "{{ text | trim }}. The name of this software is",
    "names",
    "name",
    _names,
    num_dev=300,
    null_prompt="The name of this software is",
)

for task in (IMDB40, DEBIAN_SECTIONS, PACKAGE_NAMES):
    TASKS[task.name] = task
