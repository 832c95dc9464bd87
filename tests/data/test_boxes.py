import pytest

from data_pipelines.encode.boxes import box_text, parse_boxes, parse_quads, quad_text, to_grid, to_pixels


@pytest.mark.parametrize(
    ("value", "size", "expected"),
    [(0, 640, 0), (320, 640, 500), (319.99, 640, 499), (639, 640, 998), (640, 640, 999), (700, 640, 999), (-3, 640, 0)],
)
def test_coordinates_are_integers_below_1000(value, size, expected):
    assert to_grid(value, size) == expected


def test_reading_back_gives_the_middle_of_the_cell():
    assert to_pixels(500, 640) == pytest.approx(320.32)
    for size in (28, 333, 1000, 4096):
        for value in range(1000):
            assert to_grid(to_pixels(value, size), size) == value


def test_box_of_the_papers_form():
    assert box_text((176, 106, 232, 160), 1000, 1000) == "(176,106),(232,160)"
    assert box_text((64, 48, 320, 480), 640, 480) == "(100,100),(500,999)"


def test_box_corners_are_put_in_order():
    assert box_text((320, 480, 64, 48), 640, 480) == "(100,100),(500,999)"


def test_quad_keeps_the_order_of_its_corners():
    assert quad_text((10, 20, 30, 20, 30, 40, 10, 40), 100, 100) == "(100,200),(300,200),(300,400),(100,400)"


def test_boxes_are_found_in_answers():
    text = "The dog<|box_start|>(1,2),(30,40)<|box_end|> and (5, 6), (7, 8); not (1,2) nor (1,2),(3,1000)."
    assert parse_boxes(text) == [(1, 2, 30, 40), (5, 6, 7, 8)]
    assert parse_boxes("none") == []


def test_quads_are_not_boxes():
    text = "<|quad_start|>(1,2),(3,4),(5,6),(7,8)<|quad_end|> <|box_start|>(9,9),(10,10)<|box_end|>"
    assert parse_boxes(text) == [(9, 9, 10, 10)]
    assert parse_quads(text) == [(1, 2, 3, 4, 5, 6, 7, 8)]
