"""Reads a counter that moves by itself just when it moves: learns its period and phase. Pure: time comes in.

A driver moves the counter of a GPU every 20 to 100 ms, and nobody is told. Blind reads each 50 ms know an
edge to half of that, and every second one finds nothing. Locked, one read per edge is nearly enough, made
where the edge is expected. If the counter has moved by then, the next edge is expected a little sooner; if
not, it is read again a little later, and expected there. So the expectation stays within a few milliseconds
of the edge, on either side of it in turn. Of edges that are wanted rarely each takes two reads: one before
it, so that it is seen to come; and the better the period is known, the further ahead it is trusted.
"""

from __future__ import annotations

from math import ceil

_MS = 1_000_000
_SCAN_STEP_NS = 3 * _MS
_SCAN_LASTS_NS = 520 * _MS
"""Two edges of the slowest counter lie in it."""
_SHARP_NS = 3 * _SCAN_STEP_NS
"""Edges known no better than this teach nothing."""
_SHORTEST_NS = 4 * _SCAN_STEP_NS
_LONGEST_NS = 250 * _MS
_AGAIN_NS = 4 * _MS
_MOST_AGAIN = 3
"""Reads at 4, 12 and 28 ms behind the expectation; then the lock is lost."""
_SOONER_NS = _MS // 2
_CALM_SOONER = 6
_MOST_SOONER = 13
"""So often in a row the counter has moved already: from 6 on we look for the edge in steps that double."""
_NOISE_PERIODS = 4
"""A period found over so many is believed as much as the one known before."""
_MOST_AHEAD = 64
_BLUR_NS = 8 * _MS
"""An edge may come so much sooner than expected."""
_EARLY_NS = 12 * _MS
"""An edge that comes so much sooner than it is wanted will do."""
_NEAR = 0.9
_ROUNDING = 1e-6
_FIRST_REST_NS = 2_000 * _MS
_LONGEST_REST_NS = 32_000 * _MS
_PROVEN_NS = 10_000 * _MS


class EdgeLock:
    """Says when to read next (`due_ns`), and where the edge was that a read found (`edge_ns`).

    Blind, it reads every `poll_ns`. After rests of 2 to 32 s it scans 520 ms in steps of 3 ms; two sharp
    edges in there lock it. A lock that finds no edge within 28 ms of where it should be, or again and again
    one that was early, is lost: then it is blind again, and notices an edge within `poll_ns`. Of a counter
    that moves every `poll_ns` or faster the period is all it needs: a read at any time finds a young edge.
    """

    def __init__(self, *, poll_ns: int, now_ns: int) -> None:
        self._poll_ns = poll_ns
        self._read_ns = now_ns
        self._edge_ns = now_ns
        self._is_sharp = False
        self._period_ns: float | None = None
        """Known: it is locked."""
        self._locked_ns = now_ns
        self._target_ns: int | None = None
        """The edge that the next reads are to find; None where any one will do."""
        self._num_again = self._num_sooner = 0
        self._rest_ns = _FIRST_REST_NS
        self._scan_ns = now_ns
        """It scans from then on."""
        self._sharp_ns = now_ns
        """The last edge that was known from both sides."""
        self._num_ahead = 1
        """So many periods ahead of that one we trust it; twice as many with each."""

    @property
    def period_ns(self) -> int | None:
        """None: not locked."""
        return None if self._period_ns is None else round(self._period_ns)

    def due_ns(self, now_ns: int, *, after_ns: int) -> int:
        """When to read next: an edge is wanted that is later than about `after_ns`, and than now.

        Whatever the counter does, two reads are 3 ms apart.
        """
        return max(self._expected_ns(now_ns, after_ns), self._read_ns + _SCAN_STEP_NS)

    def _expected_ns(self, now_ns: int, after_ns: int) -> int:
        period_ns = self._period_ns
        if period_ns is None:
            return self._read_ns + (_SCAN_STEP_NS if self._read_ns >= self._scan_ns else self._poll_ns)
        if period_ns <= self._poll_ns:
            return max(after_ns + round(period_ns / 2), self._read_ns + self._poll_ns)
        if self._num_again:
            return self._read_ns + (_AGAIN_NS << self._num_again - 1)
        trusted_ns = self._sharp_ns + round(self._num_ahead * period_ns)
        since_ns = max(min(after_ns - _EARLY_NS, trusted_ns), now_ns) - self._edge_ns
        target_ns = self._edge_ns + round(max(1, ceil(since_ns / period_ns - _ROUNDING)) * period_ns)
        if self._target_ns is None or target_ns < self._target_ns:
            self._target_ns = target_ns
        if self._is_armed:
            return self._target_ns
        begin_ns, half_ns = self._target_ns - _NEAR * period_ns, self._target_ns - round(period_ns / 2)
        # A read just before the edge may find it already, and the next one would wait for it in vain.
        if now_ns > self._target_ns - _BLUR_NS or self._read_ns >= half_ns:
            return self._target_ns + _AGAIN_NS
        # Awake between the last edge before it and this one, for whatever reason: that read serves, once.
        return now_ns if self._read_ns < begin_ns <= now_ns < half_ns else half_ns

    def edge_ns(self, now_ns: int) -> int:
        """Where the last edge is that a read now finds: as expected, else halfway from the last read."""
        period_ns = self._period_ns
        if period_ns is None or self._num_again or now_ns <= self._edge_ns:
            return (self._read_ns + now_ns) // 2
        if self._target_ns is None:
            return max(self._read_ns, now_ns - round(period_ns / 2))
        periods = (now_ns - self._edge_ns) / period_ns + _ROUNDING
        expected_ns = self._edge_ns + round(int(periods) * period_ns)
        return min(max(expected_ns, self._read_ns), now_ns)

    def note(self, now_ns: int, *, has_moved: bool) -> None:
        """After each read."""
        if self._period_ns is None:
            self._learn(now_ns, has_moved=has_moved)
        elif has_moved:
            self._follow(now_ns, self._period_ns)
        else:
            self._miss(now_ns, self._period_ns)
        self._read_ns = now_ns

    @property
    def _is_armed(self) -> bool:
        """Whether the edge before the target was seen: else the counter has moved by then in any case."""
        if self._target_ns is None or self._period_ns is None:
            return False
        return self._target_ns - self._edge_ns < 1.5 * self._period_ns

    def _learn(self, now_ns: int, *, has_moved: bool) -> None:
        """Lock on two sharp edges; rest when a scan did not find them."""
        if has_moved:
            edge_ns, is_sharp = self.edge_ns(now_ns), now_ns - self._read_ns <= _SHARP_NS
            period_ns = edge_ns - self._edge_ns
            if is_sharp and self._is_sharp and _SHORTEST_NS <= period_ns <= _LONGEST_NS:
                self._period_ns, self._locked_ns = float(period_ns), now_ns
                self._sharp_ns, self._num_ahead = edge_ns, 1
            self._edge_ns, self._is_sharp = edge_ns, is_sharp
        if self._period_ns is None and now_ns >= self._scan_ns + _SCAN_LASTS_NS:
            self._rest(now_ns)

    def _follow(self, now_ns: int, period_ns: float) -> None:
        """An edge was found: correct phase and period by where it was."""
        edge_ns = self.edge_ns(now_ns)
        target_ns, is_armed, was_late = self._target_ns, self._is_armed, self._num_again > 0
        self._edge_ns, self._num_again = edge_ns, 0
        if target_ns is None or not is_armed or now_ns - target_ns > period_ns / 2:
            self._target_ns = target_ns if target_ns is not None and target_ns > now_ns else None
            return
        self._target_ns = None
        if was_late:
            self._num_sooner = 0
            self._period_ns = period_ns = self._sharpened_ns(edge_ns, period_ns)
            self._sharp_ns, self._num_ahead = edge_ns, min(2 * self._num_ahead, _MOST_AHEAD)
        else:
            self._num_sooner += 1
            self._edge_ns -= _SOONER_NS << max(0, self._num_sooner - _CALM_SOONER)
        if self._num_sooner > _MOST_SOONER or not _SHORTEST_NS <= period_ns <= _LONGEST_NS:
            self._lose(now_ns)

    def _sharpened_ns(self, edge_ns: int, period_ns: float) -> float:
        """The period, by an edge that is known from both sides: its distance from the last such one."""
        num_periods = max(1, round((edge_ns - self._sharp_ns) / period_ns))
        found_ns = (edge_ns - self._sharp_ns) / num_periods
        return period_ns + num_periods / (num_periods + _NOISE_PERIODS) * (found_ns - period_ns)

    def _miss(self, now_ns: int, period_ns: float) -> None:
        """The counter stood still: the edge comes later than expected, or not at all."""
        if self._target_ns is not None and now_ns >= self._target_ns:
            self._num_again += 1
            if self._num_again > _MOST_AGAIN:
                self._lose(now_ns)
        elif not self._is_armed and now_ns - self._read_ns > 1.5 * period_ns:
            self._lose(now_ns)

    def _lose(self, now_ns: int) -> None:
        if now_ns - self._locked_ns >= _PROVEN_NS:
            self._rest_ns = _FIRST_REST_NS
        self._period_ns = self._target_ns = None
        self._num_again = self._num_sooner = 0
        self._rest(now_ns)

    def _rest(self, now_ns: int) -> None:
        """Blind for a while, each time twice as long."""
        self._is_sharp = False
        self._scan_ns = now_ns + self._rest_ns
        self._rest_ns = min(2 * self._rest_ns, _LONGEST_REST_NS)
