"""Run jobs for `dvt denoise` and `dvt extract`: from images to a feature store, in this process or on Ray."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dvt.cli.beside import clear_beside
from dvt.cli.common import print_skipped, save_json, shown
from dvt.cli.options import options_of
from dvt.cli.replay import settings_file
from dvt.cli.settings.jobs import JobOptions
from dvt.errors import ConfigError, StoreError
from dvt.images import is_url
from dvt.images.own import is_store
from dvt.jobs import launched
from dvt.jobs.run import check_run, run
from dvt.jobs.work import Summary, Work
from dvt.progress import Progress, is_first_process
from dvt.schema import read_json
from dvt.store import Job, clear_store
from dvt.text import flat


def run_job(
    command: JobOptions,
    make_work: Callable[[], Work],
    paths: Sequence[Path | str],
    settings: dict[str, Any],
    bar: Progress,
    begun: Callable[[], None] = lambda: None,
) -> tuple[Summary, float]:
    """Run a job, on Ray or in this process, and return its summary and its seconds.

    Args:
        command: the command's options.
        make_work: makes the work; picklable if the command has --ray.
        paths: paths of the images.
        settings: settings to save beside the shards once the store is known to belong to this job; the chosen
            precision replaces "auto".
        bar: a progress bar of :func:`dvt.cli.common.progress_bar`.
        begun: called when all is checked and the work begins.

    Raises:
        ConfigError: the store is a URL and --ray is missing.
    """
    start = time.perf_counter()

    def started(job: Any) -> None:
        settings["dtype"] = job.config["dtype"]  # "auto" was resolved
        save_settings(command.out, {"job": job.attributes(), **settings})
        begun()

    if command.overwrite and is_url(command.out):
        raise ConfigError(
            f"--overwrite clears folders only, and {command.out!r} is a URL: remove what lies there first"
        )
    if command.ray is not None:
        from dvt.jobs import cluster

        runner = partial(
            cluster.run,
            make_work,
            address=command.ray,
            workers=command.ray_workers,
            threads=command.ray_threads,
            device=command.device,
        )
    elif command.ray_workers is not None:
        raise ConfigError(f"--ray-workers {command.ray_workers} is for --ray ADDRESS, which is missing")
    else:
        check_run(paths, command.out)  # before the model is loaded
        work = make_work()
        if not command.overwrite:
            _check_settings(command, settings, work.job)
        runner = partial(launched.run if launched.is_launched() else run, work)
    if command.overwrite and is_first_process():  # last, so that nothing is lost to a mistake in the other options
        clear_store(Path(command.out), wait=command.wait)
        clear_beside(Path(command.out))
    summary = runner(paths, command.out, wait=command.wait, started=started, progress=bar)
    return summary, time.perf_counter() - start


def _check_settings(command: JobOptions, settings: dict[str, Any], job: Job) -> None:
    """Refuse a store that the user has made with other settings; those that only follow from them are left out."""
    try:
        kept = read_json(settings_file(command.out))
        there = Job.from_attributes(kept["job"])
    except (OSError, ConfigError, KeyError, TypeError, ValueError):  # the writer looks at the shards themselves
        return
    if there.digest == job.digest or not is_store(command.out):
        return
    if changed := _changed(command, kept, settings, there, job):
        raise StoreError(
            f"the store {command.out!r} was made with {', '.join(changed)}. Go on with its own settings (--resume), "
            "begin anew in its place (--overwrite), or choose another --out"
        )


def _changed(command: JobOptions, kept: dict[str, Any], settings: dict[str, Any], there: Job, here: Job) -> list[str]:
    """List the options that differ between two runs and that change the tokens, as they are given."""
    theirs, mine = (flat({**asdict(job), "config": {}, **asdict(job)["config"]}) for job in (there, here))
    differing = {name for name in theirs | mine if theirs.get(name) != mine.get(name)}
    old, new, found = flat(kept), flat(settings), []
    kind: Any = type(command)
    options = {".".join(each.field): each for each in options_of(kind) if each.flags}
    changed = {name: each.field[-1] for name, each in options.items() if name in old and old[name] != new.get(name)}
    for name, last in changed.items():
        about = [each for each in differing if last in each.split(".") or each.startswith(_SHORT.get(last, last))]
        about = [each for each in about if each.split(".")[-1] not in {*changed.values()} - {last}]
        if not about:
            continue
        pair = [old[name], new[name]]
        both = [each for each in about if each in theirs and each in mine]
        if len(both) == 1:  # what was chosen where nothing was given
            pair = [job[both[0]] if given is None else given for given, job in zip(pair, (theirs, mine), strict=True)]
        before, asked = (" ".join(map(str, each if isinstance(each, (list, tuple)) else [each])) for each in pair)
        found.append(f"{options[name].flags[-1]} {before} (you ask for {asked})".replace("None", "none"))
    return found


#: Options of which the job's settings have another name.
_SHORT = {"tile": "tiling"}


def save_settings(out: str, content: dict[str, Any]) -> None:
    """Write config.json beside the shards."""
    if is_url(out):
        from dvt.store.remote import ShardTarget

        ShardTarget(out).put("config.json", (json.dumps(content, indent=1) + "\n").encode())
    else:
        save_json(Path(out) / "config.json", content)


def print_job(
    console: Console, command: JobOptions, summary: Summary, seconds: float, rows: Sequence[tuple[str, str]] = ()
) -> dict[str, Any]:
    """Print a job's summary and return it for JSON; `rows` are added to the table."""
    result = {**dataclasses.asdict(summary), "seconds": seconds, "store": command.out}
    table = Table("", "", show_header=False)
    table.add_row("images done", str(summary.done))
    table.add_row("skipped, already in the store", str(summary.skipped))
    table.add_row("failed", str(len(summary.failed)))
    table.add_row("shards written", str(summary.shards))
    if summary.done:
        table.add_row("images a second", f"{summary.done / seconds:.2f}")
    table.add_row("seconds in all", f"{seconds:.1f}")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if command.profile:
        _print_profile(console, summary, "" if command.ray is None else ", in all workers together")
    if summary.done + summary.skipped:
        console.print(f"store: {shown(command.out)}")
    print_skipped(console, summary.failed)
    return result


def _print_profile(console: Console, summary: Summary, where: str) -> None:
    profile = summary.profile
    table = Table("stage", "seconds", "of all", "its threads busy", title=f"where the time went{where}")
    for stage, seconds, share, busy in profile.rows():
        table.add_row(stage, f"{seconds:.2f}", f"{share:.0%}", f"{busy:.0%}" if busy else "-")
    console.print(table)
    backbone = profile.of("backbone")
    if profile.flops and backbone:
        console.print(f"backbone: {profile.flops / 1e12:.3g} TFLOP at {profile.flops / backbone / 1e9:.0f} GFLOP/s")
    console.print(
        f"read {profile.read_bytes / 1e6:.1f} MB of images, wrote {profile.written_bytes / 1e6:.1f} MB of shards"
    )
    if profile.wall:
        console.print(profile.bound())
