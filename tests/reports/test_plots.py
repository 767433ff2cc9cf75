import xml.etree.ElementTree as ElementTree

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from perennial.reports import plots

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg):
    return ["".join(element.itertext()) for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def curve_points(svg, name, index):
    """The points of the line with that number of the drawing, in its own coordinates."""
    group = next(e for e in ElementTree.fromstring(svg).iter(f"{SVG}g") if e.get("id") == f"{name}-line2d_{index}")
    words = group.find(f"{SVG}path").get("d").split()
    return [(float(words[i + 1]), float(words[i + 2])) for i in range(0, len(words), 3)]


def test_success_is_drawn_in_percent_with_named_axes():
    svg = plots.success_curve("a", [[(0, 0.1), (5, 0.9)]], "a & b <c>", base=0.2)
    assert ElementTree.fromstring(svg).get("aria-label") == "a & b <c>"
    assert {"iteration", "success in training, %", "base", "0", "100"} <= set(texts(svg))


def lines(svg, name, points):
    """All drawn lines with that many points."""
    found = []
    for number in (n for n in range(1, 60) if f'id="{name}-line2d_{n}"' in svg):
        try:
            line = curve_points(svg, name, number)
        except (AttributeError, ValueError, IndexError):  # a tick has no path of its own
            continue
        if len(line) == points:
            found.append(line)
    return found


def test_a_line_goes_through_the_given_points():
    # The middle point lies half-way in x and at a quarter of the height between the first and the last.
    svg = plots.quantity_curve("k", [(0, 0.0), (2, 1.0), (4, 4.0)], "KL", "nats")
    ((first, middle, last),) = lines(svg, "k", 3)
    assert middle[0] == pytest.approx((first[0] + last[0]) / 2)
    assert middle[1] == pytest.approx(first[1] + (last[1] - first[1]) / 4)
    assert last[1] < first[1]  # SVG counts downwards


def test_success_uses_the_whole_height_of_the_percent_scale():
    svg = plots.success_curve("a", [[(0, 0.0), (1, 0.5), (2, 1.0)]], "t")
    ((none, half, all_),) = lines(svg, "a", 3)
    # The ticks of the drawing's vertical axis lie at 0, 25, 50, 75 and 100 %.
    texts_at = {
        "".join(e.itertext()): float(e.get("y")) for e in ElementTree.fromstring(svg).iter(f"{SVG}text") if e.get("y")
    }
    ticks = texts_at["0"], texts_at["50"], texts_at["100"]
    assert (none[1] - half[1], none[1] - all_[1]) == pytest.approx((ticks[0] - ticks[1], ticks[0] - ticks[2]), abs=0.1)


def test_the_same_numbers_give_the_same_bytes_and_no_date():
    curve = [(i, i / 9) for i in range(10)]
    svg = plots.success_curve("a", [curve], "t")
    assert svg == plots.success_curve("a", [curve], "t")
    assert "metadata" not in svg
    assert "matplotlib v" not in svg.lower()


def test_ids_of_two_drawings_on_one_page_differ_and_are_all_resolved():
    import re

    drawings = [plots.success_curve(name, [[(0, 0.1), (1, 0.2)]], "t", base=0.1) for name in ("a", "b")]
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in drawings]
    assert ids[0].isdisjoint(ids[1])
    for svg, own in zip(drawings, ids, strict=True):
        assert set(re.findall(r'(?:url\(|href=")#([^")]+)', svg)) <= own


def test_colours_follow_the_page_and_have_a_fallback():
    svg = plots.success_curve("a", [[(0, 0.1)], [(0, 0.2)], [(0, 0.3)]], "t", base=0.5)
    for colour, variable in plots.VARIABLES.items():
        assert f"var({variable}, {colour})" in svg
        assert svg.count(colour) == svg.count(f"var({variable}, {colour})")


def test_lines_have_their_own_axes_and_a_shade_from_low_to_high():
    curve = [(0.0, 10.0), (0.25, 20.0), (1.0, 50.0)]
    svg = plots.lines("s", [curve], "t", "scale", "success, %", bands=[[(0, 20), (10, 30), (40, 60)]], limits=(0, 100))
    assert {"scale", "success, %", "0.2", "100"} <= set(texts(svg))
    ((first, quarter, last),) = lines(svg, "s", 3)
    assert quarter[0] == pytest.approx(first[0] + (last[0] - first[0]) / 4)
    (shade,) = [e for e in ElementTree.fromstring(svg).iter(f"{SVG}g") if "FillBetween" in e.get("id", "")]
    down = float(next(shade.iter(f"{SVG}use")).get("y"))
    words = next(shade.iter(f"{SVG}path")).get("d").replace("z", "").split()
    heights = [down + float(words[i + 2]) for i in range(0, len(words), 3)]
    percent = (first[1] - last[1]) / 40  # the line climbs from 10 to 50
    assert max(heights) == pytest.approx(first[1] + 10 * percent, abs=0.1)
    assert min(heights) == pytest.approx(last[1] - 10 * percent, abs=0.1)


def test_lines_over_whole_numbers_are_ticked_at_whole_numbers_and_begin_at_zero():
    svg = plots.lines("r", [[(1, 5.0), (2, 6.0)]], "t", "tasks learned", "rank")
    shown = texts(svg)
    assert {"0", "1", "2"} <= set(shown)
    assert not [text for text in shown if text.startswith(("1.", "2."))]


def test_labels_of_crowded_points_cover_nothing_and_stay_inside():
    """Five points within a letter's width in the upper right corner, and one alone."""
    points = [(f"method_{i}", 10 - 0.05 * i, 10 - 0.04 * i) for i in range(5)] + [("alone", 2.0, 3.0)]
    figure = Figure(figsize=(5, 4), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([x for _, x, _ in points], [y for _, _, y in points], "o", markersize=4)
    plots.name_points(axes, points, 8)
    boxes = [text.get_window_extent() for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == [label for label, _, _ in points]
    for i, box in enumerate(boxes):
        assert not box.count_overlaps(boxes[:i])
        assert axes.bbox.x0 <= box.x0
        assert box.x1 <= axes.bbox.x1
        for x, y in axes.transData.transform([(x, y) for _, x, y in points]):
            assert not box.contains(x, y)
    at = axes.transData.transform([points[-1][1:]])[0]
    assert 0 < boxes[-1].x0 - at[0] < 10, "a point alone has its label to its right"
    assert 0 < boxes[-1].y0 - at[1] < 10
