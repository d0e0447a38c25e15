"""What a machine tells of itself while a network runs: power, temperature, clocks, throttling, memory.

Cards tell it through NVML (``libnvidia-ml.so.1``, part of the driver), Jetsons through files of the kernel. Every
reader of files takes the ``root`` below which they lie, so that a recorded tree can be read like a live machine.

Sources: NVIDIA, NVML API reference (R550); Linux, Documentation/hwmon/ina3221.rst; NVIDIA, Jetson Linux Developer
Guide, "Power and Performance" for rails, thermal zones, nvpmodel and over-current events. energymon,
jetson/JetsonPowerRails.md, tells which rails contain others.
"""

from __future__ import annotations

import ctypes
import re
import threading
import time
from pathlib import Path
from typing import Any, Callable, NamedTuple, Sequence

SAMPLE_S = 0.1  # between two samples of power; the INA3221 averages over tens of milliseconds itself
BOARD = "board"  # the rail that NVML tells: the whole card
TOTAL_RAILS = ("VDD_IN", "5V_IN", "POM_5V_IN", "VDD_TOTAL")  # supply the whole module, whatever the board calls them
UNUSED = ("NC", "Sum of shunt voltages")

# nvml.h, nvmlClocksThrottleReason* (nvmlClocksEventReason* since R535): bit -> what it says
THROTTLE_REASONS = {
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal slowdown by software",
    0x40: "thermal slowdown by hardware",
    0x80: "power brake",
    0x100: "display clocks",
}
CLOCKS = {"graphics": 0, "sm": 1, "memory": 2}  # nvmlClockType_t


class Sensors:
    """A machine of which nothing can be read but the memory of this process; the others add to it."""

    kind = "none"
    missing: str | None = "neither NVML nor a Jetson's sensors are here; power, temperature and clocks are not known"

    def __init__(self, root: str | Path = "/") -> None:
        self.root = Path(root)

    def describe(self) -> dict[str, Any]:
        """What does not change while it runs: names, versions, modes, limits."""
        return {"sensors": self.kind, "missing": self.missing}

    def read(self) -> dict[str, Any]:
        """This moment: temperatures in degrees Celsius, clocks in MHz, what slows it, memory in bytes, power in watts.

        What cannot be read is not in there.
        """
        return {"memory_bytes": process_memory(self.root)}

    def powers_w(self) -> dict[str, float]:
        """Power by rail, in watts."""
        return {}

    def energy_j(self) -> float | None:
        """Energy since some moment in the past, in joules, where the machine counts it itself."""
        return None

    @property
    def total_of(self) -> tuple[str, ...]:
        """The rails that together are what the machine takes."""
        return tuple(self.powers_w())


def open_sensors(root: str | Path = "/", pci_bus_id: str | None = None) -> Sensors:
    """Find out what kind of machine this is.

    Args:
        root: Below which ``/proc`` and ``/sys`` lie.
        pci_bus_id: Of the GPU that is measured, as ``cuDeviceGetPCIBusId`` gives it; None for the first.
    """
    if is_jetson(root):
        return Jetson(root)
    try:
        return Nvml(ctypes.CDLL("libnvidia-ml.so.1"), pci_bus_id, root)
    except (OSError, NvmlError):
        return Sensors(root)


# --- NVML ---------------------------------------------------------------------------------------------------------


class NvmlError(Exception):
    """NVML does not start, or does not know the GPU."""


class _Memory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


class Nvml(Sensors):
    """One GPU, by the driver's management library.

    Args:
        library: ``libnvidia-ml.so.1``, loaded.
        pci_bus_id: Of the GPU; NVML counts them otherwise than CUDA does. None for NVML's first.
        root: For the memory of this process.

    Raises:
        NvmlError: If it does not start or finds no such GPU.
    """

    kind = "nvml"
    missing = None

    def __init__(self, library: Any, pci_bus_id: str | None = None, root: str | Path = "/") -> None:
        super().__init__(root)
        self.library = library
        self.handle = ctypes.c_void_p()
        status = library.nvmlInit_v2()
        if status == 0 and pci_bus_id:
            status = library.nvmlDeviceGetHandleByPciBusId_v2(pci_bus_id.encode(), ctypes.byref(self.handle))
        elif status == 0:
            status = library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(0), ctypes.byref(self.handle))
        if status != 0:
            raise NvmlError(f"NVML returned {status}")

    def describe(self) -> dict[str, Any]:
        """Name, driver, the newest CUDA that it runs, power limit and highest clocks."""
        cuda = ctypes.c_int()
        told = self.library.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(cuda)) == 0
        limit = self._number("nvmlDeviceGetEnforcedPowerLimit", ctypes.c_uint)
        persistence = self._number("nvmlDeviceGetPersistenceMode", ctypes.c_uint)
        return {
            "sensors": self.kind,
            "name": self._text("nvmlDeviceGetName", self.handle),
            "driver": self._text("nvmlSystemGetDriverVersion"),
            "cuda": f"{cuda.value // 1000}.{cuda.value % 1000 // 10}" if told else None,
            "power_limit_w": None if limit is None else limit / 1e3,
            "persistence_mode": None if persistence is None else bool(persistence),
            "max_clocks_mhz": self._clocks("nvmlDeviceGetMaxClockInfo"),
        }

    def read(self) -> dict[str, Any]:
        """Temperature, clocks, what slows it, memory of the card and of this process, power."""
        temperature = self._number("nvmlDeviceGetTemperature", ctypes.c_uint, ctypes.c_int(0))
        reasons = self._number("nvmlDeviceGetCurrentClocksThrottleReasons", ctypes.c_ulonglong)
        memory = _Memory()
        told = self.library.nvmlDeviceGetMemoryInfo(self.handle, ctypes.byref(memory)) == 0
        return {
            "temperatures_c": {} if temperature is None else {"GPU": float(temperature)},
            "clocks_mhz": self._clocks("nvmlDeviceGetClockInfo"),
            "throttled_by": None if reasons is None else throttle_reasons(reasons),
            "memory_bytes": {
                **({"gpu_total": memory.total, "gpu_used": memory.used} if told else {}),
                **process_memory(self.root),
            },
            "power_w": self.powers_w(),
        }

    def powers_w(self) -> dict[str, float]:
        """Power of the whole card."""
        milliwatts = self._number("nvmlDeviceGetPowerUsage", ctypes.c_uint)
        return {} if milliwatts is None else {BOARD: milliwatts / 1e3}

    def energy_j(self) -> float | None:
        """Since the driver was loaded; Volta and newer."""
        millijoules = self._number("nvmlDeviceGetTotalEnergyConsumption", ctypes.c_ulonglong)
        return None if millijoules is None else millijoules / 1e3

    @property
    def total_of(self) -> tuple[str, ...]:
        """The card."""
        return (BOARD,)

    def _number(self, name: str, kind: Any, *arguments: Any) -> int | None:
        """What a function of the device returns by its last argument; None if this GPU or driver does not have it."""
        value = kind()
        function = getattr(self.library, name, None)
        if function is None or function(self.handle, *arguments, ctypes.byref(value)) != 0:
            return None
        return int(value.value)

    def _text(self, name: str, *arguments: Any) -> str | None:
        text = ctypes.create_string_buffer(96)  # NVML_DEVICE_NAME_V2_BUFFER_SIZE
        if getattr(self.library, name)(*arguments, text, ctypes.c_uint(len(text))) != 0:
            return None
        return text.value.decode("utf-8", "replace")

    def _clocks(self, function: str) -> dict[str, int]:
        found = {name: self._number(function, ctypes.c_uint, ctypes.c_int(kind)) for name, kind in CLOCKS.items()}
        return {name: value for name, value in found.items() if value is not None}


def throttle_reasons(bits: int) -> list[str]:
    """Name what holds the clocks down; an idle GPU is not slowed by anything."""
    named = [text for bit, text in THROTTLE_REASONS.items() if bits & bit]
    unknown = bits & ~(sum(THROTTLE_REASONS) | 0x1)
    return [*named, f"unknown (0x{unknown:x})"] if unknown else named


# --- Jetson -------------------------------------------------------------------------------------------------------


class Jetson(Sensors):
    """A Jetson module, by the files of its kernel. Memory is one for CPU and GPU."""

    kind = "jetson"
    missing = None

    def describe(self) -> dict[str, Any]:
        """Board, release, power mode, and whether ``jetson_clocks`` holds the GPU at its highest clock."""
        gpu = gpu_clocks(self.root)
        return {
            "sensors": self.kind,
            "name": board(self.root),
            "l4t": l4t_release(self.root),
            "power_mode": power_mode(self.root),
            "gpu_clock_locked": bool(gpu) and gpu["min"] == gpu["max"] if gpu else None,
            "max_clocks_mhz": {"gpu": gpu["max"]} if gpu else {},
        }

    def read(self) -> dict[str, Any]:
        """Temperatures by zone, clocks of GPU and CPU, what slows it, memory, power by rail."""
        gpu = gpu_clocks(self.root)
        cpus = [_number(path) for path in _glob(self.root, "sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq")]
        kilohertz = [value for value in cpus if value is not None]
        clocks = {"gpu": gpu["current"]} if gpu else {}
        return {
            "temperatures_c": temperatures_c(self.root),
            "clocks_mhz": {**clocks, **({"cpu": round(max(kilohertz) / 1e3)} if kilohertz else {})},
            "throttled_by": cooling(self.root),
            "over_current_events": over_current_events(self.root),
            "memory_bytes": {**machine_memory(self.root), **process_memory(self.root)},
            "power_w": self.powers_w(),
        }

    def powers_w(self) -> dict[str, float]:
        """Power of each rail that the INA3221 chips see, by label."""
        return rails_w(self.root)

    @property
    def total_of(self) -> tuple[str, ...]:
        """The rail that feeds the module, where one is measured; otherwise all, of which one may feed another."""
        rails = self.powers_w()
        return next(((name,) for name in TOTAL_RAILS if name in rails), tuple(rails))


def is_jetson(root: str | Path = "/") -> bool:
    """Tell whether this is a Jetson."""
    return "Jetson" in (board(root) or "") or (Path(root) / "etc/nv_tegra_release").is_file()


def board(root: str | Path = "/") -> str | None:
    """Model of the board as the device tree names it; None on other machines."""
    text = _text(Path(root) / "proc/device-tree/model")
    return text.strip("\0 \n") if text else None


def l4t_release(root: str | Path = "/") -> str | None:
    """Release of Jetson Linux, for example "35.4.1"."""
    found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", _text(Path(root) / "etc/nv_tegra_release") or "")
    return "{}.{}".format(*found.groups()) if found else None


def power_mode(root: str | Path = "/") -> str | None:
    """Name of the mode that ``nvpmodel -m`` has set, or its number where the configuration does not name it."""
    status = re.search(r"pmode:(\d+)", _text(Path(root) / "var/lib/nvpmodel/status") or "")
    if status is None:
        return None
    text = _text(Path(root) / "etc/nvpmodel.conf") or ""
    names: dict[str, str] = dict(re.findall(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+?)\s*>", text))
    number = str(int(status.group(1)))
    return names.get(number, number)


def rails_w(root: str | Path = "/") -> dict[str, float]:
    """Power by rail in watts, from INA3221 chips in either layout.

    JetPack 5 and newer: ``hwmon*/in1_label`` with ``in1_input`` (mV) and ``curr1_input`` (mA). Older: ``iio:device*/
    rail_name_0`` with ``in_power0_input`` (mW).
    """
    found: dict[str, float] = {}
    for label in _glob(root, "sys/bus/i2c/drivers/ina3221*/*/hwmon/hwmon*/in[1-3]_label"):
        channel = label.name[2]
        millivolts = _number(label.with_name(f"in{channel}_input"))
        milliamperes = _number(label.with_name(f"curr{channel}_input"))
        if millivolts is not None and milliamperes is not None:
            _add_rail(found, label, millivolts * milliamperes / 1e6)
    for label in _glob(root, "sys/bus/i2c/drivers/ina3221*/*/iio*/rail_name_[0-9]"):
        milliwatts = _number(label.with_name(f"in_power{label.name[-1]}_input"))
        if milliwatts is not None:
            _add_rail(found, label, milliwatts / 1e3)
    return found


def _add_rail(found: dict[str, float], label: Path, watts: float) -> None:
    name = (_text(label) or "").strip()
    if name and name not in UNUSED:
        chip = next((part for part in label.parts if re.match(r"\d+-00[0-9a-f]{2}$", part)), "another chip")
        found[name if name not in found else f"{name} ({chip})"] = watts


def temperatures_c(root: str | Path = "/") -> dict[str, float]:
    """Temperature of each thermal zone in degrees Celsius; zones that are switched off are left out."""
    found = {}
    for zone in _glob(root, "sys/class/thermal/thermal_zone*"):
        name, value = _text(zone / "type"), _number(zone / "temp")
        if name and value is not None and value > -100000:  # -256000 is "off" with kernels of JetPack 4
            found[name.strip()] = value / 1e3
    return found


def cooling(root: str | Path = "/") -> list[str]:
    """What the thermal framework slows at this moment, by cooling device; a turning fan is not slowing."""
    found = []
    for device in _glob(root, "sys/class/thermal/cooling_device*"):
        name, state = (_text(device / "type") or "").strip(), _number(device / "cur_state")
        if state and "fan" not in name:
            found.append(f"{name} (step {state})")
    return found


def over_current_events(root: str | Path = "/") -> dict[str, int]:
    """How often each over-current protection has slowed the module since it was started (Orin and newer)."""
    found = {path.name.split("_")[0]: _number(path) for path in _glob(root, "sys/class/hwmon/hwmon*/oc*_event_cnt")}
    return {name: count for name, count in found.items() if count is not None}


def gpu_clocks(root: str | Path = "/") -> dict[str, int] | None:
    """Current, lowest and highest clock that the GPU is allowed, in MHz."""
    for folder in _glob(root, "sys/class/devfreq/*"):
        if re.search(r"gpu|ga10b|gv11b|gp10b", folder.name):  # integrated GPUs since Parker; "gpu" since JetPack 6
            values = {name: _number(folder / f"{name}_freq") for name in ("cur", "min", "max")}
            megahertz = [round(value / 1e6) for value in values.values() if value is not None]
            if len(megahertz) == 3:
                return {"current": megahertz[0], "min": megahertz[1], "max": megahertz[2]}
    return None


def machine_memory(root: str | Path = "/") -> dict[str, int]:
    """Memory of the machine in bytes: all of it, and what is in use."""
    text = _text(Path(root) / "proc/meminfo") or ""
    found = {name: int(kilobytes) * 1024 for name, kilobytes in re.findall(r"^(\w+):\s+(\d+) kB", text, re.M)}
    if not {"MemTotal", "MemAvailable"} <= found.keys():
        return {}
    return {"total": found["MemTotal"], "used": found["MemTotal"] - found["MemAvailable"]}


def process_memory(root: str | Path = "/") -> dict[str, int]:
    """Memory of this process in bytes: now, and the most that it had."""
    text = _text(Path(root) / "proc/self/status") or ""
    found = dict(re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB", text, re.M))
    names = {"VmRSS": "process", "VmHWM": "process_peak"}
    return {names[name]: int(kilobytes) * 1024 for name, kilobytes in found.items()}


def _glob(root: str | Path, pattern: str) -> list[Path]:
    """Paths below a root, in the order of the numbers in their names."""
    found = Path(root).glob(pattern)
    return sorted(found, key=lambda path: [int(n) if n.isdigit() else n for n in re.split(r"(\d+)", str(path))])


def _text(path: Path) -> str | None:
    try:
        return path.read_text("utf-8", "replace")
    except OSError:  # not there, or a sensor that is switched off
        return None


def _number(path: Path) -> int | None:
    try:
        return int((_text(path) or "").strip())
    except ValueError:
        return None


# --- Energy -------------------------------------------------------------------------------------------------------


class Energy(NamedTuple):
    """What was used over some time.

    Attributes:
        duration_s: Seconds.
        rails_j: Joules by rail.
        total_j: Joules of ``total_of`` together; None if nothing could be read.
        total_of: The rails that count.
        method: ``"counter"``, ``"samples"`` or ``"none"``.
    """

    duration_s: float
    rails_j: dict[str, float]
    total_j: float | None
    total_of: tuple[str, ...]
    method: str

    @property
    def watts(self) -> float | None:
        """Mean power."""
        return None if self.total_j is None or not self.duration_s else self.total_j / self.duration_s


class EnergyMeter:
    """Energy of what is done within a ``with`` block: by the machine's counter, or by sampling its power.

    Attributes:
        energy: The result, after the block.
    """

    energy: Energy

    def __init__(self, sensors: Sensors, interval_s: float = SAMPLE_S) -> None:
        self.sensors, self.interval_s = sensors, interval_s
        self.samples: list[tuple[float, dict[str, float]]] = []
        self.done = threading.Event()

    def __enter__(self) -> EnergyMeter:
        self.started, self.counter = time.perf_counter(), self.sensors.energy_j()
        if self.counter is None:
            self._sample()
            self.thread = threading.Thread(target=self._keep_sampling, daemon=True)
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.counter is not None:
            after, ended = self.sensors.energy_j(), time.perf_counter()
            used = None if after is None else after - self.counter
            rails = {} if used is None else {BOARD: used}
            self.energy = Energy(ended - self.started, rails, used, (BOARD,), "counter")
            return
        self.done.set()
        self.thread.join()
        self._sample()
        rails = {name: integral_j(self._rail(name)) for name in self._rails()}
        counted = tuple(name for name in self.sensors.total_of if name in rails)
        total = sum(rails[name] for name in counted) if counted else None
        duration = self.samples[-1][0] - self.samples[0][0]
        self.energy = Energy(duration, rails, total, counted, "samples" if rails else "none")

    def _sample(self) -> None:
        self.samples.append((time.perf_counter(), self.sensors.powers_w()))

    def _keep_sampling(self) -> None:
        while not self.done.wait(self.interval_s):
            self._sample()

    def _rails(self) -> list[str]:
        """Those that every sample has: a rail that could not be read for a while has no integral."""
        return [name for name in self.samples[0][1] if all(name in powers for _, powers in self.samples)]

    def _rail(self, name: str) -> list[tuple[float, float]]:
        return [(moment, powers[name]) for moment, powers in self.samples]


def integral_j(samples: Sequence[tuple[float, float]]) -> float:
    """Energy in joules of power samples (seconds, watts) in the order of time, by the trapezoidal rule."""
    pairs = [(samples[i], samples[i + 1]) for i in range(len(samples) - 1)]
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairs)


def energy_of_utterances(load: Energy, idle: Energy, utterances: int) -> dict[str, Any]:
    """Joules for each utterance: all that was used, and what was used beyond what an idle machine takes.

    Args:
        load: While so many utterances were computed.
        idle: While nothing was.
        utterances: At least 1.
    """
    if load.total_j is None or idle.watts is None:
        return {"missing": "the machine tells no power"}
    return {
        "joules": load.total_j / utterances,
        "joules_above_idle": (load.total_j - idle.watts * load.duration_s) / utterances,
        "watts": load.watts,
        "idle_watts": idle.watts,
        "duration_s": load.duration_s,
        "utterances": utterances,
        "rails_joules": {name: joules / utterances for name, joules in load.rails_j.items()},
        "total_of": list(load.total_of),
        "method": load.method,
    }


def measure_energy(
    sensors: Sensors, work: Callable[[], int], idle_s: float = 10.0, sleep: Callable[[float], None] = time.sleep
) -> dict[str, Any]:
    """Energy for each utterance of some work, beside an idle machine before it.

    Args:
        sensors: Of the machine.
        work: Computes utterances for at least 10 seconds and returns how many.
        idle_s: How long the idle machine is looked at.
        sleep: Waits so many seconds.
    """
    with EnergyMeter(sensors) as idle:
        sleep(idle_s)
    with EnergyMeter(sensors) as load:
        utterances = work()
    return energy_of_utterances(load.energy, idle.energy, utterances)
