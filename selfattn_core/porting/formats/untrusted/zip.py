"""A zip archive whose list of members is checked before a member is read. Nothing is ever extracted."""

import struct
import zipfile
import zlib
from pathlib import PurePosixPath

from selfattn_core.porting.errors import PortError
from selfattn_core.porting.formats.untrusted.file import Source
from selfattn_core.porting.formats.untrusted.limits import MAX_EXPANSION, MAX_HEADER, MAX_TENSORS, SMALL

__all__ = ["Archive", "Member"]

_LOCAL_HEADER = struct.Struct("<4s22xHH")
_ENCRYPTED = 1


class Member:
    """A member that is read from its beginning. At the end its checksum is compared with the archive's.

    Args:
        archive: its archive.
        name: its name.
    """

    def __init__(self, archive: "Archive", name: str) -> None:
        self._where = f"{archive.source.path}: {name}"
        self._file = archive.open(name)

    def read_into(self, buffer: memoryview) -> None:
        """Fill the buffer with the next bytes.

        Raises:
            PortError: if they are damaged or too few.
        """
        view = buffer
        try:
            while view:
                count = self._file.readinto(view)
                if not count:
                    raise PortError(f"{self._where}: ends too early. The file is damaged.")
                view = view[count:]
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise PortError(f"{self._where}: is damaged ({error}).") from None

    def finish(self) -> None:
        """Read one more byte, so that zipfile compares the checksum.

        Raises:
            PortError: if the member is longer, or its checksum differs.
        """
        try:
            more = self._file.read(1)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise PortError(f"{self._where}: is damaged ({error}).") from None
        if more:
            raise PortError(f"{self._where}: has more bytes than its header declares.")

    def close(self) -> None:
        """Close the member."""
        self._file.close()


class Archive:
    """An open archive.

    Args:
        source: the file. `close` closes it, and so does a refusal of the archive.

    Raises:
        PortError: if it is not a complete zip archive, or if it is deceptive: names that point outside it, the same name
            twice, members that overlap, encryption, or compression that expands beyond the limits.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.members: dict[str, zipfile.ZipInfo] = {}
        try:
            self._list()
        except BaseException:
            source.close()
            raise

    def _list(self) -> None:
        source = self.source
        path = source.path
        try:
            self._zip = zipfile.ZipFile(source.file)
            members = self._zip.infolist()
        # zipfile raises struct.error, IndexError and others for a damaged directory.
        except (
            zipfile.BadZipFile,
            OSError,
            ValueError,
            NotImplementedError,
            struct.error,
            IndexError,
        ) as error:
            raise PortError(
                f"{path}: is a truncated or damaged zip archive ({error}); copy or download it again."
            ) from None
        problems = []
        if len(members) > MAX_TENSORS:
            raise PortError(f"{path}: has {len(members)} members; at most {MAX_TENSORS} are read.")
        for member in members:
            problem = _problem(member)
            if member.filename in self.members:
                problem = "is in the archive twice, so it is unclear which one counts"
            if problem:
                problems.append(f"{member.filename[:200]!r} {problem}")
            self.members[member.filename] = member
        stored = sum(member.compress_size for member in members)
        if stored > source.size:
            problems.append(f"its members overlap: together {stored} bytes in a file of {source.size}")
        whole = sum(member.file_size for member in members)
        if not problems and whole > max(SMALL, MAX_EXPANSION * stored):
            problems.append(f"it would expand from {stored} to {whole} bytes")
        if problems:
            raise PortError(
                f"{path}: the archive cannot be read:\n" + "\n".join(f"  {line}" for line in problems[:50])
            )

    def open(self, name: str) -> zipfile.ZipExtFile:
        """Open a member as a file.

        Raises:
            PortError: if the member's own header disagrees with the list.
        """
        try:
            member: zipfile.ZipExtFile = self._zip.open(self.members[name])  # type: ignore[assignment]
        except (
            zipfile.BadZipFile,
            NotImplementedError,
            RuntimeError,
            OSError,
            ValueError,
            struct.error,
        ) as error:
            raise PortError(f"{self.source.path}: {name} is damaged ({error}).") from None
        return member

    def read(self, name: str) -> bytes:
        """Read a small member.

        Raises:
            PortError: if it is larger than `MAX_HEADER`, or damaged.
        """
        size = self.members[name].file_size
        if size > MAX_HEADER:
            raise PortError(f"{self.source.path}: {name} has {size} bytes; at most {MAX_HEADER} are read.")
        content = bytearray(size)
        member = Member(self, name)
        try:
            member.read_into(memoryview(content))
            member.finish()
        finally:
            member.close()
        return bytes(content)

    def place(self, name: str) -> int:
        """The place in the file where the bytes of an uncompressed member begin.

        Raises:
            PortError: if it is compressed, or not within the file.
        """
        member = self.members[name]
        if member.compress_type != zipfile.ZIP_STORED:
            raise PortError(f"{self.source.path}: {name} is compressed, which its format never does.")
        header = self.source.bytes_at(member.header_offset, _LOCAL_HEADER.size)
        signature, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        place = member.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        if signature != b"PK\3\4" or place + member.file_size > self.source.size:
            raise PortError(f"{self.source.path}: {name} is damaged: it is not at the place in the list.")
        return int(place)

    def close(self) -> None:
        """Close the archive and the file."""
        self._zip.close()
        self.source.close()


def _problem(member: zipfile.ZipInfo) -> str:
    name = member.filename
    path = PurePosixPath(name.replace("\\", "/"))
    if (
        not name
        or path.is_absolute()
        or ".." in path.parts
        or name[1:2] == ":"
        or "\0" in member.orig_filename
    ):
        return "is a path that leads out of the archive"
    if member.flag_bits & _ENCRYPTED:
        return "is encrypted"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "is compressed in a way that no checkpoint format uses"
    if member.compress_type == zipfile.ZIP_STORED and member.compress_size != member.file_size:
        return "is stored in fewer or more bytes than it has"
    if member.file_size > max(SMALL, MAX_EXPANSION * member.compress_size):
        return f"would expand from {member.compress_size} to {member.file_size} bytes: a zip bomb, or store it uncompressed"
    return ""
