"""Energy meters on a sysfs of real files; what is no measurement says so."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from neuclip_scale.telemetry.energy import EstimatedMeter, NoMeter, RaplMeter, energy_meter

CPU = torch.device("cpu")
RANGE = 262_143_328_850  # microjoules, as on current Xeons: 20 minutes at 200 W


def write_domain(root: Path, domain: str, name: str, microjoules: int) -> Path:
    folder = root / domain
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "max_energy_range_uj").write_text(f"{RANGE}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    return folder / "energy_uj"


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    """Two packages with a part each, and the platform's domain, as /sys/class/powercap shows them."""
    write_domain(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    write_domain(tmp_path, "intel-rapl:0:0", "core", 500_000)
    write_domain(tmp_path, "intel-rapl:1", "package-1", RANGE - 3_000_000)
    write_domain(tmp_path, "intel-rapl:1:0", "dram", 500_000)
    write_domain(tmp_path, "intel-rapl:2", "psys", 9_000_000)
    (tmp_path / "intel-rapl").mkdir()  # the control type itself
    return tmp_path


def test_packages_alone_count_and_their_counters_start_over(sysfs: Path) -> None:
    meter = RaplMeter(sysfs)
    assert meter.source.startswith("measured: RAPL")
    meter.start()
    write_domain(sysfs, "intel-rapl:0", "package-0", 6_000_000)
    write_domain(sysfs, "intel-rapl:0:0", "core", 4_000_000)
    write_domain(sysfs, "intel-rapl:1", "package-1", 4_000_000)  # 3 J to the end of its range, and 4 more
    write_domain(sysfs, "intel-rapl:2", "psys", 99_000_000)
    meter.update()
    assert meter.joules == pytest.approx(5 + 7)
    write_domain(sysfs, "intel-rapl:0", "package-0", 2_000_000)  # and once more: nearly a whole turn
    meter.stop()
    assert meter.joules == pytest.approx(12 + (RANGE - 4_000_000) / 1e6)


def test_what_is_used_while_stopped_does_not_count(sysfs: Path) -> None:
    meter = RaplMeter(sysfs)
    write_domain(sysfs, "intel-rapl:0", "package-0", 2_000_000)
    meter.start()
    write_domain(sysfs, "intel-rapl:0", "package-0", 3_000_000)
    meter.stop()
    write_domain(sysfs, "intel-rapl:0", "package-0", 50_000_000)
    meter.update()
    meter.stop()
    meter.start()
    write_domain(sysfs, "intel-rapl:0", "package-0", 51_500_000)
    meter.stop()
    assert meter.joules == pytest.approx(1 + 1.5)


def test_one_rank_of_a_machine_reads_its_packages(sysfs: Path) -> None:
    assert isinstance(energy_meter(CPU, local_rank=0, powercap=sysfs), RaplMeter)
    other = energy_meter(CPU, local_rank=1, powercap=sysfs)
    assert isinstance(other, NoMeter)
    other.start()
    other.stop()
    assert (other.joules, other.source) == (0.0, "")


@pytest.mark.parametrize("empty", [True, False])
def test_without_a_counter_it_is_an_estimate(tmp_path: Path, empty: bool) -> None:
    if not empty:  # a virtual machine that shows the platform's domain only
        write_domain(tmp_path, "intel-rapl:0", "psys", 1)
    meter = energy_meter(CPU, powercap=tmp_path)
    assert isinstance(meter, EstimatedMeter)
    assert meter.source.startswith(f"estimate: {10 * torch.get_num_threads()} W per device x seconds (")
    assert "this machine has no RAPL" in meter.source
    # No counter of the machine: every rank counts for itself.
    assert isinstance(energy_meter(CPU, local_rank=1, powercap=tmp_path), EstimatedMeter)


def test_a_counter_that_may_not_be_read_is_named_as_the_reason(sysfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (sysfs / "intel-rapl:1" / "energy_uj").chmod(0)
    sysfs.chmod(0o755)
    monkeypatch.chdir(sysfs)  # the folders above are pytest's own
    user = os.geteuid()
    if user == 0:  # whom no mode keeps out
        os.seteuid(65534)
    try:
        meter = energy_meter(CPU, powercap=Path())
    finally:
        os.seteuid(user)
    assert isinstance(meter, EstimatedMeter)
    assert "only root may read it" in meter.source


def test_an_estimate_is_power_times_the_seconds_it_ran() -> None:
    meter = EstimatedMeter(50.0, "for the test")
    time.sleep(0.05)
    began = time.perf_counter()
    meter.start()
    time.sleep(0.1)
    meter.stop()
    most = 50 * (time.perf_counter() - began)
    time.sleep(0.05)
    meter.stop()
    assert 5.0 <= meter.joules <= most
    assert meter.source == "estimate: 50 W per device x seconds (for the test)"


def test_a_counter_that_vanishes_ends_the_count_and_not_the_run(sysfs: Path, caplog: pytest.LogCaptureFixture) -> None:
    meter = RaplMeter(sysfs)
    meter.start()
    write_domain(sysfs, "intel-rapl:0", "package-0", 3_000_000)
    meter.update()
    (sysfs / "intel-rapl:0" / "energy_uj").unlink()
    meter.update()
    meter.stop()
    meter.start()
    meter.stop()
    assert meter.joules == pytest.approx(2)
    assert meter.source.startswith("incomplete, the counter failed during training (")
    assert meter.source.endswith(RaplMeter.source)
    assert len(caplog.records) == 1
