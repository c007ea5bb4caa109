"""The accounts of a ledger's requests: opened by their first step, closed into final bills. Pure.

Owned by `ledger.py`. Bounded: what falls out of it is billed at once with what is known.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from itertools import chain
from struct import pack

import numpy as np

from replicas.energy.accounts import Account
from replicas.energy.bill import Cashier, RequestJoules, bill_of
from replicas.energy.meter import Source
from replicas.energy.weights import Integers
from replicas.energy.window import NO_PLACES, Step

_GOOD_COVERAGE = 0.98


class AccountBook:
    """Open accounts, ended ones that wait for their windows, and bills nobody took yet.

    `source` is that of the newest reading; None while the meter never spoke, and no bill is final then.
    `num_low_confidence` counts bills of requests whose steps were not all inside billed windows.
    """

    def __init__(self, cashier: Cashier, *, max_requests: int, max_results: int) -> None:
        self.source: Source | None = None
        self.num_low_confidence = 0
        self.num_unmeasured = 0
        self._cashier = cashier
        self._max_requests = max_requests
        self.accounts: dict[int, Account] = {}
        self._rows: dict[int, int] = {}
        self._running: set[int] = set()
        """Who had a step, and has not ended."""
        self._last_ids = b""
        """Members of the newest step, if all of them are running still."""
        self._last_places = NO_PLACES
        self._num_evicted = 0
        """Of those who fell out: places found before that may be somebody else's."""
        self._ended: dict[int, Account] = {}
        self._final: dict[int, None] = {}
        self._closed: deque[RequestJoules] = deque(maxlen=max_results)
        self._unmeasured: deque[int] = deque(maxlen=max_results)

    @property
    def has_live(self) -> bool:
        """Whether a request may still run steps."""
        return len(self.accounts) > len(self._ended)

    def begin(self, request_id: int, payer: str) -> None:
        """Steps of this request may come from now on, also if one of its id was billed before."""
        self._final.pop(request_id, None)
        self.account(request_id, payer)

    def account(self, request_id: int, payer: str = "") -> Account:
        """The account of a request; opened if there is none, ended already if its bill is final."""
        account = self.accounts.get(request_id)
        if account is None:
            account = self._open(request_id, payer)
            if len(self.accounts) > self._max_requests:
                oldest_id = next(one for one in chain(self._ended, self.accounts) if one != request_id)
                self._finish(self.accounts[oldest_id])
                self._num_evicted += 1
        return account

    def start(self, step: Step, *, is_newest: bool) -> None:
        """A step came: open the accounts of those that never ran, keep those open that ended before it."""
        num_evicted = self._num_evicted
        if not is_newest or step.rows.request_ids != self._last_ids:
            ids = step.rows.ids.tolist()
            self._last_ids = step.rows.request_ids
            for request_id in [one for one in ids if one not in self._running] if is_newest else ids:
                self._start(request_id, step)
            if num_evicted == self._num_evicted:
                self._last_places = _integers(map(self._rows.__getitem__, ids), len(ids))
        step.places, step.num_evicted = self._last_places, num_evicted

    def places(self, step: Step) -> Integers:
        """The rows of its members; one that fell out of the bounds comes back for it."""
        if step.num_evicted != self._num_evicted:
            rows = [self._claim(request_id, step).row for request_id in step.rows.ids.tolist()]
            step.places, step.num_evicted = _integers(rows, len(rows)), self._num_evicted
        return step.places

    def miss(self, step: Step) -> None:
        """A step that ran in no closed window: it is on nobody's bill, and known to be missing there."""
        self._cashier.accounts.add_missed(self.places(step), step.duration_ns)

    def end(self, account: Account) -> None:
        self._ended[account.request_id] = account
        self._running.discard(account.request_id)
        self._last_ids = b""

    def settle(self, closed_until_ns: int) -> None:
        """Bill the ended requests whose windows are all divided."""
        if self.source is None:
            return
        settled = [account for account in self._ended.values() if account.last_ns <= closed_until_ns]
        for account in settled:
            self._finish(account)

    def is_continued(self, step: Step) -> bool:
        """Whether a member of `step` ran in an earlier one."""
        for request_id in step.rows.ids:
            account = self.accounts.get(request_id)
            if account is not None and account.first_ns is not None and account.first_ns < step.start_ns:
                return True
        return False

    def take_closed(self) -> list[RequestJoules]:
        """Final bills since the last call, oldest first."""
        closed = list(self._closed)
        self._closed.clear()
        return closed

    def take_unmeasured(self) -> list[int]:
        """Ended requests, since the last call, whose energy stays unknown."""
        unmeasured = list(self._unmeasured)
        self._unmeasured.clear()
        return unmeasured

    def _start(self, request_id: int, step: Step) -> None:
        account = self.account(request_id)
        if account.first_ns is None or step.start_ns < account.first_ns:
            account.first_ns = step.start_ns
        if request_id in self._ended:
            account.last_ns = max(account.last_ns, step.end_ns)
            self._last_ids = b""
        else:
            self._running.add(request_id)

    def _claim(self, request_id: int, step: Step) -> Account:
        """Open until the step is divided, whatever else is known of it."""
        account = self.accounts.get(request_id) or self._open(request_id, "")
        account.last_ns = max(account.last_ns, step.end_ns)
        return account

    def _open(self, request_id: int, payer: str) -> Account:
        account = self._cashier.accounts.open(request_id, self._cashier.payers.known(payer))
        self.accounts[request_id] = account
        self._rows[request_id] = account.row
        if request_id in self._final:
            self._ended[request_id] = account
        return account

    def _finish(self, account: Account) -> None:
        """Turn an account into its final bill, or admit that its energy is unknown."""
        del self.accounts[account.request_id], self._rows[account.request_id]
        self._running.discard(account.request_id)
        self._last_ids = b""
        self._ended.pop(account.request_id, None)
        self._final[account.request_id] = None
        if len(self._final) > self._max_requests:
            del self._final[next(iter(self._final))]
        held = self._cashier.accounts.held(account)
        if held.coverage < _GOOD_COVERAGE:
            self.num_low_confidence += 1
        if held.is_measured and self.source is not None:
            total_mj = self._cashier.bill_mj(held)
            accounts = self._cashier.accounts
            host_mj = self._cashier.host.bill_mj(held.host_nj, first_ns=account.first_ns)
            self._closed.append(
                bill_of(
                    account,
                    held,
                    accounts,
                    total_mj=total_mj,
                    source=self.source,
                    final=True,
                    host_mj=host_mj,
                )
            )
        else:
            self.num_unmeasured += 1
            self._unmeasured.append(account.request_id)
        self._cashier.accounts.close(account)


def _integers(values: Iterable[int], count: int) -> Integers:
    """Through `pack`, a third of what numpy takes to read Python's integers one by one."""
    return np.frombuffer(pack(f"{count}q", *values), dtype=np.int64)
