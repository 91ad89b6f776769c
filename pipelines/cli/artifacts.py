"""`enat artifacts`: list, show, copy, verify and remove the artifacts of a store."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipelines.cli.options import (
    AGE,
    FOLDER,
    JSON,
    SIZE,
    STORE,
    TRACKING_URI,
    WORKSPACE,
    SentenceGroup,
    complete_stage,
    console,
    echo_json,
    s3_options,
    table_console,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipelines.artifacts.store import ArtifactStore
    from pipelines.storage.s3_client import S3Config

_ARTIFACT = click.argument("artifact", metavar="[STAGE/]KEY")
_SHORTEST_LIMIT = 3600.0  # of gc: younger files may belong to a run that is active


@click.group(cls=SentenceGroup)
def artifacts() -> None:
    """List, show, copy, verify and remove the artifacts of a store."""


@artifacts.command(name="ls")
@click.option("--stage", "stages", multiple=True, shell_complete=complete_stage, help="Only artifacts of this stage. Repeatable.")
@click.option("--dataset", "datasets", multiple=True, metavar="NAME", help="Only artifacts made from this dataset. Repeatable.")
@click.option("--larger-than", type=SIZE, help="For example 500MB or 1.5GiB.")
@click.option("--smaller-than", type=SIZE)
@click.option("--older-than", type=AGE, help="For example 30d, 12h or 90m.")
@click.option("--newer-than", type=AGE)
@click.option("--sort", type=click.Choice(["age", "size"]), default="age", show_default=True, help="Newest or largest first.")
@click.option("--unfinished", is_flag=True, help="List the files of runs that did not finish instead.")
@STORE
@s3_options
@JSON
def list_artifacts(sort: str, unfinished: bool, store: str, s3: S3Config, as_json: bool, **query: Any) -> None:
    """List artifacts with size, age, key, dataset and a description."""
    from pipelines.artifacts import inventory
    from pipelines.run import graph

    graph.check_stages(query["stages"])
    opened, now = _open(store, s3), time.time()
    with console(stderr=True).status("reading manifests"):
        manifests = [*opened.manifests()]
    if unfinished:
        if len(query.pop("stages")) or any(query.values()):
            raise click.UsageError("--unfinished lists everything; remove the other filters")
        with console(stderr=True).status("listing files"):
            left = inventory.find_unfinished(opened.folders(), manifests)
        if as_json:
            echo_json({"store": opened.uri, "unfinished": [inventory.unfinished_json(each, now) for each in left]})
        else:
            inventory.show_unfinished(left, opened.uri, now, table_console())
        return
    entries = inventory.list_artifacts(
        manifests,
        inventory.Query(**query),
        now=now,
        by_size=sort == "size",
        describe=graph.describe,
        dataset_name=graph.dataset_name,
    )
    if as_json:
        echo_json({"store": opened.uri, "artifacts": [dataclasses.asdict(entry) for entry in entries]})
    else:
        inventory.show_list(entries, opened.uri, table_console())


@artifacts.command(name="show")
@_ARTIFACT
@STORE
@s3_options
@click.option("--lineage", "with_lineage", is_flag=True, help="Also show its inputs and what was made from it, as trees.")
@click.option(
    "--contact-sheet",
    type=click.Path(path_type=Path),
    help="For a token map: write a PNG with images beside their reconstructions.",
)
@click.option("--images", default=24, show_default=True, type=click.IntRange(1, 400), help="Number of images on the contact sheet.")
@JSON
def show_artifact(
    artifact: str,
    store: str,
    s3: S3Config,
    with_lineage: bool,
    contact_sheet: Path | None,
    images: int,
    as_json: bool,
) -> None:
    """Show an artifact: its inputs, code, content and metrics. A prefix of its key is enough."""
    from pipelines.artifacts import lineage
    from pipelines.data import inspection
    from pipelines.run import graph

    opened = _open(store, s3)
    manifest = inspection.find(opened, artifact)
    found = lineage.Lineage(opened.manifests(), graph.describe) if with_lineage else None
    if contact_sheet is not None:
        inspection.write_contact_sheet(opened, manifest, contact_sheet, images)
    if as_json:
        more = {"lineage": lineage.to_json(found, manifest)} if found else {}
        echo_json({**json.loads(manifest.to_json()), **more})
        return
    terminal = console()
    terminal.print(inspection.facts_table(opened, manifest), highlight=False, soft_wrap=True)  # hashes stay whole
    for tree in lineage.trees(found, manifest) if found else ():
        terminal.print()
        terminal.print(tree, highlight=False)
    if contact_sheet is not None:
        click.echo(f"\ncontact sheet {contact_sheet}")


@artifacts.command(name="pull")
@_ARTIFACT
@STORE
@click.option(
    "--to", "target", default="runs/store", show_default=True, help="The store to copy to: a folder or s3://bucket/prefix."
)
@click.option("--files", type=FOLDER, help="Write the files and the manifest to this folder instead of a store.")
@click.option("--with-inputs", is_flag=True, help="Also copy everything it was made from, so that runs there reuse all of it.")
@s3_options
@JSON
def pull(artifact: str, store: str, target: str, files: Path | None, with_inputs: bool, s3: S3Config, as_json: bool) -> None:
    """Copy an artifact from --store to another store, where runs reuse it, or to plain files.

    Every byte is verified. Run the same command again to continue a copy that was interrupted.
    """
    from pipelines.artifacts import inventory, transfer
    from pipelines.artifacts import manifest as artifacts_manifest
    from pipelines.artifacts.open import open_store
    from pipelines.formatting import show_count, show_size

    source = _open(store, s3)
    if files is not None and with_inputs:
        raise click.UsageError("--files copies one artifact; remove --with-inputs")
    opened = None if files is not None else open_store(target, s3)
    if opened is not None and opened.uri == source.uri:
        raise click.UsageError(f"--store and --to are the same store, {opened.uri}")
    manifest = inventory.find(source, artifact)
    manifests = transfer.with_inputs(source, manifest) if with_inputs else [manifest]
    with _bar("pulling", sum(each.size for each in manifests), as_json) as advance:
        if opened is None:
            assert files is not None
            done = [transfer.write_files(source, manifest, files, advance)]
        else:
            opened.check_writable()
            done = transfer.pull(source, opened, manifests, advance)
    places = [str(files) if opened is None else opened.place(each.manifest.stage, each.manifest.key) for each in done]
    if as_json:
        rows = [
            {
                "artifact": "/".join(artifacts_manifest.name_of(each.manifest)),
                "place": place,
                "was_there": each.was_there,
                "files_fetched": each.num_fetched,
                "bytes_fetched": each.size_fetched,
            }
            for each, place in zip(done, places, strict=True)
        ]
        echo_json({"pulled": rows})
        return
    for each, place in zip(done, places, strict=True):
        fetched = f"{show_count(each.num_fetched, 'file')}, {show_size(each.size_fetched)} fetched"
        how = "already there" if each.was_there else fetched
        click.echo(f"{artifacts_manifest.short(artifacts_manifest.name_of(each.manifest))}  {how}  {place}")


@artifacts.command(name="verify")
@click.argument("keys", nargs=-1, metavar="[[STAGE/]KEY]...")
@click.option("--all", "all_of_them", is_flag=True, help="Every artifact of the store.")
@STORE
@s3_options
@JSON
def verify(keys: tuple[str, ...], all_of_them: bool, store: str, s3: S3Config, as_json: bool) -> None:
    """Read every byte of artifacts in the store and compare it with the manifest.

    The exit code is 1 if any artifact is damaged. Nothing is repaired.
    """
    from pipelines import formatting
    from pipelines.artifacts import inventory, verification
    from pipelines.artifacts import manifest as artifacts_manifest
    from pipelines.artifacts.manifest import Manifest
    from pipelines.formatting import show_count, show_size

    if bool(keys) == all_of_them:
        raise click.UsageError("name artifacts by prefixes of their keys, or give --all")
    opened = _open(store, s3)
    with console(stderr=True).status("reading manifests"):
        found = [*opened.read_manifests(is_complete=False)] if all_of_them else inventory.look_up(opened, keys)
    if not found:
        raise ValueError(f"{opened.uri} contains no artifacts, so nothing was verified. Check that this is the right store.")
    rows, is_whole = [], True
    with _bar("verifying", sum(each.size for each in found if isinstance(each, Manifest)), as_json) as advance:
        for verdict in verification.verify(opened, found, advance):
            is_whole = is_whole and not verdict.problems
            rows.append({**dataclasses.asdict(verdict), "is_whole": not verdict.problems})
            if not as_json:
                name = artifacts_manifest.short((verdict.stage, verdict.key))
                whole = f"{show_count(verdict.num_files, 'file')}, {show_size(verdict.size)}"
                outcome = f"DAMAGED  {'; '.join(verdict.problems)}" if verdict.problems else f"whole    {whole}"
                click.echo(f"{name:<26} {formatting.printable(outcome)}")
    if as_json:
        echo_json({"store": opened.uri, "is_whole": is_whole, "artifacts": rows})
    elif is_whole:
        click.echo(f"\n{len(rows):,} artifacts are whole in {opened.uri}")
    else:
        damaged = [opened.place(row["stage"], row["key"]) for row in rows if not row["is_whole"]]
        click.echo(
            f"\ndamaged: {len(damaged):,} of {len(rows):,} artifacts. Remove each of them; a run that needs it computes it again:"
        )
        click.echo("\n".join(damaged))
        if not all(row["is_readable"] for row in rows):
            click.echo(
                "An artifact that cannot be read may be whole. Before you remove it, check its disk or endpoint and verify again."
            )
    if not is_whole:
        sys.exit(1)


@artifacts.command(name="gc")
@click.option("--older-than", type=AGE, default="30d", show_default=True, help="Keep what was used within this time, at least 1h.")
@click.option(
    "--keep", multiple=True, metavar="[STAGE/]KEY", help="Keep this artifact and everything it was made from. Repeatable."
)
@click.option("--delete", is_flag=True, help="Remove. Without this option, only list what would be removed.")
@TRACKING_URI
@WORKSPACE
@click.option("--ignore-registry", is_flag=True, help="Do not ask MLflow which models are registered. They may be removed.")
@STORE
@s3_options
@JSON
def collect(
    older_than: float,
    keep: tuple[str, ...],
    delete: bool,
    tracking_uri: str | None,
    workspace: Path,
    ignore_registry: bool,
    store: str,
    s3: S3Config,
    as_json: bool,
) -> None:
    """Remove artifacts that were not used for a while.

    These are kept: artifacts used within --older-than, artifacts named by --keep, models in MLflow's registry with their last
    evaluations, and everything that any of these was made from. Files of unfinished stages, and files that no manifest names, are
    removed by age alone.
    """
    from pipelines import formatting
    from pipelines.artifacts import garbage, inventory
    from pipelines.artifacts import manifest as artifacts_manifest
    from pipelines.run import graph

    if older_than < _SHORTEST_LIMIT:
        raise click.UsageError("--older-than must be at least 1h: younger files may belong to an active run")
    opened = _open(store, s3)
    registered = set() if ignore_registry else _registered(tracking_uri, workspace, delete)
    with console(stderr=True).status("reading the store"):
        named = {artifacts_manifest.name_of(manifest) for manifest in inventory.find_all(opened, keep)}
        planned = garbage.plan(opened, limit=time.time() - older_than, named=named, registered=registered)
    for damaged in planned.damaged:
        click.echo(f"enat: {formatting.printable(str(damaged))}; until then it is kept", err=True)
    outcome = None
    if delete:
        with _bar("removing", sum(removal.size for removal in planned.removals), as_json) as advance:
            outcome = garbage.collect(opened, planned, lambda removal: advance(removal.size))
    if as_json:
        echo_json({"store": opened.uri, **garbage.to_json(planned, outcome)})
    else:
        garbage.show(planned, outcome, opened.uri, time.time(), table_console(), describe=graph.describe)


def _open(store: str, s3: S3Config) -> ArtifactStore:
    from pipelines.artifacts.open import open_existing

    return open_existing(store, s3)


def _registered(tracking_uri: str | None, workspace: Path, is_needed: bool) -> set[tuple[str, str]]:
    """(stage, key) of the artifacts of all registered versions, in any store, because a store may have several addresses."""
    from pipelines.tracking import run as tracking
    from pipelines.tracking import search

    uri = tracking.resolve_uri(tracking.TrackingConfig(uri=tracking_uri), workspace)
    try:
        artifacts = search.registered_artifacts(uri)
    except (search.TrackingError, ValueError) as error:
        advice = "the registered models are not known, so nothing is removed; set the server with --tracking-uri, or give"
        click.echo(f"enat: {' '.join(str(error).split())}; {advice} --ignore-registry", err=True)
        if is_needed:
            sys.exit(1)
        return set()
    return {(stage, key) for stage, _, key in (artifact.partition("/") for artifact in artifacts)}


@contextmanager
def _bar(what: str, total: int, is_quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar of bytes on stderr, if that is a terminal. Yields a function that advances it, which several threads may call."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    terminal = console(stderr=True)
    with Progress(*columns, console=terminal, transient=True, disable=is_quiet or not terminal.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)
