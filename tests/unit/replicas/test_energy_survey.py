"""The list of a host's meters names each device with what is wrong with it, and never fails."""

from __future__ import annotations

from pathlib import Path

import pynvml
import pytest

from replicas.energy.meter import Source
from replicas.energy.survey import survey_meters


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", refuse)


@pytest.mark.usefixtures("no_driver")
def test_a_host_without_meters_says_why_and_offers_the_estimate(tmp_path: Path) -> None:
    gpu, cpu, zeus, estimate = survey_meters(powercap_dir=tmp_path)
    assert (gpu.name, gpu.is_available) == ("nvml", False)
    assert "driver installed" in gpu.detail
    assert (cpu.name, cpu.is_available) == ("rapl", False)
    assert "virtual machines" in cpu.detail
    assert (zeus.name, zeus.is_available, zeus.source) == ("zeus", False, Source.SHARED)
    assert zeus.detail
    assert (estimate.name, estimate.is_available, estimate.confidence_factor) == ("cpu-model", True, 2.0)


@pytest.mark.usefixtures("no_driver")
def test_each_readable_zone_is_a_row_of_its_own(tmp_path: Path) -> None:
    for zone, name in (("intel-rapl:0", "package-0"), ("intel-rapl:0:0", "dram")):
        (tmp_path / zone).mkdir()
        for file, text in (("name", name), ("max_energy_range_uj", "1000"), ("energy_uj", "5")):
            (tmp_path / zone / file).write_text(text)
    rows = [one for one in survey_meters(powercap_dir=tmp_path) if one.name == "rapl"]
    assert [(one.device, one.source, one.is_available) for one in rows] == [
        ("package-0", Source.SHARED, True),
        ("package-0/dram", Source.SHARED, True),
    ]
