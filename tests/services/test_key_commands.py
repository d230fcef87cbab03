"""`millrace keys`: what it prints, what it writes, and a running gateway that hears of it."""

from __future__ import annotations

import concurrent.futures
import json
import re
import resource
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from gateway.caller import Caller
from gateway.keys import MAX_KEYS, Key, KeyFile, KeyRing, digest_of, read_keys
from services.cli import main
from services.key_commands import create
from services.serving import allowed_hosts, gateway_limits, keys_of
from services.settings import Settings, SettingsError
from tests.e2e.server import ROOT, serve
from tests.redis_server import RedisServer
from wire.errors import Forbidden

SECRET = re.compile(r"mr-[A-Za-z0-9_-]{43}")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "etc" / "keys.json"


class Keys:
    """The command, on one file."""

    def __init__(self, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.path = path
        self._capsys = capsys

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        code = main(["keys", *arguments, "--keys-file", str(self.path)])
        return code, *self._capsys.readouterr()

    def create(self, *arguments: str) -> str:
        code, out, _ = self.run("create", *arguments)
        assert code == 0
        return out.strip()

    def list(self) -> list[dict[str, object]]:
        code, out, _ = self.run("list", "--json")
        assert code == 0
        rows: list[dict[str, object]] = json.loads(out)
        return rows

    def caller(self, secret: str) -> Caller:
        """As a gateway sees it."""
        return KeyRing(self.path).caller(f"Bearer {secret}".encode())


@pytest.fixture
def keys(path: Path, capsys: pytest.CaptureFixture[str]) -> Keys:
    return Keys(path, capsys)


def test_a_secret_is_printed_alone_and_once_and_is_not_in_the_file(keys: Keys) -> None:
    code, out, err = keys.run("create", "--tenant", "team-a", "--weight", "2")
    secret = out.removesuffix("\n")
    assert code == 0
    assert SECRET.fullmatch(secret)
    assert secret not in err
    assert secret not in keys.path.read_text()
    assert digest_of(secret.encode()) in keys.path.read_text()
    assert keys.caller(secret) == Caller("team-a", 2)
    for arguments in (["list"], ["list", "--json"]):
        _, out, err = keys.run(*arguments)
        assert "team-a" in out
        assert secret not in out + err
        assert digest_of(secret.encode()) not in out + err


def test_only_its_owner_reads_the_file(keys: Keys) -> None:
    keys.create("--tenant", "a")
    keys.path.chmod(0o644)
    keys.create("--tenant", "b")
    assert stat.S_IMODE(keys.path.stat().st_mode) == 0o600
    assert [each.name for each in keys.path.parent.iterdir()] == ["keys.json"]


def test_json_has_the_secret_of_a_new_key_and_of_no_other(keys: Keys) -> None:
    first = json.loads(keys.create("--tenant", "a", "--expires", "90d", "--note", "for the crawler", "--json"))
    keys.create("--tenant", "b")
    assert keys.caller(first.pop("secret")) == Caller("a", 1)
    listed = keys.list()
    assert listed[0] == first
    assert (first["state"], first["note"], first["revoked"]) == ("active", "for the crawler", None)
    assert [each["tenant"] for each in listed] == ["a", "b"]
    assert len({each["id"] for each in listed}) == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [("30m", timedelta(minutes=30)), ("12h", timedelta(hours=12)), ("90d", timedelta(days=90))],
)
def test_a_key_expires_when_it_was_said(keys: Keys, text: str, expected: timedelta) -> None:
    keys.create("--tenant", "a", "--expires", text)
    (key,) = read_keys(keys.path)
    assert key.expires is not None
    assert key.expires - key.created == expected
    assert key.state(key.expires) == "expired"
    assert key.state(key.expires - timedelta(seconds=1)) == "active"


def test_a_revoked_key_stays_in_the_list_and_out_of_the_gateway(keys: Keys) -> None:
    secret, other = keys.create("--tenant", "a"), keys.create("--tenant", "b")
    key_id = str(keys.list()[0]["id"])
    assert keys.run("revoke", key_id)[:2] == (0, f"revoked {key_id} of a\n")
    with pytest.raises(Forbidden):
        keys.caller(secret)
    assert keys.caller(other) == Caller("b", 1)
    assert [each["state"] for each in keys.list()] == ["revoked", "active"]


def test_a_key_was_revoked_when_it_first_was(keys: Keys) -> None:
    then = datetime.now(UTC) - timedelta(days=1)
    keys.path.parent.mkdir()
    old = Key(id="k", sha256="0" * 64, tenant="t", created=then, revoked=then)
    keys.path.write_bytes(msgspec.json.encode(KeyFile(version=1, keys=[old])))
    assert json.loads(keys.run("revoke", "k", "--json")[1])["state"] == "revoked"
    assert read_keys(keys.path) == [old]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["create", "--tenant", "team a"], 2, "--tenant is 'team a'; expected 1 to 64 of A-Z a-z 0-9 . _ -"),
        (["create", "--tenant", ""], 2, "--tenant is ''"),
        (["create", "--tenant", "t" * 65], 2, "--tenant is"),
        (["create", "--tenant", "a\n"], 2, "--tenant is"),
        (["create", "--tenant", "a", "--weight", "0"], 2, "--weight is 0; expected a whole number from 1 to 64"),
        (["create", "--tenant", "a", "--weight", "65"], 2, "--weight is 65"),
        (["create", "--tenant", "a", "--expires", "0d"], 2, "--expires is '0d'"),
        (["create", "--tenant", "a", "--expires", "99999d"], 2, "--expires is '99999d'"),
        (["create", "--tenant", "a", "--expires", "soon"], 2, "--expires is 'soon'; expected minutes, hours or days"),
        (["create", "--tenant", "a", "--note", "x" * 201], 2, "--note has 201 characters"),
        (["create", "--tenant", "a", "--note", "a\x1b[2J"], 2, "--note has 5 characters; expected one line"),
        (["revoke", "key-x"], 1, "holds no key 'key-x'"),
        (["list"], 2, "No such file"),
    ],
)
def test_wrong_usage_is_answered_in_words_and_writes_nothing(
    keys: Keys, arguments: list[str], code: int, words: str
) -> None:
    if arguments != ["list"]:
        keys.create("--tenant", "first")
    before = keys.path.read_bytes() if keys.path.exists() else None
    result, out, err = keys.run(*arguments)
    assert (result, out) == (code, "")
    assert words in err
    assert (keys.path.read_bytes() if keys.path.exists() else None) == before


def test_without_a_file_the_setting_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "list"]) == 2
    assert "MILLRACE_KEYS_FILE" in capsys.readouterr().err


def test_a_broken_file_is_not_written_over(keys: Keys) -> None:
    keys.path.parent.mkdir()
    keys.path.write_text("{}")
    code, out, err = keys.run("create", "--tenant", "a")
    assert (code, out) == (2, "")
    assert "is not a file of keys" in err
    assert keys.path.read_text() == "{}"


def test_a_write_that_fails_leaves_the_old_file_alone_and_prints_no_secret(keys: Keys) -> None:
    secret = keys.create("--tenant", "a")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # as a full disk would
    try:
        code, out, err = keys.run("create", "--tenant", "b")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (code, out) == (2, "")
    assert f"cannot write {keys.path}" in err
    assert keys.caller(secret) == Caller("a", 1)
    assert [each.name for each in keys.path.parent.iterdir()] == ["keys.json"]


def test_changes_made_at_once_are_all_kept(path: Path) -> None:
    settings = Settings(keys_file=str(path))

    def add(i: int) -> int:
        return create(settings, f"team-{i}", weight=1, expires=None, note="", as_json=False)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(add, range(40))) == [0] * 40
    assert {key.tenant for key in read_keys(path)} == {f"team-{i}" for i in range(40)}


def test_a_link_stays_a_link(keys: Keys, tmp_path: Path) -> None:
    target = tmp_path / "real.json"
    keys.path.parent.mkdir()
    keys.path.symlink_to(target)
    secret = keys.create("--tenant", "a")
    assert keys.path.is_symlink()
    assert keys.caller(secret) == Caller("a", 1)
    assert len(read_keys(target)) == 1


def test_a_full_file_takes_a_new_key_in_the_place_of_one_that_has_ended(keys: Keys) -> None:
    now = datetime.now(UTC)
    many = [Key(id=f"k{i}", sha256=f"{i:064x}", tenant="t", created=now) for i in range(MAX_KEYS)]
    keys.path.parent.mkdir()
    keys.path.write_bytes(msgspec.json.encode(KeyFile(version=1, keys=many)))
    code, out, err = keys.run("create", "--tenant", "a")
    assert (code, out) == (1, "")
    assert "holds 10,000 active keys, the most it may" in err
    keys.run("revoke", "k7")
    secret = keys.create("--tenant", "a")
    assert keys.caller(secret) == Caller("a", 1)
    left = [key.id for key in read_keys(keys.path)]
    assert len(left) == MAX_KEYS
    assert "k7" not in left


# --- a gateway with and without keys ----------------------------------------------------------------------------------


@contextmanager
def listening(host: str) -> Iterator[socket.socket]:
    with socket.create_server((host, 0)) as listener:
        yield listener


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "localhost"])
def test_no_keys_are_needed_on_loopback(host: str) -> None:
    with listening(host) as listener:
        assert keys_of(Settings(host=host), listener) is None


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "localhost"])
def test_without_keys_on_loopback_only_this_machines_names_are_served(host: str) -> None:
    """A web page whose name is made to point to 127.0.0.1 is the same origin to a browser: it would read answers."""
    with listening(host) as listener:
        found = allowed_hosts(Settings(host=host), listener, None)
        assert found == {"localhost", "127.0.0.1", "[::1]", host}
        named = Settings(host=host, allowed_hosts="Chat.example.com, other")
        assert allowed_hosts(named, listener, None) == {"chat.example.com", "other"}
        assert allowed_hosts(Settings(host=host, allowed_hosts="*"), listener, None) == frozenset()


def test_with_keys_or_by_the_operators_word_any_name_will_do(keys: Keys) -> None:
    keys.create("--tenant", "a")
    with listening("127.0.0.1") as listener:
        settings = Settings(keys_file=str(keys.path))
        assert allowed_hosts(settings, listener, keys_of(settings, listener)) == frozenset()
    with listening("0.0.0.0") as listener:
        assert allowed_hosts(Settings(host="0.0.0.0", open_access="yes"), listener, None) == frozenset()


def test_web_pages_that_may_open_sockets_are_the_settings() -> None:
    limits = gateway_limits(Settings(allowed_origins="https://a.example, http://b.example:3000"))
    assert limits.allowed_origins == {"https://a.example", "http://b.example:3000"}
    assert gateway_limits(Settings()).allowed_origins == frozenset()


@pytest.mark.parametrize("host", ["0.0.0.0", ""])
def test_where_others_can_reach_it_a_gateway_has_keys_or_the_operators_word(host: str, keys: Keys) -> None:
    with listening(host) as listener:
        with pytest.raises(
            SettingsError, match=r"other machines can reach.*MILLRACE_KEYS_FILE.*MILLRACE_OPEN_ACCESS=yes"
        ):
            keys_of(Settings(host=host), listener)
        assert keys_of(Settings(host=host, open_access="yes"), listener) is None
        secret = keys.create("--tenant", "a")
        for open_access in ("no", "yes"):
            ring = keys_of(Settings(host=host, keys_file=str(keys.path), open_access=open_access), listener)
            assert ring is not None
            assert ring.caller(f"Bearer {secret}".encode()) == Caller("a", 1)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_gateway_does_not_start_with_keys_that_it_cannot_read(host: str, path: Path) -> None:
    with listening(host) as listener, pytest.raises(SettingsError, match="keys_file: cannot read keys from"):
        keys_of(Settings(host=host, keys_file=str(path), open_access="yes"), listener)


@pytest.mark.parametrize("command", ["up", "gateway"])
def test_a_process_that_others_could_reach_refuses_to_start(command: str, shipped_settings: Settings) -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "services.cli", command, "--host", "0.0.0.0", "--port", "0",
            "--store", str(shipped_settings.store),
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "other machines can reach 0.0.0.0, and no keys are asked for" in done.stderr


@pytest.mark.parametrize("command", ["up", "gateway"])
def test_a_running_process_asks_for_keys_and_hears_of_changes(
    command: str, shipped_settings: Settings, keys: Keys, tmp_path: Path
) -> None:
    secret = keys.create("--tenant", "a")
    headers = {"Authorization": f"Bearer {secret}"}
    redis = RedisServer(tmp_path, keeps_data=False)
    redis.start()
    settings = {"keys_file": str(keys.path), "host": "0.0.0.0", "redis_url": redis.url}
    try:
        with serve(shipped_settings.store, command, **settings) as server, server.client() as client:
            assert client.get("/requests/x").status_code == 401
            assert client.get("/metrics").status_code == client.get("/version").status_code == 200
            assert client.get("/requests/x", headers=headers).status_code == 404
            keys.run("revoke", str(keys.list()[0]["id"]))
            deadline = time.monotonic() + 20
            while client.get("/requests/x", headers=headers).status_code == 404:
                assert time.monotonic() < deadline, "a revoked key is still let in"
                time.sleep(0.1)
            assert client.get("/requests/x", headers=headers).status_code == 403
            assert secret not in client.get("/metrics").text
    finally:
        redis.stop()
    assert "authorization: Bearer YOUR-KEY" in "".join(server.output)
    assert secret not in "".join(server.output)
