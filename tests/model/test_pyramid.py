import pytest
import torch

from model.pyramid import Pyramid, PyramidWhitening

CHANNELS = (3, 4, 5, 6)


def _pyramid(count: int, size: int) -> Pyramid:
    """Maps whose channels differ in mean and range."""
    levels = []
    for place, channels in enumerate(CHANNELS):
        gains = torch.arange(1, channels + 1).view(-1, 1, 1)
        maps = torch.randn(count, channels, size // 4 >> place, size // 4 >> place)
        levels.append((maps * gains + 10 * gains).double())
    return Pyramid(*levels)


def test_v2_to_v4_are_standardised_and_v5_is_rectified() -> None:
    torch.manual_seed(0)
    whitening = PyramidWhitening(CHANNELS).double()
    pyramids = [_pyramid(2, 64), _pyramid(1, 96)]
    whitening.measure(pyramids)
    whitened = [whitening(pyramid) for pyramid in pyramids]
    for place in range(4):
        values = [
            torch.cat([each[place].transpose(0, 1).flatten(1) for each in maps], dim=1)
            for maps in (pyramids, whitened)
        ]
        raw, found = values
        deviation = (raw.var(1, correction=0) + 1e-5).sqrt()
        expected = (raw - raw.mean(1, keepdim=True)) / deviation[:, None]
        torch.testing.assert_close(found, 2.5 * expected.relu() if place == 3 else expected)


def test_unmeasured_statistics_leave_a_map_almost_as_it_is() -> None:
    pyramid = _pyramid(1, 64)
    torch.testing.assert_close(PyramidWhitening(CHANNELS)(pyramid).v3, pyramid.v3, rtol=1e-5, atol=0)


def test_statistics_are_no_parameters_and_stay_in_training() -> None:
    whitening = PyramidWhitening(CHANNELS).train()
    before = {name: values.clone() for name, values in whitening.state_dict().items()}
    whitening(_pyramid(1, 64))
    assert not list(whitening.parameters())
    assert all(torch.equal(values, before[name]) for name, values in whitening.state_dict().items())


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one pyramid"):
        PyramidWhitening(CHANNELS).measure([])
