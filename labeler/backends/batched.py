"""An OpenAI endpoint whose completions are had in batches: it answers from those that have come back."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, replace

from openai import AsyncOpenAI

from labeler.backends.completions import Choice, Features, Json, read_choice
from labeler.backends.openai import OpenAIModel
from labeler.batch import Batches
from labeler.budget import most_tokens
from labeler.llm import LLMOptions, Postponed, RequestFailed
from rlaif.errors import ConfigError
from rlaif.models import ModelRef
from rlaif.types import Conversation, content_id

WAITING = "waits for its batch"

_UPLOAD_S = 600.0
"""A file of 200 MB takes a while."""


class BatchedEndpoint(OpenAIModel):
    """`openai:` through the Batch API. Requests are built and replies read as for sending them one by one.

    A request without a reply is put aside and fails with `Postponed`; ask again after the batches' exchange. The probe
    is sent at once, and its result kept with the first request, so that every run builds the same ones.

    Args:
        ref: the model and its one endpoint.
        options: time-out and retries.
        batches: where requests are put aside.

    Raises:
        ConfigError: there is no key, or the model is not of one endpoint.
    """

    def __init__(self, ref: ModelRef, options: LLMOptions, batches: Batches) -> None:
        url = ref.base_url or os.environ.get("OPENAI_BASE_URL")
        if ref.backend != "openai" or (url and "," in url):
            raise ConfigError(
                f"--batch needs models of one endpoint, openai:NAME or openai:NAME@BASE_URL, not {ref}"
            )
        super().__init__(ref, options)
        self._store = batches.store
        self._fact = f"abilities of {self.name}"
        self._kept = False
        self._client = AsyncOpenAI(
            base_url=url,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            max_retries=options.max_retries,
            timeout=max(options.timeout_s, _UPLOAD_S),
        )
        batches.serve(self.name, self._client)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()
        await super().close()

    async def _features(self) -> Features:
        if self._found is None:
            kept = self._store.fact(self._fact)
            if kept is None:
                # Token ids of an answer are of no use to a request in the next batch.
                self._found = replace(await super()._features(), token_ids=False)
            else:
                self._found = Features(**{**kept, "refused": frozenset(kept["refused"])})
                self._kept = True
        return self._found

    def _keep(self, features: Features) -> None:
        if not self._kept:
            self._store.keep_fact(self._fact, {**asdict(features), "refused": sorted(features.refused)})
            self._kept = True

    async def _complete(
        self,
        path: str,
        body: Json,
        messages: Conversation,
        max_tokens: int,
        *,
        check: Callable[[Choice], object] | None = None,
        urgent: bool = False,
    ) -> Choice:
        request = content_id(self.name, path, body)
        found = self._store.find(request)
        if found is None:
            self._keep(await self._features())
            prefix = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
            self._store.add(request, self.name, path, body, most_tokens(messages, prefix, max_tokens))
            raise Postponed(WAITING)
        reply, error = found
        if error is not None:
            raise RequestFailed(error)
        if reply is None:
            raise Postponed(WAITING)
        try:
            choice = read_choice(reply)
            if check is not None:
                check(choice)
        except RequestFailed as err:
            self._store.fail(request, str(err))
            raise
        return choice
