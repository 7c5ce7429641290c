"""What the API and the metrics tell of answers from the cache and of batches at a provider."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx

from services.teacher_gateway.metrics import StateCollector
from stillhouse.chassis.storage import ObjectStore
from tests.support.gateway import World, make_world
from tests.support.gateway_api import Api
from tests.support.provider import running_provider
from tests.support.teacher import running_teacher


def collect_figures(client: httpx.Client, world: World) -> dict[str, float]:
    found = client.get(f"/v1/pipelines/{world.pipeline_id}").json()
    return dict(found["stages"]["collect"]["figures"])


def at_provider(api: Api) -> dict[str, float]:
    (family,) = (
        family
        for family in StateCollector(api.engine, api.gateway.settings).collect()
        if family.name == "stillhouse_teacher_gateway_provider_batches"
    )
    return {sample.labels["state"]: sample.value for sample in family.samples}


def test_hits_and_batches_at_a_provider_are_shown(
    tmp_path: Path, store: ObjectStore, tenant: str, small: Api, client: httpx.Client
) -> None:
    with (
        running_teacher(tmp_path / "invoices.jsonl") as teacher,
        running_provider(teacher, hold=True) as provider,
    ):

        def make(name: str, **more: Any) -> World:
            url = small.gateway.settings.database_url
            asked = {"batch_api": True}
            return make_world(
                store, url, tenant, provider.url, name=name, teacher=asked, **{"items": 3, **more}
            )

        first = make("-1")
        first.collect()
        assert collect_figures(client, first) == {"batches_at_provider": 1}
        assert at_provider(small) == {"uploading": 0, "creating": 0, "waiting": 1}
        provider.release()
        first.expire()
        first.collect()
        assert collect_figures(client, first) == {}
        assert at_provider(small) == {"uploading": 0, "creating": 0, "waiting": 0}
        second = make("-2", items=4)
        second.collect()
        provider.wait()
        second.expire()
        second.collect()
        assert collect_figures(client, second) == {"answers_cached": 3}
        charges = client.get(f"/v1/pipelines/{second.pipeline_id}/charges").json()["items"]
        assert [(c["answers"], c["cached"]) for c in charges] == [(3, 3), (1, 0)]
