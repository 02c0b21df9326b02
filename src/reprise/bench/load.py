"""Sends requests when they are due: in this process, or in several that do nothing else.

A process is given its requests by a line on its standard input, says ``ready`` when it could begin,
is told the moment by a second line, and writes a line for each answer. Moments are of
``time.perf_counter``, which all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from reprise.bench.endpoint import Answer, Endpoint, Prompt
from reprise.errors import RepriseError

AHEAD_SECONDS = 0.05
"""From the word to begin to the first request, for it to arrive everywhere."""
LINE_LIMIT = 1 << 26
"""Bytes of an answer's line: two dozen for each chunk."""


class Load:
    """Requests under way.

    Args:
        endpoint: The server that they are sent to.
        prompts: What is sent.
        offsets: Seconds from the begin at which each is due.
        limit: Requests under way at once; None: any number.
        processes: That send them.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        prompts: Sequence[Prompt],
        offsets: Sequence[float],
        limit: int | None,
        processes: int = 1,
    ) -> None:
        self._endpoint = endpoint
        self._prompts = prompts
        self._offsets = offsets
        self._limit = limit
        self._processes = min(processes, len(prompts), limit or len(prompts))
        self.began = 0.0
        self.busy_seconds = 0.0
        """Of the processor, in the process that took most."""

    async def answers(self) -> AsyncGenerator[Answer, None]:
        """As they are complete."""
        if self._processes > 1:
            async for each in self._elsewhere():
                yield each
            return
        worked, self.began = time.process_time(), time.perf_counter()
        due = [self.began + each for each in self._offsets]
        sending = send(self._endpoint, self._prompts, due, self._limit)
        try:
            async for each in sending:
                yield each
        finally:
            await sending.aclose()
            self.busy_seconds = time.process_time() - worked

    async def _elsewhere(self) -> AsyncGenerator[Answer, None]:
        senders: list[asyncio.subprocess.Process] = []
        try:
            for number in range(self._processes):
                senders.append(await self._start(number))
            for each in senders:
                assert each.stdout is not None
                if (await each.stdout.readline()).strip() != b"ready":
                    raise RepriseError("a client process has not started; its error is above")
            self.began = time.perf_counter() + AHEAD_SECONDS
            for each in senders:
                assert each.stdin is not None
                each.stdin.write(b"%b\n" % repr(self.began).encode())
            news: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
            readers = [asyncio.create_task(_read(each, news)) for each in senders]
            try:
                left = len(readers)
                while left:
                    found = await news.get()
                    if found is None:
                        left -= 1
                    elif "busy" in found:
                        self.busy_seconds = max(self.busy_seconds, found["busy"])
                    else:
                        yield Answer(**found)
            finally:
                for reader in readers:
                    reader.cancel()
        finally:
            for each in senders:
                with contextlib.suppress(ProcessLookupError):
                    each.kill()
                await each.wait()

    async def _start(self, number: int) -> asyncio.subprocess.Process:
        sender = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "reprise.bench.load",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=LINE_LIMIT,
            start_new_session=True,  # Ctrl-C is for the parent, which ends it
        )  # fmt: skip
        assert sender.stdin is not None
        count = self._processes
        limit = self._limit
        job = {
            "endpoint": self._endpoint.options,
            "prompts": [dataclasses.asdict(each) for each in self._prompts[number::count]],
            "offsets": list(self._offsets[number::count]),
            "limit": None if limit is None else limit // count + (number < limit % count),
        }
        sender.stdin.write(json.dumps(job).encode() + b"\n")
        await sender.stdin.drain()
        return sender


async def _read(
    sender: asyncio.subprocess.Process, news: asyncio.Queue[dict[str, Any] | None]
) -> None:
    assert sender.stdout is not None
    while line := await sender.stdout.readline():
        news.put_nowait(json.loads(line))
    news.put_nowait(None)


async def send(
    endpoint: Endpoint, prompts: Sequence[Prompt], due: Sequence[float], limit: int | None
) -> AsyncGenerator[Answer, None]:
    """Answers, as they are complete.

    Args:
        endpoint: The server.
        prompts: What is sent.
        due: When each is sent, if no more than ``limit`` others are under way.
        limit: None: any number.
    """
    free = asyncio.Semaphore(limit or len(prompts))

    async def one(prompt: Prompt, at: float) -> Answer:
        await asyncio.sleep(at - time.perf_counter())
        async with free:
            return await endpoint.ask(prompt, at)

    tasks = [asyncio.create_task(one(*each)) for each in zip(prompts, due, strict=True)]
    try:
        for each in asyncio.as_completed(tasks):
            yield await each
    finally:
        for task in tasks:
            task.cancel()


async def _send_as_told() -> None:
    job = json.loads(sys.stdin.readline())
    prompts = [Prompt(**each) for each in job["prompts"]]
    async with Endpoint(**job["endpoint"]) as endpoint:
        print("ready", flush=True)
        began = float(sys.stdin.readline())
        worked = time.process_time()
        due = [began + each for each in job["offsets"]]
        async for each in send(endpoint, prompts, due, job["limit"]):
            print(json.dumps(dataclasses.asdict(each)), flush=True)
        print(json.dumps({"busy": time.process_time() - worked}), flush=True)


if __name__ == "__main__":
    asyncio.run(_send_as_told())
