"""What the backend alone needs: sends request bodies that are already there, and reads the answers as bytes.

`python benchmarks/backend_alone.py URL BODIES.jsonl --in_flight 64` prints one JSON line. It knows no retries, no
judge, no journal: nothing but the server stands between it and the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from pathlib import Path

import aiohttp


async def send_all(url: str, bodies: list[bytes], in_flight: int) -> float:
    """Seconds until every body has its answer; a constant number is in flight."""
    waiting = iter(bodies)
    headers = {"content-type": "application/json"}
    connector = aiohttp.TCPConnector(limit=in_flight)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(None)) as session:

        async def worker() -> None:
            for body in waiting:
                async with session.post(url, data=body, headers=headers) as answer:
                    await answer.read()
                    answer.raise_for_status()

        started = time.monotonic()
        await asyncio.gather(*(worker() for _ in range(in_flight)))
        return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url", help="e.g. http://127.0.0.1:8000/v1/chat/completions")
    parser.add_argument("bodies", type=Path)
    parser.add_argument("--in_flight", type=int, default=64)
    args = parser.parse_args()
    bodies = args.bodies.read_bytes().splitlines()
    seconds = asyncio.run(send_all(args.url, bodies, args.in_flight))
    print(json.dumps({"requests": len(bodies), "seconds": seconds, "requests_per_s": len(bodies) / seconds}))


if __name__ == "__main__":
    main()
