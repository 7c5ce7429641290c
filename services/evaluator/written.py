"""Reads of write-once objects, remembered: what was there stays there and stays the same.

A job looks at spec, held-out set and parts each time; without this a report of many parts costs
more requests than arithmetic.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, TypeVar

from pydantic import BaseModel

from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts.artifacts import ObjectRef

M = TypeVar("M", bound=BaseModel)


class WriteOnce:
    """Remembers the last `most_models` models and `most_keys` keys; never that one is absent."""

    def __init__(
        self, store: ObjectStore, *, most_models: int = 32, most_keys: int = 20_000
    ) -> None:
        self._store = store
        self._models: OrderedDict[str, Any] = OrderedDict()
        self._keys: OrderedDict[str, None] = OrderedDict()
        self._most_models = most_models
        self._most_keys = most_keys

    def exists(self, key: str) -> bool:
        if key in self._keys:
            return True
        found = self._store.exists(key)
        if found:
            self._keys[key] = None
            while len(self._keys) > self._most_keys:
                self._keys.popitem(last=False)
        return found

    def find(self, key: str, model: type[M]) -> tuple[M, ObjectRef] | None:
        """Read an object and its reference; None when absent."""
        known: tuple[M, ObjectRef] | None = self._models.get(key)
        return known or self._remember(key, self._store.find_model(key, model))

    def get(self, ref: ObjectRef, model: type[M]) -> M:
        """Read what a manifest names."""
        known: tuple[M, ObjectRef] | None = self._models.get(ref.key)
        if known is None or known[1] != ref:
            known = self._remember(ref.key, (self._store.get_model(ref, model), ref))
        assert known is not None
        return known[0]

    def _remember(self, key: str, found: tuple[M, ObjectRef] | None) -> tuple[M, ObjectRef] | None:
        if found is not None:
            self._models[key] = found
            while len(self._models) > self._most_models:
                self._models.popitem(last=False)
        return found
