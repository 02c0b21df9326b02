"""What HTTP costs.

``python benchmarks/serving.py cpu``: CPU time of an HTTP process over an engine that is a stub,
beside a bare uvicorn application that streams the same bytes.

``python benchmarks/serving.py tokens MODEL [OPTIONS of reprise serve]``: tokens/s of streams
through HTTP beside ``LLM.generate``, and time to the first token beside the engine's own. MODEL is
a directory, or a name of ``reprise bench`` for random weights, which get a made-up tokenizer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
STREAMS = 64
LOADERS = 4
BURSTS = 7
"""Whose median is told: in some, verification compares a replay with an eager step."""
START_SECONDS = 2.0
"""For all of them to be there."""
CONTENT = re.compile(rb'"(?:text|content)":"(?!")')
DONE = b"data: [DONE]\n\n"


@dataclass
class Result:
    """Of a load."""

    seconds: float
    chunks: int
    """With text."""
    first: list[float]
    """Seconds to the first chunk with text, of each request."""
    lengths: list[int]
    """Bytes of the bodies."""


async def _one(port: int, path: str, bodies: Sequence[bytes], result: Result) -> None:
    """Requests one behind the other on a connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    for body in bodies:
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        ).encode()
        began = time.perf_counter()
        writer.write(head + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        assert b" 200 " in answer[:20], answer + await reader.read(2000)
        length = re.search(rb"content-length: (\d+)", answer)
        if length is not None:
            received = await reader.readexactly(int(length[1]))
            result.first.append(time.perf_counter() - began)
            result.lengths.append(len(received))
            continue
        first, total, ended = None, 0, False
        while not ended:
            size = int(await reader.readuntil(b"\r\n"), 16)
            data = await reader.readexactly(size + 2)
            ended = size == 0
            found = len(CONTENT.findall(data))
            if found and first is None:
                first = time.perf_counter() - began
            result.chunks += found
            total += size
        result.first.append(first or 0.0)
        result.lengths.append(total)
    writer.close()


def load(port: int, path: str, streams: Sequence[Sequence[bytes]], at: float = 0.0) -> Result:
    """Send the bodies of each stream one behind the other, all streams at once.

    Args:
        port: Of the server.
        path: Of the endpoint.
        streams: Bodies.
        at: When to begin, of ``time.time``.
    """

    async def run() -> Result:
        result = Result(0.0, 0, [], [])
        await asyncio.sleep(max(0.0, at - time.time()))
        await asyncio.gather(*(_one(port, path, each, result) for each in streams))
        result.seconds = time.time() - at
        return result

    return asyncio.run(run())


def in_others(port: int, path: str, streams: Sequence[Sequence[bytes]]) -> Result:
    """A load from several processes, of which none has much to do."""
    count = min(LOADERS, len(streams))
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        at = time.time() + START_SECONDS
        parts = [pool.submit(load, port, path, streams[each::count], at) for each in range(count)]
        found = [each.result() for each in parts]
    return Result(
        max(each.seconds for each in found),
        sum(each.chunks for each in found),
        [first for each in found for first in each.first],
        [length for each in found for length in each.lengths],
    )


class Process:
    """A server that says ``ready: URL``."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *command], stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
        )
        assert self._process.stderr is not None
        self.lines: list[str] = []
        for line in self._process.stderr:
            self.lines.append(line)
            found = re.match(r"ready: (\S+)", line)
            if found:
                self.port = int(found[1].rpartition(":")[2])
                break
        else:
            raise RuntimeError("".join(self.lines))
        # Who writes to a full pipe waits.
        threading.Thread(target=self._process.stderr.read, daemon=True).start()

    @property
    def pid(self) -> int:
        """Of the process that speaks HTTP."""
        found = subprocess.run(
            ["ps", "--ppid", str(self._process.pid), "-o", "pid=,args="],
            capture_output=True, text=True,
        ).stdout  # fmt: skip
        for line in found.splitlines():
            if "reprise.server.worker" in line:
                return int(line.split()[0])
        return self._process.pid

    def cpu(self) -> float:
        """Seconds of CPU time so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


# ---- CPU time beside a bare application ----------------------------------------------------


def bare(pieces: Sequence[bytes], seconds: float) -> None:
    """Streams the same bytes to every request, one piece a step, with uvicorn and nothing else."""
    import uvicorn
    import uvloop

    waiting: list[asyncio.Future[None]] = []

    async def tick() -> None:
        loop = asyncio.get_running_loop()
        at = loop.time()
        while True:
            at += seconds
            await asyncio.sleep(max(0.0, at - loop.time()))
            woken, waiting[:] = list(waiting), []
            for each in woken:
                if not each.done():
                    each.set_result(None)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        stream = scope["path"].endswith("stream")
        headers = [(b"content-type", b"text/event-stream")]
        if not stream:
            headers = [(b"content-length", b"%d" % len(pieces[0]))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for each in pieces if stream else pieces[:1]:
            if stream:
                future = asyncio.get_running_loop().create_future()
                waiting.append(future)
                await future
            await send({"type": "http.response.body", "body": each, "more_body": stream})
        if stream:
            await send({"type": "http.response.body", "body": b""})

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            self.ticking = asyncio.create_task(tick())
            port = self.servers[0].sockets[0].getsockname()[1]
            print(f"ready: http://127.0.0.1:{port}", file=sys.stderr, flush=True)

    config = uvicorn.Config(
        app, port=0, http="httptools", ws="none", lifespan="off", log_config=None, access_log=False,
        server_header=False, timeout_keep_alive=75,
    )  # fmt: skip
    uvloop.run(Server(config).serve())


def cpu(arguments: argparse.Namespace) -> None:
    """Print CPU time per chunk and per request, ours and the bare application's."""
    tokens, rounds = arguments.tokens, arguments.rounds
    order = json.dumps({"repeat": ["word", 1, tokens], "seconds": arguments.step})
    body = {"messages": [{"role": "user", "content": order}], "stream": True}
    streamed = json.dumps(body).encode()
    plain = json.dumps({"prompt": json.dumps({"seconds": 0.0}), "max_tokens": 1}).encode()
    serve = ROOT / "tests" / "server" / "serve_with.py"
    options = ["--port", "0", "--log-level", "warning"] if arguments.no_log else ["--port", "0"]
    found: list[dict[str, float]] = []
    for _ in range(arguments.repeats):
        ours = Process([str(serve), "-m reprise.testing.stub_engine", *options])
        try:
            load(ours.port, "/v1/chat/completions", [[streamed]])
            sample = _pieces(ours.port, streamed)
            with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
                json.dump([each.decode() for each in sample], file)
                file.flush()
                other = Process([__file__, "bare", file.name, str(arguments.step)])
                try:
                    load(other.port, "/stream", [[streamed]])
                    row = {
                        "ours": _stream_cost(ours, "/v1/chat/completions", streamed, rounds),
                        "bare": _stream_cost(other, "/stream", streamed, rounds),
                        "ours_request": _request_cost(ours, "/v1/completions", plain),
                        "bare_request": _request_cost(other, "/plain", plain),
                    }
                    found.append(row)
                finally:
                    other.close()
        finally:
            ours.close()
    chunks = STREAMS * rounds * tokens
    middle = {key: statistics.median(each[key] for each in found) for key in found[0]}
    ratio = statistics.median(each["ours"] / each["bare"] for each in found)
    step = arguments.step * 1e3
    print(f"{STREAMS} streams of {tokens} tokens, {rounds} rounds, a step of {step:g} ms")
    print(f"CPU time a chunk: ours {middle['ours'] / chunks * 1e6:.1f} us, bare uvicorn "
          f"{middle['bare'] / chunks * 1e6:.1f} us; ratio {ratio:.2f}")  # fmt: skip
    print(f"CPU time a plain request: ours {middle['ours_request'] * 1e3:.2f} ms, bare "
          f"{middle['bare_request'] * 1e3:.2f} ms")  # fmt: skip


def _pieces(port: int, body: bytes) -> list[bytes]:
    """What one stream is made of, as it is sent."""

    async def read() -> list[bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        await reader.readuntil(b"\r\n\r\n")
        found = []
        while size := int(await reader.readuntil(b"\r\n"), 16):
            found.append((await reader.readexactly(size + 2))[:-2])
        writer.close()
        return found

    return asyncio.run(read())


def _stream_cost(server: Process, path: str, body: bytes, rounds: int) -> float:
    before = server.cpu()
    in_others(server.port, path, [[body] * rounds] * STREAMS)
    return server.cpu() - before


def _request_cost(server: Process, path: str, body: bytes, count: int = 2000) -> float:
    before = server.cpu()
    in_others(server.port, path, [[body] * (count // 8)] * 8)
    return (server.cpu() - before) / count


# ---- tokens/s beside LLM.generate ----------------------------------------------------------


def make_tokenizer(directory: Path, vocab_size: int) -> None:
    """One of as many tokens as the model has, for weights that mean nothing."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: number for number, letter in enumerate(letters)}
    for number in range(len(vocab), vocab_size):
        vocab[f"Ġt{number}"] = number
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 1 << 20}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def _model(name: str, directory: Path) -> list[str]:
    """Options for the model, as the command line has them."""
    from reprise.bench.presets import model_names

    if name not in model_names():
        return ["--model", name]
    source = ROOT / "src" / "reprise" / "bench" / "configs" / name / "config.json"
    config = json.loads(source.read_text())
    (directory / "config.json").write_text(json.dumps(config))
    make_tokenizer(directory, config["vocab_size"])
    return ["--model", str(directory), "--load-format", "dummy"]


def tokens(arguments: argparse.Namespace, options: list[str]) -> None:
    """Print tokens/s and times to the first token, both ways."""
    with tempfile.TemporaryDirectory() as directory:
        engine = [*_model(arguments.model, Path(directory)), *options]
        counts = [int(each) for each in arguments.tokens.split(",")]
        offline = json.loads(
            subprocess.run(
                [sys.executable, __file__, "offline", arguments.tokens, *engine],
                capture_output=True, text=True, check=True,
            ).stdout.splitlines()[-1]
        )  # fmt: skip
        for count, rate in zip(counts, offline["rates"], strict=True):
            print(f"LLM.generate {rate:,.0f} tok/s with {count} tokens each")
        print(f"first token of one request {_ms(offline['first'])}")
        for servers in arguments.servers.split(","):
            command = ["-m", "reprise", "serve", "--port", "0", "--api-server-count", servers]
            server = Process([*command, "--log-level", "warning", *engine])
            print(f"{servers} HTTP process(es), {STREAMS} streams:")
            try:
                for count, base in zip(counts, offline["rates"], strict=True):
                    http = _http(server, count)
                    rate = http["rate"]
                    print(f"    {rate:,.0f} tok/s with {count} tokens each: {rate / base:.3f}")
                    print(f"    tokens a chunk: mean {http['mean']:.2f}, p99 {http['p99']:.0f}")
                first = _first_token(server)
            finally:
                server.close()
            print(f"    first token {_ms(first)}: {_ms(first - offline['first'])} more")


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def _prompt(number: int, length: int = 128) -> list[int]:
    """None begins like another one's, which would be in the prefix cache."""
    first = [300 + number % 900, 300 + number // 900]
    return first + [300 + (number * 7919 + place * 31) % 900 for place in range(length - 2)]


def _burst(count: int, repeat: int) -> list[int]:
    """Numbers of the prompts of a repeat with outputs of so many tokens."""
    first = 10_000 + 256 * count + STREAMS * repeat
    return list(range(first, first + STREAMS))


def _body(number: int, count: int, stream: bool = True) -> bytes:
    body = {
        "prompt": _prompt(number), "max_tokens": count, "ignore_eos": True, "temperature": 0,
        "stream": stream, "return_token_ids": False,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }  # fmt: skip
    return json.dumps(body).encode()


def _http(server: Process, count: int) -> dict[str, float]:
    path = "/v1/completions"
    in_others(server.port, path, [[_body(each, 32)] for each in range(STREAMS)])
    rates, sizes = [], []
    for repeat in range(BURSTS):
        bodies = [[_body(each, count)] for each in _burst(count, repeat)]
        found = in_others(server.port, path, bodies)
        rates.append(STREAMS * count / found.seconds)
        sizes.append(STREAMS * count / max(1, found.chunks))
    counts = _tokens_a_chunk(server.port, count)
    return {
        "rate": statistics.median(rates),
        "mean": statistics.median(sizes),
        "p99": sorted(counts)[int(len(counts) * 0.99)],
    }


def _first_token(server: Process) -> float:
    """Seconds to it, of requests one behind the other."""
    bodies = [_body(5000 + each, 4) for each in range(60)]
    alone = in_others(server.port, "/v1/completions", [bodies])
    return statistics.median(alone.first[10:])


def _tokens_a_chunk(port: int, count: int) -> list[int]:
    """Of one stream beside 63 others: by the running usage in each chunk."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        others = [[_body(7000 + each, count)] for each in range(STREAMS - 1)]
        loading = pool.submit(load, port, "/v1/completions", others)

        async def read() -> list[int]:
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
            body = _body(9000, count)
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
            )
            text = await reader.readuntil(DONE)
            writer.close()
            found = [int(each) for each in re.findall(rb'"completion_tokens":(\d+)', text)]
            steps = [later - before for before, later in zip([0, *found], found, strict=False)]
            return [each for each in steps if each]

        counts = asyncio.run(read())
        loading.result()
    return counts


def offline(counts: list[int], options: list[str]) -> None:
    """Print, as JSON, what ``LLM`` does with the same prompts."""
    from typer.main import get_command

    from reprise import LLM, SamplingParams
    from reprise.cli.app import app

    command = get_command(app).commands["generate"]  # type: ignore[attr-defined]
    parsed = command.make_context("generate", ["x", *options]).params
    names = ("model", "load_format", "max_model_len", "max_num_seqs", "num_blocks", "device",
             "graph_mode", "graph_verify", "dtype", "kv_cache_memory_bytes")  # fmt: skip
    given = {each: parsed[each] for each in names if parsed.get(each) is not None}
    given = {key: getattr(value, "value", value) for key, value in given.items()}
    llm = LLM(**given)
    few = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    llm.generate([_prompt(each) for each in range(STREAMS)], few, use_tqdm=False)
    four = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    rates = []
    for count in counts:
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        found = []
        for repeat in range(BURSTS):
            prompts = [_prompt(each) for each in _burst(count, repeat)]
            began = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            found.append(STREAMS * count / (time.perf_counter() - began))
        rates.append(statistics.median(found))
    firsts = []
    for each in range(60):
        prompt = _prompt(5000 + each)
        (output,) = llm.generate([prompt], four, use_tqdm=False)
        firsts.append(output.metrics.time_to_first_token or 0.0)
    print(json.dumps({"rates": rates, "first": statistics.median(firsts[10:])}))


def main() -> None:
    if sys.argv[1:2] == ["bare"]:
        pieces = [each.encode() for each in json.loads(Path(sys.argv[2]).read_text())]
        bare(pieces, float(sys.argv[3]))
        return
    if sys.argv[1:2] == ["offline"]:
        offline([int(each) for each in sys.argv[2].split(",")], sys.argv[3:])
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("cpu")
    one.add_argument("--tokens", type=int, default=256)
    one.add_argument("--rounds", type=int, default=3)
    one.add_argument("--repeats", type=int, default=3)
    one.add_argument("--step", type=float, default=0.02, help="seconds of a step of the stub")
    one.add_argument("--no-log", action="store_true", help="no access log")
    two = commands.add_parser("tokens")
    two.add_argument("model")
    two.add_argument("--tokens", default="256,1024", help="lengths of outputs")
    two.add_argument("--servers", default="1", help="numbers of HTTP processes, 1,2")
    given, rest = parser.parse_known_args()
    if given.command == "cpu":
        cpu(given)
    else:
        tokens(given, rest)


if __name__ == "__main__":
    main()
