"""``xgblora serve``: a run behind a port of this machine, until somebody stops it."""

import logging
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xgblora.config import RunConfig, flag
from xgblora.errors import XgbloraError
from xgblora.runs.finished import FinishedRun, UseConfig, open_finished, read_finished
from xgblora.runs.folder import task_of
from xgblora.runs.stages import WORKSPACE
from xgblora.tasks import Chat, load_splits, sample

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
BACKLOG = 1024
"""Connections that wait to be taken."""
EXAMPLES = 8
"""Rows to try on the page."""


@dataclass
class ServeConfig(UseConfig):
    """The flags of ``serve``."""

    port: int = flag(8000, "Port on 127.0.0.1; 0 takes a free one.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.port <= 65535:
            raise XgbloraError(f"--port must be 0 to 65535, got {self.port}")


def serve(folder: Path, config: ServeConfig) -> None:
    """Serve a finished run until SIGINT or SIGTERM; requests in progress are answered first.

    Args:
        folder: Of the run.
        config: Which port, and how many boosters.

    Raises:
        XgbloraError: There is no finished run, its model cannot be had, or the port is in use.
    """
    try:
        import uvicorn

        from xgblora.serving.app import Served, make_app
        from xgblora.serving.desk import Desk
    except ImportError as error:
        raise XgbloraError('serve needs a web server: run  python -m pip install "xgblora[serve]"') from error
    run = read_finished(folder)
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((HOST, config.port))
            listening.listen(BACKLOG)  # from now on requests wait, and another server is refused
        except OSError as error:
            raise XgbloraError(f"--port {config.port} cannot be had ({error.strerror}): choose another one") from error
        count = run.boosters if config.boosters is None else config.boosters
        examples = example_rows(run)
        desk = Desk(lambda: open_finished(run, config))
        try:
            app = make_app(Served(folder.resolve().name, run.task, count, examples), desk)
            server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=30))
            logger.info("Serving %s on http://%s:%d (Ctrl-C stops it)", folder, HOST, listening.getsockname()[1])
            server.run(sockets=[listening])
        finally:
            desk.close()


def example_rows(run: FinishedRun) -> list[dict[str, Any]]:
    """Some dev rows of a run, with the columns that are asked; none where its data is no longer there."""
    if isinstance(run.task, Chat) or not run.settings:
        return []
    settings = {name: run.settings[name] for name in WORKSPACE if name in run.settings}
    asked = RunConfig(output_dir=str(run.folder), **settings)
    try:
        task = task_of(asked)
        rows = sample(
            load_splits(task, asked.data_dir),
            asked.train_rows,
            task.num_dev if asked.num_dev is None else asked.num_dev,
            train_set_seed=asked.train_set_seed,
        ).dev
    except XgbloraError as error:
        logger.info("No rows to try on the page: %s", error)
        return []
    return [{column: row[column] for column in run.task.asking} for row in rows.select(range(min(EXAMPLES, len(rows))))]
