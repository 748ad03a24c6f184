import pytest

from model.evaluation.scores import (
    Figures,
    SequenceScores,
    Statistics,
    by_attribute,
    by_category,
    j_by_category,
)


def scores(name: str, *j: float, f: tuple[float, ...] = (), category: str | None = None) -> SequenceScores:
    return SequenceScores(name, category, tuple(range(1, len(j) + 1)), j, f)


def test_recall_is_the_share_above_a_half_not_at_it() -> None:
    assert Statistics.of([0.5, 0.51, 0.2, 0.9]).recall == 0.5


@pytest.mark.parametrize(
    ("count", "first", "last"),
    [
        (1, [0], [0]),
        (2, [0], [1]),
        (3, [0, 1], [2]),
        (4, [0, 1], [2, 3]),
        (8, [0, 1, 2], [5, 6, 7]),
        (48, list(range(13)), list(range(35, 48))),
        (98, list(range(25)), list(range(73, 98))),
    ],
)
def test_decay_is_the_first_quarter_minus_the_last_each_with_the_frame_at_its_edge(
    count: int, first: list[int], last: list[int]
) -> None:
    values = [float(index**2) for index in range(count)]
    expected = sum(values[i] for i in first) / len(first) - sum(values[i] for i in last) / len(last)
    assert Statistics.of(values).decay == pytest.approx(expected)


def test_a_sequence_counts_once_whatever_its_length() -> None:
    figures = Figures.of([scores("long", *[1.0] * 9, f=(1.0,) * 9), scores("short", 0.0, f=(0.5,))])
    assert (figures.j.mean, figures.f.mean, figures.jf_mean) == (0.5, 0.75, 0.625)
    assert (figures.j.recall, figures.f.recall) == (0.5, 0.5)


def test_flicker_counts_a_sequence_once_and_one_of_a_single_scored_frame_has_none() -> None:
    pair = SequenceScores("pair", None, (1, 2, 3), (1.0,) * 3, (1.0,) * 3, (0.2, 0.4), (0.1, 0.1))
    figures = Figures.of([pair, scores("single", 1.0, f=(1.0,))])
    assert (figures.flicker, figures.truth_flicker) == pytest.approx((0.15, 0.05))


def test_there_are_no_statistics_of_nothing() -> None:
    with pytest.raises(ValueError, match="no frames"):
        Statistics.of([])


def test_a_sequence_stands_under_each_of_its_attributes() -> None:
    dog, bus = scores("dog", 0.5), scores("bus", 0.7)
    groups = by_attribute([dog, bus], {"dog": ["OCC", "DEF"], "bus": ["OCC"], "swan": ["AC"]})
    assert groups == {"DEF": [dog], "OCC": [dog, bus]}
    assert list(groups) == ["DEF", "OCC"]


def test_a_sequence_without_known_attributes_is_named() -> None:
    with pytest.raises(ValueError, match="dog"):
        by_attribute([scores("dog", 0.5)], {})


def test_sequences_are_grouped_by_class_in_the_order_in_which_they_come() -> None:
    crowd, plain, other = (scores(name, 1.0, category=kind) for name, kind in ("ac", "bp", "cc"))
    assert by_category([crowd, plain, other]) == {"c": [crowd, other], "p": [plain]}
    with pytest.raises(ValueError, match="dog"):
        by_category([scores("dog", 0.5)])


def test_a_class_is_the_mean_over_its_sequences_not_over_their_frames() -> None:
    means = j_by_category(
        [
            scores("car/1", 1.0, 1.0, 1.0, category="car"),
            scores("car/2", 0.0, category="car"),
            scores("cat/1", 0.3, category="cat"),
        ]
    )
    assert means == {"car": 0.5, "cat": 0.3}


def test_a_sequence_without_class_is_refused() -> None:
    with pytest.raises(ValueError, match="dog"):
        j_by_category([scores("dog", 0.5)])
