"""SST-2 (Socher et al. 2013) as in GLUE: sentences of film reviews, negative or positive.

Columns ``sentence``, ``label`` (0 negative, 1 positive). The hub's test split has no labels, so its validation split
is what a run is evaluated on. Prompt and options: MeZO, arXiv 2305.17333, table of prompts.
"""

from collections.abc import Mapping

from datasets import Dataset, load_dataset

from xgblora.tasks.task import Task


def _hub() -> Mapping[str, Dataset]:
    splits = load_dataset("nyu-mll/glue", "sst2")
    return {"train": splits["train"], "validation": splits["validation"]}


SST2 = Task(
    name="SST2",
    text_column="sentence",
    label_column="label",
    prompt="{sentence} It was",
    options=(" terrible", " great"),
    source=_hub,
)
