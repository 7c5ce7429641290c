"""Why an exchange has no whole answer, or is not recorded: a closed list."""

from __future__ import annotations

TEACHER_UNREACHABLE = "teacher_unreachable"  # no connection, so nothing was asked
TEACHER_ERROR = "teacher_error"  # 5xx, or the connection broke
TEACHER_RATE_LIMITED = "teacher_rate_limited"  # 429
REFUSED_BY_TEACHER = "refused_by_teacher"  # any other 4xx
TEACHER_INVALID = "teacher_invalid"  # no chat completion, or no chunk of one
TEACHER_TIMEOUT = "teacher_timeout"  # no whole answer within `limits.timeout_seconds`
TEACHER_SLOW = "teacher_slow"  # an answer that drips
TRUNCATED = "truncated"  # a stream that ended without saying so
TOO_LARGE = "too_large"  # an answer beyond what is held
CLIENT_LEFT = "client_left"  # with `on_disconnect: abort`
MEMORY_FULL = "memory_full"  # calls in flight held all their memory; a stream was still answered
GATEWAY_STOPPED = "gateway_stopped"  # cut by the end of the API's grace time
GATEWAY_ERROR = "gateway_error"  # a defect of ours
RECORD_UNUSABLE = "record_unusable"  # its record is readable, and no exchange

# Answered, but not recorded:
SPOOL_FULL = "spool_full"  # the store is away for long
SPOOL_DISK = "spool_disk"  # the disk took no more
SPOOL_ERROR = "spool_error"  # a defect of ours
SPOOL_DAMAGED = "spool_damaged"  # a segment that was set aside; counted once, not by records
