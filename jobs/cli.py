"""The `rlvid` command: jobs, synthetic data, reports, a check of the installation.

Reads arguments, runs one thing, turns errors into exit codes.

Exit codes: 0 done; 1 a fault in rlvid or an engine (traceback in the run's `logs/error.log`, one line on stderr);
2 something that the message on stderr says how to fix; 130 interrupted.

Heavy modules are imported by the command that needs them: `rlvid --help` must not wait for torch.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import importlib.metadata
import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

from jobs import data
from jobs.specs import JOBS
from rlvid.config.benchmarks import KINDS
from rlvid.errors import UserError

ALIASES = {"eval compare": "compare", "data audit": "audit"}  # two words for one command
CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)

_OVERRIDES_HELP = """\
overrides:
  key.sub=value sets one key, the value is YAML: train.steps=200, rollout.replicas=2, 'data.suffix="Answer: A or B."'
  lists by index or as a whole:                  rewards.0.weight=2, train.betas=[0.9, 0.99]
  a whole section, which replaces the file's:    model.tiny={layers: 2}
Paths, in the file too, are relative to the current directory. Every key and its default: docs/configuration.md.
A job that is started again with the same run folder resumes from the newest checkpoint."""

_FLAGS = {
    "only_data": "build the preference pairs of the first iteration and train on none",
    "only_rollouts": "generate and score, train nothing",
    "dry_run": "check everything, print the resolved config and the placement, start nothing",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: `sys.argv`) and return the exit code."""
    for stream in (sys.stdout, sys.stderr):  # a locale without the letters of a config or a path must not end a job
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="backslashreplace")
    words = list(sys.argv[1:] if argv is None else argv)
    alias = ALIASES.get(" ".join(words[:2]))
    arguments = _parse([alias, *words[2:]] if alias else words)
    try:
        return arguments.run(arguments) or 0
    except UserError as error:
        print(f"rlvid: error: {_original(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:
        print(f"rlvid: interrupted{_next_time(interruption, arguments.folder)}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `rlvid ... | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
            print(f"rlvid: error: cannot write {error.filename or 'a file'}: {error.strerror}", file=sys.stderr)
            return 2
        _report_fault(error, arguments.folder)
        return 1
    return 0


def job_main(job: str) -> NoReturn:
    """What `python -m jobs.<job> --config CONFIG.yaml key.sub=value ...` does: the same as `rlvid <job>`."""
    sys.exit(main([job, *sys.argv[1:]]))


# --- arguments --------------------------------------------------------------------------------------------------------


def _parse(argv: list[str]) -> argparse.Namespace:
    """The arguments; `run` is the function of the command, `folder` the run folder, once it is known."""
    about = "Align video-language models by reinforcement learning, on Ray."
    parser = argparse.ArgumentParser("rlvid", description=about)
    parser.set_defaults(folder=None)
    version = next((found.version for found in importlib.metadata.distributions(name="rlvid")), "(not installed)")
    parser.add_argument("--version", action="version", version=f"rlvid {version}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, job in JOBS.items():
        flags = {flag: f"--{flag.replace('_', '-')}" for flag in (*job.flags, "dry_run")}
        command = commands.add_parser(
            name,
            help=job.help,
            description=f"{job.help[0].upper()}{job.help[1:]}.",
            usage=" ".join([f"rlvid {name} CONFIG.yaml [key.sub=value ...]", *map("[{}]".format, flags.values())]),
            epilog=_OVERRIDES_HELP,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=_run_job)
        command.add_argument("words", nargs="*", metavar="CONFIG.yaml key.sub=value", help=argparse.SUPPRESS)
        command.add_argument("--config", type=Path, metavar="CONFIG.yaml", help="the same as the first argument")
        for flag, option in flags.items():
            command.add_argument(option, action="store_true", help=_FLAGS[flag])
    data.add_synth(commands.add_parser("synth", help="make a synthetic set of clips with exact questions and answers"))
    data.add_data(commands.add_parser("data", help="make a manifest of a published set"))
    _add_score(commands.add_parser("score", help="score videos by a trained reward model, and rank them"))
    _add_compare(commands.add_parser("compare", help="the same as rlvid eval compare: evaluations against each other"))
    replay = commands.add_parser("replay", help="train steps of a run again from their dumps, and say what differs")
    replay.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    replay.add_argument("step", type=int, metavar="STEP")
    replay.add_argument("--count", type=int, default=1, metavar="N", help="steps in a row, 1")
    replay.set_defaults(run=_main_of("jobs.replay"))
    merge = commands.add_parser("merge", help="add an adapter to its base: one checkpoint for transformers and vLLM")
    merge.add_argument(
        "adapter", type=Path, metavar="ADAPTER", help="folder of an adapter, or of a run with model.lora"
    )
    merge.add_argument("--out", type=Path, required=True, metavar="DIR")
    merge.add_argument("--base", type=Path, metavar="DIR", help="checkpoint folder (the one that the adapter names)")
    merge.set_defaults(run=_main_of("jobs.merge"))
    report = commands.add_parser("report", help="write report.html of a run folder, finished or not")
    report.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    report.set_defaults(run=_write_report)
    doctor = commands.add_parser("doctor", help="say what is installed, what works, and how to fix what does not")
    doctor.add_argument("--json", action="store_true", help="print one JSON list of findings")
    doctor.set_defaults(run=_main_of("jobs.doctor"))

    arguments, rest = parser.parse_known_args(argv)
    # argparse stops collecting words at the first option; those behind it are words too
    unknown = [word for word in rest if word.startswith("-") or arguments.command not in JOBS]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if arguments.command in JOBS:
        words = [*arguments.words, *rest]
        kind = words.pop(0) if arguments.command == "eval" and words[:1] and words[0] in KINDS else None
        if arguments.config is None:
            if not words or ("=" in words[0] and not Path(words[0]).exists()):
                parser.error(f"{arguments.command}: CONFIG.yaml comes first, for example jobs/configs/demo.yaml")
            arguments.config = Path(words.pop(0))
        arguments.overrides = [*([f"benchmark.kind={kind}"] if kind else []), *words]
    return arguments


def _add_compare(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("runs", type=Path, nargs="*", metavar="RUN", help="run folders of rlvid eval; the first is compared with")
    columns = "source, model, setting, one for each task, reported_avg; a row test_size"
    add("--published", type=Path, metavar="TSV", help=f"a paper's table with the columns {columns}")
    add("--row", metavar="MODEL", help="compare this model's rows of the table with those of other sources")
    command.set_defaults(run=_main_of("jobs.compare"))


def _add_score(command: argparse.ArgumentParser) -> None:
    add, cache = command.add_argument, Path("~/.cache/rlvid/frames")
    add("model", type=Path, metavar="MODEL", help="folder `policy` of a run of rlvid reward-model")
    add("videos", type=Path, nargs="+", metavar="VIDEO")
    add("--prompt", required=True, metavar="TEXT", help="what the videos were generated from")
    responses = "to score (Bradley-Terry models); repeatable"
    add("--response", action="append", default=[], metavar="TEXT", help=responses)
    add("--out", type=Path, default=Path("scores.jsonl"), metavar="FILE", help="scores.jsonl")
    add("--cache-dir", type=Path, default=cache, metavar="DIR", help=f"decoded frames ({cache})")
    command.set_defaults(run=_main_of("jobs.score"))


# --- commands ---------------------------------------------------------------------------------------------------------


def _run_job(arguments: argparse.Namespace) -> None:
    from rlvid.config.keys import check_paths
    from rlvid.config.load import dump_config, load_config

    job, config, overrides = JOBS[arguments.command], arguments.config, arguments.overrides
    if job.of_run is not None and config.is_dir():
        config, of_run = job.of_run(config)
        overrides = [*of_run, *overrides]
    cfg = load_config(job.config, config, overrides)
    check_paths(cfg)
    if arguments.dry_run:
        about = job.describe(cfg, job)
        print(dump_config(cfg), *(f"# {line}" for line in about), sep="\n")
        return
    arguments.folder = job.folder(cfg)
    result = job.run(cfg, **{flag: getattr(arguments, flag) for flag in job.flags})

    from rlvid.reporting.console import Console

    Console().result(result)


def _main_of(module: str) -> Callable[[argparse.Namespace], None]:
    def run(arguments: argparse.Namespace) -> None:
        importlib.import_module(module).main(arguments)

    return run


def _write_report(arguments: argparse.Namespace) -> None:
    from rlvid.reporting.report.page import write_report
    from rlvid.reporting.run_folder import RunFolder

    print(write_report(RunFolder(arguments.run_dir)))


# --- errors -----------------------------------------------------------------------------------------------------------


def _original(error: BaseException) -> BaseException:
    """Ray raises an error from a worker as a subclass of its type that prints the worker's traceback."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


def _next_time(interruption: KeyboardInterrupt, folder: Path | None) -> str:
    """What the same command would do, for the message of an interruption."""
    if folder is None:
        return ""
    from jobs.run import how_to_resume

    return f"; the same command {str(interruption) or how_to_resume(folder)}"


def _report_fault(error: Exception, folder: Path | None) -> None:
    """Traceback to the run's log file, or to stderr where there is none yet; one line on stderr in any case."""
    place = ""
    if folder is not None and (folder / "config.yaml").is_file():
        log = folder / "logs" / "error.log"
        with suppress(OSError):  # the disk is full, for example: the traceback goes to stderr
            log.parent.mkdir(exist_ok=True)
            with log.open("a", encoding="utf-8") as file:
                file.write(f"--- {datetime.now(UTC).isoformat(timespec='seconds')}\n")
                traceback.print_exception(error, file=file)
            place = f" (traceback in {log})"
    if not place:
        traceback.print_exception(error)
    original = _original(error)
    first_line = next(iter(str(original).strip().splitlines()), "")
    print(f"rlvid: failed: {type(original).__name__}: {first_line}{place}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
