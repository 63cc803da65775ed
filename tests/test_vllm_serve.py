"""``vllm serve MODEL --kv-cache-dtype turboquant``, its OpenAI API, ``vllm bench serve`` and the example, on the CPU.

The model is a small Qwen3 with random weights, whose words are numbers.
"""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

if find_spec("vllm") is None or find_spec("vllm.config") is None:
    pytest.skip("vLLM is not installed: make test-vllm makes an environment that has it", allow_module_level=True)

from kvfold.modelshape import ModelShape
from kvfold.planner import plan

pytestmark = pytest.mark.xdist_group("serve")  # one server for all, in one worker
SCRIPT = Path(__file__).with_name("vllm_cpu_engine.py")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
WORDS = 512
PROMPT = [(7 * i * i + 3 * i) % 500 + 2 for i in range(150)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        num_hidden_layers=2, hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        intermediate_size=256, vocab_size=WORDS, tie_word_embeddings=False, max_position_embeddings=2048,
        bos_token_id=0, eos_token_id=1, initializer_range=0.2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("served")
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    words = Tokenizer(WordLevel({str(n): n for n in range(WORDS)}, unk_token="0"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="0", eos_token="1", unk_token="0")
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


class Server:
    def __init__(self, port: int) -> None:
        self.port = port

    def post(self, path: str, **body: Any) -> str:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/{path}", json.dumps({"model": "numbers", **body}).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        with OPENER.open(request, timeout=120) as answer:
            return answer.read().decode()

    def ask(self, path: str, **body: Any) -> Any:
        return json.loads(self.post(path, **body))["choices"][0]


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("log") / "serve.log"
    for last in (False, False, True):  # somebody else may take the port before the server does
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [
            sys.executable, SCRIPT, "serve", model, "--kv-cache-dtype", "turboquant", "--host", "127.0.0.1", "--port",
            str(port), "--served-model-name", "numbers", "--dtype", "bfloat16", "--max-model-len", "1024",
            "--max-num-seqs", "8", "--block-size", "64", "--kv-cache-memory-bytes", str(2**22), "--enforce-eager",
            "--no-enable-prefix-caching", "--compilation-config", '{"custom_ops": ["none"], "mode": 0}',
        ]  # fmt: skip
        with log.open("w") as out:
            process = subprocess.Popen(command, env=ENVIRONMENT, stdout=out, stderr=out, start_new_session=True)
        try:
            if not answers(port, process):
                assert not last, log.read_text()[-4000:]
                assert "in use" in log.read_text(), log.read_text()[-4000:]
                continue
            assert "kvfold compresses 2 of 2 layers to k4v4" in log.read_text()
            yield Server(port)
            return
        finally:
            process.terminate()
            try:
                process.wait(60)
            finally:  # its engine is a process of its own, which outlives it if it ends too soon
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def answers(port: int, process: subprocess.Popen[bytes]) -> bool:
    """Wait for the server; whether it is there."""
    for _ in range(240):
        if process.poll() is not None:
            return False
        try:
            with OPENER.open(f"http://127.0.0.1:{port}/health", timeout=5):
                return True
        except OSError:
            time.sleep(1)
    return False


def test_completions_are_those_of_the_engine(server: Server, model: Path) -> None:
    """Of a prompt in token ids, with the logarithms of the likeliest; and the same text in pieces."""
    asked = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    answer = server.ask("completions", logprobs=3, **asked)
    told = [int(word) for word in answer["logprobs"]["tokens"]]
    job = {"model": str(model), "rounds": [[PROMPT]], "new": 8}
    done = subprocess.run(
        [sys.executable, SCRIPT, json.dumps(job)], capture_output=True, text=True, timeout=300, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert told == json.loads(done.stdout.splitlines()[-1])["rounds"][0][0]["tokens"]
    for value, likeliest in zip(answer["logprobs"]["token_logprobs"], answer["logprobs"]["top_logprobs"], strict=True):
        assert len(likeliest) == 3
        assert value == max(likeliest.values()) < 0
    events = server.post("completions", stream=True, **asked).split("\n\n")
    pieces = [json.loads(event.removeprefix("data: ")) for event in events if event.startswith("data: {")]
    assert len(pieces) > 1
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == answer["text"]


def test_chats_have_logprobs_and_may_be_drawn(server: Server) -> None:
    messages = [{"role": "user", "content": " ".join(map(str, PROMPT[:40]))}]
    asked = {"messages": messages, "max_tokens": 5, "ignore_eos": True}
    answer = server.ask("chat/completions", logprobs=True, top_logprobs=2, temperature=0, **asked)
    assert len(answer["logprobs"]["content"]) == len(answer["message"]["content"].split()) == 5
    assert all(len(token["top_logprobs"]) == 2 for token in answer["logprobs"]["content"])
    drawn = [server.ask("chat/completions", seed=seed, **asked) for seed in (1, 1, 2)]
    first, again, other = (one["message"]["content"] for one in drawn)
    assert first == again != other


def test_wrong_requests_are_refused_and_the_server_goes_on(server: Server) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.post("completions", prompt=PROMPT, max_tokens=5000)
    assert refused.value.code == 400
    assert "1024" in refused.value.read().decode()
    assert server.ask("completions", prompt=PROMPT, max_tokens=1)["text"]


def test_vllm_bench_serve(server: Server, model: Path) -> None:
    command = [
        sys.executable, SCRIPT, "bench", "serve", "--model", "numbers", "--tokenizer", model, "--host", "127.0.0.1",
        "--port", str(server.port), "--dataset-name", "random", "--random-input-len", "100", "--random-output-len", "8",
        "--num-prompts", "5",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-4000:]
    assert re.search(r"Successful requests: +5\b", done.stdout)
    assert re.search(r"Total generated tokens: +40\b", done.stdout)


def test_the_example_answers(model: Path) -> None:
    command = [
        sys.executable, SCRIPT, SCRIPT.parents[1] / "examples" / "vllm_offline.py", "--model", model,
        "--kv-cache-dtype", "kvfold_k3v3", "--max-tokens", "4",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "kvfold compresses 2 of 2 layers to k3v3; 0 stay as they are" in done.stdout + done.stderr
    *_, first, second, third, room = done.stdout.splitlines()
    assert [len(ast.literal_eval(answer).split()) for answer in (first, second, third)] == [4, 4, 4]
    (row,) = [row for row in plan(ModelShape.uniform(2, 2, 64), 2**22, 64, ["k3v3"]) if str(row.format) == "k3v3"]
    assert room == f"the cache in kvfold_k3v3 has room for {row.tokens:,} tokens"
