"""`PYTHON -m bench.peers.driver`: one peer in its own interpreter, told by JSON lines on standard input.

The first line is the setup, each further one a workload; each is answered by one line on standard output.
An answer is an object with `error` when the peer raised; the process then ends. Whatever the peer prints
goes to standard error.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict

from bench.peers.adapter import Peer, PeerSetup, open_peer
from bench.streams import Streams
from bench.workload import Workload, workload_from_dict

PR_SET_PDEATHSIG = 1


def drive(peer: Peer, workload: Workload) -> Streams:
    """Run the workload to its end."""
    streams = Streams(workload)

    def emit(request_id: int, token_ids: Sequence[int], is_finished: bool) -> None:
        streams.deliver(request_id, token_ids, is_finished=is_finished)

    while not streams.is_done:
        for one in streams.due():
            peer.add(one.request_id, one.prompt, one.output_tokens)
        peer.step(emit)
    return streams


def serve(reply: Callable[[dict[str, object]], None]) -> None:
    """Answer every line until standard input ends."""
    peer = open_peer(PeerSetup(**json.loads(sys.stdin.readline())))
    reply(
        {
            "version": peer.version,
            "has_prefix_cache": peer.has_prefix_cache,
            "admits_midway": peer.admits_midway,
        }
    )
    for line in sys.stdin:
        streams = drive(peer, workload_from_dict(json.loads(line)))
        reply({"times": [asdict(one) for one in streams.times()], "wall_s": streams.wall_s()})
    peer.close()


def die_with_the_bench() -> None:
    """Ask Linux for a SIGKILL when the parent ends: a stopped process reads no end of input."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    die_with_the_bench()
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)

        def reply(answer: dict[str, object]) -> None:
            answers.write(json.dumps(answer) + "\n")
            answers.flush()

        try:
            serve(reply)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            reply({"error": f"{type(error).__name__}: {error}"})
            sys.exit(1)


if __name__ == "__main__":
    main()
