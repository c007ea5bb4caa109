"""What the replicas' energy ledgers divided of their meters, added up for one model. Pure: time comes in.

Replicas send running sums; a replica that comes back with a new epoch starts at nothing, one that re-dials
goes on where it was. The book adds differences, so its sums never fall, and
`prefill + decode + idle + unattributed == meter` holds in it as it holds in each ledger, as integers.
What a life had divided before it was first heard of here is of another time: in a router that was started
anew it would look like the joules of a minute.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields

from cluster.energy.idle_share import IdleShare

MAX_REPLICA_LIVES = 2048
"""Lives of replicas whose last sums are remembered; beyond it the one not heard of for longest is let go."""
MAX_TENANTS = 64
"""With sums of their own; a replica names at most 32."""
OTHER_TENANTS = "other"
RATE_AGE_S = 5.0
"""A replica that was silent for longer draws an unknown power, not its last one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantSums:
    """Millijoules of one tenant's requests."""

    prefill_mj: int = 0
    decode_mj: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerSums:
    """Millijoules; `static_mj` and `wasted_mj` are parts of `prefill_mj + decode_mj`.

    `host_meter_mj` is what the hosts drew beside it, `host_requests_mj` the requests' part; 0 if unknown. A
    host has a meter of its own, whatever the source of the devices': see `LedgerBook.host`.
    `tenants` adds up to prefill and decode, too, where the replica said whose they are.
    """

    meter_mj: int = 0
    prefill_mj: int = 0
    decode_mj: int = 0
    idle_mj: int = 0
    unattributed_mj: int = 0
    static_mj: int = 0
    wasted_mj: int = 0
    host_meter_mj: int = 0
    host_requests_mj: int = 0
    tenants: Mapping[str, TenantSums] = field(default_factory=dict)

    @property
    def amounts_mj(self) -> dict[str, int]:
        """All but the tenants', by the names of the fields."""
        return {name: getattr(self, name) for name in _FIELDS}

    @property
    def requests_mj(self) -> int:
        return self.prefill_mj + self.decode_mj

    @property
    def is_conserved(self) -> bool:
        """Whether the parts are the whole, to the millijoule."""
        return self.requests_mj + self.idle_mj + self.unattributed_mj == self.meter_mj

    def __add__(self, other: LedgerSums) -> LedgerSums:
        theirs = other.amounts_mj
        sums = {name: mj + theirs[name] for name, mj in self.amounts_mj.items()}
        return LedgerSums(**sums, tenants=self._joined(other, sign=1))

    def minus(self, other: LedgerSums) -> LedgerSums:
        """What was added since `other`; whatever is less than before counts as nothing."""
        theirs = other.amounts_mj
        sums = {name: max(0, mj - theirs[name]) for name, mj in self.amounts_mj.items()}
        return LedgerSums(**sums, tenants=self._joined(other, sign=-1))

    def _joined(self, other: LedgerSums, *, sign: int) -> dict[str, TenantSums]:
        """Tenants beyond the bound are `other`."""
        tenants = dict(self.tenants)
        for name, theirs in other.tenants.items():
            name = name if name in tenants or len(tenants) < MAX_TENANTS else OTHER_TENANTS
            mine = tenants.get(name, TenantSums())
            tenants[name] = TenantSums(
                prefill_mj=max(0, mine.prefill_mj + sign * theirs.prefill_mj),
                decode_mj=max(0, mine.decode_mj + sign * theirs.decode_mj),
            )
        return tenants


_FIELDS = tuple(each.name for each in fields(LedgerSums) if each.name != "tenants")


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerPower:
    """The same division in watts: prefill + decode + idle + unattributed == meter, but for float rounding."""

    meter_w: float
    prefill_w: float
    decode_w: float
    idle_w: float
    unattributed_w: float
    static_w: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSums:
    """Millijoules that the hosts drew beside the devices: the requests' part and the rest."""

    meter_mj: int
    requests_mj: int

    @property
    def rest_mj(self) -> int:
        return self.meter_mj - self.requests_mj


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLedger:
    """One report: the sums of a replica's life by source, up to `until_ns` of its host's clock."""

    replica_id: str
    epoch: int
    until_ns: int
    sums: Mapping[str, LedgerSums]
    confidence_factors: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Life:
    """The last report of one replica's life, and the power by source over the time before it.

    `host_w` is beside them; None: nothing of a host was divided.
    """

    ledger: ReplicaLedger
    heard_s: float
    power: Mapping[str, LedgerPower]
    host_w: float | None


class LedgerBook:
    """Mutable; owned by the event loop. Sums count from the first report of each life on."""

    def __init__(self) -> None:
        self._lives: OrderedDict[tuple[str, int], _Life] = OrderedDict()
        self._sums: dict[str, LedgerSums] = {}
        self.idle_share = IdleShare()
        self._confidence_factors: dict[str, float] = {}

    @property
    def sums(self) -> Mapping[str, LedgerSums]:
        """By source: measured and estimated joules are never added up."""
        return self._sums

    @property
    def host(self) -> HostSums | None:
        """Of the hosts around all replicas; None: none is metered. Not by source: theirs is another meter."""
        meter_mj = sum(sums.host_meter_mj for sums in self._sums.values())
        if not meter_mj:
            return None
        requests_mj = sum(sums.host_requests_mj for sums in self._sums.values())
        return HostSums(meter_mj=meter_mj, requests_mj=requests_mj)

    @property
    def newest(self) -> Iterable[ReplicaLedger]:
        """The last report of each life that is remembered."""
        return [life.ledger for life in self._lives.values()]

    def confidence_factor(self, source: str) -> float | None:
        """The truth lies within value / factor .. value * factor; None for a source nobody reported."""
        return self._confidence_factors.get(source)

    def add(self, ledger: ReplicaLedger, *, now_s: float) -> None:
        """Take in a report. One that is older than the last of its life is dropped."""
        key = (ledger.replica_id, ledger.epoch)
        last = self._lives.pop(key, None)
        if last is not None and ledger.until_ns < last.ledger.until_ns:
            self._lives[key] = last
            return
        for source, sums in ledger.sums.items():
            before = last.ledger.sums.get(source, LedgerSums()) if last else sums
            self._sums[source] = self._sums.get(source, LedgerSums()) + sums.minus(before)
        self._confidence_factors.update(ledger.confidence_factors)
        self.idle_share.note(
            {source: (sums.requests_mj, sums.idle_mj) for source, sums in self._sums.items()}, now_s=now_s
        )
        power, host_w = _power(last, ledger)
        self._lives[key] = _Life(ledger=ledger, heard_s=now_s, power=power, host_w=host_w)
        if len(self._lives) > MAX_REPLICA_LIVES:
            self._lives.popitem(last=False)

    def power(self, source: str, *, now_s: float) -> LedgerPower | None:
        """What the replicas draw now by meters of this source, added up; None while none of them says."""
        powers = [life.power[source] for life in self._heard(now_s) if source in life.power]
        if not powers:
            return None
        return LedgerPower(
            meter_w=sum(power.meter_w for power in powers),
            prefill_w=sum(power.prefill_w for power in powers),
            decode_w=sum(power.decode_w for power in powers),
            idle_w=sum(power.idle_w for power in powers),
            unattributed_w=sum(power.unattributed_w for power in powers),
            static_w=sum(power.static_w for power in powers),
        )

    def host_w(self, *, now_s: float) -> float | None:
        """What the hosts draw now beside the devices; None while none of them says."""
        powers_w = [life.host_w for life in self._heard(now_s) if life.host_w is not None]
        return sum(powers_w) if powers_w else None

    def _heard(self, now_s: float) -> Iterable[_Life]:
        return (life for life in self._lives.values() if now_s - life.heard_s <= RATE_AGE_S)


def _power(last: _Life | None, ledger: ReplicaLedger) -> tuple[Mapping[str, LedgerPower], float | None]:
    """Of the devices by source, and of the host, over the time since the last report; as before where no more
    was divided.

    A source that divided nothing new has no power: its meter gave way to another. Nor has the host.
    """
    if last is None:
        return {}, None
    seconds = (ledger.until_ns - last.ledger.until_ns) / 1e9
    if seconds <= 0.0:
        return last.power, last.host_w
    powers = {}
    host_mj = 0
    for source, sums in ledger.sums.items():
        new = sums.minus(last.ledger.sums.get(source, LedgerSums()))
        host_mj += new.host_meter_mj
        if new.meter_mj or len(ledger.sums) == 1:
            powers[source] = LedgerPower(
                meter_w=new.meter_mj / 1e3 / seconds,
                prefill_w=new.prefill_mj / 1e3 / seconds,
                decode_w=new.decode_mj / 1e3 / seconds,
                idle_w=new.idle_mj / 1e3 / seconds,
                unattributed_w=new.unattributed_mj / 1e3 / seconds,
                static_w=new.static_mj / 1e3 / seconds,
            )
    return powers, host_mj / 1e3 / seconds if host_mj else None
