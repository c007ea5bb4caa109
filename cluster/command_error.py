"""What the command line says instead of a traceback. Imports nothing, so that `--help` answers at once."""

from __future__ import annotations


class CommandError(Exception):
    """Something the user can act on: the text is one clear sentence, or one line per problem. Exit code 1."""
