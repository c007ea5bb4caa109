"""`cluster.app:build`: the name by which a chart's serveConfigV2 deploys what `wattline up` deploys."""

from __future__ import annotations

from cluster.serving.application import build

__all__ = ["build"]
