"""The process whose start is measured: ``python -m reprise.bench.startup_child JSON``.

Prints one JSON line: the moments it passed, by the wall clock that its parent reads too, and the
engine's spans.
"""

import time

alive = time.time()

import json  # noqa: E402 - the clock comes first
import sys  # noqa: E402


def main() -> None:
    from reprise import early

    arguments = json.loads(sys.argv[1])
    early.begin(arguments)  # as 'reprise generate' does
    from reprise import LLM, RepriseError

    moments = {"alive": alive, "imported": time.time()}
    try:
        engine = LLM(**arguments).engine
        moments["ready"] = time.time()

        from reprise.bench.drive import run

        run(engine, [[1, 2, 3]], [1])
        moments["first_token"] = time.time()
    except RepriseError as error:
        print(json.dumps({"error": str(error)}))
        return
    from reprise.bench.record import engine_facts

    facts = engine_facts(arguments["model"], engine)
    print(json.dumps({"moments": moments, "spans": engine.startup, "facts": facts}))


if __name__ == "__main__":
    main()
