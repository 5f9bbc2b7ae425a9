"""Reads protocol buffers as far as TensorFlow's checkpoints use them: fields by number, without a schema.

Source: protobuf.dev/programming-guides/encoding.
"""

from selfattn_core.porting.errors import PortError

__all__ = ["message", "number", "text", "varint"]


def varint(where: object, content: bytes, place: int) -> tuple[int, int]:
    """The number at a place, and the place after it.

    Example:
        >>> varint("x", bytes([0xAC, 0x02]), 0)
        (300, 2)
    """
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(content):
            break
        byte = content[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise PortError(f"{where}: is damaged: a number does not end.")


def message(where: str, content: int | bytes) -> dict[int, list[int | bytes]]:
    """The fields of a protocol buffer by their number.

    Raises:
        PortError: if it is cut off or has another kind.

    Example:
        >>> message("x", bytes([0x08, 0x03]))
        {1: [3]}
    """
    if not isinstance(content, bytes):
        raise PortError(f"{where}: is damaged: a number where a message should be.")
    fields: dict[int, list[int | bytes]] = {}
    place = 0
    while place < len(content):
        tag, place = varint(where, content, place)
        value: int | bytes
        if tag & 7 == 0:
            value, place = varint(where, content, place)
        elif tag & 7 in (1, 5):
            width = 8 if tag & 7 == 1 else 4
            value, place = int.from_bytes(content[place : place + width], "little"), place + width
        elif tag & 7 == 2:
            length, place = varint(where, content, place)
            value, place = content[place : place + length], place + length
        else:
            raise PortError(f"{where}: is damaged: a field of an unknown kind.")
        if place > len(content):
            raise PortError(f"{where}: is damaged: a field is cut off.")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def number(where: str, fields: dict[int, list[int | bytes]], field: int, default: int) -> int:
    """A field with a number. If there are several, the last one counts.

    Raises:
        PortError: if it has another kind.

    Example:
        >>> number("x", {1: [3]}, 1, 0), number("x", {1: [3]}, 2, 7)
        (3, 7)
    """
    value = fields.get(field, [default])[-1]
    if not isinstance(value, int):
        raise PortError(f"{where}: is damaged: bytes where a number should be.")
    return value


def text(fields: dict[int, list[int | bytes]], field: int) -> str:
    """A field with a text. "" if it is missing or has another kind.

    Example:
        >>> text({1: [b"kernel"]}, 1), text({}, 1)
        ('kernel', '')
    """
    value = fields.get(field, [b""])[-1]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else ""
