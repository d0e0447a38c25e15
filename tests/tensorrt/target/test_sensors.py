"""Sensors of the target: NVML and the files of a Jetson.

There is neither here. The trees follow the published layouts (NVIDIA, Jetson Linux Developer Guide; energymon's table
of rails; the kernel's ina3221 driver); they are not recordings of boards of ours. ``FakeNvml`` stands in for the
driver's library and is called as the real one is, through ctypes objects.
"""

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.tensorrt.target.sensors import (
    BOARD,
    Energy,
    EnergyMeter,
    Jetson,
    Nvml,
    NvmlError,
    Sensors,
    energy_of_utterances,
    integral_j,
    measure_energy,
    open_sensors,
    process_memory,
    throttle_reasons,
)

CHIP = "sys/bus/i2c/drivers/ina3221"

ORIN = {
    "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
    "proc/meminfo": "MemTotal:       31391868 kB\nMemFree:         1000000 kB\nMemAvailable:   27391868 kB\n",
    "proc/self/status": "Name:\tpython3\nVmHWM:\t  204800 kB\nVmRSS:\t  102400 kB\n",
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN >\nCPU_ONLINE CORE_0 1\n< POWER_MODEL ID=2 NAME=MODE_30W >\n",
    "var/lib/nvpmodel/status": "pmode:0002",
    f"{CHIP}/1-0040/hwmon/hwmon3/in1_label": "VDD_GPU_SOC\n",
    f"{CHIP}/1-0040/hwmon/hwmon3/in1_input": "19200\n",
    f"{CHIP}/1-0040/hwmon/hwmon3/curr1_input": "250\n",
    f"{CHIP}/1-0040/hwmon/hwmon3/in2_label": "VDD_CPU_CV\n",
    f"{CHIP}/1-0040/hwmon/hwmon3/in2_input": "19200\n",
    f"{CHIP}/1-0040/hwmon/hwmon3/curr2_input": "50\n",
    f"{CHIP}/1-0040/hwmon/hwmon3/in3_label": "VIN_SYS_5V0\n",
    f"{CHIP}/1-0040/hwmon/hwmon3/in3_input": "5000\n",
    f"{CHIP}/1-0040/hwmon/hwmon3/curr3_input": "600\n",
    f"{CHIP}/1-0040/hwmon/hwmon3/in7_label": "Sum of shunt voltages\n",
    f"{CHIP}/1-0040/hwmon/hwmon3/in7_input": "1\n",
    f"{CHIP}/1-0041/hwmon/hwmon4/in1_label": "NC\n",
    f"{CHIP}/1-0041/hwmon/hwmon4/in1_input": "0\n",
    f"{CHIP}/1-0041/hwmon/hwmon4/curr1_input": "0\n",
    f"{CHIP}/1-0041/hwmon/hwmon4/in2_label": "VDDQ_VDD2_1V8AO\n",
    f"{CHIP}/1-0041/hwmon/hwmon4/in2_input": "5000\n",
    f"{CHIP}/1-0041/hwmon/hwmon4/curr2_input": "100\n",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "48500\n",
    "sys/class/thermal/thermal_zone1/type": "gpu-thermal\n",
    "sys/class/thermal/thermal_zone1/temp": "45250\n",
    "sys/class/thermal/thermal_zone2/type": "cv0-thermal\n",  # off: reading gives an error, here an empty file
    "sys/class/thermal/thermal_zone2/temp": "",
    "sys/class/thermal/cooling_device0/type": "gpu-throttle-alert\n",
    "sys/class/thermal/cooling_device0/cur_state": "1\n",
    "sys/class/thermal/cooling_device1/type": "pwm-fan\n",
    "sys/class/thermal/cooling_device1/cur_state": "2\n",
    "sys/class/hwmon/hwmon1/oc1_event_cnt": "0\n",
    "sys/class/hwmon/hwmon1/oc3_event_cnt": "4\n",
    "sys/class/devfreq/15480000.nvdec/cur_freq": "793600000\n",
    "sys/class/devfreq/17000000.gpu/cur_freq": "1300500000\n",
    "sys/class/devfreq/17000000.gpu/min_freq": "1300500000\n",
    "sys/class/devfreq/17000000.gpu/max_freq": "1300500000\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "729600\n",
    "sys/devices/system/cpu/cpu10/cpufreq/scaling_cur_freq": "2201600\n",
}

XAVIER = {  # JetPack 5: the newer layout, the module without a total
    "proc/device-tree/model": "Jetson-AGX\0",
    "etc/nv_tegra_release": "# R35 (release), REVISION: 4.1, GCID: 33958178, BOARD: t186ref, EABI: aarch64\n",
    "var/lib/nvpmodel/status": "pmode:0007",
    "sys/class/devfreq/17000000.gv11b/cur_freq": "114750000\n",
    "sys/class/devfreq/17000000.gv11b/min_freq": "114750000\n",
    "sys/class/devfreq/17000000.gv11b/max_freq": "1377000000\n",
    "sys/class/thermal/thermal_zone0/type": "CPU-therm\n",
    "sys/class/thermal/thermal_zone0/temp": "33500\n",
    "sys/class/thermal/thermal_zone5/type": "GPU-therm\n",
    "sys/class/thermal/thermal_zone5/temp": "-256000\n",
    **{
        f"{CHIP}x/1-004{chip}/hwmon/hwmon{chip}/{kind}{channel}_{what}": text
        for chip, labels in enumerate((("GPU", "CPU", "SOC"), ("CV", "VDDRQ", "SYS5V")))
        for channel, label in enumerate(labels, start=1)
        for kind, what, text in (("in", "label", label), ("in", "input", "10000"), ("curr", "input", "100"))
    },
}

OLD_XAVIER_NX = {  # JetPack 4: the older layout
    "proc/device-tree/model": "NVIDIA Jetson Xavier NX Developer Kit\0",
    **{
        f"{CHIP}x/7-0040/iio:device0/{name}": text
        for channel, (label, milliwatts) in enumerate((("VDD_IN", 5144), ("VDD_CPU_GPU_CV", 1271), ("VDD_SOC", 1026)))
        for name, text in ((f"rail_name_{channel}", label), (f"in_power{channel}_input", str(milliwatts)))
    },
}


def tree(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture
def orin(tmp_path: Path) -> Jetson:
    found = open_sensors(tree(tmp_path, ORIN))
    assert isinstance(found, Jetson)
    return found


def test_an_orin_is_described(orin: Jetson) -> None:
    assert orin.describe() == {
        "sensors": "jetson",
        "name": "NVIDIA Jetson AGX Orin Developer Kit",
        "l4t": "36.4.3",
        "power_mode": "MODE_30W",
        "gpu_clock_locked": True,
        "max_clocks_mhz": {"gpu": 1300},
    }


def test_an_orin_is_read(orin: Jetson) -> None:
    found = orin.read()
    assert found["temperatures_c"] == {"cpu-thermal": 48.5, "gpu-thermal": 45.25}
    assert found["clocks_mhz"] == {"gpu": 1300, "cpu": 2202}
    assert found["throttled_by"] == ["gpu-throttle-alert (step 1)"]
    assert found["over_current_events"] == {"oc1": 0, "oc3": 4}
    assert found["memory_bytes"] == {
        "total": 31391868 * 1024,
        "used": 4000000 * 1024,
        "process": 102400 * 1024,
        "process_peak": 204800 * 1024,
    }
    assert found["power_w"] == pytest.approx(
        {"VDD_GPU_SOC": 4.8, "VDD_CPU_CV": 0.96, "VIN_SYS_5V0": 3.0, "VDDQ_VDD2_1V8AO": 0.5}
    )
    assert orin.total_of == tuple(found["power_w"])


def test_a_xavier_of_the_newer_layout(tmp_path: Path) -> None:
    found = open_sensors(tree(tmp_path, XAVIER))
    assert found.describe()["power_mode"] == "7"  # the configuration that names it is not there
    assert found.describe()["gpu_clock_locked"] is False
    assert found.powers_w() == dict.fromkeys(("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"), 1.0)
    assert found.read()["temperatures_c"] == {"CPU-therm": 33.5}


def test_the_older_layout_and_the_rail_that_feeds_the_others(tmp_path: Path) -> None:
    found = open_sensors(tree(tmp_path, OLD_XAVIER_NX))
    assert found.powers_w() == {"VDD_IN": 5.144, "VDD_CPU_GPU_CV": 1.271, "VDD_SOC": 1.026}
    assert found.total_of == ("VDD_IN",)
    assert found.describe()["gpu_clock_locked"] is None
    assert found.read()["memory_bytes"] == {}


def test_two_rails_of_one_name_are_both_told(tmp_path: Path) -> None:
    files = {path.replace("1-0041", "1-0042"): text for path, text in ORIN.items() if "1-0041" in path}
    found = open_sensors(tree(tmp_path, ORIN | files)).powers_w()
    assert found["VDDQ_VDD2_1V8AO"] == found["VDDQ_VDD2_1V8AO (1-0042)"] == 0.5


@pytest.mark.parametrize("damage", ["", "nonsense", None])
def test_what_cannot_be_read_is_left_out(tmp_path: Path, damage: str | None) -> None:
    root = tree(tmp_path, ORIN)
    for path in (f"{CHIP}/1-0040/hwmon/hwmon3/curr1_input", "sys/class/thermal/thermal_zone1/temp", "proc/meminfo"):
        if damage is None:
            (root / path).unlink()
        else:
            (root / path).write_text(damage)
    found = open_sensors(root).read()
    assert "VDD_GPU_SOC" not in found["power_w"]
    assert "gpu-thermal" not in found["temperatures_c"]
    assert "total" not in found["memory_bytes"]


def test_a_machine_without_sensors_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: str) -> None:
        raise OSError

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    found = open_sensors(tmp_path)
    assert found.describe()["missing"] == Sensors.missing
    assert (found.powers_w(), found.energy_j(), found.total_of) == ({}, None, ())


def test_memory_of_this_process_is_that_of_the_kernel() -> None:
    found = process_memory()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    assert found["process"] == pytest.approx(pages * os.sysconf("SC_PAGE_SIZE"), rel=0.2)
    assert found["process_peak"] >= found["process"] * 0.8


class FakeNvml:
    """Answers as NVML on a T4 would; functions that a driver does not have raise, as in ctypes."""

    def __init__(self, absent: tuple[str, ...] = (), status: int = 0) -> None:
        self.absent, self.status, self.energy_mj, self.asked = absent, status, 1_000_000, b""

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return self.status

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, handle: Any) -> int:  # noqa: N802
        handle._obj.value = 1 + index.value
        return 0

    def nvmlDeviceGetHandleByPciBusId_v2(self, bus: bytes, handle: Any) -> int:  # noqa: N802
        handle._obj.value, self.asked = 7, bus
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any) -> int:  # noqa: N802
        memory._obj.total, memory._obj.used = 16 << 30, 1 << 30
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any, value: Any) -> int:  # noqa: N802
        value._obj.value = self.energy_mj
        self.energy_mj += 50_000
        return 3 if "nvmlDeviceGetTotalEnergyConsumption" in self.absent else 0  # NVML_ERROR_NOT_SUPPORTED

    def __getattr__(self, name: str) -> Any:
        texts = {"nvmlDeviceGetName": b"Tesla T4", "nvmlSystemGetDriverVersion": b"535.104.05"}
        numbers = {
            "nvmlSystemGetCudaDriverVersion_v2": 12020,
            "nvmlDeviceGetEnforcedPowerLimit": 70000,
            "nvmlDeviceGetPersistenceMode": 1,
            "nvmlDeviceGetTemperature": 61,
            "nvmlDeviceGetCurrentClocksThrottleReasons": 0x4 | 0x20 | 0x1,
            "nvmlDeviceGetPowerUsage": 69500,
        }
        clocks = {"nvmlDeviceGetClockInfo": (1005, 1005, 5000), "nvmlDeviceGetMaxClockInfo": (1590, 1590, 5001)}
        if name in self.absent:
            raise AttributeError(name)
        if name in texts:
            return self._text(texts[name])
        if name in clocks:
            return lambda handle, kind, value: self._set(value, clocks[name][kind.value])
        return lambda *arguments: self._set(arguments[-1], numbers[name])

    @staticmethod
    def _set(value: Any, number: int) -> int:
        value._obj.value = number
        return 0

    @staticmethod
    def _text(text: bytes) -> Any:
        def write(*arguments: Any) -> int:
            arguments[-2].value = text
            return 0

        return write


def test_a_card_is_described_and_read() -> None:
    found = Nvml(FakeNvml())
    about = found.describe()
    assert (about["name"], about["driver"], about["cuda"]) == ("Tesla T4", "535.104.05", "12.2")
    assert (about["power_limit_w"], about["persistence_mode"]) == (70, True)
    assert about["max_clocks_mhz"] == {"graphics": 1590, "sm": 1590, "memory": 5001}
    now = found.read()
    assert now["temperatures_c"] == {"GPU": 61}
    assert now["throttled_by"] == ["power cap", "thermal slowdown by software"]
    assert now["memory_bytes"]["gpu_used"] == 1 << 30
    assert now["power_w"] == {BOARD: 69.5}


def test_the_card_is_found_by_its_place_on_the_bus() -> None:
    library = FakeNvml()
    assert Nvml(library, "0000:65:00.0").handle.value == 7
    assert library.asked == b"0000:65:00.0"


def test_what_a_card_does_not_tell_is_left_out() -> None:
    names = ("nvmlDeviceGetPowerUsage", "nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetMaxClockInfo")
    found = Nvml(FakeNvml(absent=names))
    assert (found.powers_w(), found.energy_j()) == ({}, None)
    assert found.describe()["max_clocks_mhz"] == {}


def test_nvml_that_does_not_start_is_an_error() -> None:
    with pytest.raises(NvmlError, match="NVML returned 9"):
        Nvml(FakeNvml(status=9))


def test_throttle_reasons_have_names() -> None:
    assert throttle_reasons(0x1) == []
    assert throttle_reasons(0x40 | 0x8) == ["hardware slowdown", "thermal slowdown by hardware"]
    assert throttle_reasons(0x4 | 0x1000) == ["power cap", "unknown (0x1000)"]


@given(
    powers=st.lists(st.floats(0, 100), min_size=2, max_size=20),
    step=st.floats(0.01, 10),
    cut=st.integers(0, 19),
)
def test_the_integral_lies_between_the_extremes_and_adds_up(powers: list[float], step: float, cut: int) -> None:
    samples = [(i * step, power) for i, power in enumerate(powers)]
    whole, duration = integral_j(samples), (len(powers) - 1) * step
    assert min(powers) * duration - 1e-6 <= whole <= max(powers) * duration + 1e-6
    cut = min(cut, len(samples) - 1)
    assert whole == pytest.approx(integral_j(samples[: cut + 1]) + integral_j(samples[cut:]))
    constant = [(moment, 12.5) for moment, _ in samples]
    assert integral_j(constant) == pytest.approx(12.5 * duration)


def test_the_counter_of_a_card_gives_the_energy() -> None:
    with EnergyMeter(Nvml(FakeNvml())) as meter:
        pass
    assert meter.energy.method == "counter"
    assert meter.energy.total_j == 50  # what FakeNvml adds between two looks


def test_a_counter_that_stops_telling_gives_no_energy() -> None:
    library = FakeNvml()
    with EnergyMeter(Nvml(library)) as meter:
        library.absent = ("nvmlDeviceGetTotalEnergyConsumption",)
    assert meter.energy.total_j is None
    assert energy_of_utterances(meter.energy, meter.energy, 1) == {"missing": "the machine tells no power"}


class FakeRails(Sensors):
    """Two rails of constant power, one of which cannot always be read."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def powers_w(self) -> dict[str, float]:
        self.asked += 1
        return {"GPU": 3.0, "CPU": 1.0} | ({} if self.asked == 2 else {"CV": 5.0})


def test_power_is_sampled_and_a_rail_with_gaps_is_left_out() -> None:
    with EnergyMeter(FakeRails(), interval_s=0.005) as meter:
        while len(meter.samples) < 4:
            meter.done.wait(0.005)
    found = meter.energy
    assert found.method == "samples"
    assert found.rails_j.keys() == {"GPU", "CPU"}
    assert found.rails_j["GPU"] == pytest.approx(3 * found.duration_s)
    assert found.total_j == pytest.approx(sum(found.rails_j.values()))
    assert not meter.thread.is_alive()


def test_energy_of_an_utterance_is_what_it_takes_beyond_idle() -> None:
    load = Energy(10.0, {"VDD_IN": 200.0}, 200.0, ("VDD_IN",), "samples")
    idle = Energy(20.0, {"VDD_IN": 100.0}, 100.0, ("VDD_IN",), "samples")
    found = energy_of_utterances(load, idle, 1000)
    assert found["joules"] == 0.2
    assert found["joules_above_idle"] == pytest.approx(0.15)  # 200 J less 5 W over 10 s
    assert (found["watts"], found["idle_watts"]) == (20, 5)
    nothing = Energy(10.0, {}, None, (), "none")
    assert energy_of_utterances(nothing, nothing, 1) == {"missing": "the machine tells no power"}


def test_idle_is_looked_at_before_the_work() -> None:
    order: list[str] = []

    def work() -> int:
        order.append("work")
        return 5

    found = measure_energy(Nvml(FakeNvml()), work, idle_s=10, sleep=lambda s: order.append(f"idle {s}"))
    assert order == ["idle 10", "work"]
    assert found["utterances"] == 5
