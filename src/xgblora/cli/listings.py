"""The verbs that list what there is."""

from pathlib import Path

from xgblora.cli.output import print_table, set_up_output
from xgblora.cli.parsing import parse
from xgblora.runs.preview import PreviewConfig, rows_table, task_table
from xgblora.tasks import get_task, load_task


def tasks(verb: str, argv: list[str]) -> int:
    """The tasks, or rows of one."""
    set_up_output()
    named = bool(argv) and not argv[0].startswith("-")
    config = parse(PreviewConfig, verb, argv[1:] if named else argv)
    if not named:
        print_table(task_table())
        return 0
    of_file = Path(argv[0]).suffix in (".yaml", ".yml")
    print_table(rows_table(load_task(argv[0]) if of_file else get_task(argv[0]), config))
    return 0
