"""The accounts of a ledger's requests: opened by their first step, closed into final bills. Pure.

Owned by `ledger.py`. Bounded: what falls out of it is billed at once with what is known.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from replicas.energy.accounts import Account
from replicas.energy.bill import Cashier, RequestJoules, bill_of
from replicas.energy.meter import Source
from replicas.energy.window import Step

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
        self._rows = _Rows(lambda request_id: self._claim(request_id).row)
        self._started: set[int] = set()
        self._checked_ids: tuple[int, ...] = ()
        """Members of the newest step, if all of them have started and none has ended since."""
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
            if request_id in self._final:
                self._ended[request_id] = account
            if len(self.accounts) > self._max_requests:
                oldest_id = next(iter(self._ended or self.accounts))
                self._finish(self.accounts[oldest_id])
        return account

    def start(self, step: Step, *, is_newest: bool) -> None:
        """A step came: open the accounts of those that never ran, keep those open that ended before it."""
        request_ids, started = step.rows.request_ids, self._started
        if is_newest and request_ids == self._checked_ids:
            return
        self._checked_ids = request_ids
        for request_id in [one for one in request_ids if one not in started] if is_newest else request_ids:
            account = self.account(request_id)
            started.add(request_id)
            if account.first_ns is None or step.start_ns < account.first_ns:
                account.first_ns = step.start_ns
        if not self._ended.keys().isdisjoint(request_ids):
            for request_id in request_ids:
                if request_id in self._ended:
                    account = self._ended[request_id]
                    account.last_ns = max(account.last_ns, step.end_ns)
            self._checked_ids = ()

    @property
    def row_of(self) -> Callable[[int], int]:
        """The row of a request that a window bills; one that fell out of the bounds comes back for it."""
        return self._rows.__getitem__

    def miss(self, step: Step) -> None:
        """A step that ran in no closed window: it is on nobody's bill, and known to be missing there."""
        for request_id in step.rows.request_ids:
            self._cashier.accounts.add_step(self._claim(request_id), step.duration_ns)

    def end(self, account: Account) -> None:
        self._ended[account.request_id] = account
        self._checked_ids = ()

    def settle(self, closed_until_ns: int) -> None:
        """Bill the ended requests whose windows are all divided."""
        if self.source is None:
            return
        settled = [account for account in self._ended.values() if account.last_ns <= closed_until_ns]
        for account in settled:
            self._finish(account)

    def is_continued(self, step: Step) -> bool:
        """Whether a member of `step` ran in an earlier one."""
        for request_id in step.rows.request_ids:
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

    def _claim(self, request_id: int) -> Account:
        return self.accounts.get(request_id) or self._open(request_id, "")

    def _open(self, request_id: int, payer: str) -> Account:
        account = self._cashier.accounts.open(request_id, self._cashier.payers.known(payer))
        self.accounts[request_id] = account
        self._rows[request_id] = account.row
        return account

    def _finish(self, account: Account) -> None:
        """Turn an account into its final bill, or admit that its energy is unknown."""
        del self.accounts[account.request_id], self._rows[account.request_id]
        self._started.discard(account.request_id)
        self._checked_ids = ()
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


class _Rows(dict[int, int]):
    """The row of each open request. `open_row` finds one for a request that has none."""

    def __init__(self, open_row: Callable[[int], int]) -> None:
        self._open_row = open_row

    def __missing__(self, request_id: int) -> int:
        return self._open_row(request_id)
