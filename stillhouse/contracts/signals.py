"""How a teacher's distribution is stored: a top-k list with a tail, or counts of sampled ids.

A `topk` signal keeps, for each supervised position, some outcomes (ids with log-probabilities)
and the mass of all the others, the tail. Stored are

* the tail as float16 of its log, from unquantised values;
* the first (likeliest) outcome as float16 of log(1 - p), which stays exact where p is near 1;
* the other outcomes as uint8 steps of 1/16 nat below zero.

The decoder renormalises to a sum of one with every outcome above zero. About 75 bytes a position
at k = 20 + 1 outcomes. The arrays of one row are bytes, little-endian, C order:
ids [T, S], first [T], rest [T, S - 1], tail [T], with T positions and S slots.

A `counts` signal keeps ids drawn from the teacher's whole distribution, with replacement, and how
often each came (RS-KD, Anshumann et al., ACL 2025): the target counts / draws is unbiased, which
holds for forward KL alone. Ids as above, and in `rest` uint8 [T, S] the counts, 0 where a slot is
empty; `first` and `tail` are empty. Decoded it is a TopK whose tail holds nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

STEP = 1 / 16
ABSENT = 255  # a slot without an outcome; also the least value of `rest`: 255 / 16 = 15.9 nats
FLOOR = -60.0  # the log of a mass that counts as nothing, within float16
SENTINEL = -900.0  # servers write -9999 or -inf for "not computed": such an outcome is the tail's

Array = npt.NDArray[np.generic]


@dataclass(frozen=True)
class TopK:
    """Outcomes of T positions. `logp` is -inf and `ids` 0 where a slot holds no outcome.

    ids: int64 [T, S]; logp: float64 [T, S], the likeliest first; tail: float64 [T], log mass.
    """

    ids: npt.NDArray[np.int64]
    logp: npt.NDArray[np.float64]
    tail: npt.NDArray[np.float64]

    @property
    def positions(self) -> int:
        return int(self.ids.shape[0])

    @property
    def slots(self) -> int:
        return int(self.ids.shape[1])


@dataclass(frozen=True)
class StoredTopK:
    """The same as stored in a row of a shard."""

    slots: int
    ids: bytes
    first: bytes
    rest: bytes
    tail: bytes

    @property
    def drawn(self) -> bool:
        """Whether it holds counts of drawn ids."""
        return not self.first and bool(self.rest)


MAX_DRAWS = 255


def encode_counts(positions: list[dict[int, int]]) -> StoredTopK:
    """Store `{id: count}` for each position, the most frequent first.

    Raises ValueError for a position without a draw, or with counts over MAX_DRAWS.
    """
    slots = max((len(drawn) for drawn in positions), default=1)
    ids = np.zeros((len(positions), slots), np.int64)
    counts = np.zeros((len(positions), slots), np.int64)
    for t, drawn in enumerate(positions):
        ordered = sorted(drawn.items(), key=lambda pair: (-pair[1], pair[0]))
        if not ordered or ordered[-1][1] < 1 or ordered[0][1] > MAX_DRAWS:
            raise ValueError(f"position {t}: expected counts of 1 to {MAX_DRAWS}, found {drawn}")
        ids[t, : len(ordered)] = [i for i, _ in ordered]
        counts[t, : len(ordered)] = [count for _, count in ordered]
    return StoredTopK(slots, _packed(ids), b"", counts.astype(np.uint8).tobytes(), b"")


def _decode_counts(stored: StoredTopK) -> TopK:
    counts = np.frombuffer(stored.rest, np.uint8)
    if stored.slots < 1 or len(counts) % stored.slots:
        raise ValueError(f"stored counts do not fit themselves: {stored.slots} slots")
    counts = counts.reshape(-1, stored.slots)
    ids = _unpacked(stored.ids, len(counts), stored.slots)
    total = counts.sum(axis=1, keepdims=True)
    if not total.all():
        raise ValueError("stored counts do not fit themselves: a position without a draw")
    with np.errstate(divide="ignore"):
        logp = np.log(counts / total)
    return TopK(ids, logp, np.full(len(counts), FLOOR))


def from_outcomes(
    positions: list[dict[int, float]], slots: int, *, one_hot: frozenset[int] = frozenset()
) -> TopK:
    """Collect outcomes `{id: log-probability}` for each position into arrays, likeliest first.

    Log-probabilities at or below SENTINEL go to the tail. The tail is log(1 - sum), computed
    before anything is quantised. Raises ValueError for a position without an outcome or with
    probabilities that sum to more than 1.001. Positions in `one_hot` may hold a single certain
    outcome (an end of turn that the teacher did not score).
    """
    count = len(positions)
    ids = np.zeros((count, slots), np.int64)
    logp = np.full((count, slots), -np.inf)
    tail = np.full(count, FLOOR)
    for t, outcomes in enumerate(positions):
        kept = sorted(
            ((lp, i) for i, lp in outcomes.items() if lp > SENTINEL and np.isfinite(lp)),
            key=lambda pair: (-pair[0], pair[1]),
        )
        if not kept or len(kept) > slots:
            raise ValueError(f"position {t}: expected 1 to {slots} outcomes, found {len(kept)}")
        values = np.array([lp for lp, _ in kept], np.float64)
        mass = float(np.exp(values).sum())
        if mass > 1.001:
            raise ValueError(f"position {t}: probabilities sum to {mass:.4f}, expected at most 1")
        ids[t, : len(kept)] = [i for _, i in kept]
        logp[t, : len(kept)] = values
        if t not in one_hot:
            tail[t] = _log_complement(values)
    return TopK(ids, logp, tail)


def _log_complement(logp: npt.NDArray[np.float64]) -> float:
    """log(1 - sum(exp(logp))), by way of the first outcome's complement, which keeps precision."""
    rest = -np.expm1(logp[0]) - float(np.exp(logp[1:]).sum())
    return float(np.log(rest)) if rest > np.exp(FLOOR) else FLOOR


def encode(signal: TopK) -> StoredTopK:
    """Quantise for storage."""
    present = np.isfinite(signal.logp)
    first = np.minimum(signal.logp[:, 0], -1e-12)
    complement = np.maximum(np.log(-np.expm1(first)), FLOOR)
    steps = np.rint(np.where(present, -signal.logp, 0.0)[:, 1:] / STEP)
    rest = np.where(present[:, 1:], np.clip(steps, 0, ABSENT - 1), ABSENT).astype(np.uint8)
    return StoredTopK(
        slots=signal.slots,
        ids=_packed(signal.ids),
        first=complement.astype("<f2").tobytes(),
        rest=rest.tobytes(),
        tail=np.maximum(signal.tail, FLOOR).astype("<f2").tobytes(),
    )


def decode(stored: StoredTopK) -> TopK:
    """Read a stored signal of either kind; probabilities and tail of each position sum to one.

    Raises ValueError when the lengths of the arrays do not fit each other.
    """
    if stored.drawn:
        return _decode_counts(stored)
    first = np.frombuffer(stored.first, "<f2").astype(np.float64)
    count, slots = len(first), stored.slots
    if slots < 1 or len(stored.rest) != count * (slots - 1) or len(stored.tail) != 2 * count:
        raise ValueError(f"a stored signal does not fit itself: {count} positions, {slots} slots")
    ids = _unpacked(stored.ids, count, slots)
    rest = np.frombuffer(stored.rest, np.uint8).reshape(count, slots - 1)
    tail = np.frombuffer(stored.tail, "<f2").astype(np.float64)
    logp = np.full((count, slots), -np.inf)
    logp[:, 0] = np.log1p(-np.exp(np.minimum(first, -1e-12)))
    logp[:, 1:] = np.where(rest == ABSENT, -np.inf, -STEP * rest.astype(np.float64))
    # The first outcome is the exact one: the others share what it leaves, in their proportions.
    others = np.concatenate([logp[:, 1:], tail[:, None]], axis=1)
    top = others.max(axis=1, keepdims=True)
    total = top[:, 0] + np.log(np.exp(others - top).sum(axis=1))
    left = np.log(-np.expm1(np.minimum(logp[:, 0], -1e-12)))
    shift = (left - total)[:, None]
    return TopK(ids, np.concatenate([logp[:, :1], logp[:, 1:] + shift], axis=1), tail + shift[:, 0])


def _packed(ids: npt.NDArray[np.int64]) -> bytes:
    width = np.uint16 if int(ids.max(initial=0)) < 2**16 else np.uint32
    return ids.astype(width).tobytes()


def _unpacked(data: bytes, count: int, slots: int) -> npt.NDArray[np.int64]:
    for width in ("<u2", "<u4"):
        if len(data) == np.dtype(width).itemsize * count * slots:
            return np.frombuffer(data, width).reshape(count, slots).astype(np.int64)
    raise ValueError(
        f"a stored signal does not fit itself: {count} positions, {slots} slots, "
        f"{len(data)} bytes of ids"
    )
