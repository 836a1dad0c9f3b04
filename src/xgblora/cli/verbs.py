"""The verbs: what each is for, and the function that carries it out, imported when it is called."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

Handler = Callable[[str, list[str]], int]
"""(verb, arguments after it) -> exit code."""


@dataclass(frozen=True)
class Verb:
    """A verb of the command line."""

    group: str
    """Under which heading ``--help`` lists it."""
    summary: str
    home: str
    """Its module in this package."""
    name: str
    """Of its function there."""
    shared: bool = False
    """Several processes may share it."""

    def function(self) -> Handler:
        """The function that carries the verb out."""
        handler: Handler = getattr(importlib.import_module(f"xgblora.cli.{self.home}"), self.name)
        return handler


VERBS = {
    "demo": Verb("Start here", "a small model learns a real task on this machine, in minutes", "new_runs", "demo"),
    "tasks": Verb("Start here", "the tasks, or rows of one as a model sees them", "listings", "tasks"),
    "train": Verb("Train", "one run: one model, one task, one method, one seed", "new_runs", "train", True),
    "compare": Verb("Train", "several methods over seeds, with figures and a summary", "new_runs", "compare", True),
    "boost": Verb("Train", "XGBLoRA over several seeds, evaluated at each merge", "new_runs", "boost", True),
    "tune": Verb("Train", "the flags with the lowest dev loss, by trials", "new_runs", "tune"),
    "check": Verb("Train", "what the flags mean, and whether memory suffices; trains nothing", "new_runs", "check"),
    "predict": Verb("Use a run", "answers for new texts, with how sure they are", "asking", "predict", True),
    "eval": Verb("Use a run", "accuracy, F1, confusion and calibration on labelled rows", "asking", "evaluate", True),
    "chat": Verb("Use a run", "a conversation with a model that learned conversations", "asking", "chat"),
    "serve": Verb("Use a run", "a page to try a run, and a server for OpenAI's clients", "asking", "serve"),
    "report": Verb("Use a run", "a page with charts of a run, or of a comparison", "finished_runs", "report"),
    "stages": Verb("Use a run", "how good a run is with its first 0, 1, ... boosters", "finished_runs", "stages", True),
    "replay": Verb("Use a run", "the adapter after any step, from the log of losses alone", "finished_runs", "replay"),
    "export": Verb("Use a run", "a run for PEFT, as a whole model, or for llama.cpp", "finished_runs", "export"),
    "push": Verb("Use a run", "a run's adapter, with its model card, to the Hugging Face hub", "finished_runs", "push"),
    "completion": Verb("More", "the script that lets a shell complete all this", "completion", "completion"),
}
