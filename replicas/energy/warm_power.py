"""What the devices of a group draw while no step runs. Pure."""

from __future__ import annotations

from replicas.energy.window import Window

PJ_PER_MJ = 1_000_000_000
_SHORTEST_NS = 10_000_000
_FALL = 0.5
_RISE = 0.05


class WarmPower:
    """Told, told by the meter per window, or measured in windows without any step.

    Measured: an average that falls fast and rises slowly, because a device that still cools down, or work of
    somebody else, only ever adds. Energy comes in whole picojoules, so that a sum over split windows is the
    energy of the whole.
    """

    def __init__(self, *, told_w: float | None = None) -> None:
        self._told_mw = None if told_w is None else round(told_w * 1e3)
        self._measured_mw: float | None = None

    @property
    def power_w(self) -> float | None:
        """None while unknown."""
        milliwatts = self._told_mw if self._told_mw is not None else self._measured_mw
        return None if milliwatts is None else milliwatts / 1e3

    def observe_idle(self, window: Window) -> None:
        """A window in which nothing ran. Short ones say nothing: the meter counts whole millijoules."""
        if window.width_ns < _SHORTEST_NS:
            return
        seen_mw = window.delta_mj * 1e9 / window.width_ns
        if self._measured_mw is None:
            self._measured_mw = seen_mw
        else:
            pace = _FALL if seen_mw < self._measured_mw else _RISE
            self._measured_mw += pace * (seen_mw - self._measured_mw)

    def drawn_pj(self, window: Window, time_ns: int) -> int:
        """Energy of `time_ns` of `window` without work. 0 while unknown: then work pays for all of it."""
        if window.static_mj is not None:
            return window.static_mj * PJ_PER_MJ * time_ns // window.width_ns
        if self._told_mw is not None:
            return self._told_mw * time_ns
        return round(self._measured_mw) * time_ns if self._measured_mw is not None else 0
