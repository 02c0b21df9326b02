"""Streams and events: work happens in the order that the host asks for."""

from __future__ import annotations

import time

import torch

from reprise.doctor.conformance.contract import Kit, contract, need

ROUNDS = 8
TRIALS = 10


@contract("order")
def streams_order_work(kit: Kit) -> str:
    """A stream that waits for another sees all that was submitted there before.

    ``side.wait_stream(current)`` and back: what the side stream computes starts from the current
    stream's results, and the current stream goes on from the side stream's. Used by every
    capture, which runs on a stream of its own.
    """
    platform = kit.platform
    current, side = platform.current_stream(), platform.stream()
    for value in range(1, 4):
        x, y = kit.full(4096), kit.full(4096)
        kit.burn()
        x.fill_(value)
        side.wait_stream(current)
        with platform.use_stream(side):
            kit.burn()
            y.copy_(x * 2)
        current.wait_stream(side)
        z = y + 1
        platform.synchronize()
        got = float(z.amin()), float(z.amax())
        need(
            got == (2 * value + 1,) * 2,
            f"{got} instead of {2 * value + 1}: a wait_stream() did not hold work back",
        )
    return "3 round trips over a side stream"


@contract("order")
def events_order_work(kit: Kit) -> str:
    """Work behind ``event.wait`` starts from what was submitted before ``event.record``.

    After ``event.synchronize()`` the host reads what was copied to it before the event, and
    ``query()`` says that the event has happened. Used for every step's results.
    """
    platform = kit.platform
    x, y = kit.full(4096), kit.full(4096)
    host = torch.zeros(4096, pin_memory=platform.pins_memory)
    side, event, done = platform.stream(), platform.event(), platform.event()
    side.wait_stream(platform.current_stream())
    with platform.use_stream(side):
        kit.burn(ROUNDS)
        x.fill_(3)
        event.record(side)
    event.wait(platform.current_stream())
    y.copy_(x + 1)
    host.copy_(y, non_blocking=True)
    done.record(platform.current_stream())
    done.synchronize()
    need(bool(host.eq(4).all()), f"the host read {host[0]} and not 4 behind the event")
    need(done.query(), "query() is false for an event that synchronize() has waited for")
    return "a wait between streams, and one by the host"


@contract("order")
def events_time_work(kit: Kit) -> str:
    """``elapsed_time`` of two events is the time of the work between them, in milliseconds.

    More work takes longer, and never longer than the host's own clock saw.
    """
    platform = kit.platform

    def measure(rounds: int) -> tuple[float, float]:
        began, ended = platform.event(timing=True), platform.event(timing=True)
        platform.synchronize()
        wall = time.perf_counter()
        began.record(platform.current_stream())
        kit.burn(rounds)
        ended.record(platform.current_stream())
        platform.synchronize()
        return float(began.elapsed_time(ended)), (time.perf_counter() - wall) * 1e3

    kit.burn(ROUNDS)
    # Another program may have the processor at any moment, between two lines of this one too: a
    # trial decides nothing against the platform, only that none of many shows what is right.
    wrong: str | None = None
    for _ in range(TRIALS):
        (short, _), (long, wall) = measure(1), measure(2 * ROUNDS)
        wrong = _wrong(short, long, wall)
        if wrong is None:
            break
    need(wrong is None, wrong or "")
    return f"{long:.2f} ms by events, {wall:.2f} ms by the host's clock"


def _wrong(short: float, long: float, wall: float) -> str | None:
    """What cannot be in the times, in ms, of one round of work and of many; None: they can."""
    if short <= 0:
        return f"elapsed_time() is {short:.3f} ms for work that takes time"
    if long <= 2 * short:
        return f"{2 * ROUNDS} times the work takes {long:.3f} ms, the single amount {short:.3f} ms"
    if not wall * 0.2 <= long <= wall * 1.05 + 0.5:
        return f"events say {long:.3f} ms, the host's clock {wall:.3f} ms"
    return None
