import pytest
import torch

from model.engines import trying_out
from model.errors import DeviceError, EngineUnavailable


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "does not work here: CUDA out of memory"),
        (RuntimeError("Failed to find C compiler"), "does not work here: Failed to find C compiler"),
        (PermissionError("no room for what is compiled"), "does not work here: no room"),
        (DeviceError("device 'cuda:9' is not there"), "device 'cuda:9'"),
        (ValueError("a weight is too large"), "a weight is too large"),
    ],
)
def test_an_engine_that_cannot_run_is_an_engine_that_is_not_there(error: Exception, message: str) -> None:
    with pytest.raises(EngineUnavailable, match=message), trying_out():
        raise error


def test_a_device_that_failed_is_not_taken_for_an_engine_that_is_not_there() -> None:
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"), trying_out():
        raise torch.AcceleratorError("an illegal memory access was encountered")
