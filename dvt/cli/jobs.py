"""Run jobs for `dvt denoise` and `dvt extract`: from images to a feature store, in this process or on Ray."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dvt.cli.beside import clear_beside
from dvt.cli.common import print_skipped, save_json, shown
from dvt.cli.settings.jobs import JobOptions
from dvt.errors import ConfigError
from dvt.images import is_url
from dvt.jobs import launched
from dvt.jobs.run import check_run, run
from dvt.jobs.work import Summary, Work
from dvt.progress import Progress, is_first_process
from dvt.store import clear_store


def run_job(
    command: JobOptions,
    make_work: Callable[[], Work],
    paths: Sequence[Path | str],
    settings: dict[str, Any],
    bar: Progress,
) -> tuple[Summary, float]:
    """Run a job, on Ray or in this process, and return its summary and its seconds.

    Args:
        command: the command's options.
        make_work: makes the work; picklable if the command has --ray.
        paths: paths of the images.
        settings: settings to save beside the shards once the store is known to belong to this job; the chosen
            precision replaces "auto".
        bar: a progress bar of :func:`dvt.cli.common.progress_bar`.

    Raises:
        ConfigError: the store is a URL and --ray is missing.
    """
    start = time.perf_counter()

    def started(job: Any) -> None:
        settings["dtype"] = job.config["dtype"]  # "auto" was resolved
        save_settings(command.out, {"job": job.attributes(), **settings})

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
        runner = partial(launched.run if launched.is_launched() else run, make_work())
    if command.overwrite and is_first_process():  # last, so that nothing is lost to a mistake in the other options
        clear_store(Path(command.out), wait=command.wait)
        clear_beside(Path(command.out))
    summary = runner(paths, command.out, wait=command.wait, started=started, progress=bar)
    return summary, time.perf_counter() - start


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
