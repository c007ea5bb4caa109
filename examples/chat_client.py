"""A chat in thirty lines: `python examples/chat_client.py "Who are you?"`, while `wattline demo` serves."""

from __future__ import annotations

import sys

from cluster.client import Ask, Client
from cluster.replies import Final

ADDRESS = "127.0.0.1:50051"


def main(question: str) -> None:
    with Client(ADDRESS) as client:
        model = client.list_models()[0].name
        ask = Ask(temperature=0.0, max_tokens=64, energy_wait_ms=500)
        for event in client.chat(model, [("user", question)], ask):
            if isinstance(event, Final):
                tokens, joules = event.usage.completion_tokens, event.energy.total_j
                known = "unknown" if joules is None else f"{joules:.2f} J"
                print(f"\n{model}: {tokens} tokens, {known} ({event.energy.source})")
            else:
                print(event.text, end="", flush=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "Who are you?")
