"""Forward-only fine-tuning of causal language models with LoRA and XGBLoRA.

The names it offers stand in ``__init__.pyi``. Each is imported when it is first used: a command that only prints does
not wait for torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
