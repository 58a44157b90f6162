"""Files from a web address: complete, checked, continued, or one line; a server on the loopback plays the web."""

from __future__ import annotations

import base64
import errno
import hashlib
import multiprocessing
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moduseg.config import compose
from moduseg.errors import (
    ArtefactError,
    ConfigError,
    MissingError,
    ModusegError,
    StorageError,
    hide_credentials,
)
from moduseg.stages.propose import Propose
from moduseg.weights import download
from moduseg.weights.download import fetch, get_cache_home, get_cached_path, is_offline
from moduseg.weights.sources import find_weights
from tests.support.serving import Site, go_online, serve
from tests.support.tagged_world import settings, write_folder

KEY = "proposer.checkpoint"
CONTENT = np.random.default_rng(0).bytes(3_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("MODUSEG_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(download, "PAUSE", 0.0)
    go_online(monkeypatch)
    with serve() as site:
        site.files["/models/w.pth"] = CONTENT
        yield site


def url_of(site: Site) -> str:
    return f"{site.address}/models/w.pth"


def left_in(folder: Path) -> set[str]:
    """Files that are no locks."""
    return {p.name for p in folder.iterdir() if not p.name.endswith(".lock")}


def test_a_file_is_fetched_once(site: Site) -> None:
    path = fetch(url_of(site), KEY, SHA256)
    assert path == get_cache_home() / site.address.removeprefix("http://").replace(":", "_") / "models" / "w.pth"
    assert path.read_bytes() == CONTENT
    assert left_in(path.parent) == {"w.pth"}
    assert fetch(url_of(site), KEY, SHA256) == path
    assert fetch(url_of(site), KEY) == path
    assert len(site.asked) == 1


@pytest.mark.parametrize("digest", [SHA256, None])
def test_a_broken_connection_is_continued(site: Site, digest: str | None) -> None:
    site.cuts = [1_500_000, 10]
    assert fetch(url_of(site), KEY, digest).read_bytes() == CONTENT
    assert site.parts == [None, "bytes=1500000-", "bytes=1500010-"]


def part_of(site: Site, content: bytes, tag: str | None) -> Path:
    """What a process that was killed leaves."""
    part = get_cached_path(url_of(site)).with_name("w.pth.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_bytes(content)
    if tag is not None:
        part.with_name("w.pth.part.tag").write_text(tag)
    return part


TAG = f'"{SHA256[:8]}"'
HALF = CONTENT[:1_500_000]


@pytest.mark.parametrize(
    ("content", "tag", "digest", "parts"),
    [
        (HALF, TAG, SHA256, ["bytes=1500000-"]),
        (HALF, TAG, None, ["bytes=1500000-"]),
        # Of another version than the server has now: the server sends the whole file.
        (b"old", '"00000000"', None, ["bytes=3-"]),
        # Of an unknown version: only a digest could tell whether the halves belong together.
        (HALF, None, SHA256, ["bytes=1500000-"]),
        (HALF, None, None, [None]),
        # Everything had come, but the process ended before it was renamed.
        (CONTENT, TAG, None, ["bytes=3000000-"]),
        # More than there is: another file.
        (CONTENT + b"more", TAG, None, ["bytes=3000004-", None]),
    ],
    ids=["known", "by tag", "other version", "by digest", "unknown", "all of it", "too much"],
)
def test_what_a_killed_process_leaves(
    site: Site, content: bytes, tag: str | None, digest: str | None, parts: list[str | None]
) -> None:
    part_of(site, content, tag)
    path = fetch(url_of(site), KEY, digest)
    assert path.read_bytes() == CONTENT
    assert site.parts == parts
    assert left_in(path.parent) == {"w.pth"}


@pytest.mark.parametrize("digest", [SHA256, None])
def test_a_server_that_gives_no_parts(site: Site, digest: str | None) -> None:
    site.ranges, site.cuts = False, [2_000_000]
    assert fetch(url_of(site), KEY, digest).read_bytes() == CONTENT
    assert site.parts == [None, "bytes=2000000-"]


def test_a_server_that_names_no_version(site: Site) -> None:
    site.etag, site.cuts = False, [2_000_000]
    assert fetch(url_of(site), KEY).read_bytes() == CONTENT
    assert site.parts == [None, None]


def test_another_digest_is_refused(site: Site) -> None:
    site.files["/models/w.pth"] = b"not these"
    with pytest.raises(ArtefactError, match=rf"^proposer\.checkpoint: got sha256 .*expected {SHA256}") as caught:
        fetch(url_of(site), KEY, SHA256)
    assert one_line(caught.value)
    assert not left_in(get_cached_path(url_of(site)).parent)
    site.files["/models/w.pth"] = CONTENT
    assert fetch(url_of(site), KEY, SHA256).read_bytes() == CONTENT


def test_a_file_put_there_is_checked_too(site: Site) -> None:
    place = get_cached_path(url_of(site))
    place.parent.mkdir(parents=True)
    place.write_bytes(b"not these")
    with pytest.raises(ArtefactError, match=r"w\.pth has sha256 .*remove the file"):
        fetch(url_of(site), KEY, SHA256)
    assert place.read_bytes() == b"not these"
    assert not site.asked


def one_line(error: BaseException) -> bool:
    return "\n" not in str(error)


def says_what_to_do(error: BaseException, url: str) -> bool:
    place = get_cached_path(url)
    return one_line(error) and all(t in str(error) for t in (KEY, url, place.name, str(place.parent), f"{KEY}=<"))


def test_a_file_that_the_server_has_not(site: Site) -> None:
    url = f"{site.address}/models/other.pth"
    with pytest.raises(MissingError, match="the server answers 404") as caught:
        fetch(url, KEY)
    assert says_what_to_do(caught.value, url)
    assert len(site.asked) == 1


def test_a_busy_server_is_asked_again(site: Site) -> None:
    site.answers = [503, 429, 200]
    assert fetch(url_of(site), KEY).read_bytes() == CONTENT
    site.files["/w"], site.answers = b"", [500] * 10
    with pytest.raises(MissingError, match="the server answers 500"):
        fetch(f"{site.address}/w", KEY)
    assert len(site.asked) == 3 + download.ATTEMPTS


def test_a_connection_without_progress_is_given_up(site: Site) -> None:
    site.cuts = [1000] + [0] * 20
    with pytest.raises(MissingError, match=r"ended at 1000 of 3000000 bytes.*1000 bytes are kept") as caught:
        fetch(url_of(site), KEY, SHA256)
    assert says_what_to_do(caught.value, url_of(site))
    assert len(site.asked) == download.ATTEMPTS
    site.cuts = []
    assert fetch(url_of(site), KEY, SHA256).read_bytes() == CONTENT
    assert site.parts[-1] == "bytes=1000-"


def test_no_network(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> Any:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(download, "PAUSE", 60.0)  # there is nothing to wait for
    with pytest.raises(MissingError, match=r"could not be fetched \(.*name resolution\)") as caught:
        fetch(url_of(site), KEY)
    assert says_what_to_do(caught.value, url_of(site))


@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "constant"])
def test_offline_means_no_network_for_addresses_either(site: Site, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_offline()
    if how == "constant":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setenv(how, "yes")
    assert is_offline()
    with pytest.raises(MissingError, match="HF_HUB_OFFLINE forbids") as caught:
        fetch(url_of(site), KEY, SHA256)
    assert says_what_to_do(caught.value, url_of(site))
    place = get_cached_path(url_of(site))
    place.parent.mkdir(parents=True)
    place.write_bytes(CONTENT)
    assert fetch(url_of(site), KEY, SHA256) == place
    assert not site.asked


def test_threads_share_one_download(site: Site) -> None:
    site.delay = 0.2
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(fetch(url_of(site), KEY, SHA256))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.read_bytes() for path in found] == [CONTENT] * 4
    assert len(site.asked) == 1


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_processes_share_one_download(site: Site) -> None:
    site.delay, site.cuts = 0.2, [1_000_000]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=fetch, args=(url_of(site), KEY, SHA256)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=30)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert get_cached_path(url_of(site)).read_bytes() == CONTENT
    assert site.parts == [None, "bytes=1000000-"]


# Storage


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_ends_in_one_line(site: Site) -> None:
    part = get_cached_path(url_of(site)).with_name("w.pth.part")
    part.parent.mkdir(parents=True)
    part.symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"No space left on device\); free some space.*MODUSEG_HOME=") as caught:
        fetch(url_of(site), KEY, SHA256)
    assert one_line(caught.value)
    assert not get_cached_path(url_of(site)).exists()
    assert len(site.asked) == 1


def test_too_little_space_is_found_before_the_download(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: SimpleNamespace(free=2_000_000))
    with pytest.raises(StorageError, match=r"0\.00 GB are free.*MODUSEG_HOME="):
        fetch(url_of(site), KEY)
    assert not get_cached_path(url_of(site)).with_name("w.pth.part").exists()


def test_a_folder_that_cannot_be_made(site: Site, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    with pytest.raises(StorageError, match=r"cannot be written.*MODUSEG_HOME=") as caught:
        fetch(url_of(site), KEY)
    assert one_line(caught.value)
    assert not site.asked


@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.EROFS, "check the permissions"), (errno.EDQUOT, "free some space")]
)
def test_remedies(number: int, remedy: str) -> None:
    assert remedy in str(download.storage_error(Path("w"), OSError(number, "reason")))


# Names and passwords in an address

SECRET = "s3cret%20word"
BASIC = "Basic " + base64.b64encode(b"some one:s3cret word").decode()


def secret_url(site: Site, path: str = "/models/w.pth") -> str:
    return f"http://some%20one:{SECRET}@{site.address.removeprefix('http://')}{path}"


def test_a_password_opens_the_server_and_stays_out_of_the_cache(site: Site) -> None:
    site.authorization = BASIC
    path = find_weights(secret_url(site), KEY)
    assert path.read_bytes() == CONTENT
    assert path == get_cached_path(url_of(site))
    assert "Authorization" in site.asked[0][1]


def test_no_message_holds_a_password(site: Site) -> None:
    site.authorization = "Basic other"
    for text in (secret_url(site), f"{secret_url(site)}#md5=00", secret_url(site, "/"), secret_url(site, "/a/%00")):
        with pytest.raises(ModusegError) as caught:
            find_weights(text, KEY)
        assert site.address in str(caught.value)
        assert "s3cret" not in str(caught.value)
        assert "some" not in str(caught.value)


def test_a_password_is_kept_out_of_results_and_keys(site: Site, tmp_path: Path) -> None:
    site.authorization = BASIC
    site.files["/sam.safetensors"] = find_weights("miniature/sam.safetensors", KEY).read_bytes()
    write_folder(tmp_path / "own", range(2))
    path = secret_url(site, "/sam.safetensors")

    def propose(checkpoint: str) -> Path:
        arguments = settings(tmp_path / "own", tmp_path / "out", "proposer.points_per_side=2")
        return Propose.run(compose([*arguments, f"proposer.checkpoint={checkpoint}"]), split="train")

    folder = propose(path)
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert any(site.address.encode() in file.read_bytes() for file in files)
    assert [file for file in files if b"s3cret" in file.read_bytes()] == []
    assert propose(f"{site.address}/sam.safetensors") == folder


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("got 'https://me:pw@host/a@b'", "got 'https://host/a@b'"),
        ("HTTP://token@host:80 and ftp://u:p@h/x", "HTTP://host:80 and ftp://h/x"),
        ("hf://owner/name@main/file", "hf://owner/name@main/file"),
        ("https://host/a?mail=a@b", "https://host/a?mail=a@b"),
        ("https://host?mail=a@b", "https://host?mail=a@b"),
        ("mail a@b", "mail a@b"),
    ],
)
def test_only_names_and_passwords_are_hidden(text: str, expected: str) -> None:
    assert hide_credentials(text) == expected


# Names


@pytest.mark.parametrize(
    "url", ["https://host", "https://host/", "ftp://host/w", "https:///w", "https://host/a/../../w", "https://h/%2e%2e"]
)
def test_no_address_of_a_file(url: str) -> None:
    with pytest.raises(ConfigError, match=r"proposer\.checkpoint: got .*expected the address of a file"):
        get_cached_path(url, KEY)


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MODUSEG_HOME", raising=False)
    assert get_cached_path("https://host/a/w.pth") == tmp_path / ".cache" / "moduseg" / "host" / "a" / "w.pth"
    monkeypatch.setenv("MODUSEG_HOME", "~/weights")
    assert get_cache_home() == tmp_path / "weights"


def test_a_query_makes_another_file(site: Site) -> None:
    """A server may give one path several contents."""
    contents = {f"/models/w.safetensors?version={number}": bytes([number]) * 9 for number in (1, 2)}
    site.files |= contents
    paths = {address: fetch(f"{site.address}{address}", KEY) for address in contents}
    assert {address: path.read_bytes() for address, path in paths.items()} == contents
    assert {path.suffix for path in paths.values()} == {".safetensors"}
    assert get_cached_path(f"{site.address}/models/w.safetensors") not in paths.values()


def test_weights_by_address(site: Site) -> None:
    for text in (url_of(site), f"{url_of(site)}#sha256={SHA256.upper()}"):
        assert find_weights(text, KEY).read_bytes() == CONTENT
    for text, error, message in (
        (f"{url_of(site)}#sha256={SHA256[:-1]}", ConfigError, "expected #sha256=<64 hexadecimal digits>"),
        (f"{url_of(site)}#md5=00", ConfigError, "expected #sha256=<64 hexadecimal digits>"),
        (f"{url_of(site)}#sha256={'0' * 64}", ArtefactError, f"expected {'0' * 64}"),
        (f"{site.address}/models/none#sha256={SHA256}", MissingError, "404"),
        ("hf://owner/w.pth", ConfigError, "expected hf://<owner>/<name>@<revision>/<file>"),
    ):
        with pytest.raises(ModusegError, match=message) as caught:
            find_weights(text, KEY)
        assert isinstance(caught.value, error)
        assert one_line(caught.value)
