"""What the columns of every output mean, for dataset cards. The schemas stand beside the code that fills them."""

from __future__ import annotations

from collections.abc import Mapping

_PROVENANCE = {
    "judge": "the judge, as it was named; several form a jury",
    "rubric": "how the model was asked; its text stands below",
    "rubric_hash": "hash of the rubric's text",
    "prompt_tokens": "tokens read by the model, as it counted them",
    "completion_tokens": "tokens written by the model",
    "cached_tokens": "those of `prompt_tokens` that came from a cache",
    "cost_usd": "price of these tokens; null where no price was told",
}

PREFERENCES: Mapping[str, str] = {
    "id": "hash of prompt and responses, as the input had them; (A, B) and (B, A) differ",
    "prompt": "messages, ending with the user's",
    "chosen": "the response that the label prefers, as one assistant message",
    "rejected": "the other one; never the same text",
    "chosen_prob": "the soft label: P(chosen preferred), from 0.5 to 1, after calibration and clamp",
    "margin": "2 `chosen_prob` - 1, or the expected margin of a graded rubric",
    "chosen_is_a": "whether the chosen response came first in the input",
    "chosen_prob_raw": "the label before calibration and clamp",
    "chosen_prob_first": "P(chosen preferred) with the chosen response shown first",
    "chosen_prob_second": "the same with the chosen response shown second; `chosen_prob_raw` averages both",
    "label_mass_ab": "probability of all labels together, with the input's first response shown first; "
    "little of it means that the judge wanted to say something else",
    "label_mass_ba": "the same, with the input's first response shown second",
    "censored": "a label was outside the endpoint's list of likeliest tokens, so its probability is a bound",
    "same_position": "both orders preferred the same position: position bias was stronger than the responses",
    "rationale_ab": "what the judge wrote before the label, with the input's first response shown first",
    "rationale_ba": "the same, with the input's first response shown second",
    "truncated": "a rationale was cut at its greatest length",
    "principle": "the principle of the constitution that the judge was given",
    "source": "how the label was had: `logprobs`, `samples`, `verdict`, or the guard that ruled without asking",
    "votes": "each judge's P(chosen preferred); empty without a jury",
    "human_chosen_prob": "P(chosen preferred) by people, where the input had it; the judge never saw it",
    **_PROVENANCE,
}

RANKINGS: Mapping[str, str] = {
    "id": "hash of prompt and responses",
    "prompt": "messages, ending with the user's",
    "ranking": "responses from best to worst: text, model, rank, Bradley-Terry strength in log-odds",
    "comparisons": "labelled pairs behind the ranking",
}

SCORES: Mapping[str, str] = {
    "id": "hash of prompt and response",
    "prompt": "messages, ending with the user's",
    "response": "what was scored",
    "score": "the expectation over the rubric's scale under `probs`; with several rubrics the mean of the aspects",
    "probs": "probability of each level of the scale, in order",
    "label_mass": "probability of all levels together; little of it means that the judge wanted to say something else",
    "censored": "a level was outside the endpoint's list of likeliest tokens, so its probability is a bound",
    "rationale": "what the judge wrote before the score",
    "truncated": "a rationale was cut at its greatest length",
    "aspects": "with several rubrics: score, probabilities, mass and rationale of each",
    "votes": "each judge's score; empty without a jury",
    "source": "how the score was had: `logprobs`, `samples`, `verdict`, or the guard that ruled without asking",
    **_PROVENANCE,
}

CANDIDATES: Mapping[str, str] = {
    "prompt": "messages, ending with the user's",
    "completions": "sampled responses: text, model, why it ended, the seed that it is a function of",
}

REVISIONS: Mapping[str, str] = {
    "id": "hash of prompt, initial response and revision",
    "prompt": "messages, ending with the user's",
    "completion": "the revision of the last round, as one assistant message",
    "initial": "the response that the revisions began from",
    "rounds": "in order: the principle drawn, the critique by it, the revision",
    "model": "the model that criticised and revised",
    **{name: text for name, text in _PROVENANCE.items() if name != "judge"},
}

TRL_PREFERENCE: Mapping[str, str] = {
    **{name: PREFERENCES[name] for name in ("prompt", "chosen", "rejected", "chosen_prob")},
    "id": "of the pair in the labelled dataset",
}

TRL_REWARD: Mapping[str, str] = {**TRL_PREFERENCE, "margin": PREFERENCES["margin"]}

TRL_UNPAIRED: Mapping[str, str] = {
    "prompt": "messages, ending with the user's",
    "completion": "a response, as one assistant message",
    "label": "whether it was preferred to the other response of its pair",
    "preferred_prob": "P(this response preferred to the other one)",
    "id": "of the pair in the labelled dataset: both of its responses carry it",
}

EVERYTHING: Mapping[str, str] = {**PREFERENCES, "extra": "further columns of the input, as JSON text"}
