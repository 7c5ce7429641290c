"""What the gateway, the builder and the trainer rely on in the demo's teacher and its weights."""

import http.client
import json
import subprocess
import sys

import pytest

from stillhouse.embedded.ports import free_ports
from stillhouse.embedded.process import base_environment, kill_group, spawn, wait_until_ready
from stillhouse.embedded.stack import http_probe
from stillhouse.embedded.teacher import MODEL_NAME, gguf_path

pytest.importorskip("xllamacpp", reason="needs the extra stillhouse[demo]")
try:
    gguf_path()
except FileNotFoundError as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = pytest.mark.slow

QUESTION = [{"role": "user", "content": "What is 2+2? Answer in one sentence."}]
END_OF_TURN = 2


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    port, log = next(free_ports()), tmp_path_factory.mktemp("teacher") / "log"
    argv = [sys.executable, "-m", "stillhouse.embedded.teacher", "--port", str(port)]
    process = spawn(argv, env=base_environment({"OMP_NUM_THREADS": "1"}), log=log)
    probe = http_probe("127.0.0.1", port, "/health")
    wait_until_ready(process, probe, name="teacher", log=log, deadline_seconds=60)

    def post(**fields):
        body = {"model": MODEL_NAME, "messages": QUESTION, "max_tokens": 24, "temperature": 1.0}
        body |= {"logprobs": True, "top_logprobs": 20, "seed": 3} | fields
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        answer = json.load(connection.getresponse())
        connection.close()
        return answer

    yield post
    kill_group(process)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "model"
    command = [sys.executable, "-m", "stillhouse.embedded.weights", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def content(answer):
    return answer["choices"][0]["logprobs"]["content"]


def test_each_token_has_its_id_and_twenty_alternatives_down_to_the_end_of_turn(ask):
    answer = ask()
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert len(content(answer)) == answer["usage"]["completion_tokens"]
    assert content(answer)[-1]["id"] == END_OF_TURN
    assert all(len(token["top_logprobs"]) == 20 for token in content(answer))


def test_log_probabilities_are_raw_at_any_temperature(ask):
    first = [content(ask(max_tokens=1, **f))[0] for f in ({}, {"temperature": 0.5, "top_p": 0.3})]
    assert first[0]["top_logprobs"] == first[1]["top_logprobs"]


def test_the_same_seed_gives_the_same_answer_whatever_the_slot_held(ask):
    before = content(ask())
    ask(messages=[{"role": "user", "content": "Something else."}], seed=4)
    assert content(ask()) == before
    assert content(ask(seed=5)) != before


def test_the_weights_are_the_served_ones_but_for_rounding(ask, weights):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    answer = ask()
    tokenizer = AutoTokenizer.from_pretrained(weights, local_files_only=True)
    text = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(prompt) == answer["usage"]["prompt_tokens"]
    sampled = [token["id"] for token in content(answer)]
    assert tokenizer.decode(sampled[:-1]) == answer["choices"][0]["message"]["content"]

    model = AutoModelForCausalLM.from_pretrained(weights, local_files_only=True)
    assert model.dtype == torch.float32
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert not hasattr(model.config, "quantization_config")
    with torch.no_grad():
        logits = model(torch.tensor([prompt + sampled])).logits[0, len(prompt) - 1 : -1]
    ours = logits.log_softmax(-1)
    gaps = []
    for row, token in zip(ours, content(answer), strict=True):
        theirs = torch.tensor([a["logprob"] for a in token["top_logprobs"]])
        mine = row[[a["id"] for a in token["top_logprobs"]]]
        gaps.append(float((theirs.exp() * (theirs - mine)).sum()))
    assert sum(gaps) / len(gaps) < 0.03  # 0.003 nats measured: the noise floor of Q4_1


def test_converting_again_returns_at_once(weights):
    before = (weights / "model.safetensors").stat().st_mtime_ns
    command = [sys.executable, "-m", "stillhouse.embedded.weights", str(weights)]
    subprocess.run(command, check=True, capture_output=True, timeout=10)
    assert (weights / "model.safetensors").stat().st_mtime_ns == before
    assert [p.name for p in weights.parent.iterdir()] == [weights.name]
