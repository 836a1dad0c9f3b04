"""The model of a finished run behind HTTP: a page to try it, and the protocol that OpenAI's clients speak."""
