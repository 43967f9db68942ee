"""Whether a judge and a policy are relatives: judges prefer their own kind.

GPT-4 favoured its own answers by 10 % and Claude v1 by 25 % (arXiv 2306.05685, section 3.3), and the preference
follows familiarity of the text rather than recognition of the author (arXiv 2410.21819). So relatives are named,
by what their model names say.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from rlaif.models import BACKENDS

_NAMES = {
    "Llama": r"llama|vicuna|alpaca|koala|tulu|wizardlm|guanaco",
    "Mistral": r"mistral|mixtral|ministral|magistral|codestral|devstral|pixtral|zephyr",
    "Qwen": r"qwen|\bqwq|\bqvq",
    "Gemini/Gemma": r"gemma|gemini|\bpalm\b|\bbard\b|text-bison",
    "GPT": r"\bgpt-?[345]|gpt-oss|chatgpt|davinci|\bo[134](?:-|$)",
    "Claude": r"claude",
    "DeepSeek": r"deepseek",
    "Phi": r"\bphi-?\d|wizardlm-2-8x22b",
    "Command": r"\bcommand-|c4ai|\baya\b",
    "Yi": r"\byi-",
    "GLM": r"\bglm-|chatglm",
    "InternLM": r"internlm",
    "Falcon": r"falcon",
    "OLMo": r"\bolmo",
    "Granite": r"granite",
    "Nemotron": r"nemotron",
    "Grok": r"\bgrok",
    "Kimi": r"\bkimi|moonlight",
    "MiniMax": r"minimax",
    "SmolLM": r"smollm",
    "Hunyuan": r"hunyuan",
    "ERNIE": r"\bernie",
    "Pythia": r"pythia",
    "GPT-2": r"\bgpt-?2",
    "tinyworld": r"tinyworld",
}
_FAMILIES = {family: re.compile(pattern) for family, pattern in _NAMES.items()}


def families(model: str) -> frozenset[str]:
    """The families that a model name tells of: usually one, two for a distilled model, none if it says nothing.

    Args:
        model: with or without back end and address, e.g. `openai:Qwen/Qwen3-8B@http://host/v1`.
    """
    name = _plain(model)
    return frozenset(family for family, pattern in _FAMILIES.items() if pattern.search(name))


def relatives(judges: Iterable[str], policies: Iterable[str]) -> list[str]:
    """One warning per judge and policy that are the same model or of one family; sorted.

    Args:
        judges: names of the judges.
        policies: names of the models that wrote the responses.
    """
    writers = sorted({policy for policy in policies if policy})
    found = []
    for judge in sorted(set(judges)):
        for policy in writers:
            shared = families(judge) & families(policy)
            if _plain(judge) == _plain(policy):
                what = "are the same model"
            elif shared:
                what = f"are both of the {' and '.join(sorted(shared))} family"
            else:
                continue
            found.append(
                f"judge {judge} and policy {policy} {what}: such judges have been seen to prefer their own kind by "
                "10 to 25 %; confirm with a judge of another family"
            )
    return found


def _plain(model: str) -> str:
    """The model's name without back end and address, in lower case, underscores as hyphens."""
    backend, colon, rest = model.partition(":")
    if backend == "tinyworld":
        return model.lower()
    name = rest if colon and backend in BACKENDS else model
    return name.partition("@")[0].lower().replace("_", "-")
