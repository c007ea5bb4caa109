"""Sends one choice of an order down a link: its job, its text side, its span."""

from __future__ import annotations

from array import array
from dataclasses import replace
from functools import partial

from cluster.config import RouterSection
from cluster.link.engine_job import EngineJob
from cluster.request.completion import Completion
from cluster.request.errors import ResumeRefused, SlowConsumer
from cluster.router.choices import choice_seed
from cluster.router.order import Route
from cluster.router.run import Attempt, Run
from cluster.router.way_in import WayIn
from cluster.served_model import ServedModel
from cluster.text.answer_text import AnswerText
from cluster.text.detokenizer import MAX_WINDOW
from cluster.text.text_threads import TextThreads


class Submission:
    """What every request of a router has in common on its way down. Holds no state of any."""

    def __init__(self, *, section: RouterSection, threads: TextThreads) -> None:
        self._stall_buffer_bytes = section.stall_buffer_bytes
        self._threads = threads

    async def text_so_far(self, model: ServedModel, completion: Completion, route: Route) -> AnswerText:
        """The text side of an answer, which has seen what the caller has. Raises ResumeRefused."""
        text = new_text(model, completion, route)
        if completion.delivered_ids:
            feed = partial(text.feed, completion.delivered_ids, is_last=False)
            # Each token makes text of a window of tokens.
            piece = await self._threads.run(feed, size=MAX_WINDOW * len(completion.delivered_ids))
            if piece.is_stopped:
                raise ResumeRefused("the answer ended with these tokens; nothing is left to resume")
        return text

    def submit(
        self, way_in: WayIn, completion: Completion, route: Route, text: AnswerText, *, index: int = 0
    ) -> Run:
        """Choice `index`, from where its caller has it. Raises Overloaded, ReplicaStopped, DeadlinePassed."""
        caller = way_in.caller
        order, deadline_s = route.order, caller.deadline_s()
        span = caller.span.start_inference(
            completion, request_id=caller.request_id, max_tokens=order.max_tokens
        )
        limit_bytes = self._stall_buffer_bytes
        job = EngineJob(
            prompt_ids=order.prompt_ids,
            sampling=replace(completion.sampling, seed=choice_seed(completion.sampling.seed, index)),
            max_tokens=order.max_tokens,
            stop_token_ids=stop_token_ids(completion, route),
            priority=order.priority,
            deadline_s=deadline_s,
            lane=route.lane,
            cache_salt=order.errand.cache_salt,
            tenant=caller.tenant,
            cached_tokens=route.cached_tokens,
            traceparent=span.traceparent,
            text=text,
            buffer_bytes=limit_bytes // completion.num_choices,
            scores_prompt=completion.wants_prompt_logprobs and index == 0,
            on_overflow=lambda: caller.interrupt(SlowConsumer(limit_bytes=limit_bytes)),
        )
        delivered_ids = completion.delivered_ids
        rest = (
            job.resumed(
                delivered_ids,
                attempt=0,
                lane=route.lane,
                deadline_s=deadline_s,
                cached_tokens=route.cached_tokens,
            )
            if delivered_ids
            else job
        )
        return Run(
            request_id=caller.request_id,
            tenant=caller.tenant,
            arrived_s=caller.arrived_s,
            model=way_in.model,
            way_in=way_in,
            job=job,
            span=span,
            attempts=[first_attempt(route, rest)],
            index=index,
            delivered_ids=array("I", completion.delivered_ids),
        )


def first_attempt(route: Route, job: EngineJob) -> Attempt:
    """The job on its way. Raises Overloaded, ReplicaStopped."""
    stream, account = route.connection.submit(job)
    return Attempt(
        connection=route.connection,
        stream=stream,
        account=account,
        lane=route.lane,
        first_offset=job.first_offset,
        prompt_tokens=len(job.prompt_ids),
        decision=route.place.decision if route.place else None,
    )


def stop_token_ids(completion: Completion, route: Route) -> frozenset[int]:
    """The caller's, and those that end a text of this model unless they are to be ignored."""
    ends = frozenset() if completion.ignore_eos else frozenset(route.connection.hello.eos_token_ids)
    return completion.stop_token_ids | ends


def new_text(model: ServedModel, completion: Completion, route: Route) -> AnswerText:
    return AnswerText(
        model.tokenizer,
        stop_texts=completion.stop_texts,
        stop_token_ids=stop_token_ids(completion, route),
    )
