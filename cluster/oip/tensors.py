"""Tensors of one element or a few, as their bytes on the wire and as values. Pure."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from cluster.request.errors import InvalidRequest
from protos import wattline_oip_pb2 as pb

MAX_INPUTS = 32
LENGTH_BYTES = 4
"""Before each element of a BYTES tensor, little-endian."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One input or output of every model. `is_scalar`: of one element; else one for each choice."""

    name: str
    datatype: str
    is_optional: bool = True
    is_scalar: bool = True

    @property
    def dims(self) -> tuple[int, ...]:
        return (1,) if self.is_scalar else (-1,)


INPUTS = {
    spec.name: spec
    for spec in (
        TensorSpec(name="text_input", datatype="BYTES", is_optional=False),
        TensorSpec(name="stream", datatype="BOOL"),
        TensorSpec(name="sampling_parameters", datatype="BYTES"),
        TensorSpec(name="exclude_input_in_output", datatype="BOOL"),
        TensorSpec(name="return_finish_reason", datatype="BOOL"),
        TensorSpec(name="return_cumulative_logprob", datatype="BOOL"),
        TensorSpec(name="return_logprobs", datatype="BOOL"),
        TensorSpec(name="return_num_input_tokens", datatype="BOOL"),
        TensorSpec(name="return_num_output_tokens", datatype="BOOL"),
    )
}
OUTPUTS = {
    spec.name: spec
    for spec in (
        TensorSpec(name="text_output", datatype="BYTES", is_scalar=False),
        TensorSpec(name="finish_reason", datatype="BYTES", is_scalar=False),
        TensorSpec(name="cumulative_logprob", datatype="FP32", is_scalar=False),
        TensorSpec(name="logprobs", datatype="BYTES", is_scalar=False),
        TensorSpec(name="num_input_tokens", datatype="UINT32"),
        TensorSpec(name="num_output_tokens", datatype="UINT32", is_scalar=False),
    )
}
"""Names and types of Triton's vLLM backend."""


def read_inputs(request: pb.ModelInferRequest) -> dict[str, str | bool]:
    """The one element of every input. Raises InvalidRequest for a tensor that no model here has."""
    if len(request.inputs) > MAX_INPUTS:
        raise InvalidRequest(
            field="inputs", got=f"{len(request.inputs)} tensors", limit=f"{MAX_INPUTS}", fix="send fewer"
        )
    is_raw = len(request.raw_input_contents) > 0
    if is_raw and len(request.raw_input_contents) != len(request.inputs):
        raise InvalidRequest(
            field="raw_input_contents",
            got=f"{len(request.raw_input_contents)} entries",
            limit=f"{len(request.inputs)}, one for each input",
            fix="send all inputs in one form",
        )
    values: dict[str, str | bool] = {}
    for index, tensor in enumerate(request.inputs):
        _check_tensor(tensor, is_known=tensor.name not in values)
        if is_raw:
            values[tensor.name] = _read_raw(tensor, request.raw_input_contents[index])
        else:
            values[tensor.name] = _read_contents(tensor)
    for spec in INPUTS.values():
        if not spec.is_optional and spec.name not in values:
            raise InvalidRequest(field=spec.name, got="nothing", limit="one element", fix="send this tensor")
    return values


def response_tensors(
    values: Mapping[str, Sequence[str] | Sequence[int] | Sequence[float]],
) -> tuple[list[pb.InferOutputTensor], list[bytes]]:
    """Outputs and their raw contents, for `ModelInferResponse`."""
    tensors = [
        pb.InferOutputTensor(name=name, datatype=OUTPUTS[name].datatype, shape=[len(elements)])
        for name, elements in values.items()
    ]
    return tensors, [_write(OUTPUTS[name].datatype, elements) for name, elements in values.items()]


def _check_tensor(tensor: pb.InferInputTensor, *, is_known: bool) -> None:
    spec = INPUTS.get(tensor.name)
    if spec is None or not is_known:
        raise InvalidRequest(
            field="inputs",
            got=f"{tensor.name[:64]!r}" + ("" if is_known else " twice"),
            limit=", ".join(INPUTS),
            fix="send these alone, once each",
        )
    if tensor.datatype != spec.datatype:
        raise InvalidRequest(
            field=tensor.name, got=tensor.datatype[:16], limit=spec.datatype, fix="send this data type"
        )
    if prod(tensor.shape) != 1 or any(size < 1 for size in tensor.shape):
        raise InvalidRequest(
            field=tensor.name,
            got=f"shape {list(tensor.shape)[:8]}",
            limit="shape [1]: one prompt a request",
            fix="send several requests",
        )


def _read_raw(tensor: pb.InferInputTensor, raw: bytes) -> str | bool:
    if tensor.datatype == "BOOL":
        if len(raw) != 1:
            raise _unreadable(tensor, f"{len(raw)} bytes", "1 byte")
        return raw != b"\x00"
    if len(raw) < LENGTH_BYTES or struct.unpack_from("<I", raw)[0] != len(raw) - LENGTH_BYTES:
        raise _unreadable(tensor, f"{len(raw)} bytes", "one element behind its length in 4 bytes")
    return _decode(tensor, raw[LENGTH_BYTES:])


def _read_contents(tensor: pb.InferInputTensor) -> str | bool:
    if tensor.datatype == "BOOL":
        if len(tensor.contents.bool_contents) != 1:
            raise _unreadable(tensor, f"{len(tensor.contents.bool_contents)} elements", "one element")
        return tensor.contents.bool_contents[0]
    if len(tensor.contents.bytes_contents) != 1:
        raise _unreadable(tensor, f"{len(tensor.contents.bytes_contents)} elements", "one element")
    return _decode(tensor, tensor.contents.bytes_contents[0])


def _decode(tensor: pb.InferInputTensor, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise _unreadable(tensor, "bytes that are no UTF-8", "UTF-8") from None


def _unreadable(tensor: pb.InferInputTensor, got: str, limit: str) -> InvalidRequest:
    return InvalidRequest(field=tensor.name, got=got, limit=limit, fix="fill the tensor in this form")


def _write(datatype: str, elements: Sequence[str] | Sequence[int] | Sequence[float]) -> bytes:
    if datatype == "BYTES":
        contents = [str(element).encode() for element in elements]
        return b"".join(struct.pack("<I", len(content)) + content for content in contents)
    return struct.pack(f"<{len(elements)}{'f' if datatype == 'FP32' else 'I'}", *elements)
