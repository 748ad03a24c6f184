from model.evaluation import paper
from model.variants import ROWS


def test_the_full_network_is_the_best_of_its_kind() -> None:
    """The paper's point, and a guard against a slip of the pen in the table."""
    full = paper.DAVIS16_VAL["full"]
    for name, row in paper.DAVIS16_VAL.items():
        assert name == "multi_scale" or (row.j_mean <= full.j_mean and row.f_mean <= full.f_mean)


def test_rows_of_both_datasets_have_the_same_names() -> None:
    assert paper.YOUTUBE_OBJECTS.keys() <= paper.DAVIS16_VAL.keys()


def test_every_row_has_a_network_and_figures() -> None:
    assert paper.DAVIS16_VAL.keys() == ROWS.keys()
