"""What this protocol's clients can ask of the server and of a model: metadata and configuration. Pure."""

from __future__ import annotations

from importlib.metadata import version

from cluster.oip.tensors import INPUTS, OUTPUTS, TensorSpec
from protos import wattline_oip_pb2 as pb

MODEL_VERSION = "1"
PLATFORM = "wattline"
CONFIG_TYPES = {
    "BYTES": pb.TYPE_STRING,
    "BOOL": pb.TYPE_BOOL,
    "FP32": pb.TYPE_FP32,
    "UINT32": pb.TYPE_UINT32,
}


def server_metadata() -> pb.ServerMetadataResponse:
    extensions = ("model_configuration", "parameters", "binary_tensor_data")
    return pb.ServerMetadataResponse(name=PLATFORM, version=version("wattline"), extensions=extensions)


def model_metadata(name: str) -> pb.ModelMetadataResponse:
    """All models here have the same tensors."""
    return pb.ModelMetadataResponse(
        name=name,
        versions=[MODEL_VERSION],
        platform=PLATFORM,
        inputs=[_metadata(spec) for spec in INPUTS.values()],
        outputs=[_metadata(spec) for spec in OUTPUTS.values()],
    )


def model_config(name: str) -> pb.ModelConfigResponse:
    """Decoupled: a request has as many responses as its answer has pieces."""
    config = pb.ModelConfig(
        name=name,
        platform=PLATFORM,
        backend=PLATFORM,
        max_batch_size=0,
        input=[
            pb.ModelInput(
                name=spec.name,
                data_type=CONFIG_TYPES[spec.datatype],
                dims=spec.dims,
                optional=spec.is_optional,
            )
            for spec in INPUTS.values()
        ],
        output=[
            pb.ModelOutput(name=spec.name, data_type=CONFIG_TYPES[spec.datatype], dims=spec.dims)
            for spec in OUTPUTS.values()
        ],
        model_transaction_policy=pb.ModelTransactionPolicy(decoupled=True),
    )
    return pb.ModelConfigResponse(config=config)


def _metadata(spec: TensorSpec) -> pb.TensorMetadata:
    return pb.TensorMetadata(name=spec.name, datatype=spec.datatype, shape=spec.dims)
