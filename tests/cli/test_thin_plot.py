# SPDX-License-Identifier: GPL-2.0-or-later
"""The picture of how a disk grew: its numbers, its SVG, and the command that draws it."""

from __future__ import annotations

import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rpc.conftest import Start, Wire, authorities, dev_directory, start
from vdsm_storage.cli import draw
from vdsm_storage.cli.plot import BOTTOM, LEFT, RIGHT, TOP, byte_scale, plot, time_scale
from vdsm_storage.cli.points import bytes_text, rows_of, spans_of, summary, time_text

__all__ = ["authorities", "start"]  # fixtures

SVG = "{http://www.w3.org/2000/svg}"
MIB, GIB = 1 << 20, 1 << 30
T0 = 1_700_000_000.0  # 2023-11-14 22:13:20 UTC
PROGRAM = str(Path(sys.executable).parent / "vdsm-client")
VM = "8d6a1f0e-0000-4000-8000-000000000001"
KINDS = (
    "event", "extended", "armed", "paused", "resumed", "throttled", "released", "full", "looked",
)  # fmt: skip


def point(when: float, allocation: int, size: int, threshold: int, what: str) -> dict[str, Any]:
    """As the wire has it; MiB."""
    sizes = {"allocation": allocation, "size": size, "threshold": threshold}
    return {"when": T0 + when, "what": what, **{k: str(v * MIB) for k, v in sizes.items()}}


GROWING = [
    point(0, 0, 1024, 512, "armed"),
    point(2, 512, 1024, 0, "event"),
    point(3, 768, 2048, 0, "extended"),
    point(3, 768, 2048, 1536, "armed"),
    point(5, 1536, 2048, 0, "event"),
    point(6, 1792, 2048, 0, "throttled"),
    point(8, 2048, 2048, 0, "paused"),
    point(8.5, 2048, 4096, 0, "extended"),
    point(8.5, 2048, 4096, 3584, "armed"),
    point(8.5, 2048, 4096, 3584, "resumed"),
    point(9, 2176, 4096, 3584, "released"),
    point(10, 2560, 4096, 3584, "looked"),
]


def drawn(points: Sequence[Mapping[str, Any]], title: str = "VM a, drive vda") -> ET.Element:
    """What is drawn; a mistake in the SVG is an error of the parser's."""
    return ET.fromstring(plot(points, title))


def paths(root: ET.Element, name: str) -> list[str]:
    return [path.get("d", "") for path in root.iter(f"{SVG}path") if path.get("class") == name]


def boxes(root: ET.Element, name: str) -> list[tuple[float, float]]:
    """From and to, in pixels, of the spans of the plot itself."""
    found = [box for box in root.iter(f"{SVG}rect") if box.get("class") == name]
    return [
        (float(box.get("x", 0)), float(box.get("x", 0)) + float(box.get("width", 0)))
        for box in found
        if float(box.get("y", 0)) >= TOP
    ]


def words(root: ET.Element) -> list[str]:
    return [text.text or "" for text in root.iter(f"{SVG}text")]


def x(seconds: float, whole: float = 10.0) -> str:
    return f"{LEFT + seconds / whole * (RIGHT - LEFT):.1f}"


def y(mib: float, top: float = 4096.0) -> str:
    return f"{BOTTOM - mib / top * (BOTTOM - TOP):.1f}"


# -- the picture ----------------------------------------------------------------------------------


def test_lines_are_where_the_numbers_are() -> None:
    root = drawn(GROWING)
    _legend, size = sorted(paths(root, "size"), key=len)
    assert size == (
        f"M{x(0)} {y(1024)}H{x(3)}V{y(2048)}H{x(8.5)}V{y(4096)}H{x(10)}"
    )  # each size holds until the next
    _legend, limit = sorted(paths(root, "limit"), key=len)
    assert limit == (
        f"M{x(0)} {y(512)}H{x(2)}M{x(3)} {y(1536)}H{x(5)}M{x(8.5)} {y(3584)}H{x(10)}"
    )  # and there is none between an event and the next arming
    _legend, written = sorted(paths(root, "written"), key=len)
    places = [(0, 0), (2, 512), (3, 768), (5, 1536), (6, 1792), (8, 2048), (8.5, 2048), (9, 2176),
              (10, 2560)]  # fmt: skip
    assert written == "M" + "L".join(f"{x(when)} {y(mib)}" for when, mib in places)
    (under,) = paths(root, "under")
    assert under == f"{written}V{BOTTOM}H{LEFT}.0Z"


def test_spans_are_shaded_where_they_were() -> None:
    root = drawn(GROWING)
    ((left, right),) = boxes(root, "paused")
    assert (f"{left:.1f}", f"{right:.1f}") == (x(8), x(8.5))
    ((left, right),) = boxes(root, "slowed")
    assert (f"{left:.1f}", f"{right:.1f}") == (x(6), x(9))
    assert boxes(root, "full") == []


def test_a_short_pause_is_seen_also_at_the_very_end() -> None:
    points = [
        point(0, 0, 8, 0, "armed"), point(4, 8, 8, 0, "paused"), point(4.0001, 8, 8, 0, "resumed"),
        point(10, 8, 8, 0, "paused"),
    ]  # fmt: skip
    (first, last) = boxes(drawn(points), "paused")
    assert f"{first[0]:.1f}" == x(4)
    assert first[1] - first[0] == pytest.approx(1.5)
    assert last[1] == pytest.approx(RIGHT)


def test_words_of_the_picture() -> None:
    shown = words(drawn(GROWING, "VM <a> & b, drive vda"))
    assert "VM <a> & b, drive vda" in shown
    told = "2.5 GiB written in 10 s (256 MiB/s), 2 extensions, 1 pause, slowed for 3 s"
    assert told in shown
    assert "seconds since 2023-11-14 22:13:20 UTC" in shown
    assert "GiB" in shown
    assert shown[:5] == ["0", "1", "2", "3", "4"]
    assert shown[5:11] == ["0", "2", "4", "6", "8", "10"]
    legend = ["size of the volume", "threshold", "written by the guest", "guest paused",
              "guest slowed"]  # fmt: skip
    assert shown[-5:] == legend
    calm = words(drawn([point(0, 1, 8, 0, "looked"), point(60, 2, 8, 0, "looked")]))
    assert calm[-2:] == ["size of the volume", "written by the guest"]
    assert "1 MiB written in 60 s (17.1 KiB/s), no extensions, no pauses" in calm


def test_colours_for_light_and_for_dark_pages() -> None:
    """With a background of its own in either; each class that is used has a colour."""
    svg = plot(GROWING, "VM a")
    style = re.search("<style>(.*)</style>", svg)
    assert style is not None
    light, dark = style[1].split("@media(prefers-color-scheme:dark)")
    used = set(re.findall('class="([a-z]+)"', svg))
    colours = [
        dict(re.findall(r"\.([a-z]+)\{[a-z]+:(#[0-9a-f]{6})\}", part)) for part in (light, dark)
    ]
    assert used <= set(colours[0]) == set(colours[1])
    for scheme in colours:
        for name in used - {"back", "grid", "under"}:
            assert contrast(scheme[name], scheme["back"]) > 3, (name, scheme)
        assert contrast(scheme["soft"], scheme["back"]) > 4.5


def contrast(one: str, other: str) -> float:
    """As the guidelines for accessible pages reckon it: 3 for graphics, 4.5 for text."""

    def light(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)


def test_one_point_and_none() -> None:
    root = drawn([point(0, 1, 4, 2, "armed")])
    assert f"M{x(0)} {y(4, 4)}H{x(10)}" in paths(root, "size")
    with pytest.raises(ValueError, match="no points"):
        plot([], "VM a")


def test_a_title_that_xml_cannot_have() -> None:
    assert "a b" in words(drawn(GROWING, "a\x1bb"))


POINTS = st.lists(
    st.builds(
        point,
        st.floats(0, 1e7, allow_nan=False),
        st.integers(0, 1 << 43), st.integers(0, 1 << 43), st.integers(0, 1 << 35),
        st.sampled_from(KINDS),
    ),
    min_size=1, max_size=40,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(points=POINTS)
def test_whatever_was_recorded_is_drawn_within_the_frame(points: list[dict[str, Any]]) -> None:
    root = drawn(points)
    for name in ("size", "limit", "written", "under"):
        for path in paths(root, name):
            for right, down in places(path):
                assert LEFT - 0.06 <= right <= RIGHT + 0.06, path
                assert 70 <= down <= BOTTOM + 0.06, path
    for name in ("paused", "slowed", "full"):
        for left, right in boxes(root, name):
            assert LEFT - 0.1 <= left < right <= RIGHT + 0.1
    assert 2 <= sum(word.replace(".", "").isdigit() for word in words(root)) <= 24


def places(path: str) -> Iterator[tuple[float, float]]:
    """Where an SVG path of M, L, H, V and h (of a legend) comes by."""
    right = down = 0.0
    for letter, numbers in re.findall(r"([MLHVhZ])([-\d. ]*)", path):
        values = [float(number) for number in numbers.split()]
        if letter in "ML":
            right, down = values
        elif letter == "H":
            (right,) = values
        elif letter == "h":
            right += values[0]
        elif letter == "V":
            (down,) = values
        yield right, down


@settings(max_examples=200, deadline=None)
@given(first=st.floats(0, 1e10), length=st.floats(1e-3, 1e9))
def test_axis_of_time(first: float, length: float) -> None:
    scale = time_scale(first, first + length)
    assert 4 <= len(scale.ticks) <= 10
    assert scale.ticks[0] == first
    assert scale.ticks[-1] <= (first + length) * (1 + 1e-9) + 1e-6


@pytest.mark.parametrize(
    ("sizes", "labels"),
    [
        ((0, 3 * GIB), ["0", "0.5", "1", "1.5", "2", "2.5", "3"]),
        ((100 * GIB, 104 * GIB), ["100", "101", "102", "103", "104"]),
        ((0, 100 * MIB), ["0", "16", "32", "48", "64", "80", "96", "112"]),
        ((5, 5), ["0", "1", "2", "3", "4", "5"]),
        ((GIB, GIB), ["0", "0.25", "0.5", "0.75", "1"]),
        ((0, 0), ["0", "1"]),
    ],
)
def test_axis_of_bytes(sizes: tuple[int, int], labels: list[str]) -> None:
    low, high = sizes
    rows = rows_of([{"when": 1, "allocation": low, "size": high, "threshold": 0, "what": "armed"}])
    scale = byte_scale(rows)
    assert [f"{tick / scale.factor:g}" for tick in scale.ticks] == labels


def test_many_points_make_a_small_file() -> None:
    points = [point(n, n // 10, 1000, 0, "looked") for n in range(8000)]
    assert len(plot(points, "VM a")) < 60_000


# -- numbers --------------------------------------------------------------------------------------


def test_spans() -> None:
    def spans(*told: str) -> list[tuple[str, float, float]]:
        rows = rows_of([point(n, 0, 1, 0, what) for n, what in enumerate(told)])
        return [(span.name, span.start - T0, span.end - T0) for span in spans_of(rows)]

    assert spans("paused", "extended", "resumed", "looked") == [("paused", 0, 2)]
    assert spans("armed", "full", "full", "looked", "extended") == [("full", 1, 4)]
    assert spans("resumed", "released", "extended", "looked") == []
    assert spans("armed", "throttled", "looked") == [("slowed", 1, 2)]


def test_summary_does_not_count_a_new_layer_as_a_loss() -> None:
    """After a snapshot the guest writes to another volume, which is empty."""
    rows = rows_of([point(0, 100, 200, 0, "armed"), point(1, 150, 200, 0, "looked"),
                    point(2, 1, 100, 0, "armed"), point(3, 31, 100, 0, "looked")])  # fmt: skip
    assert summary(rows, []) == "80 MiB written in 3 s (26.7 MiB/s), no extensions, no pauses"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1000 * MIB, "1000 MiB"),
        (2.5 * GIB, "2.5 GiB"), (5000 * (1 << 40), "5000 TiB"),
    ],
)  # fmt: skip
def test_bytes_in_words(count: float, text: str) -> None:
    assert bytes_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.01, "0.01 s"), (299, "299 s"), (360, "6 minutes"), (6 * 3600, "6 hours"),
     (10 * 86400, "10 days")],
)  # fmt: skip
def test_times_in_words(seconds: float, text: str) -> None:
    assert time_text(seconds) == text


# -- the command ----------------------------------------------------------------------------------


@pytest.fixture
def wire(start: Start, tmp_path: Path, authorities: tuple[str, str]) -> Wire:
    wire = start(secure=True)
    wire.probe.gate.set()
    dev_directory(wire, tmp_path, authorities[0])
    wire.probe.vms = [{"vmId": VM, "vmName": "web", "status": "Up"}]
    wire.probe.history = {"vda": GROWING, "vdb": []}
    return wire


def client(tmp_path: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [PROGRAM, "--dev", str(tmp_path), "thin", "plot", *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("vm", [VM, "web"])
def test_plot_writes_an_svg(wire: Wire, tmp_path: Path, vm: str) -> None:
    done = client(tmp_path, vm, "vda", "-o", str(tmp_path / "a.svg"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "a.svg").read_text() == plot(GROWING, "VM web, drive vda")
    assert wire.probe.calls == [("history", {"vmID": VM, "drive": "vda", "since": 0.0})]


def test_plot_to_standard_output_since(wire: Wire, tmp_path: Path) -> None:
    done = client(tmp_path, "web", "vda", "-o", "-", "--since", "60")
    assert done.stdout == plot(GROWING, "VM web, drive vda")
    client(tmp_path, "web", "vda", "-o", "-", "--since", "1700000005")
    asked = [params["since"] for _, params in wire.probe.calls]
    assert 50 < time.time() - asked[0] < 120
    assert asked[1] == 1700000005


def test_plot_writes_a_png(wire: Wire, tmp_path: Path) -> None:
    pytest.importorskip("resvg_py", reason="needs resvg-py: make venv")
    done = client(tmp_path, "web", "vda", "-o", str(tmp_path / "a.PNG"))
    assert (done.returncode, done.stderr) == (0, "")
    data = (tmp_path / "a.PNG").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    assert (width, height) == (1760, 880)


def test_no_png_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw, "renderer", None)
    with pytest.raises(draw.UsageError, match=r"a\.png: PNG needs .* resvg-py.*rsvg-convert"):
        draw.must_be_possible("a.png")
    draw.must_be_possible("a.svg")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["web", "vda"], "-o FILE"),
        (["web", "-o", "a.svg"], "a drive"),
        (["web", "vda", "-o", "a.pdf"], ".svg or .png"),
        (["web", "vdb", "-o", "a.svg"], "vdb: nothing was recorded"),
        (["web", "vda", "-o", "/nowhere/a.svg"], "/nowhere/a.svg: No such file"),
        (["web", "vda", "-o", "-", "--since", "-1"], "--since"),
        (["twice", "vda", "-o", "-"], "2 VMs have that name"),
    ],
)
def test_mistakes(wire: Wire, tmp_path: Path, more: list[str], told: str) -> None:
    wire.probe.vms += [{"vmId": VM[:-1] + end, "vmName": "twice", "status": "Up"} for end in "23"]
    done = client(tmp_path, *more)
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr
    assert not Path("a.svg").exists()


def test_a_name_that_no_vm_has(wire: Wire, tmp_path: Path) -> None:
    done = client(tmp_path, "nobody", "vda", "-o", str(tmp_path / "a.svg"))
    assert done.returncode == 1
    assert '"code": 1' in done.stderr
    assert "nobody" in done.stderr
