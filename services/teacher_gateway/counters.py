"""What the gateway counts while it works; what is rendered from stored state is in `metrics`."""

from __future__ import annotations

from prometheus_client import Counter, Histogram

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
