from collections import Counter

import pytest

from model.training.sampling import JointSampler, joint_image_batches


def indices(sampler: JointSampler, steps: range, kind: str) -> list[int]:
    batches = [sampler.batch(step) for step in steps]
    return [key.index for batch in batches if batch.kind == kind for key in batch.keys]


def test_the_papers_data_sets_give_five_image_batches_after_each_video_batch() -> None:
    assert joint_image_batches(videos=2079, images=10553, batch_size=8) == 5


def test_videos_that_do_not_fill_a_batch_count_as_one() -> None:
    assert joint_image_batches(videos=3, images=20, batch_size=8) == 2


def test_image_batches_follow_each_video_batch() -> None:
    sampler = JointSampler(videos=16, images=40, batch_size=8)
    kinds = [sampler.batch(step).kind for step in range(7)]
    assert kinds == ["video", "image", "image", "video", "image", "image", "video"]


def test_how_many_image_batches_follow_can_be_given() -> None:
    sampler = JointSampler(videos=16, images=4, batch_size=8, image_batches=1)
    assert [sampler.batch(step).kind for step in range(4)] == ["video", "image", "video", "image"]


@pytest.mark.parametrize(("videos", "images", "kind"), [(5, 0, "video"), (0, 5, "image")])
def test_one_kind_alone_fills_every_batch(videos: int, images: int, kind: str) -> None:
    sampler = JointSampler(videos=videos, images=images, batch_size=5)
    assert {sampler.batch(step).kind for step in range(6)} == {kind}
    assert Counter(indices(sampler, range(6), kind)) == dict.fromkeys(range(5), 6)


def test_each_epoch_holds_every_index_once_in_an_order_of_its_own() -> None:
    sampler = JointSampler(videos=21, images=35, batch_size=4, image_batches=2)
    videos = indices(sampler, range(3 * 21), "video")  # 21 batches of 4: 4 epochs
    images = indices(sampler, range(3 * 35), "image")  # 70 batches of 4: 8 epochs
    for row, count in ((videos, 21), (images, 35)):
        epochs = [tuple(row[start : start + count]) for start in range(0, len(row), count)]
        assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
        assert len(set(epochs)) == len(epochs)


def test_fewer_samples_than_a_batch_holds_come_several_times() -> None:
    sampler = JointSampler(videos=3, images=0, batch_size=8)
    assert Counter(indices(sampler, range(3), "video")) == dict.fromkeys(range(3), 8)


def test_a_batch_depends_on_its_step_alone() -> None:
    def sampler() -> JointSampler:
        return JointSampler(videos=10, images=30, batch_size=4, seed=3)

    straight = sampler()
    in_order = [straight.batch(step) for step in range(40)]
    resumed = sampler()
    assert [resumed.batch(step) for step in range(25, 40)] == in_order[25:]
    assert [resumed.batch(step) for step in (7, 30, 0)] == [in_order[step] for step in (7, 30, 0)]


def test_every_sample_has_a_seed_of_its_own() -> None:
    sampler = JointSampler(videos=10, images=30, batch_size=4, seed=3)
    seeds = [key.seed for step in range(50) for key in sampler.batch(step).keys]
    assert len(set(seeds)) == 200


def test_another_seed_makes_another_order() -> None:
    first, second = (JointSampler(videos=50, images=0, batch_size=50, seed=seed) for seed in (0, 1))
    assert indices(first, range(1), "video") != indices(second, range(1), "video")
    assert {key.seed for key in first.batch(0).keys}.isdisjoint(key.seed for key in second.batch(0).keys)


def test_images_that_would_never_come_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"2079 videos, 1894 images and 0 image batches .* give image_batches"
    ):
        JointSampler(videos=2079, images=1894, batch_size=8)


@pytest.mark.parametrize(
    "wrong",
    [
        {"videos": -1},
        {"images": -1},
        {"batch_size": 0},
        {"seed": -1},
        {"image_batches": 0},
        {"videos": 0, "images": 0},
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"must be|would ever"):
        JointSampler(**({"videos": 8, "images": 8, "batch_size": 4} | wrong))


def test_a_negative_step_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 0, got -1"):
        JointSampler(videos=1, images=0, batch_size=1).batch(-1)
