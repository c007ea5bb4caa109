"""`wattline agent`: the energy agent of a host, where a process of its own reads the meters."""

from __future__ import annotations

import typer

PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""Its options are the agent's own: `wattline agent --help` lists them."""


def agent(context: typer.Context) -> None:
    """Read this host's meters for every replica on it.

    `up` needs none: replicas start one themselves. Run it where meters need privilege.
    """
    from replicas.energy.agent import main

    main(context.args)
