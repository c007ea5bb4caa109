"""`wattline monitoring`: files for those who run Prometheus and Grafana."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def monitoring(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to write to.")],
    router: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST:PORT",
            help="A router's HTTP address; repeat for more. Default: the one `wattline up` runs here.",
            show_default=False,
        ),
    ] = None,
    scrape_s: Annotated[float, typer.Option(min=0.1, max=300.0, help="Seconds between scrapes.")] = 5.0,
    key_file: Annotated[
        str,
        typer.Option(
            metavar="FILE", help="On Prometheus' machine, an operator's key: where there are tenants."
        ),
    ] = "",
    ca: Annotated[
        str, typer.Option(metavar="FILE", help="On Prometheus' machine, the CA of routers that speak TLS.")
    ] = "",
) -> None:
    """Write scrape configuration, recording rules, alerts and a Grafana dashboard.

    Then: prometheus --config.file=DIR/prometheus.yml, and import DIR/grafana-wattline.json into Grafana.
    """
    from rich.console import Console

    from cluster.command_error import CommandError
    from cluster.config import default_runtime_dir
    from cluster.monitoring.write import ScrapeAccess, write_all
    from cluster.serving.run_folder import read_state

    if not router:
        state = read_state(default_runtime_dir())
        if state is None or not state.http:
            raise CommandError("no `wattline up` runs here; say where the router is with --router HOST:PORT")
        router = [state.http]
    access = ScrapeAccess(key_file=key_file, ca_file=ca)
    try:
        paths = write_all(out, routers=tuple(router), scrape_s=scrape_s, access=access)
    except OSError as error:
        raise CommandError(f"--out {out}: cannot be written ({error.strerror}); give a folder") from error
    console = Console()
    for path in paths:
        console.print(str(path), highlight=False)
    typer.echo(f"Now: prometheus --config.file={out / 'prometheus.yml'}", err=True)
