"""Prometheus metrics of a running server: what they count, and that they tell no text."""

from __future__ import annotations

import asyncio
import urllib.request
from typing import Any

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from protos.rlaif.reward.v1 import reward_pb2 as pb
from reward_server.config import ServeConfig
from reward_server.server import RewardServer
from rlaif.errors import ConfigError
from tests.reward_server.fakes import LengthScorer, score_request, serving


def scrape(port: int) -> tuple[str, dict[tuple[str, frozenset[tuple[str, str]]], float]]:
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    return text, {(s.name, frozenset(s.labels.items())): s.value for s in samples}


def test_metrics_count_calls_items_tokens_and_tell_no_text() -> None:
    async def scenario() -> None:
        async with serving(LengthScorer(), metrics_port=0) as served:
            await served.stub.Score(score_request("secret words", "poison", "nan"))
            with pytest.raises(grpc.aio.AioRpcError):
                await served.stub.Score(pb.ScoreRequest())
            port = served.server.metrics_port
            assert port is not None
            text, metrics = await asyncio.to_thread(scrape, port)

        def value(metric: str, /, **labels: str) -> Any:
            return metrics.get((metric, frozenset(labels.items())))

        assert value("rlaif_calls_total", method="Score", code="OK") == 1
        assert value("rlaif_calls_total", method="Score", code="INVALID_ARGUMENT") == 1
        assert value("rlaif_items_total", outcome="score") == 1
        assert value("rlaif_items_total", outcome="model_failed") == 1
        assert value("rlaif_items_total", outcome="not_finite") == 1
        assert value("rlaif_tokens_total") == len("secret words") + len("poison") + len("nan")
        assert value("rlaif_padded_tokens_total") >= value("rlaif_tokens_total")
        assert value("rlaif_active_model", name="length", version="length-1") == 1
        assert value("rlaif_queue_tokens") == 0
        assert "secret" not in text

    asyncio.run(scenario())


def test_metrics_on_a_port_in_use_stop_the_start_with_one_line() -> None:
    async def scenario() -> None:
        async with serving(LengthScorer(), metrics_port=0) as served:
            config = ServeConfig(model="length", port=0, metrics_port=served.server.metrics_port)
            with pytest.raises(ConfigError, match="metrics_port"):
                await RewardServer(config).start()

    asyncio.run(scenario())
