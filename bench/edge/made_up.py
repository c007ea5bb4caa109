"""The answer that the servers beside ours give: one message per token, as our own schema writes it."""

from __future__ import annotations

from protos import wattline_inference_pb2 as pb

TEXT = " token"
"""About as long as the words that our null tokenizer makes up."""


def token_message(index: int) -> pb.GenerateResponse:
    """The message of the token at `index` of an answer."""
    return pb.GenerateResponse(delta=pb.Delta(text=TEXT, token_ids=(index,)))
