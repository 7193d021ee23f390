"""`rlvid data` and `rlvid synth`: check files of samples, make manifests of published sets, and a synthetic set."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlvid.config import SyntheticConfig
from rlvid.errors import UserError
from rlvid.types import Sample

MOVED = "paths that begin with OLD begin with NEW instead"
SHOWN = 3
MOST_EXAMPLES = 60  # on a page


def add_data(command: argparse.ArgumentParser) -> None:
    """Arguments of `rlvid data`."""
    from rlvid.data.dialects import DIALECTS

    commands = command.add_subparsers(dest="data_command", required=True, metavar="convert | check")
    one = commands.add_parser(
        "convert",
        help="make a manifest of a published set, or the reverse",
        description="Make a manifest of a published set, or with --to its items of a manifest. Videos stay where they "
        "are.",
        epilog="dialects:\n" + "\n".join(f"  {name:<14} {dialect.about}" for name, dialect in DIALECTS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    one.set_defaults(run=convert)
    add = one.add_argument
    add("source", type=Path, metavar="IN", help="file of items (JSON lines, JSON array, parquet), or folder")
    add("out", type=Path, metavar="OUT", help="gets manifest.jsonl (items.jsonl with --to) and refused.jsonl")
    way = one.add_mutually_exclusive_group(required=True)
    way.add_argument("--from", dest="dialect", choices=DIALECTS, metavar="DIALECT", help="what IN is; see below")
    way.add_argument("--to", choices=DIALECTS, metavar="DIALECT", help="write the manifest IN as items of this dialect")
    add("--videos", type=Path, metavar="DIR", help="where relative paths start; default: the file's folder")
    add("--map", action="append", default=[], metavar="OLD=NEW", help=MOVED)
    add("--source", dest="only", metavar="NAME", help="annotated or real items of videofeedback alone")
    mismatched = "add this share of rows with a wrong prompt (0)"
    add("--mismatched", type=float, default=0.0, metavar="SHARE", help=mismatched)
    add("--seed", type=int, default=0, metavar="N", help="of the mismatched rows (0)")
    two = commands.add_parser(
        "check",
        help="find what is wrong with manifests and published files",
        description="Read all rows of manifests or published files, count them, and name what is wrong with them. Give "
        "all splits of a set at once: rows that are in two of them are found. Exits with 1 where there is a fault.",
    )
    two.set_defaults(run=check)
    add = two.add_argument
    add("files", type=Path, nargs="+", metavar="FILE", help="JSON lines, JSON array, parquet or table; may be gzipped")
    add("--from", dest="dialect", choices=DIALECTS, metavar="DIALECT", help="of all files; default: by their rows")
    add("--videos", type=Path, metavar="DIR", help="where relative paths start; default: each file's folder")
    add("--map", action="append", default=[], metavar="OLD=NEW", help=MOVED)
    add("--decode", action="store_true", help="read every clip and image")
    add("--page", type=Path, metavar="HTML", help="write what was found, and examples with their frames")
    add("--all", action="store_true", help=f"show all examples of a fault, not {SHOWN}")


def convert(arguments: argparse.Namespace) -> None:
    """Convert, and say what was written."""
    from rlvid.data.dialects import DIALECTS
    from rlvid.data.dialects.conversion import convert, write_as
    from rlvid.data.dialects.dialect import Roots

    a = arguments
    roots = Roots(a.videos, mapped=_mapped(a.map))
    only = None if a.only == "both" else a.only
    if a.to:
        if a.map or a.only or a.mismatched:
            raise UserError("--map, --source and --mismatched have no effect with --to: leave them out")
        made = write_as(a.source, a.out, DIALECTS[a.to], a.videos)
    else:
        made = convert(a.source, a.out, DIALECTS[a.dialect], roots, only, a.mismatched, _seed(a))
    n = made.n_refused
    note = f"; {n} item{'s' * (n > 1)} refused, see {a.out / 'refused.jsonl'}" if n else ""
    print(f"{made.manifest}: {made.n_rows} rows{note}")
    if made.root is not None:
        print(f"its videos are elsewhere: set data.root={made.root}")


def check(arguments: argparse.Namespace) -> int:
    """Check, and say what was found; 1 if anything is wrong."""
    from rlvid.data.check import check
    from rlvid.data.dialects.dialect import Roots

    a = arguments
    report = check(a.files, a.dialect, Roots(a.videos, mapped=_mapped(a.map)), a.decode)
    for name, n in sorted(report.counts.items(), key=lambda item: -item[1]):
        if n:
            print(f"{n:>9,}  {name}")
    faults = {name: found for name, found in report.faults.items() if found}
    for name, found in sorted(faults.items(), key=lambda item: -len(item[1])):
        print(f"\n{len(found):>9,}  {name}")
        shown = found if a.all else found[:SHOWN]
        print("\n".join(f"{'':11}{example}" for example in shown))
        if len(found) > len(shown):
            print(f"{'':11}... and {len(found) - len(shown)} more")
    if a.page:
        _write_page(a.page, a.files, report.counts, faults, report.examples)
        print(f"\n{a.page}: examples with their frames")
    print(json.dumps({"rows": report.counts["rows"], "faults": {name: len(found) for name, found in faults.items()}}))
    return 1 if faults else 0


def _write_page(
    file: Path,
    checked: Sequence[Path],
    counts: Mapping[str, int],
    faults: Mapping[str, Sequence[str]],
    examples: Mapping[str, Sequence[Sample]],
) -> None:
    from rlvid.data.check import frames_of
    from rlvid.errors import BadClip
    from rlvid.files import naming_write_errors
    from rlvid.reporting.report.data import Example, write_data_page

    shown = []
    for kind, sample in [(kind, sample) for kind, samples in examples.items() for sample in samples][:MOST_EXAMPLES]:
        turns = [*((message.role, message.text) for message in sample.messages), ("answer", sample.answer)]
        try:
            shown.append(Example(sample.id, kind, turns, frames_of(sample)))
        except BadClip as error:
            shown.append(Example(sample.id, kind, turns, (), str(error)))
    with naming_write_errors(f"the page {file}", "give --page another place"):
        write_data_page(file, [path.name for path in checked], counts, faults, shown)


def _mapped(texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    parts = [text.partition("=") for text in texts]
    if wrong := ["".join(own) for own in parts if not all(own)]:
        raise UserError(f"--map {wrong[0]}: expected OLD=NEW")
    return tuple((old, new) for old, _, new in parts)


def add_synth(command: argparse.ArgumentParser) -> None:
    """Arguments of `rlvid synth`: an output folder, a seed, and the keys of `data.synthetic`."""
    command.set_defaults(run=synth)
    add = command.add_argument
    add("out_dir", type=Path, metavar="OUT_DIR")
    for key, field in SyntheticConfig.model_fields.items():
        add(f"--{key}", metavar="KIND,KIND" if key == "kinds" else "N", help=field.description)
    add("--seed", type=int, default=0, metavar="N", help="the same seed gives the same files (0)")


def synth(arguments: argparse.Namespace) -> None:
    """Make a synthetic set, and print the files."""
    from rlvid.config.load import config_from_options
    from rlvid.synthetic.moving_shapes import make_synthetic, pairs_of

    options = {key: text for key in SyntheticConfig.model_fields if (text := getattr(arguments, key)) is not None}
    if "kinds" in options:
        options["kinds"] = f"[{options['kinds']}]"
    cfg = config_from_options(SyntheticConfig, options)
    for manifest in make_synthetic(arguments.out_dir, cfg, _seed(arguments)):
        print(manifest, pairs_of(manifest), sep="\n")


def _seed(arguments: argparse.Namespace) -> int:
    if arguments.seed < 0:
        raise UserError(f"--seed must be at least 0, got {arguments.seed}")
    return int(arguments.seed)
