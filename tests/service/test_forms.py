import pytest

from service.errors import InvalidRequest
from service.forms import FormBody

VIDEO = bytes(range(256)) * 3 + b"\r\n--limi\r\n--limit\r\r\n-"  # with what looks like a boundary
FORM = (
    b'--limit\r\nContent-Disposition: form-data; name="threshold"\r\n\r\n0.5\r\n'
    b'--limit\r\nContent-Disposition: form-data; name="video"; filename="a b.mp4"\r\n'
    b"Content-Type: video/mp4\r\n\r\n" + VIDEO + b"\r\n"
    b'--limit\r\nContent-Disposition: form-data; name="artifacts"\r\n\r\nmasks\r\n'
    b'--limit\r\ncontent-disposition: form-data; name="artifacts"\r\n\r\n\xc3\xbcber\r\n'
    b"--limit--\r\n"
)


def parse(*chunks: bytes, max_field_bytes: int = 100) -> FormBody:
    body = FormBody(b"limit", max_field_bytes=max_field_bytes)
    for chunk in chunks:
        body.feed(chunk)
    body.finish()
    return body


def refusal(*chunks: bytes) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse(*chunks)
    return caught.value


def part(headers: str, content: bytes = b"x") -> bytes:
    return b"--limit\r\n" + headers.encode() + b"\r\n\r\n" + content + b"\r\n"


def disposition(name: str, content: bytes = b"x", filename: str | None = None) -> bytes:
    suffix = "" if filename is None else f'; filename="{filename}"'
    return part(f'Content-Disposition: form-data; name="{name}"{suffix}', content)


END = b"--limit--\r\n"


def assert_understood(body: FormBody) -> None:
    assert bytes(body.video) == VIDEO
    assert body.filename == "a b.mp4"
    assert body.fields == {"threshold": ["0.5"], "artifacts": ["masks", "über"]}


def test_a_form_is_understood_wherever_it_is_split() -> None:
    for position in range(len(FORM) + 1):
        assert_understood(parse(FORM[:position], FORM[position:]))


def test_a_form_is_understood_byte_by_byte() -> None:
    assert_understood(parse(*(FORM[index : index + 1] for index in range(len(FORM)))))


def test_taken_video_is_not_given_twice() -> None:
    body = FormBody(b"limit", max_field_bytes=100)
    taken = b""
    for index in range(0, len(FORM), 7):
        body.feed(FORM[index : index + 7])
        taken += body.take_video()
    assert taken == VIDEO


def test_a_video_needs_no_filename() -> None:
    assert parse(disposition("video"), END).filename is None
    assert parse(disposition("video", filename=""), END).filename is None


def test_a_filename_is_kept_as_it_is_but_not_longer_than_needed() -> None:
    assert parse(disposition("video", filename="../../ü%d.mp4"), END).filename == "../../ü%d.mp4"
    assert parse(disposition("video", filename="n" * 3000), END).filename == "n" * 255


def test_every_form_that_ends_too_early_is_refused() -> None:
    for length in range(0, len(FORM) - len(b"\r\n"), 13):
        assert refusal(FORM[:length]).code == "bad_request"


@pytest.mark.parametrize(
    ("form", "code"),
    [
        (END, "missing_video"),
        (disposition("threshold") + END, "missing_video"),
        (disposition("file", filename="a.mp4") + END, "missing_video"),
        (disposition("video") * 2 + END, "bad_request"),
        (disposition("threshold", b"x" * 101) + disposition("video") + END, "bad_request"),
        (disposition("threshold", b"\xff") + disposition("video") + END, "bad_request"),
        (disposition("threshold") * 32 + disposition("video") + END, "bad_request"),
        (part("Content-Type: text/plain") + END, "bad_request"),
        (part("Content-Disposition: form-data") + END, "bad_request"),
        (part("no header at all") + END, "bad_request"),
        (part("X: " + "y" * 10_000) + END, "bad_request"),
        (b"--other\r\n" + END, "bad_request"),
        (b"no form at all", "bad_request"),
    ],
)
def test_a_form_that_cannot_be_used_is_refused(form: bytes, code: str) -> None:
    assert refusal(form).code == code


def test_a_boundary_beyond_all_measure_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        FormBody(b"x" * 300, max_field_bytes=100)
