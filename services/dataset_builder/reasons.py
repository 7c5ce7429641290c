"""Why an item has no row, and why a row has no signal: the closed lists that metrics count by.

A reason is part of the stored data: it may be added to, never renamed.
"""

from __future__ import annotations

# Rejections, in the order of the steps
MALFORMED_JSON = "malformed_json"
ERROR_BODY = "error_body"
WRONG_SCHEMA = "wrong_schema"
NO_CHOICES = "no_choices"
BROKEN_TEXT = "broken_text"
CONTENT_FILTER = "content_filter"
UNEXPECTED_FINISH = "unexpected_finish"
REFUSED = "refused"
EMPTY_ANSWER = "empty_answer"
TOO_SHORT = "too_short"
CUT = "cut"
HELDOUT_PROMPT = "heldout_prompt"
HELDOUT_ANSWER = "heldout_answer"
TEMPLATE_REFUSED = "template_refused"
TURN_DIFFERS = "turn_differs"
USAGE_MISSING = "usage_missing"
PROMPT_TOKENS_DIFFER = "prompt_tokens_differ"
CONTROL_TOKEN = "control_token"  # noqa: S105
IDS_DIFFER_FROM_TEXT = "ids_differ_from_text"
TOO_LONG = "too_long"

# Rejections of the batch as a whole
NO_ANSWER = "no_answer"
STEP_FAILED = "step_failed"
BUILD_FAILED = "build_failed"

REJECTIONS: frozenset[str] = frozenset(
    {
        MALFORMED_JSON,
        ERROR_BODY,
        WRONG_SCHEMA,
        NO_CHOICES,
        BROKEN_TEXT,
        CONTENT_FILTER,
        UNEXPECTED_FINISH,
        REFUSED,
        EMPTY_ANSWER,
        TOO_SHORT,
        CUT,
        HELDOUT_PROMPT,
        HELDOUT_ANSWER,
        TEMPLATE_REFUSED,
        TURN_DIFFERS,
        USAGE_MISSING,
        PROMPT_TOKENS_DIFFER,
        CONTROL_TOKEN,
        IDS_DIFFER_FROM_TEXT,
        TOO_LONG,
        NO_ANSWER,
        STEP_FAILED,
        BUILD_FAILED,
    }
)

# Rows of a `topk` or `counts` dataset that are `text` only
NO_LOGPROBS = "no_logprobs"
LOGPROBS_MALFORMED = "logprobs_malformed"
LOGPROBS_NOT_RAW = "logprobs_not_raw"
SAMPLED_TOKENS_MISSING = "sampled_tokens_missing"
SAMPLED_TOKEN_UNMAPPED = "sampled_token_unmapped"  # noqa: S105
TOKENIZER_WITHOUT_BYTES = "tokenizer_without_bytes"
REASONING_IN_TOKENS = "reasoning_in_tokens"
CALL_NOT_IN_TOKENS = "call_not_in_tokens"
NO_COUNTS = "no_counts"
COUNTS_MALFORMED = "counts_malformed"

TEXT_ROWS: frozenset[str] = frozenset(
    {
        NO_LOGPROBS,
        LOGPROBS_MALFORMED,
        LOGPROBS_NOT_RAW,
        SAMPLED_TOKENS_MISSING,
        SAMPLED_TOKEN_UNMAPPED,
        TOKENIZER_WITHOUT_BYTES,
        REASONING_IN_TOKENS,
        CALL_NOT_IN_TOKENS,
        NO_COUNTS,
        COUNTS_MALFORMED,
    }
)
