"""What our trainers and their peers are given in `trainer_peers.py`: weights, prompts, pairs and a reward.

Imported in the peers' environments too: nothing of this project is needed here.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "</s>", "<unk>")
PAD, EOS, _ = range(len(SPECIAL))
VOCABULARY = 8192
MAX_PROMPT = 256
MAX_RESPONSE = 64
END_PROBABILITY = 0.04
"""Of the untrained policy at every token: responses of 23 tokens on average, 7 in 100 cut off at 64."""


def word_value(word: str) -> float:
    """What a word `wN` is worth, in [0, 1]."""
    return int(word[1:]) * 37 % 101 / 100


def rewards(prompts: Iterable[str], responses: Iterable[str]) -> list[float]:
    """The mean value of all words of prompt and response: what a scalar head on the last token can compute."""
    texts = (f"{prompt} {response}".split() for prompt, response in zip(prompts, responses, strict=True))
    return [sum(map(word_value, words)) / len(words) for words in texts]


def save_policy(folder: Path) -> None:
    """A Llama of 10 M random weights, 4 layers of width 320, one token a word, that ends with `END_PROBABILITY`.

    Column 0 of the hidden state is the same for all tokens: no layer writes to it, and EOS alone reads it.
    """
    words = [f"w{i}" for i in range(VOCABULARY - len(SPECIAL))]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("w", " w"), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    wrapped.chat_template = (
        "{% for message in messages %}{{ message['content'] }}"
        "{{ eos_token if loop.last and message['role'] == 'assistant' else ' ' }}{% endfor %}"
    )
    wrapped.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=320, intermediate_size=864, num_hidden_layers=4, num_attention_heads=5,
        num_key_value_heads=1, head_dim=64, max_position_embeddings=1024, bos_token_id=None, eos_token_id=EOS,
        pad_token_id=PAD,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 0.1
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        head = model.get_output_embeddings().weight
        head[:, 0] = 0.0
        head[EOS] = 0.0
        out = model(torch.randint(len(SPECIAL), VOCABULARY, (8, 64)), output_hidden_states=True)
        others = out.logits.logsumexp(-1).mean()
        wanted = others + torch.tensor(END_PROBABILITY / (1 - END_PROBABILITY)).log()
        head[EOS, 0] = wanted / out.hidden_states[-1][..., 0].mean()
    model.save_pretrained(folder)


def words(rng: random.Random, count: int) -> str:
    """So many words."""
    return " ".join(f"w{rng.randrange(VOCABULARY - len(SPECIAL))}" for _ in range(count))


def prompt(rng: random.Random, median: float, sigma: float) -> str:
    """A prompt whose number of words is lognormal, at most `MAX_PROMPT`."""
    return words(rng, min(MAX_PROMPT, max(4, round(median * rng.lognormvariate(0.0, sigma)))))


def response(rng: random.Random) -> str:
    """A response as long as the untrained policy's, without its EOS."""
    count = 1
    while count < MAX_RESPONSE - 1 and rng.random() >= END_PROBABILITY:
        count += 1
    return words(rng, count)


def write_data(folder: Path, *, rows: int, median: float, sigma: float) -> None:
    """`prompts.jsonl` and `pairs.jsonl`."""
    rng = random.Random(0)
    prompts = [prompt(rng, median, sigma) for _ in range(rows)]
    write(folder / "prompts.jsonl", [{"prompt": text} for text in prompts])
    pairs = [{"prompt": text, "chosen": response(rng), "rejected": response(rng)} for text in prompts]
    write(folder / "pairs.jsonl", pairs)


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
