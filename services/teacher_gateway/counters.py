"""What the gateway counts while it works; what is rendered from stored state is in `metrics`."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

CALLS = Counter(
    "stillhouse_teacher_gateway_calls_total",
    "Calls of teachers by outcome: answered, or the reason why not",
    ["outcome"],
)
TOKENS = Counter(
    "stillhouse_teacher_gateway_tokens_total",
    "Tokens of answered calls as the teacher counted them, by kind: prompt or completion",
    ["kind"],
)
CALL_SECONDS = Histogram(
    "stillhouse_teacher_gateway_call_seconds",
    "Duration of calls of teachers",
    buckets=(0.1, 0.5, 1, 2, 5, 10, 30, 60, 300),
)
ADOPTED = Counter(
    "stillhouse_teacher_gateway_adopted_answers_total",
    "Answers of earlier attempts that were taken over instead of asked again",
)
CACHED = Counter(
    "stillhouse_teacher_gateway_cached_answers_total",
    "Answers that the tenant had paid for before and that were taken instead of asked for",
)
PROVIDER_FILES = Counter(
    "stillhouse_teacher_gateway_provider_files_total",
    "Files at a provider's batch API that were not needed any more, by outcome: deleted or left",
    ["outcome"],
)
TURN_WAITS = Counter(
    "stillhouse_teacher_gateway_turn_wait_seconds_total",
    "Seconds in which attempts could make no further call, by what they waited for: share, rate or "
    "cool_down",
    ["reason"],
)
COOL_DOWNS = Counter(
    "stillhouse_teacher_gateway_cool_downs_total",
    "Replies by which a teacher asked for a pause (Retry-After)",
)
LOWERED = Counter(
    "stillhouse_teacher_gateway_concurrency_cuts_total",
    "Cuts of a teacher's calls at once, by sign of strain: rate_limited, failing or slow",
    ["reason"],
)
CIRCUIT_OPENINGS = Counter(
    "stillhouse_teacher_gateway_circuit_openings_total",
    "Times that a teacher was found away and its circuit opened",
)
REDRIVES = Counter(
    "stillhouse_teacher_gateway_redrives_total",
    "Input events that were sent again, by the stage that did not move",
    ["stage"],
)
TICK_ERRORS = Counter(
    "stillhouse_teacher_gateway_tick_errors_total",
    "Duties of the clock that ended in an error and are done again, by duty",
    ["duty"],
)
CAPTURE_REQUESTS = Counter(
    "stillhouse_teacher_gateway_capture_requests_total",
    "Calls of the capture endpoint by class of status",
    ["status"],
)
CAPTURE_SECONDS = Histogram(
    "stillhouse_teacher_gateway_capture_seconds",
    "Duration of calls to registered teachers, whole streams included",
    buckets=(0.005, 0.02, 0.05, 0.1, 0.5, 1, 5, 30, 120, 600),
)
CAPTURE_OPEN = Gauge(
    "stillhouse_teacher_gateway_capture_open_calls",
    "Calls to registered teachers that have not ended",
    multiprocess_mode="livesum",
)
CAPTURE_SPOOLED = Counter(
    "stillhouse_teacher_gateway_capture_spooled_total",
    "Records that are durable on the API's own disk",
)
CAPTURE_SHIPPED = Counter(
    "stillhouse_teacher_gateway_capture_shipped_total",
    "Records that are in the store and its index, failures included",
)
CAPTURE_FAILURES = Counter(
    "stillhouse_teacher_gateway_capture_failures_total",
    "Exchanges without a whole answer, or that were not recorded, by reason",
    ["reason"],
)
CAPTURE_SPOOL_BYTES = Gauge(
    "stillhouse_teacher_gateway_capture_spool_bytes",
    "Recorded traffic on the API's own disk that is not in the store yet",
    multiprocess_mode="livesum",
)

EVENT_STREAMS = Gauge(
    "stillhouse_teacher_gateway_event_streams",
    "Event streams that are open in this process",
)
