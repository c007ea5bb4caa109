"""A client that knows nothing but the address: `python examples/reflection_client.py "Who are you?"`.

It asks the server for its own schema (gRPC reflection), so it needs none of Wattline's code, and lists the
models and streams a chat with what it learned. The same works from any language with reflection.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

SERVICE = "wattline.v1.Inference"


def main(question: str, address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        methods = pool.FindServiceByName(SERVICE).methods_by_name

        def ask(method: str, **fields: Any) -> Iterator[Any]:
            """Call a method by its name; one answer or many."""
            learned = methods[method]
            asked = GetMessageClass(learned.input_type)(**fields)
            read = GetMessageClass(learned.output_type).FromString
            path = f"/{SERVICE}/{method}"
            if learned.server_streaming:
                return iter(channel.unary_stream(path, type(asked).SerializeToString, read)(asked))
            return iter([channel.unary_unary(path, type(asked).SerializeToString, read)(asked)])

        (listed,) = ask("ListModels")
        for model in listed.models:
            print(f"{model.name}: {model.context_tokens} tokens of context, {model.ready_replicas} ready")
        events = ask(
            "Chat",
            model=listed.models[0].name,
            messages=[{"role": "user", "content": question}],
            limits={"max_tokens": 64},
            sampling={"temperature": 0.0},
        )
        for event in events:
            if event.WhichOneof("event") == "delta":
                print(event.delta.text, end="", flush=True)
            else:
                print(f"\n{event.final.usage}{event.final.energy}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="List the models of a router and ask the first one.")
    parser.add_argument("question", nargs="?", default="Who are you?")
    parser.add_argument("--address", default="127.0.0.1:50051", help="of the router")
    arguments = parser.parse_args()
    main(arguments.question, arguments.address)
