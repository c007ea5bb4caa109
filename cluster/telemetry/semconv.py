"""Every name of a span, attribute and trailer, in one place: the conventions are still moving.

RPC names follow OpenTelemetry v1.44, GenAI names v1.41 of the conventions (both pre-stable).
"""

from __future__ import annotations

RPC_SYSTEM_NAME = "rpc.system.name"
RPC_METHOD = "rpc.method"
RPC_STATUS_CODE = "rpc.response.status_code"
HTTP_METHOD = "http.request.method"
HTTP_ROUTE = "http.route"
ERROR_TYPE = "error.type"
SERVER_ERROR_CODES = frozenset(
    {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
)
"""The gRPC codes that make a server span an error; the others are the caller's doing."""

OPERATION_NAME = "gen_ai.operation.name"
PROVIDER_NAME = "gen_ai.provider.name"
PROVIDER = "wattline"
REQUEST_MODEL = "gen_ai.request.model"
REQUEST_MAX_TOKENS = "gen_ai.request.max_tokens"
REQUEST_TEMPERATURE = "gen_ai.request.temperature"
REQUEST_TOP_P = "gen_ai.request.top_p"
REQUEST_TOP_K = "gen_ai.request.top_k"
REQUEST_SEED = "gen_ai.request.seed"
RESPONSE_ID = "gen_ai.response.id"
RESPONSE_MODEL = "gen_ai.response.model"
FINISH_REASONS = "gen_ai.response.finish_reasons"
INPUT_MESSAGES = "gen_ai.input.messages"
INPUT_TOKENS = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
CACHED_TOKENS = "gen_ai.usage.cache_read.input_tokens"

ADMISSION = "admission"
TOKENIZE = "tokenize"
ROUTE = "route"
QUEUE = "queue"
PREFILL = "prefill"
DECODE = "decode"

REPLICA_ID = "wattline.replica.id"
WASTED_TOKENS = "wattline.usage.wasted_tokens"
PREEMPTIONS = "wattline.preemptions"
ATTEMPTS = "wattline.attempts"
RESUMED_AT = "wattline.resumed_at"
FAILOVER_EVENT = "wattline.failover"
FAILOVER_REASON = "wattline.failover.reason"
FAILOVER_OFFSET = "wattline.failover.offset"
FAILOVER_FROM = "wattline.failover.from_replica"
FAILOVER_TO = "wattline.failover.to_replica"
ENERGY_TOTAL_J = "wattline.energy.total_j"
ENERGY_PREFILL_J = "wattline.energy.prefill_j"
ENERGY_DECODE_J = "wattline.energy.decode_j"
ENERGY_STATIC_J = "wattline.energy.static_j"
ENERGY_WASTED_J = "wattline.energy.wasted_j"
ENERGY_SOURCE = "wattline.energy.source"
ENERGY_METHOD = "wattline.energy.method"
ENERGY_WINDOW_MS = "wattline.energy.window_ms"
ENERGY_CONFIDENCE = "wattline.energy.confidence"
ENERGY_FINAL = "wattline.energy.final"

TRAILER_REQUEST_ID = "wattline-request-id"
TRAILER_TRACE_ID = "wattline-trace-id"
TRAILER_ENERGY_JOULES = "wattline-energy-joules"
TRAILER_ENERGY_SOURCE = "wattline-energy-source"
TRAILER_ENERGY_STATE = "wattline-energy-state"
