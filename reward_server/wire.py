"""Between protobuf and the scorer's types; no calls, no clocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from google.rpc import code_pb2, status_pb2
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo

from protos.rlaif.reward.v1 import reward_pb2 as pb
from reward_server.batcher import Priority, Report
from reward_server.registry import Model, State
from reward_server.scorers.base import (
    Compared,
    CompareTask,
    Failure,
    Kind,
    Normalization,
    Outcome,
    Problem,
    Scored,
    Scorer,
    ScoreTask,
    Task,
    Truncation,
)
from rlaif import types

DOMAIN = "rlaif.reward.v1"
"""`ErrorInfo.domain` of all errors."""

Request = pb.ScoreRequest | pb.CompareRequest

_MAX_VIOLATIONS = 8
"""They travel in the trailer, where gRPC clients take 8 KiB, and all of them may have the same cause."""

TRUNCATION: dict[int, Truncation] = {
    pb.TRUNCATION_UNSPECIFIED: "reject",
    pb.TRUNCATION_REJECT: "reject",
    pb.TRUNCATION_LEFT: "left",
}
PRIORITY: dict[int, Priority] = {
    pb.PRIORITY_INTERACTIVE: Priority.INTERACTIVE,
    pb.PRIORITY_BULK: Priority.BULK,
}
CODES: dict[Problem, int] = {
    "invalid": code_pb2.INVALID_ARGUMENT,
    "too_long": code_pb2.OUT_OF_RANGE,
    "no_score": code_pb2.INTERNAL,
    "not_finite": code_pb2.INTERNAL,
    "model_failed": code_pb2.INTERNAL,
    "unavailable": code_pb2.UNAVAILABLE,
    "expired": code_pb2.DEADLINE_EXCEEDED,
    "unsupported": code_pb2.UNIMPLEMENTED,
}
KINDS: dict[Kind, pb.ScorerKind.ValueType] = {
    "reward_model": pb.SCORER_KIND_REWARD_MODEL,
    "judge": pb.SCORER_KIND_JUDGE,
    "composite": pb.SCORER_KIND_COMPOSITE,
}
STATES: dict[State, pb.ModelState.ValueType] = {
    State.LOADING: pb.MODEL_STATE_LOADING,
    State.READY: pb.MODEL_STATE_READY,
    State.ACTIVE: pb.MODEL_STATE_ACTIVE,
    State.DRAINING: pb.MODEL_STATE_DRAINING,
}


def violations(request: Request, max_items: int) -> Iterable[BadRequest.FieldViolation]:
    """What is wrong with a request as a whole, the first few things; its items are looked at one by one."""
    return islice(_violations(request, max_items), _MAX_VIOLATIONS)


def _violations(request: Request, max_items: int) -> Iterator[BadRequest.FieldViolation]:
    if not 1 <= len(request.items) <= max_items:
        yield _violation("items", f"must hold 1 to {max_items} items, not {len(request.items)}")
        return  # there may be millions of them
    seen: set[int] = set()
    for index, item_id in enumerate(item.id for item in request.items):
        if item_id in seen:
            text = f"{item_id} is the id of an earlier item; ids must be unique within a request"
            yield _violation(f"items[{index}].id", text)
        seen.add(item_id)
    if request.truncation not in TRUNCATION:
        yield _violation("truncation", f"{request.truncation} is no Truncation")
    if request.priority not in (pb.PRIORITY_UNSPECIFIED, *PRIORITY):
        yield _violation("priority", f"{request.priority} is no Priority")


def _violation(field: str, description: str) -> BadRequest.FieldViolation:
    return BadRequest.FieldViolation(field=field, description=description)


def score_tasks(request: pb.ScoreRequest) -> list[Task | Failure]:
    """One task per item, or what is wrong with the item."""
    truncation = TRUNCATION[request.truncation]
    tasks: list[Task | Failure] = []
    for item in request.items:
        conversation = _conversation(item.conversation)
        if isinstance(conversation, Failure):
            tasks.append(conversation)
        elif conversation[-1].role != "assistant":
            tasks.append(Failure("invalid", "the conversation must end with the assistant turn to score"))
        elif len(conversation) == 1:
            tasks.append(Failure("invalid", "the conversation has no prompt before the assistant turn"))
        else:
            tasks.append(
                ScoreTask(conversation, truncation, request.with_rationale, alone=request.deterministic)
            )
    return tasks


def compare_tasks(request: pb.CompareRequest) -> list[Task | Failure]:
    """One task per item, or what is wrong with the item."""
    truncation = TRUNCATION[request.truncation]
    tasks: list[Task | Failure] = []
    for item in request.items:
        prompt = _conversation(item.prompt)
        if isinstance(prompt, Failure):
            tasks.append(prompt)
        elif prompt[-1].role != "user":
            tasks.append(Failure("invalid", "the prompt must end with a user turn"))
        else:
            pair = types.Pair(prompt, item.response_a, item.response_b)
            tasks.append(CompareTask(pair, truncation, alone=request.deterministic))
    return tasks


def _conversation(message: pb.Conversation) -> types.Conversation | Failure:
    if not message.messages:
        return Failure("invalid", "the conversation has no messages")
    turns = []
    for index, turn in enumerate(message.messages):
        if turn.role not in ("system", "user", "assistant"):
            return Failure("invalid", f"messages[{index}].role must be system, user or assistant")
        turns.append(types.Message(turn.role, turn.content))  # type: ignore[arg-type]
    return tuple(turns)


def score_response(
    request: pb.ScoreRequest, outcomes: Sequence[Outcome], report: Report, model: Model
) -> pb.ScoreResponse:
    """The answer to a request; `outcomes` in the order of its items."""
    scale = model.scorer.normalization
    return pb.ScoreResponse(
        outcomes=[_score_outcome(i.id, o, scale) for i, o in zip(request.items, outcomes, strict=True)],
        model=version_of(model.scorer),
        timing=_timing(report),
        usage=_usage(outcomes, report),
    )


def compare_response(
    request: pb.CompareRequest, outcomes: Sequence[Outcome], report: Report, model: Model
) -> pb.CompareResponse:
    """The answer to a request; `outcomes` in the order of its items."""
    return pb.CompareResponse(
        outcomes=[_compare_outcome(i.id, o) for i, o in zip(request.items, outcomes, strict=True)],
        model=version_of(model.scorer),
        timing=_timing(report),
        usage=_usage(outcomes, report),
    )


def _score_outcome(item_id: int, outcome: Outcome, scale: Normalization) -> pb.ScoreOutcome:
    if isinstance(outcome, Failure):
        return pb.ScoreOutcome(id=item_id, error=item_status(outcome))
    assert isinstance(outcome, Scored)
    score = pb.Score(
        raw=outcome.raw,
        normalized=(outcome.raw - scale.center) / scale.scale,
        tokens=outcome.tokens,
        truncated=outcome.truncated,
        rationale=outcome.rationale,
        tokens_sha256=outcome.fingerprint,
    )
    if outcome.distribution is not None:
        reading = outcome.distribution
        score.distribution.CopyFrom(
            pb.LevelDistribution(probability=reading.probability, level=reading.level, mass=reading.mass)
        )
    return pb.ScoreOutcome(id=item_id, score=score)


def _compare_outcome(item_id: int, outcome: Outcome) -> pb.CompareOutcome:
    if isinstance(outcome, Failure):
        return pb.CompareOutcome(id=item_id, error=item_status(outcome))
    assert isinstance(outcome, Compared)
    return pb.CompareOutcome(
        id=item_id,
        comparison=pb.Comparison(
            p_a=outcome.p_a,
            p_a_first=outcome.p_a_first,
            p_a_second=outcome.p_a_second,
            tokens=outcome.tokens,
            truncated=outcome.truncated,
        ),
    )


def item_status(failure: Failure) -> status_pb2.Status:
    """Why one item has no outcome."""
    status = status_pb2.Status(code=CODES[failure.problem], message=failure.message)
    status.details.add().Pack(ErrorInfo(reason=failure.problem.upper(), domain=DOMAIN))
    return status


def _timing(report: Report) -> pb.Timing:
    return pb.Timing(
        queue_us=_microseconds(report.queue_s),
        compute_us=_microseconds(report.compute_s),
        tokenize_us=_microseconds(report.tokenize_s),
        batch_items=report.batch_items,
        batch_tokens=report.batch_tokens,
        padded_tokens=report.padded_tokens,
    )


def _microseconds(seconds: float) -> int:
    return max(0, round(seconds * 1e6))


def _usage(outcomes: Sequence[Outcome], report: Report) -> pb.Usage:
    cached = sum(o.cached for o in outcomes if not isinstance(o, Failure))
    return pb.Usage(input_tokens=report.input_tokens, cached_tokens=cached)


def version_of(scorer: Scorer) -> pb.ModelVersion:
    """Who scored."""
    return pb.ModelVersion(name=scorer.name, version=scorer.version)


def loaded(model: Model) -> pb.LoadedModel:
    """A model and its state."""
    return pb.LoadedModel(model=version_of(model.scorer), state=STATES[model.state])
