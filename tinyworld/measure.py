"""Measure the shipped models against the gold utility on unseen posts: `python -m tinyworld.measure`.

The judge answers exactly as the labeler asks: greedy rationale, forced ending, probabilities of the label tokens.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice, product
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from labeler.rubric import Question, Rubric
from rlaif.agreement import same_position, spearman
from rlaif.types import Pair, expectation, to_dicts, user_prompt
from tinyworld import WORLD_DIR
from tinyworld.corpus import judge_text
from tinyworld.gold import gold_prefers, gold_utility, review
from tinyworld.grammar import make_post, parse
from tinyworld.pairs import UNSEEN, WRITERS, Writer, decided
from tinyworld.tokenizer import rubric


def load(folder: Path) -> tuple[Any, PreTrainedTokenizerFast]:
    """A model in evaluation mode and its tokenizer."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    return model.eval(), tokenizer


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    batch_size: int = 100,
) -> list[str]:
    """Continue rendered chats up to EOS; greedy at temperature 0. Returns the new text alone, in order."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i].split()))
    out = [""] * len(texts)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        inputs = tokenizer(
            [texts[i] for i in rows], return_tensors="pt", padding=True, add_special_tokens=False
        )
        sampling: dict[str, Any] = (
            {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
            if temperature
            else {"do_sample": False}
        )
        ids = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            **sampling,
        )
        new = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(rows, new, strict=True):
            out[i] = text
    return out


@torch.inference_mode()
def label_probs(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    labels: Sequence[str],
    *,
    batch_size: int = 100,
) -> Tensor:
    """Probability of each label as the next token, renormalised over the labels; float32 (len(texts), len(labels))."""
    ids = tokenizer.convert_tokens_to_ids(list(labels))
    rows = []
    for start in range(0, len(texts), batch_size):
        inputs = tokenizer(
            list(texts[start : start + batch_size]),
            return_tensors="pt",
            padding=True,
            add_special_tokens=False,
        )
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, -1]
        rows.append(logits[:, ids].softmax(-1))
    return torch.cat(rows)


def judge(
    model: Any, tokenizer: PreTrainedTokenizerFast, asked: Rubric, questions: Sequence[Question]
) -> tuple[Tensor, list[str | None]]:
    """Label distributions (len(questions), labels) and rationales, by the recipe of the RLAIF paper (section 2.1)."""
    rationales: list[str | None] = [None] * len(questions)
    if asked.cot:
        cues = [judge_text(tokenizer, q, str(q.rationale_cue)) for q in questions]
        rationales = list(generate(model, tokenizer, cues, max_new_tokens=160))
    prefixes = [
        judge_text(tokenizer, q, q.label_prefix(r)) for q, r in zip(questions, rationales, strict=True)
    ]
    return label_probs(model, tokenizer, prefixes, asked.labels), rationales


def measure_pairs(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    writer: Writer,
    n: int,
    *,
    cot: bool,
    num_exemplars: int = 0,
    preamble: str | None = None,
) -> dict[str, float]:
    """Agreement of pair labels with gold on the first `n` non-tied pairs of a writer.

    The options are the pair rubric's: a rationale first, so many exemplars, which preamble.

    Returns:
        `one_order` and `both_orders`: shares of right labels in [0, 1]; `same_position`: share of pairs whose two
        orders preferred the same position; `rationale_tokens`: mean length of a rationale.
    """
    asked = rubric("pair").with_options(cot=cot, num_exemplars=num_exemplars, preamble=preamble)
    triples = list(islice(decided(writer), n))
    pairs = [Pair(user_prompt(post), a, b) for post, a, b in triples]
    questions = [asked.ask_pair(p, order) for order in ("ab", "ba") for p in pairs]
    probs, rationales = judge(model, tokenizer, asked, questions)
    p_ab, p_ba = probs[:n, 0].numpy(), probs[n:, 1].numpy()
    gold = np.array([gold_prefers(*t) for t in triples])
    return {
        "one_order": float(np.mean(np.concatenate([p_ab > 0.5, p_ba > 0.5]) == np.tile(gold > 0.5, 2))),
        "both_orders": float(np.mean(((p_ab + p_ba) / 2 > 0.5) == (gold > 0.5))),
        "same_position": float(np.mean(same_position(probs[:n, 0].numpy(), probs[n:, 0].numpy()))),
        "rationale_tokens": fmean(len(r.split()) for r in rationales if r is not None) if cot else 0.0,
    }


def measure_scores(
    model: Any, tokenizer: PreTrainedTokenizerFast, writer: Writer, n: int, *, cot: bool
) -> dict[str, float]:
    """Spearman correlation of expected 1-10 scores with gold on `n` summaries of different posts."""
    asked = rubric("score").with_options(cot=cot)
    rows = [writer(i)[:2] for i in range(n)]
    probs, rationales = judge(model, tokenizer, asked, [asked.ask_score(user_prompt(p), s) for p, s in rows])
    expected = [expectation(p, asked.levels) for p in probs.tolist()]
    return {
        "spearman": spearman(np.round(expected, 9), [gold_utility(p, s) for p, s in rows]),
        "rationale_tokens": fmean(len(r.split()) for r in rationales if r is not None) if cot else 0.0,
    }


def measure_policy(
    model: Any, tokenizer: PreTrainedTokenizerFast, n: int, *, seed: int = 0
) -> dict[str, float]:
    """The policy at temperature 1 on `n` unseen posts, one summary each.

    Returns:
        `gold`: mean utility in [-1/2, 1]; `fluent`: share of sentences in the grammar and closed by a full stop;
        `words`: mean length; `facts`: facts per post; `covered`, `distorted`, `invented`, `repeated`: findings per
        summary; `distinct`: different texts among four samples of a post, as a share.
    """
    torch.manual_seed(seed)
    posts = [make_post(UNSEEN + i).text for i in range(n)]
    chats = [
        str(
            tokenizer.apply_chat_template(
                to_dicts(user_prompt(p)), tokenize=False, add_generation_prompt=True
            )
        )
        for p in posts
    ]
    texts = generate(model, tokenizer, chats, max_new_tokens=40, temperature=1.0)
    sentences = [s for t in texts for s in parse(t)]
    verdicts = [f.verdict for p, t in zip(posts, texts, strict=True) for f in review(p, t)]
    few = chats[:50]
    again = generate(model, tokenizer, few * 4, max_new_tokens=40, temperature=1.0)
    distinct = [len({again[i + k * len(few)] for k in range(4)}) / 4 for i in range(len(few))]
    return {
        "gold": fmean(gold_utility(p, t) for p, t in zip(posts, texts, strict=True)),
        "fluent": fmean(float(s.fact is not None and s.closed) for s in sentences),
        "words": fmean(len(t.split()) for t in texts),
        "facts": fmean(len(parse(p)) for p in posts),
        **{v: verdicts.count(v) / n for v in ("covered", "distorted", "invented", "repeated")},
        "distinct": fmean(distinct),
    }


def main() -> None:
    """Command line: one JSON line per measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, default=WORLD_DIR / "weights", help="Folder with the models.")
    parser.add_argument("--n", type=int, default=400, help="Pairs, summaries and posts per measurement.")
    args = parser.parse_args()
    for judge_name in ("judge", "judge-fewshot", "judge-medium", "judge-small", "judge-tiny"):
        if not (args.weights / judge_name).is_dir():
            continue
        model, tokenizer = load(args.weights / judge_name)
        for (name, writer), cot in product(WRITERS.items(), (True, False)):
            asked: list[dict[str, Any]] = [{}]
            if judge_name != "judge":
                asked += [{"preamble": "detailed", "num_exemplars": 2}]
            for how in asked:
                words = " ".join([judge_name, name, f"cot={cot}", *(f"{k}={v}" for k, v in how.items())])
                pairs = partial(measure_pairs, model, tokenizer, writer, args.n, cot=cot, **how)
                _report(f"pairs {words}", pairs)
            if judge_name == "judge":
                scores = partial(measure_scores, model, tokenizer, writer, args.n, cot=cot)
                _report(f"scores {judge_name} {name} cot={cot}", scores)
    if (args.weights / "policy").is_dir():
        model, tokenizer = load(args.weights / "policy")
        _report("policy", partial(measure_policy, model, tokenizer, args.n))


def _report(name: str, measure: Callable[[], dict[str, float]]) -> None:
    began = time.monotonic()
    figures = {k: round(v, 4) for k, v in measure().items()}
    print(
        json.dumps({"measurement": name, **figures, "seconds": round(time.monotonic() - began, 1)}),
        flush=True,
    )


if __name__ == "__main__":
    main()
