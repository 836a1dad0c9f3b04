"""Text that a model is not trained on: its loss shows what is forgotten, and boosters can be kept off it."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from xgblora.base import Base
from xgblora.data.batch import Example
from xgblora.errors import XgbloraError
from xgblora.learn.evaluate import by_tokens
from xgblora.learn.generation import Writer
from xgblora.learn.losses import TextLoss
from xgblora.randomness import Stream, generator
from xgblora.tasks import Generation

OWN_TEXTS, OWN_WORDS = 64, 64
"""How many texts a model writes by itself, and of how many words each at most."""


def read_texts(path: Path) -> list[str]:
    """The texts of a file, one a line; blank lines do not count.

    Raises:
        XgbloraError: It cannot be read, or holds no text.
    """
    try:
        texts = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise XgbloraError(f"cannot read {path}: {reason}") from error
    if not texts:
        raise XgbloraError(f"{path} holds no text: a text a line is wanted")
    return texts


def encode_texts(texts: Sequence[str], tokenizer: Tokenizer, max_length: int) -> list[Example]:
    """Texts as examples whose tokens are all predicted but for the first; longer ones end at ``max_length`` tokens.

    Raises:
        XgbloraError: None has two tokens.
    """
    ids = [row[:max_length] for row in tokenizer(list(texts))["input_ids"]]
    rows = [Example(row[:-1], [row[-1:]], 0, score_prompt=True) for row in ids if len(row) > 1]
    if not rows:
        raise XgbloraError("the lines have one token each: nothing in them can be predicted")
    return rows


def own_texts(base: Base, tokenizer: Tokenizer, seed: int) -> list[Example]:
    """Texts that a model writes by itself, each after a random word (Liu et al. 2023, arXiv 2305.17888).

    Args:
        base: The model as it is.
        tokenizer: Its own.
        seed: Of what is drawn.

    Returns:
        OWN_TEXTS examples as :func:`encode_texts` gives them.
    """
    words = min(len(tokenizer), base.vocabulary)
    ordinary = torch.tensor(sorted(set(range(words)) - set(tokenizer.all_special_ids)))
    draw = generator(seed, Stream.OWN_TEXT)
    first = ordinary[torch.randint(len(ordinary), (OWN_TEXTS,), generator=draw)].tolist()
    length = min(OWN_WORDS, (base.context_length or OWN_WORDS + 1) - 1)
    writer = Writer(tokenizer, Generation(length, stop=""))
    with torch.random.fork_rng():
        torch.manual_seed(draw.initial_seed())
        written = writer.continuations(base, [[word] for word in first], draws=1)
    return [
        Example([word, *ids[:-1]], [ids[-1:]], 0, score_prompt=True)
        for word, (ids,) in zip(first, written, strict=True)
    ]


def token_loss(base: Base, texts: Sequence[Example], batch_size: int) -> float:
    """Mean negative log-probability of a token, in nats, over all that are predicted.

    Args:
        base: With its adapters as they are.
        texts: From :func:`encode_texts`.
        batch_size: A batch holds as many tokens as so many texts of average length.

    Examples:
        >>> from xgblora.base.load import tiny_model
        >>> round(token_loss(Base(tiny_model()), [Example([1, 2], [[3]], 0, score_prompt=True)], 8), 1)
        4.6
    """
    total = 0.0
    with base.without_gradients():
        batches = [base.batch([texts[i] for i in group]) for group in by_tokens(texts, batch_size)]
        for batch, losses in zip(batches, TextLoss().all_losses(base, batches), strict=True):
            predicted = torch.tensor([len(text.prompt) for text in batch.examples])
            total += (losses.double().cpu() * predicted).sum().item()
    return total / sum(len(text.prompt) for text in texts)
