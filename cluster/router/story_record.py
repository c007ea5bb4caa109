"""The stories of the requests that ended last, found by request id or trace id. Bounded twice over."""

from __future__ import annotations

from collections import OrderedDict

from cluster.request.errors import UnknownRequest
from cluster.router.story import Story

MAX_STORIES = 1024
MAX_CANDIDATES = 16_384
"""In all stories together: a candidate and its score are a kilobyte or less, so some 16 MB."""

MIN_ID_CHARS = 8
"""As many of an id as tables show."""


class StoryRecord:
    """Mutable; owned by the event loop. What ended longest ago is forgotten first."""

    def __init__(self, *, max_stories: int = MAX_STORIES, max_candidates: int = MAX_CANDIDATES) -> None:
        self._max_stories = max_stories
        self._max_candidates = max_candidates
        self._stories: OrderedDict[str, Story] = OrderedDict()
        self._traces: dict[str, list[str]] = {}
        """Request ids by trace, oldest first: a trace may hold several requests."""
        self._num_candidates = 0

    def __len__(self) -> int:
        return len(self._stories)

    def add(self, story: Story) -> None:
        if story.request_id in self._stories:
            self._forget(story.request_id)
        self._stories[story.request_id] = story
        self._traces.setdefault(story.trace_id, []).append(story.request_id)
        self._num_candidates += story.num_candidates
        while self._stories and (
            len(self._stories) > self._max_stories or self._num_candidates > self._max_candidates
        ):
            self._forget(next(iter(self._stories)))

    def find(self, request_or_trace_id: str) -> tuple[Story, ...]:
        """One story of a request, all of a trace, oldest first; of either id the beginning will do.

        Raises UnknownRequest.
        """
        request_ids = self._traces.get(request_or_trace_id) or self._begin_with(request_or_trace_id)
        stories = tuple([self._stories[one] for one in request_ids if one in self._stories])
        if not stories:
            raise UnknownRequest(
                f"no request of this request or trace id ended here; the last {self._max_stories} are "
                "remembered, those under way are told when they end; of an id the first "
                f"{MIN_ID_CHARS} characters will do"
            )
        return stories

    def _begin_with(self, text: str) -> list[str]:
        if text in self._stories:
            return [text]
        if len(text) < MIN_ID_CHARS:
            return []
        return [
            request_id
            for request_id, story in self._stories.items()
            if request_id.startswith(text) or story.trace_id.startswith(text)
        ]

    def _forget(self, request_id: str) -> None:
        story = self._stories.pop(request_id)
        self._num_candidates -= story.num_candidates
        others = self._traces[story.trace_id]
        others.remove(request_id)
        if not others:
            del self._traces[story.trace_id]
