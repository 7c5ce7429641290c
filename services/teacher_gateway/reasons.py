"""Why an item ended without an answer: the closed list of collection's rejections."""

from __future__ import annotations

TEACHER_RATE_LIMITED = "teacher_rate_limited"  # 429, more often than the limits allow
TEACHER_ERROR = "teacher_error"  # 5xx, or the connection broke
TEACHER_TIMEOUT = "teacher_timeout"  # no whole answer within the call's deadline
TEACHER_INVALID = "teacher_invalid"  # an answer that is not what the API promises
TEACHER_UNREACHABLE = "teacher_unreachable"  # no connection
MISSING_LOGPROBS = "missing_logprobs"  # asked for log-probabilities, got none
STILL_REASONING = "still_reasoning"  # `signal.max_tokens` went by before the answer began
REFUSED_BY_TEACHER = "refused_by_teacher"  # 4xx, a refusal, a content filter
UNSUPPORTED_CONVERSATION = "unsupported_conversation"  # what this teacher's API cannot express
NO_GIVEN_ANSWER = "no_given_answer"  # `answers: given`, and the prompt carries none
BUDGET_EXHAUSTED = "budget_exhausted"  # the worst case of one answer does not fit any more
CLOSED_BY_DEADLINE = "closed_by_deadline"  # `close_deadline_hours` went by
WORKER_LOST = "worker_lost"  # its worker died again and again while it asked
PIPELINE_STOPPED = "pipeline_stopped"  # cancelled or failed before it was asked
