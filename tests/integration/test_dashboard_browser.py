"""The dashboard in a real browser: numbers as in /metrics, charts drawn, keys and themes that work."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from protos import wattline_link_pb2 as link
from tests.browser import Page, find_chromium, open_page
from tests.router_fixture import MODEL, TestRouter, collect, make_config, make_request, run_test_router

CHROMIUM = find_chromium()
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
]
NS = 1_000_000_000
POWER_LEGEND = "document.querySelector('#chart-power + .legend').textContent"
READY = "document.documentElement?.dataset.ready === 'true'"
PAINTED = """[...document.querySelectorAll('canvas')].filter((one) => one.offsetParent).map((canvas) => {
  const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
  return data.some((value) => value > 0);
}).every((isPainted) => isPainted)"""


@pytest.fixture
async def router(request: pytest.FixtureRequest) -> AsyncIterator[TestRouter]:
    config = make_config(
        model={"slo": {"ttft_ms": 60_000, "tpot_ms": 60_000}, **getattr(request, "param", {})}
    )
    async with run_test_router(config) as running:
        yield running


@pytest.fixture
async def page(router: TestRouter) -> AsyncIterator[Page]:
    assert CHROMIUM is not None
    async with open_page(CHROMIUM) as page:
        await page.set_view(width=1280, height=900)
        await page.open(f"http://{router.addresses.http}/")
        await page.until(READY)
        yield page


def make_totals(second: int) -> link.LedgerTotals:
    prefill_mj, decode_mj, idle_mj, unattributed_mj = 1234 * second, 5678 * second, 910 * second, 11 * second
    return link.LedgerTotals(
        until_ns=second * NS,
        source="fake",
        confidence_factor=1.0,
        meter_mj=prefill_mj + decode_mj + idle_mj + unattributed_mj,
        prefill_mj=prefill_mj,
        decode_mj=decode_mj,
        idle_mj=idle_mj,
        unattributed_mj=unattributed_mj,
        host_meter_mj=500 * second,
        host_requests_mj=400 * second,
    )


async def scrape(router: TestRouter) -> dict[tuple[str, ...], float]:
    """Every sample: name and label values in label order."""

    def fetch() -> str:
        with urlopen(f"http://{router.addresses.http}/metrics", timeout=60) as response:
            return str(response.read().decode())

    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(await asyncio.to_thread(fetch))
        for sample in family.samples
    }


async def shown(page: Page, selector: str, field: str) -> int:
    return int(await page.evaluate(f"document.querySelector('{selector}').dataset.{field}"))


async def test_the_numbers_on_the_page_are_those_of_metrics(
    router: TestRouter, page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.energy.ledger_book.RATE_AGE_S", 1e9)  # However slow the machine is.
    assert "host" not in await page.evaluate(POWER_LEGEND)
    async with router.replica() as replica:
        for length in (3, 5, 7):
            await collect(router.inference.Generate(make_request("x" * length, energy_wait_ms=1000)))
        for second in (1, 2, 3):
            await replica.report_ledger(make_totals(second))
        await page.until(f"document.querySelector('[data-ledger=meter_mj]')?.dataset.mj === '{7833 * 3}'")
        samples = await scrape(router)
        for key, name, kind in (
            ("prompt_tokens", "wattline_tokens_total", "prompt"),
            ("output_tokens", "wattline_tokens_total", "output"),
        ):
            assert await shown(page, f"[data-total={key}]", "value") == samples[name, kind, MODEL]
        assert await shown(page, "[data-total=requests]", "value") == 3
        assert samples["wattline_requests_total", "OK", MODEL] == 3
        billed_mj = await shown(page, "[data-total=request_energy_mj]", "value")
        assert billed_mj == round(
            1e3
            * sum(value for key, value in samples.items() if key[0] == "wattline_request_energy_joules_total")
        )
        parts_mj = 0
        for key, ledger, phase in (
            ("prefill_mj", "request", "prefill"),
            ("decode_mj", "request", "decode"),
            ("idle_mj", "idle", "none"),
            ("unattributed_mj", "unattributed", "none"),
        ):
            value_mj = await shown(page, f"[data-ledger={key}]", "mj")
            name = "wattline_energy_joules_total"
            labels = (name, "device", ledger, MODEL, phase, "fake")
            of_tenants = [value for key, value in samples.items() if key[:-1] == labels]
            assert value_mj == round(1e3 * sum(of_tenants))
            parts_mj += value_mj
        meter_mj = round(1e3 * samples["wattline_energy_meter_joules_total", MODEL, "fake"])
        assert await shown(page, "[data-ledger=meter_mj]", "mj") == parts_mj == meter_mj
        host_mj = 0
        for key, ledger in (("host_requests_mj", "request"), ("host_rest_mj", "rest")):
            value_mj = await shown(page, f"[data-ledger={key}]", "mj")
            assert value_mj == round(
                1e3 * samples["wattline_host_energy_joules_total", ledger, MODEL, "shared"]
            )
            host_mj += value_mj
        assert await shown(page, "[data-ledger=host_meter_mj]", "mj") == host_mj == 500 * 3
        await page.until(f"{POWER_LEGEND}.includes('host, beside it0.500 W')")
        assert await page.evaluate("document.querySelector('[data-tile=power] .sub').textContent") == (
            "host 0.500 W beside it"
        )
        assert "to the millijoule" in await page.evaluate(
            "document.getElementById('ledger-check').textContent"
        )
        assert await page.evaluate("document.getElementById('badge').textContent") == "simulated (fake)"
        assert await page.evaluate("document.querySelectorAll('#requests tr').length") == 3
        await page.until(PAINTED)
    assert page.complaints == []
    host = f"http://{router.addresses.http}/"
    assert all(url.startswith(host) for url in page.requested)


async def test_the_experts_are_drawn_of_a_model_that_has_them_and_keys_walk_over_the_map(
    router: TestRouter, page: Page
) -> None:
    words = "document.getElementById('heat-words').textContent"
    heat = link.ExpertHeat(
        num_layers=2,
        num_experts=4,
        layers_per_row=1,
        experts_per_column=1,
        load_percent=(320, 16, 32, 32, 100, 100, 100, 100),
        copied_cells=(0,),
        tokens=400,
        num_ranks=2,
        num_copies=1,
        imbalance=1.06,
        imbalance_without_copies=1.34,
    )
    async with router.replica() as replica:
        await page.until("document.querySelector('#replicas .state')?.dataset.state === 'ready'")
        assert await page.evaluate("document.getElementById('experts').hidden")
        beat = link.Heartbeat(load=replica.load())
        await replica.send(link.FromReplica(heartbeat=beat, experts=heat))
        await page.until("!document.getElementById('experts').hidden")
        assert await page.evaluate(words) == "hottest 3.20× layer 0, expert 0"
        assert "from 1.34× to 1.06×" in await page.evaluate(
            "document.getElementById('imbalance-words').textContent"
        )
        await page.until(PAINTED)
        await page.evaluate("document.getElementById('heat').focus()")
        await page.press("ArrowRight")
        assert await page.evaluate(words) == "3.20× layer 0, expert 0, rank 0, copied"
        for _ in range(2):
            await page.press("ArrowRight")
        assert await page.evaluate(words) == "0.32× layer 0, expert 2, rank 1"
    assert page.complaints == []


async def test_a_lost_replica_is_told_with_its_reason_and_rows_stay_where_they_are(
    router: TestRouter, page: Page
) -> None:
    kinds = "[...document.querySelectorAll('#events .state')].map((one) => one.dataset.state).join()"
    replica = router.replica()
    await replica.attach()
    await page.until(f"{kinds} === 'attached'")
    await page.evaluate("document.querySelector('#events tr').mark = 'kept'")
    await replica.leave(says_goodbye=False)
    await page.until(f"{kinds} === 'lost,attached'")
    assert await page.evaluate("document.querySelectorAll('#events tr')[1].mark") == "kept"
    notice = await page.evaluate("document.getElementById('notice-text').textContent")
    assert "was lost at" in notice and "its link ended without a word" in notice


@pytest.mark.parametrize("router", [{"replicas": {"min": 2, "max": 2}}], indirect=True)
async def test_a_model_short_of_a_replica_says_which_one_and_why(router: TestRouter, page: Page) -> None:
    text = "document.getElementById('notice-text').textContent"
    short = "[...document.querySelectorAll('#model-choice [data-short]')].map((one) => one.title).join(', ')"
    line = "document.querySelector('#chart-replicas + .legend').textContent"
    told = (
        f"{MODEL} 1 of 2 ready. replica-1, lost at [\\d:]+: its link ended without a word. Watch for the next"
    )
    lost = router.replica(replica_id="replica-1")
    async with router.replica():
        await lost.attach()
        await page.until(f"{line} === 'ready2wanted2' && {short} === 'absent 0 of 1 ready'")
        await lost.leave(says_goodbye=False)
        await page.until(f"/^{told}/.test({text})")
        await page.until(f"{line} === 'ready1wanted2'")
        await page.until(f"{short} === '{MODEL} 1 of 2 ready, absent 0 of 1 ready'")


async def test_enter_on_a_request_copies_the_command_that_tells_its_story(
    router: TestRouter, page: Page
) -> None:
    await page.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    async with router.replica():
        await collect(router.inference.Generate(make_request("hello", energy_wait_ms=1000)))
        await page.until("document.querySelector('#requests .copy') !== null")
        await page.evaluate("document.querySelector('#requests .copy').focus()")
        await page.press("Enter")
        await page.until("document.getElementById('tip').textContent.startsWith('copied: wattline why ')")
        copied = await page.evaluate("navigator.clipboard.readText()")
    assert copied == await page.evaluate("document.querySelector('#requests .copy').dataset.copy")


async def test_an_empty_page_says_what_to_do(router: TestRouter, page: Page) -> None:
    command = "document.getElementById('notice-command').textContent"
    assert "wattline up" in await page.evaluate(command)
    async with router.replica():
        await page.until(f"{command}.startsWith('wattline chat --model {MODEL}')")
        await collect(router.inference.Generate(make_request("hello", energy_wait_ms=1000)))
        await page.until("document.getElementById('notice').hidden")


async def test_keys_reach_everything_and_the_theme_follows_the_system_until_chosen(page: Page) -> None:
    await page.press("Tab")
    assert await page.evaluate("document.activeElement.className") == "skip"
    theme = "document.documentElement.dataset.theme"
    assert await page.evaluate(theme) == "light"
    await page.set_view(width=1280, height=900, is_dark=True)
    await page.until(f"{theme} === 'dark'")
    await page.evaluate("document.getElementById('theme').click()")
    assert await page.evaluate(f"[{theme}, document.getElementById('theme').textContent].join()") == (
        "light,light"
    )
    await page.set_view(width=1280, height=300)
    await page.evaluate("document.querySelector('#charts .term').focus()")
    await page.until("scrollY > 0")
    await page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert not await page.evaluate("document.getElementById('tip').hidden")


async def test_a_phone_shows_it_all_without_scrolling_sideways(page: Page) -> None:
    await page.set_view(width=375, height=800)
    assert await page.evaluate("document.documentElement.scrollWidth") == 375


async def test_a_lost_router_is_said(router: TestRouter, page: Page) -> None:
    await page.until("document.getElementById('link').textContent === 'live'")
    await router.router.stop(drain_s=0.0)
    await page.until("document.getElementById('link').textContent === 'reconnecting'")
