"""A model's files on this node: a folder as it is, or a hub id fetched into the local hub cache."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from cluster.command_error import CommandError

TOKENIZER_PATTERNS = ("*.json", "*.txt", "*.jinja", "*.model")
WEIGHT_PATTERNS = ("*.safetensors",)
DOUBLE_PATTERNS = ("original/*", "consolidated*")
"""The same weights once more, as some makers ship them."""

OFFLINE = "there is no network to the hub, or HF_HUB_OFFLINE is set"
MAX_REASON_CHARS = 200


class SourceError(CommandError):
    """A source that is no folder and cannot be fetched from the hub."""


def resolve_source(source: str, *, revision: str = "main", has_weights: bool = True) -> Path:
    """The folder of a checkpoint; `has_weights=False` leaves the weights on the hub.

    Blocks while files arrive (progress bars on standard error). Files already in the cache are not fetched
    again, and HF_HUB_OFFLINE=1 uses the cache alone. Raises SourceError.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute():
        raise SourceError(
            f"source {source!r} is no folder on this machine; every node that serves the model needs its "
            "checkpoint there"
        )
    patterns = TOKENIZER_PATTERNS + (WEIGHT_PATTERNS if has_weights else ())
    try:
        return Path(
            snapshot_download(
                source,
                revision=revision,
                allow_patterns=list(patterns),
                ignore_patterns=list(DOUBLE_PATTERNS),
            )
        )
    except GatedRepoError as error:
        raise SourceError(
            f"source {source!r} is gated: accept its terms on the hub and set HF_TOKEN on this node"
        ) from error
    except RepositoryNotFoundError as error:
        raise SourceError(
            f"source {source!r} is neither a folder nor a model on the hub; "
            "check its spelling, or HF_TOKEN if it is private"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        is_offline = isinstance(error, LocalEntryNotFoundError)
        reason = OFFLINE if is_offline else str(error).strip().split("\n")[0][:MAX_REASON_CHARS]
        raise SourceError(
            f"source {source!r} (revision {revision!r}) is not in the local cache and cannot be fetched: "
            f"{reason}; give a folder, or fetch it once where there is a network: "
            f"`hf download {source} --revision {revision}`"
        ) from error
