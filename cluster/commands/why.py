"""`wattline why`: what happened to one request, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.command_error import CommandError
from cluster.commands.options import Address, ApiKey, Ca, Cert, Json, dial_router


def why(
    request_id: Annotated[
        str, typer.Argument(metavar="ID", help="The id of a request that ended, or of its trace.")
    ],
    address: Address = "",
    ca: Ca = "",
    cert: Cert = "",
    api_key: ApiKey = "",
    as_json: Json = False,
    record: Annotated[
        Path | None,
        typer.Option(
            "--record", metavar="FILE", help="Write the balancer's decisions to a file that can be replayed."
        ),
    ] = None,
) -> None:
    """Tell a request's story: limits, queue, candidates with their scores, replicas, joules.

    Routers remember the last thousand requests or so, and none of their text. The id is in every answer, in
    the trailers, and on the dashboard; its first eight characters will do.
    """
    import json

    from google.protobuf.json_format import MessageToDict
    from rich.console import Console

    from cluster.commands.story_screen import render_story

    with dial_router(address, ca=ca, cert=cert, api_key=api_key) as client:
        stories = client.explain(request_id)
    if record is not None:
        record_decisions([story.recording for story in stories if story.recording], record)
    if as_json:
        told = [MessageToDict(story, preserving_proto_field_name=True) for story in stories]
        typer.echo(json.dumps(told, indent=2))
        return
    console = Console()
    for story in stories:
        console.print(render_story(story))


def record_decisions(recordings: list[str], path: Path) -> None:
    """One document of all decisions. Raises CommandError where there are none, or the file cannot be."""
    from cluster.balancing.recording import read_decisions, write_decisions

    decisions = [decision for text in recordings for decision in read_decisions(text)]
    if not decisions:
        raise CommandError("the balancer was not asked for this request; there is nothing to record")
    try:
        path.write_text(write_decisions(decisions) + "\n")
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}") from error
