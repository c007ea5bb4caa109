"""What happened to a replica, as one line, for `status` and `top`."""

from __future__ import annotations

from rich.text import Text

from cluster.replies import FleetEvent

EVENT_STYLES = {"lost": "red", "frozen": "red", "silent": "yellow", "draining": "yellow"}


def describe_event(event: FleetEvent) -> Text:
    """Example: `3m ago  llama#4f0a  draining: another configuration was deployed`."""
    text = Text(f"{show_duration(event.age_s):>4} ago  ", style="bright_black", overflow="fold")
    text.append(f"{event.replica_id or event.model}  ", "none")
    text.append(event.kind, EVENT_STYLES.get(event.kind, "green"))
    text.append(f": {event.reason}" if event.reason else "")
    return text


def show_duration(seconds: float) -> str:
    """Example: `42s`, `7m`, `3h`."""
    if seconds < 60:
        return f"{seconds:.0f}s"
    return f"{seconds / 60:.0f}m" if seconds < 3600 else f"{seconds / 3600:.0f}h"
