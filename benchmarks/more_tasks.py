"""Six tasks beside the package's own, from text that comes with package registries.

IMDB40: the first 40 words of 25,000 film reviews, negative or positive, from the wheel that holds Rotten Tomatoes.
DebianSections: one-line descriptions of Debian packages, and which of five sections the package is in; from the
package index of a Debian machine (``apt-cache dumpavail``). One package a source, at most 600 a section.
PackageNames: the same descriptions, and which of four packages of its section each is of; none that names its package.
PackageDepends: what some packages depend on and suggest, and whether one of them depends on another. In half of the
rows it does not, and of these every other one suggests it. One package a source.
DebianSynopses: the first 60 words that describe a package, and the line that sums them up, to be written. The texts are
there after ``apt-get update -o Acquire::Languages=en``.
PackageFields: a question about what stands in a package's record, to be answered in its words.
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
from xgblora.tasks.task import Generation, Task

WORDS = 40
SECTIONS = ("games", "sound", "science", "net", "fonts")
MOST_OF_A_SECTION = 600
WRITTEN_ABOUT = 60
MOST_WRITTEN = 6000
ASKED = {
    "Version": "Which version of {} is it?",
    "Maintainer": "Who looks after {}?",
    "Section": "What kind of software is {}?",
    "Homepage": "Where on the web is {}?",
    "Description": "What is {}?",
}
"""Fields of a record, and what asks for them."""


def _imdb() -> Mapping[str, Dataset]:
    return hold_out(reviews("imdb").map(lambda row: {"text": " ".join(row["text"].split()[:WORDS])}), 2000)


def listed() -> list[Message]:
    """All packages, by name."""
    listing = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, check=True, encoding="utf-8").stdout
    packages = [message_from_string(block) for block in listing.split("\n\n")]
    return sorted(packages, key=lambda package: package["Package"] or "")


def source_of(package: Message) -> str:
    """Name of the source that it is built from."""
    return (package["Source"] or package["Package"] or "").split(" ")[0]


def _packages() -> list[dict[str, Any]]:
    """Name, description and section (its number) of packages, section by section in a fixed random order."""
    sources, texts = set(), set()
    rows: dict[str, list[dict[str, Any]]] = {section: [] for section in SECTIONS}
    for package in listed():
        section, text = package["Section"], package["Description"]
        source = source_of(package)
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
    for package in listed():
        source = source_of(package)
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


def _translations() -> list[Message]:
    """English descriptions, by package: the first line sums up the others."""
    listed = ["apt-get", "indextargets", "-o", "Acquire::Languages=en", "--format", "$(FILENAME)"]
    output = subprocess.run([*listed, "Created-By: Translations"], capture_output=True, check=True, encoding="utf-8")
    texts = [
        subprocess.run(["/usr/lib/apt/apt-helper", "cat-file", file], capture_output=True, check=True, encoding="utf-8")
        for file in sorted(output.stdout.split())
    ]
    return [message_from_string(block) for text in texts for block in text.stdout.split("\n\n") if block.strip()]


def translated() -> list[tuple[str, str, str]]:
    """Of each package its name, the line that sums it up, and the text that is summed up; some are there twice."""
    texts = []
    for package in sorted(_translations(), key=lambda package: package["Package"] or ""):
        synopsis, *lines = (package["Description-en"] or "").split("\n")
        whole = " ".join("" if line.strip() == "." else line for line in lines)
        texts.append((package["Package"] or "", synopsis, whole))
    return texts


def _synopses() -> Mapping[str, Dataset]:
    rows: dict[str, str] = {}  # text by synopsis
    texts = set()
    for _, synopsis, whole in translated():
        words = whole.split()
        text = " ".join(words[:WRITTEN_ABOUT])
        if len(words) >= WRITTEN_ABOUT // 3 and text not in texts and synopsis not in rows:
            rows[synopsis] = text
            texts.add(text)
    kept = [{"text": text, "synopsis": synopsis} for synopsis, text in rows.items()]
    order = torch.randperm(len(kept), generator=generator(0, Stream.SPLIT, len(SECTIONS) + 2)).tolist()[:MOST_WRITTEN]
    return hold_out(Dataset.from_list([kept[i] for i in order]), 2000)


def _fields() -> Mapping[str, Dataset]:
    sources, rows = set(), []
    for package in listed():
        if source_of(package) not in sources and all(package[field] for field in ASKED):
            sources.add(source_of(package))
            rows.append({field: " ".join(package[field].split())[:200] for field in ("Package", *ASKED)})
    order = torch.randperm(len(rows), generator=generator(0, Stream.SPLIT, len(SECTIONS) + 3)).tolist()[:MOST_WRITTEN]
    kept = []
    for number, place in enumerate(order):
        field = list(ASKED)[number % len(ASKED)]
        record = "\n".join(f"{name}: {rows[place][name]}" for name in ("Package", *ASKED))
        question = ASKED[field].format(rows[place]["Package"])
        kept.append({"record": record, "question": question, "value": rows[place][field]})
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

DEBIAN_SYNOPSES = Task(
    "DebianSynopses",
    "{{ text }}\nIn one line:",
    (),
    "synopsis",
    _synopses,
    metric="rouge_l",
    classification=False,
    generation=Generation(24),
)

PACKAGE_FIELDS = Task(
    "PackageFields",
    "{{ record }}\nQuestion: {{ question }}\nAnswer:",
    (),
    "value",
    _fields,
    metric="f1",
    classification=False,
    generation=Generation(40),
)

for task in (IMDB40, DEBIAN_SECTIONS, PACKAGE_NAMES, PACKAGE_DEPENDS, DEBIAN_SYNOPSES, PACKAGE_FIELDS):
    TASKS[task.name] = task
