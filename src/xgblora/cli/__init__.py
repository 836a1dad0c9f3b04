"""The command line: ``xgblora VERB [--flag value ...]``. Nothing heavy is imported until there is work to do."""

import sys
from collections.abc import Sequence

from xgblora import group
from xgblora.cli.pages import help_page, overview
from xgblora.cli.verbs import VERBS
from xgblora.errors import Interrupted, XgbloraError, did_you_mean, within_memory


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out one verb.

    Args:
        argv: Verb and flags; by default those of the process.

    Returns:
        The exit code: 0 done, 1 ``check`` failed, 2 the user's error (one line on stderr), 128 + its number for a
        signal.
    """
    try:
        return _carry_out(list(sys.argv[1:] if argv is None else argv) or ["--help"])
    finally:
        group.leave()


def _carry_out(argv: list[str]) -> int:
    verb, *rest = argv
    if verb in ("-h", "--help", "help"):
        return _print(help_page(rest[0]) if rest and rest[0] in VERBS else overview())
    if verb == "--version":
        return _print(_version())
    try:
        if verb not in VERBS:
            raise XgbloraError(f"unknown verb {verb!r}{did_you_mean(verb, VERBS)} (xgblora --help lists the verbs)")
        if "-h" in rest or "--help" in rest:
            return _print(help_page(verb))
        group.join()
        if group.size() > 1 and not VERBS[verb].shared:
            raise XgbloraError(f"xgblora {verb} runs in one process: start it without torchrun")
        if "--help-all" in rest or "--help_all" in rest:
            rest = ["--help"]  # argparse's, of every flag
        with within_memory(
            f"in xgblora {verb}", "smaller batches, --dtype bfloat16 or a smaller model; finished work is kept"
        ):
            return VERBS[verb].function()(verb, rest)
    except XgbloraError as error:
        return _fail(str(error))
    except BrokenPipeError:  # whoever read what is printed has seen enough
        sys.stdout = None
        return 0
    except OSError as error:  # a full disk, a read-only folder
        return _fail(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
    except Interrupted as stop:
        again = "the same command" + (" with --skip_completed" if verb in ("compare", "boost") else "")
        if group.speaks():
            print(f"{stop}; {again} goes on at the last checkpoint", file=sys.stderr)
        return stop.code
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        return 130


def _print(text: str) -> int:
    print(text)
    return 0


def _fail(message: str) -> int:
    if group.speaks():
        print(f"error: {message}", file=sys.stderr)
    return 2


def _version() -> str:
    from importlib.metadata import version

    return f"xgblora {version('xgblora')}"
