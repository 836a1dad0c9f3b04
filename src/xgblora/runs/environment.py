"""What a run was made with: ``environment.json``."""

import platform
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

ENVIRONMENT = "environment.json"
PACKAGES = ("xgblora", "torch", "transformers", "peft")


def environment(device: torch.device) -> dict[str, str]:
    """Versions, processor and memory, in words.

    Args:
        device: Where the run computes.
    """
    return {
        **{name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": str(psutil.cpu_count(logical=False) or psutil.cpu_count()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GB",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def _processor() -> str:
    listed = Path("/proc/cpuinfo")
    if listed.is_file():
        for line in listed.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
