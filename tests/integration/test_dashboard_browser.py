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
READY = "document.documentElement?.dataset.ready === 'true'"
PAINTED = """[...document.querySelectorAll('canvas')].map((canvas) => {
  const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
  return data.some((value) => value > 0);
})"""


@pytest.fixture
async def router() -> AsyncIterator[TestRouter]:
    config = make_config(model={"slo": {"ttft_ms": 60_000, "tpot_ms": 60_000}})
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
    )


async def scrape(router: TestRouter) -> dict[tuple[str, ...], float]:
    """Every sample: name and label values in label order."""

    def fetch() -> str:
        with urlopen(f"http://{router.addresses.http}/metrics", timeout=20) as response:
            return str(response.read().decode())

    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(await asyncio.to_thread(fetch))
        for sample in family.samples
    }


async def shown(page: Page, selector: str, field: str) -> int:
    return int(await page.evaluate(f"document.querySelector('{selector}').dataset.{field}"))


async def test_the_numbers_on_the_page_are_those_of_metrics(router: TestRouter, page: Page) -> None:
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
        assert "to the millijoule" in await page.evaluate(
            "document.getElementById('ledger-check').textContent"
        )
        assert await page.evaluate("document.getElementById('badge').textContent") == "simulated (fake)"
        assert await page.evaluate("document.querySelectorAll('#requests tr').length") == 3
        assert all(await page.evaluate(PAINTED))
    assert page.complaints == []
    host = f"http://{router.addresses.http}/"
    assert all(url.startswith(host) for url in page.requested)


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
    await page.evaluate("document.querySelector('.tiles .term').focus()")
    assert not await page.evaluate("document.getElementById('tip').hidden")


async def test_a_phone_shows_it_all_without_scrolling_sideways(page: Page) -> None:
    await page.set_view(width=375, height=800)
    assert await page.evaluate("document.documentElement.scrollWidth") == 375


async def test_a_lost_router_is_said(router: TestRouter, page: Page) -> None:
    assert await page.evaluate("document.getElementById('link').textContent") == "live"
    await router.router.stop(drain_s=0.0)
    await page.until("document.getElementById('link').textContent === 'reconnecting'")
