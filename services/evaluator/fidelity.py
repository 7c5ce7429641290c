"""How near a model is to its teacher on the teacher's own answers.

For each supervised position with the teacher's distribution p and the model's q:

    kl_top20  sum over the stored outcomes of p (log p - log q), plus the same for the tail, all
              other outcomes taken as one. A lower bound of kl_full.
    kl_full   sum over the vocabulary of p (log p - log q), p from the teacher's own weights.
    nll       -log q(the teacher's token)
    top1      whether q's likeliest token is the teacher's likeliest stored one; where the row holds
              text alone or counts of drawn ids, the likeliest of the teacher's own weights

The log of q's tail is a log-sum-exp over the logits with the stored ids masked; 1 - sum would
cancel in float32. Full vocabularies are held for `chunk` positions at a time only. The teacher's
weights go through the same functions: what they score is the noise floor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from services.evaluator.reasons import VOCABULARY_MISMATCH
from services.evaluator.statistics import RowSums
from services.evaluator.suite import Row
from stillhouse.chassis.errors import PermanentError
from stillhouse.contracts.signals import decode


@dataclass(frozen=True)
class Signal:
    """The stored outcomes of one row on the device: ids [T, S], logp [T, S], tail [T]."""

    ids: Any
    logp: Any
    tail: Any


def hidden_states(model: Any, rows: Sequence[Row]) -> list[Any]:
    """Compute what the head reads at each row's supervised positions: a list of [T, H].

    What all prompts begin with (system prompt, template) is computed once and its keys and
    values are used for every row.
    """
    from transformers import DynamicCache

    device = model.device
    shared = _shared_prefix(rows)
    states = []
    with torch.inference_mode():
        cache = DynamicCache()
        if shared:
            prefix = torch.tensor([rows[0].ids[:shared]], device=device)
            model.model(prefix, past_key_values=cache, use_cache=True)
        for row in rows:
            # The last id predicts nothing that is supervised.
            rest = torch.tensor([row.ids[shared:-1]], device=device)
            out = model.model(rest, past_key_values=cache, use_cache=True).last_hidden_state[0]
            cache.crop(-rest.shape[1])
            states.append(out[row.prompt_tokens - 1 - shared :].clone())
    return states


def _shared_prefix(rows: Sequence[Row]) -> int:
    """How many ids all prompts share, at most all but the last of the shortest prompt."""
    most = min((row.prompt_tokens - 1 for row in rows), default=0)
    for n in range(most):
        if len({row.ids[n] for row in rows}) > 1:
            return n
    return most


def score_rows(
    head: Any,
    states: Sequence[Any],
    rows: Sequence[Row],
    *,
    reference_head: Any = None,
    reference_states: Sequence[Any] | None = None,
    vocabulary: int,
    chunk: int,
) -> list[RowSums]:
    """Sum the figures of each row over its supervised positions.

    `head` maps [T, H] to logits. `vocabulary` is the tokenizer's; it matters where the two heads
    are padded to different sizes.
    """
    size, reference_size = _size(head), _size(reference_head) if reference_head else None
    if min(size, reference_size or size) < vocabulary:
        raise PermanentError(
            f"expected models over at least the tokenizer's {vocabulary} tokens, found a model "
            f"over {size} and a reference over {reference_size}: student and teacher must share "
            "one tokenizer",
            reason=VOCABULARY_MISMATCH,
        )
    # Padding beyond the tokenizer holds no token: where its size differs, it is left out.
    width = size if reference_size in (None, size) else vocabulary
    sums = []
    with torch.inference_mode():
        for n, row in enumerate(rows):
            signal = _signal(row, states[n].device, width)
            total = RowSums(row_id=row.row_id, prompt_id=row.prompt_id, tokens=row.supervised)
            targets = torch.tensor(row.ids[row.prompt_tokens :], device=states[n].device)
            for start in range(0, row.supervised, chunk):
                span = slice(start, min(start + chunk, row.supervised))
                logq = _log_probabilities(head, states[n][span], width)
                logp = None
                if reference_head is not None and reference_states is not None:
                    logp = _log_probabilities(reference_head, reference_states[n][span], width)
                part = _cut(signal, span)
                total = total.plus(**_chunk_sums(logq, targets[span], part, logp))
            sums.append(total)
    return sums


def stored_sums(rows: Sequence[Row]) -> list[RowSums]:
    """What the stored signal alone tells of the teacher: the loss on its own tokens.

    For pipelines without reference weights. Rows without log-probabilities are left out.
    """
    found = []
    for row in rows:
        if row.signal is None:
            continue
        signal = decode(row.signal)
        nll, scored = 0.0, 0
        for t, token in enumerate(row.ids[row.prompt_tokens :]):
            for slot in range(signal.slots):
                if signal.ids[t, slot] == token and signal.logp[t, slot] > -float("inf"):
                    nll -= float(signal.logp[t, slot])
                    scored += 1
                    break
        found.append(RowSums(row_id=row.row_id, prompt_id=row.prompt_id, tokens=scored, nll=nll))
    return found


def _size(head: Any) -> int:
    return int(head.weight.shape[0])


def _log_probabilities(head: Any, states: Any, width: int) -> Any:
    """log q over the vocabulary: [t, width] float32, one buffer."""
    logits = head(states)[:, :width].float()
    logits -= logits.logsumexp(-1, keepdim=True)
    return logits


def _chunk_sums(logq: Any, targets: Any, signal: Signal | None, logp: Any) -> dict[str, float]:
    """Sums over the positions of a chunk. Consumes `logq` and `logp`."""
    sums = {"nll": -float(_double(logq.gather(1, targets[:, None])).sum())}
    teachers = None
    if signal is not None:
        teachers = signal.ids[:, 0]
    elif logp is not None:
        teachers = logp.argmax(-1)
    if teachers is not None:
        sums["top1"] = float((logq.argmax(-1) == teachers).sum())
        sums["ranked"] = float(len(targets))
    if logp is not None:
        p = logp.exp()
        sums["kl_full"] = float(_double((p.mul_(logp.sub_(logq))).sum(-1)).sum())
    if signal is not None:
        kept = _double(logq.gather(1, signal.ids))
        # An empty slot repeats the first id, so masking it changes nothing.
        tail = _double(logq.scatter_(1, signal.ids, -torch.inf).logsumexp(-1))
        present = signal.logp > -torch.inf
        terms = signal.logp.exp() * torch.where(present, signal.logp - kept, 0.0)
        # Where every token is stored, the tail of the teacher is a rounding and q has none.
        rest = torch.where(tail > -torch.inf, signal.tail.exp() * (signal.tail - tail), 0.0)
        sums["kl_top20"] = float(terms.sum() + rest.sum())
        sums["scored"] = float(len(targets))
    return sums


def _double(values: Any) -> Any:
    return values.to(torch.float64)


def _signal(row: Row, device: Any, width: int) -> Signal | None:
    if row.signal is None:
        return None
    stored = decode(row.signal)
    if stored.positions != row.supervised or int(stored.ids.max()) >= width:
        raise PermanentError(
            f"row {row.row_id}: expected a signal of {row.supervised} positions over {width} "
            f"tokens, found {stored.positions} positions and id {int(stored.ids.max())}",
            reason=VOCABULARY_MISMATCH,
        )
    logp = torch.from_numpy(stored.logp)
    ids = torch.from_numpy(stored.ids)
    ids = torch.where(logp > -torch.inf, ids, ids[:, :1])
    return Signal(ids.to(device), logp.to(device), torch.from_numpy(stored.tail).to(device))


def _cut(signal: Signal | None, span: slice) -> Signal | None:
    return signal and Signal(signal.ids[span], signal.logp[span], signal.tail[span])
