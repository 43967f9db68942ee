"""How a model is named everywhere: `BACKEND:NAME[@BASE_URL]`."""

from __future__ import annotations

import json
import re
import textwrap
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


def require_pretrained(path: str, *, hint: str = "", endpoint: str | None = None) -> None:
    """See that there is a model to load before a library goes and looks for it, asking again for a minute.

    What the hub's cache holds is not asked for. The hub is asked once; whatever it answers but that it knows no such
    model is left to the loading.

    Args:
        path: what `from_pretrained` will be given.
        hint: what else the name may have been meant for; follows the message.
        endpoint: address of the hub; None for the one that huggingface_hub uses.

    Raises:
        ModelError: the folder is that of a run without a model; or there is no such folder, and the hub has no such
            model, or cannot be asked.
    """
    folder = Path(path)
    if folder.is_dir():
        _require_no_bare_run(folder)
        return
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    missing = f"there is no folder {path} here, and "
    try:
        if any(isinstance(try_to_load_from_cache(path, name), str) for name in _CONFIGS):
            return
        if constants.HF_HUB_OFFLINE:
            raise ModelError(f"{missing}none of this name in the hub's cache (HF_HUB_OFFLINE is set){hint}")
        get_hf_file_metadata(hf_hub_url(path, _CONFIGS[0], endpoint=endpoint))
    except ModelError:
        raise
    except GatedRepoError:  # a kind of RepositoryNotFoundError
        return
    except HFValidationError as err:
        raise ModelError(f"{missing}a model of the hub cannot have this name{hint}") from err
    except RepositoryNotFoundError as err:
        raise ModelError(
            f"{missing}no model of this name on the hub, or one that you may not read (hf auth login){hint}"
        ) from err
    except HfHubHTTPError:
        return  # it has no config.json, may not be read, or the hub is busy: loading goes about it as it does
    except Exception as err:  # of whichever HTTP library huggingface_hub is built on
        raise ModelError(
            f"{missing}the hub at {endpoint or constants.ENDPOINT} cannot be asked: {reason(err)}{hint}"
        ) from err


_CONFIGS = ("config.json", "adapter_config.json")


def _require_no_bare_run(folder: Path) -> None:
    if any((folder / name).exists() for name in _CONFIGS):
        return
    try:
        command = json.loads((folder / "run.json").read_text(encoding="utf-8"))["command"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    raise ModelError(f"{folder} holds a run of `rlaif {command}` and no model: name the folder of a model")


def reason(err: Exception) -> str:
    """What an error of a library says, on one line, cut between words."""
    return textwrap.shorten(str(err), 200, placeholder=" ...") or type(err).__name__


def endpoint_hint(ref: ModelRef) -> str:
    """What a name without a slash may have been meant for."""
    return "" if "/" in ref.name else f"; if it runs behind an endpoint, write openai:{ref.name}@BASE_URL"


def cannot_load(ref: ModelRef, err: Exception) -> ModelError:
    """The one line for a model that does not load."""
    return ModelError(f"model {ref} cannot be loaded: {reason(err)}{endpoint_hint(ref)}")
