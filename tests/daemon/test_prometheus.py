"""What the daemon tells Prometheus: valid text, named as Prometheus wants it, with true numbers, mount by mount."""

import re
from collections.abc import Callable

from prometheus_client.parser import text_string_to_metric_families

from tests.daemon.conftest import Daemon
from tests.store.conftest import Image
from tests.system.daemon import wait_until

ROUTE = "/api/ext/v1/metrics"
PREFIX = "virtiofsd_nydus_"


def scrape(one: Daemon) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Samples by name below the prefix, and labels; the text is checked on the way."""
    status, text = one.call(ROUTE)
    assert status == 200
    lint(text)
    return {
        (sample.name.removeprefix(PREFIX), frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def lint(text: str) -> None:
    """The rules of the text format, and of naming: what `promtool check metrics` holds a text against."""
    assert text.endswith("\n")
    known: dict[str, str] = {}
    helped: set[str] = set()
    seen: set[str] = set()
    current = ""
    for line in text.splitlines():
        if line.startswith("# HELP "):
            _, _, current, about = line.split(" ", 3)
            assert about and current not in helped, f"said twice, or without help: {line}"
            helped.add(current)
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name == current and name not in known and kind in ("counter", "gauge", "histogram"), line
            assert re.fullmatch(PREFIX + r"[a-z][a-z_]*[a-z]", name), f"not a base name: {name}"
            assert name.endswith("_total") == (kind == "counter"), f"_total is for counters: {line}"
            assert not re.search(r"_(ms|us|millis\w*|kib|mib|kb|mb|percent|bucket|count|sum|info)(_|$)", name), name
            known[name] = kind
        else:
            match = re.fullmatch(r'([a-z_]+)(?:\{((?:[a-z_]+="(?:[^"\\\n]|\\[\\"n])*",?)*)\})? (-?[0-9.]+)', line)
            assert match, f"not a sample: {line}"
            name = match[1]
            if known[current] == "histogram":
                name = re.sub(r"_(bucket|sum|count)$", "", name)
            assert name == current, f"a sample away from its family: {line}"
            key = line.rpartition(" ")[0]
            assert key not in seen, f"twice: {line}"
            seen.add(key)
            assert float(match[3]) >= 0, line
    assert helped == set(known)


def of(found: dict, name: str, **labels: str) -> float:
    return found[name, frozenset(labels.items())]


def test_numbers(image: Image, daemon: Callable[..., Daemon]) -> None:
    one = daemon()
    name = "file-11"
    assert one.read(name) == image.files[name]
    found = scrape(one)
    mount, backend = {"mountpoint": "/"}, {"mountpoint": "/", "backend": "registry"}
    assert of(found, "needed_bytes_total", **mount) == len(image.files[name])
    # Bytes count when they arrive, so before a reader has them
    fetched = of(found, "fetched_bytes_total", **backend)
    assert 0 < fetched <= image.blob.stat().st_size
    assert of(found, "prefetched_bytes_total", **backend) == of(found, "wasted_bytes_total", **backend) == 0
    assert of(found, "file_operations_total", operation="lookup", **mount) == 1
    reads = of(found, "file_operations_total", operation="read", **mount)
    hit, waited = of(found, "reads_hit_total", **mount), of(found, "reads_waited_total", **mount)
    assert waited >= 1 and hit + waited == of(found, "read_seconds_count", **mount) <= reads
    buckets = [
        of(found, "read_seconds_bucket", le=le, **mount)
        for le in ("0.0002", "0.001", "0.02", "0.05", "0.5", "1", "2", "+Inf")
    ]
    assert buckets == sorted(buckets) and buckets[-1] == hit + waited
    assert of(found, "oldest_wait_seconds", **mount) == 0
    assert of(found, "backend_healthy", **backend) == 1 and of(found, "backend_login_refused", **backend) == 0
    assert one.read(name) == image.files[name]
    again = scrape(one)
    assert of(again, "needed_bytes_total", **mount) == 2 * len(image.files[name])
    assert of(again, "fetched_bytes_total", **backend) == fetched  # all of it was here


def test_mounts_count_apart(image: Image, daemon: Callable[..., Daemon]) -> None:
    """And a mount point may have any name."""
    one = daemon(with_image=False)
    odd = '/a "b" \\c'
    for place, cache in ((odd, "cache-1"), ("/other", "cache-2")):
        one.mount(place, one.config(cache, cache))
    assert one.read(f"{odd}/file-03") == image.files["file-03"]
    found = scrape(one)
    assert of(found, "needed_bytes_total", mountpoint=odd) == len(image.files["file-03"])
    assert of(found, "fetched_bytes_total", mountpoint=odd, backend="registry") > 0
    assert of(found, "needed_bytes_total", mountpoint="/other") == 0
    assert of(found, "fetched_bytes_total", mountpoint="/other", backend="registry") == 0
    one.service.table.umount(odd)
    found = scrape(one)
    assert of(found, "mounts") == 1
    assert not [key for key in found if ("mountpoint", odd) in key[1]]


def test_what_came_for_nothing(image: Image, daemon: Callable[..., Daemon]) -> None:
    one = daemon()
    backend = {"mountpoint": "/", "backend": "registry"}
    assert one.read("file-01") == image.files["file-01"]
    assert of(scrape(one), "wasted_bytes_total", **backend) == 0
    one.server.inject("corrupt")
    assert one.read("file-11") == image.files["file-11"]
    found = wait_until(
        lambda: of(found := scrape(one), "wasted_bytes_total", **backend) and found, "the bad bytes are counted"
    )  # when their range is over
    assert of(found, "wasted_bytes_total", **backend) < of(found, "fetched_bytes_total", **backend)


def test_what_was_fetched_ahead(image: Image, daemon: Callable[..., Daemon]) -> None:
    one = daemon()
    assert one.call("/api/ext/v1/prefetch?wait=30", "PUT")[0] == 200
    found = scrape(one)
    backend = {"mountpoint": "/", "backend": "registry"}
    ahead = of(found, "prefetched_bytes_total", **backend)
    assert 0.9 * image.blob.stat().st_size < ahead <= of(found, "fetched_bytes_total", **backend)
    blob = {"mountpoint": "/", "blob": image.blob.name}
    assert of(found, "blob_chunks_ready", **blob) == of(found, "blob_chunks", **blob) > 0
    assert of(found, "needed_bytes_total", mountpoint="/") == 0
