"""Four tasks beside the package's own, from text that comes with package registries.

IMDB40: the first 40 words of 25,000 film reviews, negative or positive, from the wheel that holds Rotten Tomatoes.
DebianSections: one-line descriptions of Debian packages, and which of five sections the package is in; from the
package index of a Debian machine (``apt-cache dumpavail``). One package a source, at most 600 a section.
PackageNames: the same descriptions, and which of four packages of its section each is of; none that names its package.
PackageDepends: what some packages depend on and suggest, and whether one of them depends on another. In half of the
rows it does not, and of these every other one suggests it. One package a source.
"""

import re
import subprocess
from collections.abc import Mapping
from email import message_from_string
from email.message import Message
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


def _listed() -> list[Message]:
    """All packages, by name."""
    listing = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, check=True, encoding="utf-8").stdout
    packages = [message_from_string(block) for block in listing.split("\n\n")]
    return sorted(packages, key=lambda package: package["Package"] or "")


def _source(package: Message) -> str:
    """Name of the source that it is built from."""
    return (package["Source"] or package["Package"] or "").split(" ")[0]


def _packages() -> list[dict[str, Any]]:
    """Name, description and section (its number) of packages, section by section in a fixed random order."""
    sources, texts = set(), set()
    rows: dict[str, list[dict[str, Any]]] = {section: [] for section in SECTIONS}
    for package in _listed():
        section, text = package["Section"], package["Description"]
        source = _source(package)
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


def _related(package: Message, field: str) -> list[str]:
    """Names of a field, without versions and second choices."""
    return [name for part in (package[field] or "").split(",") if (name := re.split(r"[\s:|(]", part.strip())[0])]


def _depends() -> Mapping[str, Dataset]:
    sources, rows = set(), []
    for package in _listed():
        source = _source(package)
        needed, suggested = (_related(package, field) for field in ("Depends", "Suggests"))
        suggested = [name for name in suggested if name not in needed]
        if source not in sources and 2 <= len(needed) <= 6 and 1 <= len(suggested) <= 6 and package["Description"]:
            sources.add(source)
            rows.append({"name": package["Package"], "needed": needed, "suggested": suggested})
    order = torch.randperm(len(rows), generator=generator(0, Stream.SPLIT, len(SECTIONS) + 1)).tolist()[:5000]
    kept = [rows[i] for i in order]
    for number, row in enumerate(kept):
        other = kept[number - 1]["needed"]  # as likely a name as those of the row itself
        strange = [name for name in other if name not in (*row["needed"], *row["suggested"], row["name"])]
        asked = row["needed"] if number % 2 else row["suggested"] if number % 4 or not strange else strange
        row["asked"] = asked[number // 4 % len(asked)]
        row["label"] = number % 2
    return hold_out(Dataset.from_list(kept), 2000)


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

PACKAGE_DEPENDS = Task(
    "PackageDepends",
    "{{ name }} depends on {{ needed | join(', ') }}. It suggests {{ suggested | join(', ') }}.\n"
    "Question: Does {{ name }} depend on {{ asked }}?\nAnswer:",
    ("no", "yes"),
    "label",
    _depends,
)

for task in (IMDB40, DEBIAN_SECTIONS, PACKAGE_NAMES, PACKAGE_DEPENDS):
    TASKS[task.name] = task
