"""Records of any source into a prepared data set, with a report of what became of every event."""

import re
import time
from collections.abc import Callable, Sequence
from operator import attrgetter
from pathlib import Path

from behrt_jax.config.data import PrepareConfig
from behrt_jax.data.event_rules import told_without_effect
from behrt_jax.data.facts import FACT_WITH_TIME
from behrt_jax.data.splits import told_split
from behrt_jax.errors import InputError
from behrt_jax.files import JsonObject, check_new_folder
from behrt_jax.records.meds_export import export_meds
from behrt_jax.records.prepare.manifest import read_like
from behrt_jax.records.prepare.pipeline import prepare
from behrt_jax.records.sources.meds import open_meds
from behrt_jax.records.sources.omop import open_omop
from behrt_jax.records.sources.source import Source
from behrt_jax.records.sources.synthea import open_synthea
from behrt_jax.records.sources.table import WithBirths, open_table
from behrt_jax.tracking.console import Console, open_console

SOURCES: dict[str, Callable[[Path, PrepareConfig], Source]] = {
    "meds": lambda path, config: open_meds(
        path, config.visit_column, config.splits.names, needs_train=config.like is None
    ),
    "omop": lambda path, config: open_omop(path, config.ancestors, config.omop.skip),
    "synthea": lambda path, config: open_synthea(path, config.synthea.skip),
    "table": lambda path, config: open_table(path, config.table),
}
"""Kinds of sources: its name in the configuration -> how it is opened, with the options of its own."""
OWN_OPTIONS = {
    "visit_column": "meds",
    "splits.names": "meds",
    "ancestors": "omop",
    "omop.skip": "omop",
    "synthea.skip": "synthea",
    "table": "table",
}
"""Option -> the one kind of source that it is of."""
SECONDS_BETWEEN_LINES = 5.0
"""Between two lines of progress."""


def prepare_records(config: PrepareConfig) -> JsonObject:
    """Read the source, write the prepared data set (and, on request, MEDS), and say what came of it.

    Returns:
        The manifest; with ``config.shard`` the counts of that shard.

    Raises:
        InputError: wrong options, or records that cannot be read; nothing is left half-written.
    """
    if config.output is None and not config.dry_run:
        raise InputError("--output is missing: give a folder to write, or add --dry_run.")
    if config.to_meds is not None and (config.shard is not None or config.merge):
        raise InputError("--to_meds reads the source whole: give it without --shard and --merge.")
    if config.to_meds is not None:
        check_new_folder(config.to_meds, "--to_meds")
    config, like = read_like(config)
    source = open_source(config)
    with open_console() as console:
        if like is not None:
            rows = f"{len(like.vocabulary):,} rows"
            console.log(f"Preparing like {config.like}: its vocabulary ({rows}) and rules.")
            if like.preparation.options.get("ancestors") and config.source != "omop":
                console.log(
                    "There concepts were replaced by their ancestors, which only an OMOP source can do: the "
                    "codes must be those ancestors already."
                )
        console.log(f"Reading {source.name} data: {len(source.files())} files in {source.units()} parts.")
        if source.splits():
            for option in ("tuning_fraction", "held_out_fraction", "seed", "splits.exact"):
                if attrgetter(option)(config) != attrgetter(option)(PrepareConfig()):
                    console.log(f"Warning: the source has splits of its own, so --{option} has no effect.")

        shown = time.monotonic()

        def progress(stage: str, done: int, total: int) -> None:
            nonlocal shown
            if time.monotonic() - shown >= SECONDS_BETWEEN_LINES:
                shown = time.monotonic()
                console.log(f"{stage}: {done} of {total} parts")

        manifest = prepare(source, config, progress)
        if config.shard is not None:
            console.log(f"Part {config.shard} is read. When all parts are, run once more with --merge.")
            return manifest
        report(console, manifest)
        if config.dry_run:
            console.log("Dry run: nothing was written.")
        elif config.output is not None:
            files = [path for path in sorted(config.output.rglob("*")) if path.is_file()]
            state = "Up to date, left as it was" if manifest["up_to_date"] else "Written"
            console.log(f"{state}: {config.output}: {_named(files, config.output)}")
        if config.to_meds is not None and not config.dry_run:
            files = export_meds(source, config, config.to_meds)
            console.log(f"Written as MEDS: {config.to_meds}: {_named(files, config.to_meds)}")
    return manifest


def open_source(config: PrepareConfig) -> Source:
    """Open the source of the configuration: its files are found, their heads checked, no event is read yet.

    Raises:
        InputError: there is no input, it is not of that source, or an option is of another.
    """
    for option, source in OWN_OPTIONS.items():
        given, default = (attrgetter(option)(one) for one in (config, PrepareConfig()))
        if given != default and source != config.source:
            raise InputError(
                f"--{option} is of --source {source} and has no effect on {config.source}: leave it out."
            )
    if config.input is None:
        raise InputError("--input is missing: give the folder (or, for a table, the file) to read.")
    path = Path(config.input).expanduser()
    if not path.exists():
        raise InputError(f"--input: {path} does not exist.")
    source = SOURCES[config.source](path, config)
    if config.births is None and not config.birth_codes:
        return source
    return WithBirths(source, config.births, config.birth_codes)


def report(console: Console, manifest: JsonObject) -> None:
    """Show what came in, what was kept, what was lost and why, lengths, padding and the top codes."""
    events = manifest["events"]
    kept = events["read"] - sum(events["dropped"].values())
    console.table(
        "Events",
        ("rule", "events"),
        [
            ("read", events["read"]),
            *((f"dropped: {rule}", count) for rule, count in events["dropped"].items()),
            ("kept", kept),
            *((f"changed: {rule}", count) for rule, count in events["changed"].items()),
        ],
    )
    if times := manifest.get("times"):
        console.log(f"Events from {times['first']} to {times['last']}, median {times['median']}.")
        if times["median"][:4] == times["last"][:4] == "1970":
            console.log(
                "Warning: the events end in 1970, so that the numbers of the time column are most likely of "
                "another unit than its type says (seconds or milliseconds); doctor --data tells more."
            )
    if unborn := events["dropped"].get("no birth"):
        console.log(
            f"{unborn:,} events are of subjects without a birth: --births FILE, --birth_codes or "
            "--without_birth keep them."
        )
    for delay, codes in manifest["delayed_codes"].items():
        matched = f"{codes:,} codes" if codes else "no code of the vocabulary, so that it has no effect"
        console.log(f"Delay {delay}: {matched}.")
    _report_options(console, manifest)
    splits = manifest["splits"]
    like = "like" in manifest["options"]
    for name in (name for name, part in splits.items() if not part["subjects"] and not like):
        console.log(f"Warning: the {name} split has no subject with events.")
    _report_facts(console, manifest)
    console.table(
        f"Subjects ({manifest['vocabulary']['rows']:,} vocabulary rows)",
        ("split", "subjects", "without events", "events", "codes", "visits", "p50", "p90", "p99", "max"),
        [
            (name, part["subjects"], manifest["subjects_without_events"][name], part["events"],
             part["codes"], part["visits"],
             *(part["lengths"].get(key) for key in ("p50", "p90", "p99", "max")))
            for name, part in splits.items()
        ],
    )  # fmt: skip
    if padding := splits["train"]["padding"]:
        console.table(
            "Padding of the train split",
            ("row length", "a sequence a row", "packed"),
            [
                (length, f"{shares['padded']:.1%}", f"{shares['packed']:.1%}")
                for length, shares in padding.items()
            ],
        )
    console.table(
        "Most frequent codes",
        ("code", "events", "description"),
        [(row["code"], row["events"], row["description"]) for row in manifest["top_codes"][:10]],
    )
    if like and (unknown := manifest["unknown_codes"]):
        console.table(
            f"Codes that the vocabulary does not know, [UNK] ({manifest['distinct_unknown_codes']:,})",
            ("code", "events"),
            [(row["code"], row["events"]) for row in unknown[:20]],
        )


def _report_facts(console: Console, manifest: JsonObject) -> None:
    """What is known of subjects beside their events."""
    shown = ("facts", "subjects", "several", "unknown", "deaths", "births_without_events")
    console.table(
        "Facts about subjects (tokens for models with model.fact_tokens alone)",
        ("split", "static facts", "subjects with any", "with several of a kind", "rare, [UNK]", "deaths",
         "births of subjects without events"),
        [(name, *map(counts.get, shown)) for name, counts in manifest["subject_facts"].items()],
    )  # fmt: skip
    rows = manifest.get("fact_rows", {})
    if top := manifest.get("top_facts"):
        console.table(
            f"Most frequent static facts ({len(rows):,} with a row of the vocabulary)",
            ("code", "subjects"),
            [(row["code"], row["subjects"]) for row in top[:10]],
        )
    if timed := manifest["events"]["dropped"].get(FACT_WITH_TIME):
        console.log(
            f"{timed:,} events match --static_codes, but have a time: they are no facts, and no events "
            "unless --codes select them."
        )


def _report_options(console: Console, manifest: JsonObject) -> None:
    """How subjects were dealt out, and options that had no effect."""
    options = manifest["options"]
    if options.get("held_out_fraction") == 1:
        console.log("The source has no splits of its own: all its subjects are held_out.")
    elif "tuning_fraction" in options:
        fractions = (options[name] for name in ("tuning_fraction", "held_out_fraction", "seed"))
        console.log(told_split(*fractions, exact="exact_splits" in options))
    idle = manifest.get("without_effect", {})
    for warning in told_without_effect(idle, "--"):
        console.log(warning)
    for pattern in set(options.get("value_codes", ())).difference(idle.get("value_codes", ())):
        if "like" not in options and not any(
            re.match(pattern, code) for code in manifest.get("value_edges", ())
        ):
            console.log(
                f"Warning: --value_codes {pattern} makes no bins: none of its codes has enough "
                "numeric values in the train split."
            )


def _named(files: Sequence[Path], folder: Path) -> str:
    names = [str(path.absolute().relative_to(folder.absolute())) for path in files]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
