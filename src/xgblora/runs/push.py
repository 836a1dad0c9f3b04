"""A run's adapter, with its model card, on the Hugging Face hub."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from xgblora.config import flag
from xgblora.errors import XgbloraError, one_line
from xgblora.runs.finished import read_finished


@dataclass
class PushConfig:
    """The flags of ``push``."""

    private: bool = flag(False, "Make a new repository private.")
    message: str = flag("Upload an adapter", "Message of the commit.")


def push(run: Path, repository: str, config: PushConfig) -> str:
    """Upload the adapter of a finished run; the repository is made where it is missing.

    Args:
        run: The run's folder, or an adapter's.
        repository: ``owner/name``.
        config: How.

    Returns:
        The address of the commit.

    Raises:
        XgbloraError: There is no run, nobody is logged in, or the hub refuses.
    """
    folder = read_finished(run).adapter
    api = HfApi()
    try:
        api.create_repo(repository, private=config.private, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=config.message)
    except LocalTokenNotFoundError as error:
        raise XgbloraError("nobody is logged in to the hub: run  hf auth login") from error
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise XgbloraError(f"cannot upload to {repository}: {one_line(error, 300)}") from error
    return str(commit.commit_url)
