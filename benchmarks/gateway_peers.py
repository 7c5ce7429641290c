"""The other gateways of `benchmarks.gateway`, each as it is run for speed; in a venv of their own.

    python -m benchmarks.gateway_peers tensorzero --upstream http://127.0.0.1:9911/v1 --folder DIR
    python -m benchmarks.gateway_peers fastapi --upstream ... --folder DIR --port 9922
    python -m benchmarks.gateway_peers litellm --upstream ... --folder DIR --port 9923

Each prints one JSON line `{"url": ..., "model": ..., "key": ...}` once it serves. TensorZero is its
gateway as the Python package embeds it, with recording off; the pass-through is what one writes in
an afternoon (FastAPI, aiohttp, both bodies appended to a file, no fsync); LiteLLM is its proxy with
a master key and no database, so it records nothing either.
"""

import argparse
import asyncio
import json
import os
import sys
import threading
import time
import urllib.request
from pathlib import Path

KEY = "sk-benchmark"
MODEL = "upstream"


def told(url: str, model: str, key: str = "none") -> None:
    """Say where the peer serves, and nothing more: whoever started it reads no further."""
    print(json.dumps({"url": url, "model": model, "key": key}), flush=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def tensorzero(upstream: str, folder: Path) -> None:
    import warnings

    from openai import OpenAI
    from tensorzero import patch_openai_client

    warnings.simplefilter("ignore", DeprecationWarning)
    # It warns of our `metadata` at each request; writing that down is not what is compared.
    os.environ["RUST_LOG"] = "error"
    config = folder / "tensorzero.toml"
    config.write_text(
        "[gateway]\nobservability.enabled = false\n"
        f'[models.{MODEL}]\nrouting = ["here"]\n'
        f'[models.{MODEL}.providers.here]\ntype = "openai"\nmodel_name = "{MODEL}"\n'
        f'api_base = "{upstream}/"\napi_key_location = "none"\n'
    )
    client = OpenAI(api_key="none")
    patch_openai_client(client, config_file=str(config), async_setup=False)
    told(f"{client.base_url}chat/completions", f"tensorzero::model_name::{MODEL}")
    while True:
        time.sleep(3600)


def fastapi(upstream: str, folder: Path, port: int) -> None:
    import aiohttp
    import uvicorn
    from fastapi import FastAPI, Request, Response

    app = FastAPI()
    record = (folder / "record.jsonl").open("ab")
    shared: dict[str, aiohttp.ClientSession] = {}

    @app.post("/v1/chat/completions")
    async def forward(request: Request) -> Response:
        session = shared.get("session")
        if session is None:
            session = shared["session"] = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0), auto_decompress=False
            )
        asked = await request.json()
        async with session.post(f"{upstream}/chat/completions", json=asked) as answer:
            body = await answer.read()
        line = {"at": time.time(), "request": asked, "response": json.loads(body)}
        record.write(json.dumps(line).encode() + b"\n")
        return Response(body, answer.status, media_type="application/json")

    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", access_log=False)
    )
    _tell_when_up(port, f"http://127.0.0.1:{port}/v1/chat/completions", "none")
    asyncio.run(server.serve())


def litellm(upstream: str, folder: Path, port: int) -> None:
    config = folder / "litellm.yaml"
    config.write_text(
        f"model_list:\n  - model_name: {MODEL}\n    litellm_params:\n"
        f"      model: openai/{MODEL}\n      api_base: {upstream}\n      api_key: none\n"
        f"general_settings:\n  master_key: {KEY}\nlitellm_settings:\n  telemetry: false\n"
    )
    _tell_when_up(port, f"http://127.0.0.1:{port}/v1/chat/completions", KEY)
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    sys.argv = ["litellm", "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    sys.argv += ["--num_workers", "1", "--telemetry", "False"]
    from litellm import run_server

    run_server()


def _tell_when_up(port: int, url: str, key: str) -> None:
    """Say where it serves once it answers anything at all."""

    def wait() -> None:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health/liveliness", timeout=2)
                break
            except urllib.error.HTTPError:
                break
            except OSError:
                time.sleep(0.2)
        told(url, MODEL, key)

    threading.Thread(target=wait, daemon=True).start()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer", choices=("tensorzero", "fastapi", "litellm"))
    parser.add_argument("--upstream", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--port", type=int, default=0)
    chosen = parser.parse_args()
    if chosen.peer == "tensorzero":
        tensorzero(chosen.upstream, chosen.folder)
    elif chosen.peer == "fastapi":
        fastapi(chosen.upstream, chosen.folder, chosen.port)
    else:
        litellm(chosen.upstream, chosen.folder, chosen.port)


if __name__ == "__main__":
    main()
