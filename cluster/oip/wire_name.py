"""The name that clients call this service by, which is not the one of its messages' package here."""

from __future__ import annotations

from google.protobuf.descriptor_pb2 import FileDescriptorProto

from protos import wattline_oip_pb2 as pb

PACKAGE = "inference"
FILE = "inference/grpc_service.proto"
SERVICE = f"{PACKAGE}.{pb.DESCRIPTOR.services_by_name['GRPCInferenceService'].name}"


def file_on_the_wire() -> FileDescriptorProto:
    """Our `.proto` as clients know it: for reflection, in a pool of its own."""
    file = FileDescriptorProto.FromString(pb.DESCRIPTOR.serialized_pb)
    ours, theirs = f".{file.package}.", f".{PACKAGE}."
    file.name, file.package = FILE, PACKAGE
    messages = [*file.message_type, *(inner for outer in file.message_type for inner in outer.nested_type)]
    for field in (field for message in messages for field in message.field if field.type_name):
        field.type_name = field.type_name.replace(ours, theirs, 1)
    for method in (method for service in file.service for method in service.method):
        method.input_type = method.input_type.replace(ours, theirs, 1)
        method.output_type = method.output_type.replace(ours, theirs, 1)
    return file
