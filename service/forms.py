"""The two shapes of an upload's body, fed chunk by chunk: the bare video, or a form with the video in it."""

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from service.errors import InvalidRequest

_VIDEO_FIELD = "video"
_MAX_PARTS = 32
_MAX_FILENAME_LENGTH = 255


class RawBody:
    """A body that is the video. ``video`` holds what has come and not been taken yet."""

    def __init__(self) -> None:
        self.video = bytearray()
        self.filename: str | None = None
        self.fields: dict[str, list[str]] = {}

    def feed(self, chunk: bytes) -> None:
        self.video += chunk

    def take_video(self) -> bytearray:
        taken, self.video = self.video, bytearray()
        return taken

    def finish(self) -> None:
        """The body has ended."""


class FormBody(RawBody):
    """A ``multipart/form-data`` body: the video in the field ``video``, options in the others.

    All methods raise InvalidRequest: ``bad_request`` if the form is malformed or beyond the limits,
    ``missing_video`` if the video is not where it should be.
    """

    def __init__(self, boundary: bytes, *, max_field_bytes: int) -> None:
        super().__init__()
        self._max_field_bytes = max_field_bytes
        self._parts = 0
        self._video_seen = False
        self._ended = False
        self._header_name = bytearray()
        self._header_value = bytearray()
        self._disposition = b""
        self._field: str | None = None  # None: the part is the video
        self._value = bytearray()
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin_part,
                    "on_header_field": self._add_header_name,
                    "on_header_value": self._add_header_value,
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._begin_content,
                    "on_part_data": self._add_content,
                    "on_part_end": self._end_part,
                    "on_end": self._end,
                },
            )
        except FormParserError as error:
            raise InvalidRequest("The form's boundary is too long.") from error

    def feed(self, chunk: bytes) -> None:
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise InvalidRequest("The form is malformed.") from error

    def finish(self) -> None:
        if not self._ended:
            raise InvalidRequest("The form ends before its closing boundary.")
        if not self._video_seen:
            raise InvalidRequest("The form has no field `video`.", code="missing_video")

    def _begin_part(self) -> None:
        self._parts += 1
        if self._parts > _MAX_PARTS:
            raise InvalidRequest(f"The form has more than {_MAX_PARTS} fields.")
        self._disposition = b""

    def _add_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _add_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _end_header(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = bytes(self._header_value)
        self._header_name.clear()
        self._header_value.clear()

    def _begin_content(self) -> None:
        _, parameters = parse_options_header(self._disposition.decode("latin-1"))
        if b"name" not in parameters:
            raise InvalidRequest("A field of the form has no name.")
        name = parameters[b"name"].decode(errors="replace")
        if name == _VIDEO_FIELD:
            self._begin_video(parameters.get(b"filename", b"").decode(errors="replace"))
        elif b"filename" in parameters:
            raise InvalidRequest("The file has to come in the field `video`.", code="missing_video")
        else:
            self._field = name

    def _begin_video(self, filename: str) -> None:
        if self._video_seen:
            raise InvalidRequest("The form has more than one field `video`.")
        self._video_seen = True
        self._field = None
        self.filename = filename[:_MAX_FILENAME_LENGTH] or None

    def _add_content(self, data: bytes, start: int, end: int) -> None:
        if self._field is None:
            self.video += memoryview(data)[start:end]
            return
        self._value += memoryview(data)[start:end]
        if len(self._value) > self._max_field_bytes:
            raise InvalidRequest(f"A field of the form is longer than {self._max_field_bytes} bytes.")

    def _end_part(self) -> None:
        if self._field is None:
            return
        try:
            value = self._value.decode()
        except UnicodeDecodeError as error:
            raise InvalidRequest("A field of the form is not UTF-8.") from error
        self.fields.setdefault(self._field, []).append(value)
        self._value.clear()

    def _end(self) -> None:
        self._ended = True
