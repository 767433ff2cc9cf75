import json
import math
import re
import shutil
from html.parser import HTMLParser

import pytest
from example_run import HELD_OUT, TRAINED, write_example

from perennial.errors import PerennialError
from perennial.reports import page, summary
from perennial.reports.record import read

HOSTILE = ["<script>alert(1)<", "\"onerror=x' & {{7*7}}", "物体を押す ✓", "a]b [red]c", "$x_1$ --"]
ALIKE = f"iterations of {TRAINED[0]}: all episodes of each group ended alike"
VOID = {"meta", "link", "data-void", "br", "img", "input", "hr"}


class Elements(HTMLParser):
    """Every element as (tag, attributes, text inside it); complains about tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.found, self._open = [], []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        element = [tag, dict(attrs), ""]
        self.found.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.found.append([tag, dict(attrs), ""])

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        for element in self._open:
            element[2] += data

    def all(self, tag, **attributes):
        return [e for e in self.found if e[0] == tag and all(e[1].get(k) == v for k, v in attributes.items())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_example(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture(scope="module")
def elements(folder):
    return Elements(page.render(folder))


def after(elements, start, tag):
    """The elements of kind `tag` that follow `start` until the next element of its kind."""
    rest = elements.found[elements.found.index(start) + 1 :]
    end = next((i for i, e in enumerate(rest) if e[0] == start[0]), len(rest))
    return [e for e in rest[:end] if e[0] == tag]


@pytest.mark.parametrize("decoder", ["sampled", "greedy"])
def test_metrics_are_those_of_the_json(folder, elements, decoder):
    figures = summary.report_json(folder)["decoders"][decoder]
    for name in ("avg", "gain", "nbt", "fwt", "zs", "zs_gain"):
        row = elements.all("tr", **{"data-metric": name})[0]
        (cell,) = (c for c in after(elements, row, "td") if c[1].get("data-decoder") == decoder)
        shown = [float(e[1]["value"]) for e in after(elements, cell, "data")[:3]]
        assert shown == [figures[name][key] for key in ("value", "low", "high")]


@pytest.mark.parametrize("decoder", ["sampled", "greedy"])
def test_heat_map_shows_every_rate_of_the_json(folder, elements, decoder):
    matrix = summary.report_json(folder)["decoders"][decoder]["matrix"]
    (table,) = elements.all("table", **{"data-decoder": decoder})
    cells = after(elements, table, "td")
    cells = [c for c in cells if "cell" in c[1].get("class", "")]
    rates = [float(after(elements, cell, "data")[0][1]["value"]) for cell in cells]
    assert rates == [rate for row in matrix["rates"] for rate in row]
    width = len(TRAINED) + len(HELD_OUT)
    outlined = [divmod(i, width) for i, cell in enumerate(cells) if "taught" in cell[1]["class"].split()]
    assert outlined == [(task + 1, task) for task in range(len(TRAINED))]


def test_a_cell_tells_n_and_the_wilson_interval(elements):
    first = next(e for e in elements.all("td") if "cell" in e[1].get("class", ""))
    successes, n, z = 11, 40, 1.959964  # Wilson (1927), in its closed form
    middle, half = successes + z**2 / 2, z * math.sqrt(successes * (n - successes) / n + z**2 / 4)
    low, high = (100 * (middle + sign * half) / (n + z**2) for sign in (-1, 1))
    assert (
        first[1]["title"] == f"11 of 40 episodes of handle-press-v3, 95\u00a0% interval {low:.1f} to {high:.1f}\u00a0%"
    )
    assert first[2] == f"27.5{low:.0f}\u2013{high:.0f} · n\u00a040"


def test_hostile_names_are_shown_and_never_obeyed(tmp_path):
    folder = write_example(
        tmp_path / "<b>run' \"x\"", trained=HOSTILE[:3], held_out=HOSTILE[3:], episodes=5, iterations=2,
        strategies=[{"name": "</pre><script>alert(2)</script>"}],
    )  # fmt: skip
    text = page.render(folder)
    elements = Elements(text)
    assert elements.all("script") == []
    heads = [e[2] for e in elements.all("th", scope="col")]
    assert set(HOSTILE) <= set(heads)
    assert not any(name.startswith("on") for _, attributes, _ in elements.found for name in attributes)
    assert (
        "</pre><script>alert(2)</script>"
        in json.loads(next(e[2] for e in elements.all("pre") if '"seed"' in e[2]))["strategies"][0]["name"]
    )
    commands = next(e[2] for e in elements.all("pre") if "perennial compare" in e[2])
    assert "perennial compare '<b>run'\"'\"' \"x\"' OTHER_RUN" in commands


def test_the_page_needs_nothing_but_itself(elements):
    links = [
        value
        for _, attributes, _ in elements.found
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "action", "poster", "srcset")
    ]
    assert links
    assert all(link.startswith(("#", "data:")) for link in links)
    (policy,) = elements.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert "default-src 'none'" in policy[1]["content"]
    assert "script" not in policy[1]["content"]
    assert "url(" not in elements.all("style")[0][2]


def test_every_id_is_unique_and_every_drawing_and_video_is_labelled(elements):
    ids = [attributes["id"] for _, attributes, _ in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag in ("svg", "video"):
        assert all(attributes["aria-label"] for _, attributes, _ in elements.all(tag))
    assert all("scope" in attributes for _, attributes, _ in elements.all("th"))


def test_videos_stand_in_pairs(elements):
    labels = [attributes["aria-label"] for _, attributes, _ in elements.all("video")]
    assert labels == [f"{task}, {when}" for task in (*TRAINED, *HELD_OUT) for when in ("Before", "After 5 tasks")]
    assert all({"controls", "muted", "loop", "playsinline"} <= set(a) for _, a, _ in elements.all("video"))


@pytest.mark.parametrize(("damaged_row", "done"), [(2, 1), (1, 0)])
def test_an_unfinished_run_says_so_and_how_to_go_on(tmp_path, damaged_row, done):
    folder = write_example(tmp_path / "half", rows=2, videos=False)
    damaged = folder / f"evaluations/{damaged_row:02d}/greedy/id/reach-v3.json"
    damaged.write_text("{}")  # counts as missing
    elements = Elements(page.render(folder))
    assert elements.all("h1")[0][2] == f"{done} of 5 tasks taught, one after another"
    assert "This run is not finished" in elements.all("div", role="note")[0][2]
    assert "perennial resume half" in elements.all("code")[0][2]
    missing = [e for e in elements.all("td") if "missing" in e[1].get("class", "")]
    assert len(missing) == 2 * 3 * 8 + 1


@pytest.mark.parametrize("rows", [0, None])
def test_a_run_that_has_just_begun_has_a_page_without_figures(tmp_path, rows):
    folder = write_example(tmp_path / "new", rows=0, videos=False, iterations=0)
    if rows is None:
        shutil.rmtree(folder / "evaluations")
        (folder / "timings.jsonl").unlink()
    elements = Elements(page.render(folder))
    assert elements.all("h1")[0][2].startswith("0 of 5 tasks")
    assert [e[2].strip() for e in elements.all("div", **{"class": "figure"})] == ["\u2013"] * 3
    assert elements.all("video") == elements.all("svg") == []


def test_joint_teaching_has_two_rows_and_no_forgetting(tmp_path):
    folder = write_example(tmp_path / "joint", rows=1, videos=False, iterations=2)
    described = json.loads((folder / "run.json").read_text())
    described["config"]["schedule"] = "joint"
    (folder / "run.json").write_text(json.dumps(described))
    elements = Elements(page.render(folder))
    assert elements.all("h1")[0][2] == "5 tasks taught, all together"
    figures = summary.report_json(folder)
    assert [name for name in ("avg", "gain", "nbt", "fwt", "zs", "zs_gain") if figures[name] is None] == ["nbt", "fwt"]
    assert figures["matrix"]["rows"] == ["base", "5 tasks"]


@pytest.mark.parametrize(
    ("kept", "still", "sentence"),
    [
        (0, 12, f"No learning signal in 12 of 12 {ALIKE}, so these iterations changed nothing."),
        (0, 5, f"No learning signal in 12 of 12 {ALIKE}, so only the strategies acted, in 7 of them."),
        (0.25, 0, "only 25\u00a0%"),
        (0.25, 3, f"No learning signal in 3 of 12 {ALIKE}, so these iterations changed nothing."),
        (0.8, 0, ""),
    ],
)
def test_warnings(tmp_path, kept, still, sentence):
    folder = write_example(tmp_path / "run", trained=TRAINED[:1], held_out=[], videos=False, kept=kept)
    log = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    quiet = [row | {"grad_norm": 0.0} for row in rows[:still]]
    log.write_text("".join(json.dumps(row) + "\n" for row in (*quiet, *rows[still:])))
    notes = Elements(page.render(folder)).all("div", role="note")
    assert [sentence in note[2] for note in notes] == ([True] if sentence else [])


def test_time_and_speed_add_up(elements):
    # 5 tasks x 12 iterations x (6.5, 4.25, 0.4) s; evaluation 2 decoders x sum(21 .. 26) s, 28,000 steps each.
    (table,) = (e for e in elements.all("table") if "Playing training episodes" in e[2])
    cells = [e[2] for e in after(elements, table, "td")]
    assert cells[0::2][:5] == ["6 min 30 s", "4 min 15 s", "4 min 42 s", "24 s", "15 min 51 s"]
    steps = 5 * sum(9000 - 250 * i for i in range(12)) + 12 * 28000
    assert any(
        e[2].startswith(f"{steps:,} environment steps") and f"{steps / (390 + 282):,.0f} a second" in e[2]
        for e in elements.all("p")
    )


def test_the_time_of_strategies_is_told_where_it_was_measured(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "run")
    with (copy / "timings.jsonl").open("a") as log:
        for episodes in (0, 16):
            cost = {"seconds": 30.0, "episodes": episodes, "env_steps": 100 * episodes}
            log.write(json.dumps({"event": "strategy", **cost}) + "\n")
    before, now = page._time(read(folder)), page._time(read(copy))
    name = "Strategies before and after tasks"
    assert [part["seconds"] for part in now["parts"] if part["name"] == name] == [60.0]
    assert name not in [part["name"] for part in before["parts"]]
    assert now["total"] == before["total"] + 60
    assert now["env_steps"] == before["env_steps"] + 1600
    assert now["speed"] == before["speed"]


def test_write_leaves_the_json_and_the_same_page_every_time(folder):
    path = page.write(folder)
    assert path == folder / "report" / "index.html"
    assert json.loads((folder / "report" / "report.json").read_text()) == summary.report_json(folder)
    assert path.read_text(encoding="utf-8") == page.render(folder)


def test_what_is_no_run_folder_is_refused(tmp_path):
    with pytest.raises(PerennialError, match=r"no run\.json"):
        page.write(tmp_path)
    (tmp_path / "run.json").write_text('{"format": 1, "config": {"tasks": {}}}')
    with pytest.raises(PerennialError, match="damaged: its config has no 'evaluation'"):
        page.write(tmp_path)


def luminance(colour):
    """Relative luminance by WCAG 2.2."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1])
def test_text_has_enough_contrast_in_light_and_dark(elements, scheme):
    blocks = re.findall(r":root \{(.*?)\}", elements.all("style")[0][2], re.DOTALL)
    colours = dict(re.findall(r"(--[\w-]+): (#[0-9a-f]{6})", blocks[scheme]))
    pairs = [("--ink", ground) for ground in ("--ground", "--card", "--notice", "--heat-low", "--heat-high")]
    pairs += [(text, "--ground") for text in ("--soft", "--accent", "--second")] + [("--soft", "--card")]
    assert {pair: contrast(colours[pair[0]], colours[pair[1]]) >= 4.5 for pair in pairs} == dict.fromkeys(pairs, True)
