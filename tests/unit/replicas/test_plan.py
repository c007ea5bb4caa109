"""Plans cross the ring as int32 words and come back equal."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from replicas.plan import LAST_SAMPLED, NewRow, PlannedRow, ScoredRow, StepPlan, decode_plan, encode_plan
from replicas.request import SamplingParams
from replicas.sampling_words import as_float32

INT31 = st.integers(0, 2**31 - 1)
FLOAT32 = st.floats(0, 2, width=32)

PLAIN = st.builds(
    SamplingParams, temperature=FLOAT32, top_p=FLOAT32, top_k=INT31, seed=st.integers(0, 2**64 - 1)
)
EDITED = st.builds(
    SamplingParams,
    temperature=FLOAT32,
    seed=st.integers(0, 2**64 - 1),
    min_p=FLOAT32,
    repetition_penalty=FLOAT32,
    presence_penalty=FLOAT32,
    frequency_penalty=FLOAT32,
    logit_bias=st.lists(st.tuples(INT31, FLOAT32), max_size=4).map(tuple),
    num_logprobs=st.one_of(st.none(), INT31),
)
NEW_ROWS = st.builds(
    NewRow,
    row=INT31,
    sampling=st.one_of(PLAIN, EDITED),
    history=st.lists(INT31, max_size=4).map(tuple),
    num_prompt=INT31,
)
ROWS = st.builds(
    PlannedRow,
    row=INT31,
    start_pos=INT31,
    token_ids=st.lists(st.one_of(st.just(LAST_SAMPLED), INT31), max_size=5).map(tuple),
    new_blocks=st.lists(INT31, max_size=5).map(tuple),
    samples=st.booleans(),
)
SCORED = st.builds(ScoredRow, row=INT31, next_id=st.integers(-1, 2**31 - 1))
PLANS = st.builds(
    StepPlan,
    step=st.integers(0, 2**64 - 1),
    freed_rows=st.lists(INT31, max_size=4).map(tuple),
    new_rows=st.lists(NEW_ROWS, max_size=4).map(tuple),
    rows=st.lists(ROWS, max_size=4).map(tuple),
    scored=st.lists(st.builds(ScoredRow, row=INT31, next_id=st.integers(-1, 2**31 - 1)), max_size=3).map(
        tuple
    ),
)


@settings(derandomize=True, deadline=None)
@given(PLANS)
def test_a_plan_survives_the_round_trip(plan: StepPlan) -> None:
    assert decode_plan(encode_plan(plan)) == plan


def test_a_small_plan_is_a_handful_of_words() -> None:
    plan = StepPlan(
        step=2**32 + 1,
        freed_rows=(4,),
        new_rows=(),
        rows=(PlannedRow(row=3, start_pos=17, token_ids=(LAST_SAMPLED,), new_blocks=(9,), samples=True),),
    )
    words = memoryview(encode_plan(plan)).cast("i").tolist()
    assert words == [1, 1, 1, 0, 1, 4, 3, 17, 1, 1, 1, LAST_SAMPLED, 9]
    assert plan.num_tokens == 1


def test_sampling_is_cut_to_what_every_rank_sees() -> None:
    sampling = as_float32(SamplingParams(temperature=0.7, top_p=0.9, top_k=40, seed=2**64 - 1))
    assert sampling == SamplingParams(
        temperature=0.699999988079071, top_p=0.8999999761581421, top_k=40, seed=2**64 - 1
    )
    assert as_float32(sampling) == sampling
