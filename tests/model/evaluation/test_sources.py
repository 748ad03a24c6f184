from pathlib import Path

import pytest

from model.errors import DatasetError
from model.evaluation.sources import davis16_source
from tests.packed_data import pack_sequence
from tests.sequences import square, write_sequence


def write_davis(root: Path, split: str, names: list[str]) -> None:
    for name in names:
        write_sequence(root, [square(left) for left in range(3)], name=name)
    (root / "ImageSets" / "2016").mkdir(parents=True)
    (root / "ImageSets" / "2016" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))


def test_packed_sequences_are_unpacked_when_they_are_asked_for(tmp_path: Path) -> None:
    for name in ("dog", "bus"):
        pack_sequence(tmp_path / "data" / "davis16" / "val", name)
    source = davis16_source(tmp_path / "data", "val")
    assert source.names == ("bus", "dog")
    (sequence,) = source.load(["dog"], tmp_path / "out")
    assert (sequence.name, len(sequence.frames)) == ("dog", 4)
    assert [path.name for path in (tmp_path / "out" / "JPEGImages" / "480p").iterdir()] == ["dog"]


def test_sequences_that_lie_unpacked_are_used_where_they_are(tmp_path: Path) -> None:
    write_davis(tmp_path, "val", ["dog", "bus"])
    source = davis16_source(tmp_path, "val")
    assert source.names == ("dog", "bus")
    (sequence,) = source.load(["bus"], tmp_path / "out")
    assert sequence.frames[0] == tmp_path / "JPEGImages" / "480p" / "bus" / "00000.jpg"
    assert not (tmp_path / "out").exists()


def test_the_held_out_sequences_of_packed_data_are_of_both_packs(tmp_path: Path) -> None:
    for folder, name in {"davis16/train": "car-turn", "sequences": "clip-gym-man"}.items():
        for packed in (name, "bear"):
            pack_sequence(tmp_path / folder, packed)
    assert davis16_source(tmp_path, "held-out").names == ("car-turn", "clip-gym-man")


def test_the_held_out_sequences_of_unpacked_data_are_part_of_train(tmp_path: Path) -> None:
    write_davis(tmp_path, "train", ["bear", "mallard-fly"])
    assert davis16_source(tmp_path, "held-out").names == ("mallard-fly",)


def test_data_without_the_split_is_refused(tmp_path: Path) -> None:
    pack_sequence(tmp_path / "davis16" / "train", "bear")
    for split in ("val", "held-out"):
        with pytest.raises(DatasetError, match=f"no sequence of the split {split}"):
            davis16_source(tmp_path, split)  # type: ignore[arg-type]
