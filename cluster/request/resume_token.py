"""The token with which a caller goes on at another router when its own died. Pure but for the clock.

A router keeps nothing of a stream that its death would lose: the caller has the question, and the tokens so
far. The token adds what only the server knew, the drawn seed, which weights answered and how many replicas
died under it, and is sealed with the routers' secret, so that it fits nothing but that tenant's question.
"""

from __future__ import annotations

import hmac
import struct
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import blake2b

from cluster.request.completion import Completion
from cluster.request.errors import ResumeRefused
from cluster.request.failover import ReplicaIdentity

VERSION = 1
"""The low half of the first byte; the high one counts deaths, of which older tokens know none."""
MAX_DEATHS = 15
LIFE_S = 3600
DIGEST_BYTES = 16
BODY = struct.Struct(f"<BQI{DIGEST_BYTES}s{DIGEST_BYTES}s")
TOKEN_BYTES = BODY.size + DIGEST_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeClaims:
    """What a token holds. `question` and `identity` are digests; `expires_s` is Unix time.

    `num_deaths`: replicas that died under the request and are held against it.
    """

    seed: int
    question: bytes
    identity: bytes
    expires_s: int
    num_deaths: int = 0


class ResumeSeal:
    """Makes and opens tokens; `key` is derived of the routers' secret."""

    def __init__(self, key: bytes, *, clock_s: Callable[[], float] = time.time) -> None:
        self._key = key
        self._clock_s = clock_s

    def seal(self, num_deaths: int = 0, *, seed: int, question: bytes, identity: ReplicaIdentity) -> bytes:
        first = VERSION | min(num_deaths, MAX_DEATHS) << 4
        body = BODY.pack(first, seed, int(self._clock_s()) + LIFE_S, question, digest_identity(identity))
        return body + self._mac(body)

    def open(self, token: bytes, *, question: bytes) -> ResumeClaims:
        """The claims of a token for this question. Raises ResumeRefused."""
        body, mac = token[: BODY.size], token[BODY.size :]
        if len(token) != TOKEN_BYTES or not hmac.compare_digest(self._mac(body), mac):
            raise ResumeRefused("the resume token was not made by these routers; start over without it")
        first, seed, expires_s, sealed, identity = BODY.unpack(body)
        if first & 0xF != VERSION or sealed != question:
            raise ResumeRefused("the resume token belongs to another request; send the request as it was")
        if self._clock_s() >= expires_s:
            raise ResumeRefused(f"the resume token is older than {LIFE_S} s; start over without it")
        return ResumeClaims(
            seed=seed, question=sealed, identity=identity, expires_s=expires_s, num_deaths=first >> 4
        )

    def _mac(self, body: bytes) -> bytes:
        return blake2b(body, key=self._key, digest_size=DIGEST_BYTES, person=b"wattline.resume").digest()


def digest_question(completion: Completion, prompt_ids: tuple[int, ...], *, tenant: str) -> bytes:
    """Tenant, model, prompt and all that shapes the answer, but for the seed."""
    shape = (
        tenant,
        completion.model,
        replace(completion.sampling, seed=0),
        completion.max_tokens,
        completion.stop_texts,
        sorted(completion.stop_token_ids),
        completion.ignore_eos,
    )
    digest = blake2b(repr(shape).encode(), digest_size=DIGEST_BYTES, person=b"wattline.ask")
    digest.update(array("I", prompt_ids).tobytes())
    return digest.digest()


def digest_identity(identity: ReplicaIdentity) -> bytes:
    """What an answering replica must have in common with the first one."""
    words = "\0".join((identity.model, identity.weights_digest, identity.tokenizer_digest))
    return blake2b(words.encode(), digest_size=DIGEST_BYTES).digest()
