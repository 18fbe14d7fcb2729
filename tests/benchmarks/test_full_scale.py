from benchmarks import full_scale


def test_the_table_has_a_dash_for_what_a_part_lacks():
    measured = {
        "ours, prediction": {"peak_gb": 1.224, "compile": 4.71, "first": 3.0, "second": 2.53},
        "torchvision, prediction": {"peak_gb": 1.5, "first": 4.0, "second": 3.96},
    }
    lines = full_scale.table(measured).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0][1:] == ["peak memory, GB", "compilation, s", "first run, s", "second run, s"]
    assert cells[2] == ["ours, prediction", "1.22", "4.7", "3.0", "2.5"]
    assert cells[3] == ["torchvision, prediction", "1.50", "-", "4.0", "4.0"]


def test_the_image_is_the_same_for_both():
    image, boxes, classes = full_scale.image_and_objects()
    again, same_boxes, _ = full_scale.image_and_objects()
    assert image.shape == (*full_scale.CANVAS, 3)
    assert (image == again).all()
    assert (boxes == same_boxes).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert boxes[:, [0, 2]].max() <= full_scale.CANVAS[1]
    assert len(classes) == full_scale.NUM_OBJECTS
