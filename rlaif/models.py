"""How a model is named everywhere: `BACKEND:NAME[@BASE_URL]`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

from rlaif.errors import ConfigError, ModelError

Backend = Literal["hf", "openai", "decisions", "vllm", "tinyworld", "scripted"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
HOSTED: tuple[Backend, ...] = ("openai", "decisions")
"""Back ends that reach a model behind an endpoint."""


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A parsed model name.

    Attributes:
        backend: what runs it.
        name: Hugging Face name or local path (`hf`, `vllm`), the endpoint's model name (`openai`, `decisions`), `judge`
            or `policy` (`tinyworld`), a script file (`scripted`).
        base_url: the endpoint of a hosted model, or several of the same model, separated by commas; None means the
            `OPENAI_BASE_URL` variable or, with `openai`, OpenAI itself.
    """

    backend: Backend
    name: str
    base_url: str | None = None

    @classmethod
    def parse(cls, text: str) -> ModelRef:
        """Read a name such as `openai:NAME@BASE_URL`; a bare name or path is taken as `hf:`.

        All forms: `openai:NAME[@BASE_URL[,BASE_URL...]]`, `decisions:NAME@BASE_URL`, `hf:NAME_OR_PATH`,
        `vllm:NAME_OR_PATH`, `tinyworld:judge|policy`, `scripted:FILE`.

        Raises:
            ConfigError: the name is empty, or an endpoint is given without http:// or https://.
        """
        head, colon, rest = text.partition(":")
        backend: Backend = "hf"
        name = text
        for known in BACKENDS:
            if colon and head == known:
                backend, name = known, rest
        base_url = None
        if backend in HOSTED:
            name, at, url = name.partition("@http")  # a name may hold "@" too: @cf/org/model, model@20240620
            base_url = f"http{url}" if at else None
            if re.search(r"@[\w.-]+:\d+(/|$)", name):
                raise ConfigError(
                    f"the endpoint in {text!r} needs its scheme: {backend}:NAME@http://HOST:PORT/v1"
                )
        if not name:
            raise ConfigError(
                f"model {text!r} has no name: write hf:NAME_OR_PATH, openai:NAME@BASE_URL or tinyworld:judge"
            )
        return cls(backend, name, base_url)

    def __str__(self) -> str:
        """The name in its canonical form."""
        return f"{self.backend}:{self.name}" + (f"@{self.base_url}" if self.base_url else "")

    def pretrained_path(self) -> str:
        """What `from_pretrained` takes for this model: a local folder or a hub name.

        Raises:
            ModelError: the model runs behind an endpoint, the embedded world has no such model, or the name can only be
                that of a folder, and there is none.
        """
        if self.backend == "hf":
            of_a_folder = self.name.startswith(("/", ".", "~")) or self.name.count("/") > 1
            if of_a_folder and not Path(self.name).is_dir():
                raise ModelError(f"there is no folder {self.name}: check the path of the model")
            return self.name
        if self.backend == "tinyworld":
            spec = find_spec("tinyworld")
            if spec is None or spec.origin is None:
                raise ModelError("the tinyworld package is not installed; install rlaif again")
            folder = Path(spec.origin).parent / "weights" / self.name
            if not folder.is_dir():
                known = sorted(p.name for p in folder.parent.glob("*") if p.is_dir())
                raise ModelError(
                    f"no embedded model {self.name!r}; tinyworld has: {', '.join(known) or 'none'}"
                )
            return str(folder)
        raise ModelError(f"{self} has no weights here: this task needs hf:NAME_OR_PATH or tinyworld:NAME")


def length_dependent_positions(config: Any) -> list[dict[str, Any]]:
    """Settings of those rotary embeddings of a model that change with the longest sequence of a batch.

    Args:
        config: of transformers. Models with several kinds of layers have settings for each kind.
    """
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    settings = [rope] if "rope_type" in rope else [own for own in rope.values() if isinstance(own, dict)]
    return [own for own in settings if own.get("rope_type") in ("dynamic", "longrope")]


def has_length_dependent_positions(config: Any) -> bool:
    """Whether a model's rotary embedding changes with the longest sequence of a batch, by its transformers config."""
    return bool(length_dependent_positions(config))


def cannot_load(ref: ModelRef, err: Exception) -> ModelError:
    """The one line for a model that does not load."""
    detail = " ".join(str(err).split())
    hint = "" if "/" in ref.name else f"; if it runs behind an endpoint, write openai:{ref.name}@BASE_URL"
    return ModelError(
        f"model {ref} cannot be loaded: {detail[:200]}{'...' if len(detail) > 200 else ''}{hint}"
    )
