"""Keys: made once, kept as a hash, found by their id, refused when taken out or over."""

from __future__ import annotations

import os
from datetime import UTC, date, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from cluster.cli import app
from cluster.config import ConfigError
from cluster.security.api_keys import ApiKey, KeyRing, find_tenant, make_key, parse_keys, read_keys

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
LINE = "acme: 0123456789ab sha256:" + "0" * 64


class FakeClock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def keys_of(*keys: ApiKey) -> dict[str, ApiKey]:
    return {key.key_id: key for key in keys}


def test_a_key_is_its_tenant_s_and_survives_the_file() -> None:
    text, key = make_key("acme", label="laptop", expires_on=date(2027, 6, 30))
    assert parse_keys(f"# ours\n\n{key.line}\n", origin="f") == keys_of(key)
    assert find_tenant(keys_of(key), text, now=NOW) == "acme"
    assert text.split("_", 2)[2] not in key.line


def test_no_two_keys_are_equal() -> None:
    assert len({make_key("acme")[0] for _ in range(20)}) == 20


def test_a_key_may_hold_to_the_end_of_the_calendar() -> None:
    text, key = make_key("acme", expires_on=date.max)
    assert find_tenant(keys_of(key), text, now=NOW) == "acme"


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.text(min_size=1, max_size=66), st.none() | st.dates())
def test_what_is_made_is_read_back_whatever_its_label(label: str, expires_on: date | None) -> None:
    """In a line with a comment sign, what follows it would be lost: the day the key ends, too."""
    try:
        _, key = make_key("acme", label=label, expires_on=expires_on)
    except ConfigError:
        return
    assert parse_keys(key.line, origin="f") == keys_of(key)


def test_a_key_holds_up_to_the_end_of_its_last_day() -> None:
    text, key = make_key("acme", expires_on=date(2026, 11, 22))
    assert find_tenant(keys_of(key), text, now=datetime(2026, 11, 22, 23, 59, tzinfo=UTC)) == "acme"
    assert find_tenant(keys_of(key), text, now=datetime(2026, 11, 23, tzinfo=UTC)) is None


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.text(max_size=200))
def test_whatever_is_no_key_is_nobody_s(text: str) -> None:
    made, key = make_key("acme")
    found = keys_of(key)
    assert find_tenant(found, text, now=NOW) is None
    assert find_tenant(found, made[:-1], now=NOW) is None
    assert find_tenant(found, f"wl_{key.key_id}_{text}", now=NOW) is None
    assert find_tenant(found, made + text, now=NOW) == (None if text else "acme")


@pytest.mark.parametrize(
    "line",
    [
        "acme 0123456789ab sha256:" + "0" * 64,
        "acme: 0123456789ab md5:" + "0" * 32,
        "acme: 0123456789ab sha256:" + "0" * 63,
        f"{LINE} expires=tomorrow",
        f"{LINE} something",
        LINE.replace("acme", "a/../b"),
        "wl_0123456789ab_secret",
    ],
)
def test_a_line_that_is_no_key_is_named_by_its_number_alone(line: str) -> None:
    with pytest.raises(ConfigError, match=r"f, line 2: is no key; write TENANT: ID sha256:HASH") as caught:
        parse_keys(f"{LINE}\n{line}\n", origin="f")
    assert line not in str(caught.value)


def test_a_key_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="f, line 2: key 0123456789ab is there twice; remove one"):
        parse_keys(f"{LINE}\n{LINE.replace('acme', 'other')}", origin="f")


def test_a_file_that_everybody_may_write_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(LINE)
    path.chmod(0o666)
    with pytest.raises(ConfigError, match=r"everybody may write to .*; `chmod o-w` it"):
        read_keys(path)


def test_the_ring_follows_its_file_and_keeps_the_last_good_one(tmp_path: Path) -> None:
    path, clock = tmp_path / "keys", FakeClock()
    (_, one), (_, two) = make_key("acme"), make_key("other")

    def write(text: str, *, time_ns: int) -> None:
        path.write_text(text)
        os.utime(path, ns=(time_ns, time_ns))
        clock.now_s += 1.0

    write(one.line, time_ns=1)
    ring = KeyRing(path, clock_s=clock)
    assert ring.keys == keys_of(one)
    write(two.line, time_ns=2)
    assert ring.keys == keys_of(two), "the first is revoked"
    write("half a li", time_ns=3)
    assert ring.keys == keys_of(two)
    path.unlink()
    clock.now_s += 1.0
    assert ring.keys == keys_of(two)
    write(one.line, time_ns=4)
    assert ring.keys == keys_of(one)


def test_a_file_that_is_mended_without_being_written_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As by the `chmod o-w` that the log asks for: the key that was taken out holds no longer."""
    path, clock = tmp_path / "keys", FakeClock()
    (_, one), (_, two) = make_key("acme"), make_key("other")
    path.write_text(one.line)
    ring = KeyRing(path, clock_s=clock)
    path.write_text(f"{two.line} # and no longer the first\n")
    path.chmod(0o666)
    for _ in range(3):
        clock.now_s += 1.0
        assert ring.keys == keys_of(one)
    path.chmod(0o600)
    clock.now_s += 1.0
    assert ring.keys == keys_of(two)
    assert sum("api_keys_kept" in record.message for record in caplog.records) == 1


def test_the_command_shows_a_key_once_and_writes_its_line(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    result = CliRunner().invoke(app, ["key", "new", "acme", "--label", "ci", "--days", "30", "-f", str(path)])
    assert result.exit_code == 0
    (key,) = read_keys(path).values()
    assert (key.tenant, key.label) == ("acme", "ci")
    assert find_tenant(keys_of(key), result.stdout.strip(), now=datetime.now(UTC)) == "acme"
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_new_key_has_a_line_of_its_own_behind_one_left_open(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(LINE)
    for tenant in ("one", "two"):
        assert CliRunner().invoke(app, ["key", "new", tenant, "-f", str(path)]).exit_code == 0
    assert [key.tenant for key in read_keys(path).values()] == ["acme", "one", "two"]


def test_a_key_cannot_hold_longer_than_the_calendar() -> None:
    assert CliRunner().invoke(app, ["key", "new", "acme", "--days", "99999999"]).exit_code == 2


def test_a_tenant_is_a_plain_name() -> None:
    with pytest.raises(ConfigError, match=r"tenant: got 'a b'; allowed: letters, digits and \. _ -"):
        make_key("a b")
