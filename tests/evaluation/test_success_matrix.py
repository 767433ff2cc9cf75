import json

import numpy as np
import pytest
from matrices import matrix_of_rates

from perennial.errors import PerennialError
from perennial.evaluation.success_matrix import SuccessMatrix
from perennial.storage.cells import Cell
from perennial.storage.run_folder import RunFolder


def test_rates_and_episodes_with_missing_cells():
    matrix = matrix_of_rates([[0.5, 0.2, 1.0], [np.nan, 0.9, 0.0]], trained=2)
    np.testing.assert_array_equal(matrix.rates(), [[0.5, 0.2, 1.0], [np.nan, 0.9, 0.0]])
    np.testing.assert_array_equal(matrix.episodes(), [[10, 10, 10], [0, 10, 10]])


def test_json_and_back():
    matrix = matrix_of_rates([[0.5, 0.2, 1.0], [np.nan, 0.9, 0.0]], trained=2)
    back = SuccessMatrix.from_json(json.loads(json.dumps(matrix.to_json())))
    assert (back.trained, back.held_out) == (("task0", "task1"), ("task2",))
    np.testing.assert_array_equal(back.rates(), matrix.rates())
    assert all(back.successes[row][task].dtype == bool for row in range(2) for task in back.successes[row])


def test_rows_on_different_states_cannot_be_compared():
    with pytest.raises(PerennialError, match=r"'a' have \[2, 3\] episodes"):
        SuccessMatrix(("a",), (), ({"a": np.ones(2, bool)}, {"a": np.ones(3, bool)}))


def test_restricted_keeps_the_first_states_and_the_own_order():
    matrix = matrix_of_rates([[0.5, 0.2, 1.0, 0.4]] * 4, trained=3)
    part = matrix.restricted(["task2", "task0"], [], {"task0": 4, "task2": 10})
    assert part.tasks == ("task0", "task2")
    np.testing.assert_array_equal(part.rates()[0], [1.0, 1.0])
    np.testing.assert_array_equal(part.episodes()[0], [4, 10])


@pytest.mark.parametrize(("schedule", "rows"), [("sequential", 3), ("joint", 2)])
def test_built_from_the_cells_of_one_decoder_and_variant(tmp_path, schedule, rows):
    config = {
        "schedule": schedule,
        "tasks": {"trained": ["a", "b"], "held_out": ["c"]},
        "evaluation": {"variants": ["id", "ood_val"]},
    }
    with RunFolder.create(tmp_path / "r", "demo", config, {}) as run:
        run.write_cell(Cell(0, "sampled", "id", "a"), [1, 0], [1, 1])
        run.write_cell(Cell(0, "sampled", "id", "c"), [1, 1], [1, 1])
        run.write_cell(Cell(1, "sampled", "id", "b"), [0, 0], [1, 1])
        run.write_cell(Cell(9, "sampled", "id", "b"), [0, 0], [1, 1])
        run.write_cell(Cell(1, "greedy", "id", "a"), [1, 1], [1, 1])
        run.write_cell(Cell(1, "sampled", "ood_val", "a"), [1, 1], [1, 1])
    matrix = SuccessMatrix.from_run(RunFolder.open(tmp_path / "r"), "sampled", "id")
    expected = np.full((rows, 3), np.nan)
    expected[0, [0, 2]], expected[1, 1] = [0.5, 1.0], 0.0
    np.testing.assert_array_equal(matrix.rates(), expected)
    assert (matrix.trained, matrix.held_out) == (("a", "b"), ("c",))
