"""The capture endpoint: live traffic goes to a registered teacher and is recorded on the way.

- endpoint: ASGI for /v1/chat/completions, /v1/completions, /v1/models
- serving: what one process has meanwhile, and the watch over its calls
- asked: what a request's body decides: model, stream, tags, the most it can cost
- callers, registrations: who asks, and whom; from memory (memory), which follows SQL in seconds
- allowance, tranches: what this process may spend for a teacher, in memory and in SQL
- room: the memory that calls in flight may hold
- exchange: one call upstream, and what it ended in; sse: its events while they pass
- record, spool: finished exchanges on this process's own disk
- completion, ship: put together and brought to the store and its index, dead processes' ones too
- keeping: what goes on beside the calls
- read: prompts out of what was recorded
- refusal, failures: errors as OpenAI writes them, and why an exchange has no whole answer
"""
