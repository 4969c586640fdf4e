"""`diskctl show` (also `image show`) and `diskctl status`: what diskd knows of its images and of itself."""

from typing import Any

import attrs
import click

from daemonkit.cli import print_json
from daemonkit.units import SECOND, format_size, to_seconds
from diskd.cli.calling import Diskd, json_option, pass_diskd
from diskd.cli.images import document
from diskd.core import calls
from diskd.core.statistics import ClientStats, ImageStats, IoCounts, StatsRequest

_SIZES = ("size", "block_size", "region_size", "allocated", "merge_remaining")


def stats_document(stats: ImageStats) -> dict[str, Any]:
    """Sizes in bytes, durations in seconds, absent values null."""
    return {
        **document(stats.image),
        "lease": None if stats.lease is None else attrs.asdict(stats.lease),
        "reference_points": None if stats.points is None else [attrs.asdict(point) for point in stats.points],
        "io": None if stats.io is None else _io(stats.io),
        "open_regions": stats.open_regions,
        "open_bytes": stats.open_bytes,
        "max_open_bytes": stats.max_open_bytes,
        "clients": [_client(client) for client in stats.clients],
    }


def _io(io: IoCounts) -> dict[str, Any]:
    counts = attrs.asdict(io)
    counts["flush_seconds"] = to_seconds(counts.pop("flush_ns"))
    return counts


def _client(client: ClientStats) -> dict[str, Any]:
    return {
        "peer": client.peer,
        "export": client.export,
        "requests": client.requests,
        "age": to_seconds(client.age_ns),
    }


@click.command()
@click.argument("name", required=False)
@json_option
@pass_diskd
def show(diskd: Diskd, name: str | None, as_json: bool) -> None:
    """Everything about one image, or about all: I/O counts, clients, lease, points, checkpoint, merge.

    Counts begin when an image is opened: for rates, take two readings. `open` is what a power loss now would
    over-report at most. With --json and a NAME one document, without a NAME a list.
    """
    found = diskd.call(calls.IMAGE_STATS, StatsRequest([name] if name else [])).images
    documents = [stats_document(stats) for stats in found]
    if as_json:
        print_json(documents[0] if name else documents)
        return
    for number, stats in enumerate(found):
        if number:
            click.echo()
        _print(stats)


def _print(stats: ImageStats) -> None:
    for key, value in document(stats.image).items():
        if value is None:
            continue
        text = format_size(value) if key in _SIZES else value
        if key == "space":
            parts = [f"{part.replace('_', ' ')} {format_size(size)}" for part, size in value.items() if size]
            text = ", ".join(parts)
        elif isinstance(value, dict):
            text = ", ".join(f"{part} {inner}" for part, inner in value.items() if inner is not None)
        click.echo(f"{key.replace('_', ' '):16} {text}")
    if stats.io is not None:
        _print_io(stats.io)
    if stats.open_bytes is not None and stats.max_open_bytes is not None:
        opened = f"{format_size(stats.open_bytes)} in {stats.open_regions} regions"
        click.echo(f"{'open':16} {opened}, at most {format_size(stats.max_open_bytes)}")
    for client in stats.clients:
        seconds = client.age_ns // SECOND
        click.echo(
            f"{'client':16} {client.peer} as {client.export}, {client.requests} requests in {seconds} s"
        )
    for point in stats.points or []:
        click.echo(f"{'point':16} {point.point} {'valid' if point.valid else point.reason}")


def _print_io(io: IoCounts) -> None:
    rows = [
        ("read", f"{io.reads} requests, {format_size(io.read_bytes)}"),
        ("written", f"{io.writes} requests, {format_size(io.written_bytes)}"),
        ("zeroed", f"{io.zeroes} requests, {format_size(io.zeroed_bytes)}"),
        ("trimmed", f"{io.trims} requests, {format_size(io.trimmed_bytes)}"),
        ("flushed", f"{io.flushes} requests, {io.flush_ns / SECOND:.3f} s"),
        ("errors", f"{io.errors}"),
        ("first touches", f"{io.regions_opened} regions, {io.marks} durable marks"),
    ]
    for name, text in rows:
        click.echo(f"{name:16} {text}")


@click.command()
@json_option
@pass_diskd
def status(diskd: Diskd, as_json: bool) -> None:
    """How this diskd is, what it serves, and where."""
    found = diskd.call(calls.STATUS, calls.Nothing())
    vitals = found.vitals
    if as_json:
        print_json(
            {
                **attrs.asdict(found, filter=lambda field, _: field.name != "vitals"),
                "uptime": to_seconds(vitals.uptime_ns),
                "loop_lag": to_seconds(vitals.loop_lag_ns),
                "threads": vitals.threads,
                "memory": vitals.resident_bytes,
                "open_files": vitals.open_files,
                "open_files_max": vitals.files_max,
            }
        )
        return
    click.echo(
        f"diskd {found.version}, pid {found.pid}, root {found.root}, up {vitals.uptime_ns // SECOND} s"
    )
    click.echo(f"nbd {found.nbd or '-'}, socket {found.nbd_socket or '-'}, {found.connections} clients")
    why = f", {found.closed} of them not served (diskctl image list tells why)" if found.closed else ""
    click.echo(f"{found.images} images{why}")
    click.echo(
        f"loop late by {vitals.loop_lag_ns / SECOND:.3f} s at most, {vitals.threads} threads,"
        f" {format_size(vitals.resident_bytes)}, {vitals.open_files} of {vitals.files_max} files"
    )
    for name in found.exports:
        click.echo(f"  {name}")
