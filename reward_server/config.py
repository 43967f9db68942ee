"""The flags of `rlaif serve`. Imports neither torch nor grpc."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlaif.errors import ConfigError

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class ServeConfig:
    """Serve rewards over gRPC: `--model` for a learned reward model, or `--judge` for an LLM that scores directly."""

    model: str | None = None
    """Reward model: a folder of `rlaif train rm` or any sequence classifier with one output, vllm:NAME_OR_PATH for the
    same in vLLM's engine, or a .yaml file with parts and a rule that makes one score of theirs."""
    judge: str | None = None
    """Judge: tinyworld:judge, hf:NAME_OR_PATH or openai:NAME@BASE_URL."""
    rubric: str = "helpfulness-score"
    """Rubric of `Score` when a judge serves: a preset, tinyworld:score or a YAML file."""
    pair_rubric: str | None = None
    """Rubric of `Compare` when a judge serves: a preset, tinyworld:pair or a YAML file. Without it, no `Compare`."""
    cot: bool = True
    """Whether the judge writes a rationale before its score."""
    host: str = "127.0.0.1"
    """Address to listen on; other than loopback needs TLS and tokens."""
    port: int = 50051
    """Port to listen on; 0 picks a free one."""
    tls_cert: Path | None = None
    """Certificate chain, PEM; with --tls_key. Renewed files are taken up while the server runs."""
    tls_key: Path | None = None
    """Private key of the certificate, PEM."""
    tls_client_ca: Path | None = None
    """Mutual TLS: only clients with a certificate of these authorities may connect, PEM."""
    token_file: Path | None = None
    """Bearer tokens, one `score TOKEN` or `admin TOKEN` a line; read again when it changes."""
    metrics_port: int | None = None
    """Serve Prometheus metrics at http://HOST:PORT/metrics; 0 picks a free port."""
    metrics_host: str = "127.0.0.1"
    """Address of the metrics. They hold counts, durations and model names, never text."""
    otlp_endpoint: str | None = None
    """Send OpenTelemetry spans to the collector at this URL over gRPC, http://localhost:4317 for example. The OTEL_*
    variables set the rest: service name, sampler, headers, certificates. Spans hold no text."""
    insecure: bool = False
    """Listen beyond loopback without TLS or without tokens; whoever reaches the port may score and swap models."""
    http_port: int | None = None
    """Also answer the HTTP requests of OpenRLHF, verl, vLLM and OpenAI clients here, on --host; 0 picks a free port."""
    http_wait_s: float = 60.0
    """How long `/get_reward` is held while the queue is full or the model loads, before it gets a 503."""
    http_read_timeout_s: float = 30.0
    """How long a client may take to send the headers or the body of a request."""
    http_drop_failed: bool = False
    """`/get_reward` leaves out what could not be scored, instead of a 422 or 500; never a number in its place."""
    served_model_name: str | None = None
    """The model's name for HTTP callers, who may still ask for it as --model or --judge has it."""
    ready_file: Path | None = None
    """Written with HOST:PORT once the server answers."""
    device: str = "auto"
    """Where a reward model runs: cpu, cuda, cuda:1 ...; auto takes a GPU if there is one. Not for vllm: models."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of a reward model; auto keeps the checkpoint's on a GPU and takes float32 on a CPU."""
    torch_compile: bool = False
    """Compile a reward model while the server warms up, for a minute or more: faster forward passes, the same scores
    to 1e-5. On a CPU it needs a C++ compiler and holds the weights twice. Not for vllm: models."""
    max_length: int | None = None
    """Longest conversation in tokens. By default the length the model was trained with, or its context."""
    max_items: int = 256
    """Most items in one request."""
    max_batch_tokens: int = 8192
    """Most tokens of a batch, padding included."""
    max_queue_tokens: int = 1_000_000
    """Tokens that may wait; a request beyond that is refused at once and told when to come back."""
    max_queue_items: int = 8192
    """Items that may wait."""
    max_request_bytes: int = 8 << 20
    """Largest request message."""
    max_stream_requests: int = 64
    """Unanswered requests that one `ScoreStream` may have."""
    max_models: int = 2
    """Models held at the same time, so that one can be swapped for another without a refused call."""
    max_in_flight: int = 64
    """Items that a judge works on at the same time; rows of a batch for a local one."""
    drain_timeout_s: float = 60.0
    """After SIGTERM or SIGINT: how long requests in flight may take to finish."""

    def __post_init__(self) -> None:
        """Refuse combinations that cannot work."""
        if (self.model is None) == (self.judge is None):
            raise ConfigError("give either --model (a reward model) or --judge (an LLM), and not both")
        if self.torch_compile and self.judge is not None:
            raise ConfigError("--torch_compile is for a reward model (--model), not for a judge")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("--tls_cert and --tls_key belong together: give both or neither")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ConfigError("--tls_client_ca needs --tls_cert and --tls_key")
        if self.host not in LOOPBACK and not self.insecure and not (self.tls_cert and self.token_file):
            raise ConfigError(
                f"--host {self.host} is not loopback: give --tls_cert, --tls_key and --token_file, or --insecure if "
                "whoever reaches the port may score and swap models"
            )
        if self.otlp_endpoint is not None and not self.otlp_endpoint.startswith(("http://", "https://")):
            raise ConfigError(
                f"--otlp_endpoint must be the URL of an OTLP collector, http://localhost:4317 for example, not "
                f"{self.otlp_endpoint}"
            )
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port must be between 0 and 65535, not {self.port}")
        if self.http_port is not None and not 0 <= self.http_port <= 65535:
            raise ConfigError(f"--http_port must be between 0 and 65535, not {self.http_port}")
        if self.http_wait_s < 0 or self.http_read_timeout_s <= 0:
            raise ConfigError(
                "--http_wait_s must not be negative, and --http_read_timeout_s must be positive"
            )
        for name in (
            "max_items",
            "max_batch_tokens",
            "max_queue_tokens",
            "max_queue_items",
            "max_request_bytes",
            "max_stream_requests",
            "max_models",
            "max_in_flight",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if self.max_length is not None and self.max_length < 1:
            raise ConfigError(f"--max_length must be at least 1, not {self.max_length}")
        if self.drain_timeout_s < 0:
            raise ConfigError(f"--drain_timeout_s must not be negative, not {self.drain_timeout_s}")
