"""The monitor's codec: what QEMU reads is read, what it complains of is complained of in its words."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostpc.wire.qmp import MAX_BYTES, MAX_NESTING, Broken, QmpError, Reader, Value, answer, encode, request

PARSE = "JSON parse error, "
NO_OBJECT = "QMP input must be a JSON object"

# Bytes and what QEMU 7.2 and 10.0 said to them (tests/qemu/test_qemu_monitor.py asks again).
BROKEN: list[tuple[bytes, list[str]]] = [
    (b'{"a" x}\n', [PARSE + "missing : in object pair"]),
    (b"}\n", [PARSE + "expecting value"]),
    (b"]\n", [PARSE + "expecting value"]),
    (b":\n", [PARSE + "expecting value"]),
    (b'{"execute": "query-status"\x01}\n', [PARSE + "stray '\x01'", PARSE + "expecting value"]),
    (b"tru\n", [PARSE + "invalid keyword 'tru'"]),
    (b'{"a":tru}\n', [PARSE + "invalid keyword 'tru'"]),
    (b"[1,]\n", [PARSE + "expecting value"]),
    (b"{,}\n", [PARSE + "expecting value"]),
    (b"\xff\n", [PARSE + "stray '\ufffd'"]),
    (b'{"execute":"a\nb"}\n', [PARSE + "stray '\"a\n'", PARSE + "expecting value"]),
    (b'"\\q"\n', [PARSE + "invalid escape sequence in string"]),
    (b"01\n", [PARSE + "stray '01'"]),
    (b"-\n", [PARSE + "stray '-\n'"]),
    (b"1.\n", [PARSE + "stray '1.\n'"]),
    (b"1e\n", [PARSE + "stray '1e\n'"]),
    (b"+1\n", [PARSE + "stray '+'"]),
    (b'{"a":1]\n', [PARSE + "expected separator in dict"]),
    (b'{"a":%s}\n', [PARSE + "stray '%'", PARSE + "expecting value"]),
    (b'"\\ud800"\n', [PARSE + "\\ud800 is not a valid Unicode character"]),
    (b"'a\n", [PARSE + "stray ''a\n'"]),
    (b'{"execute":"query-status",}\n', [PARSE + "expecting value"]),
    (b'{"execute" "query-status"}\n', [PARSE + "missing : in object pair"]),
    (b"{1:2}\n", [PARSE + "key is not a string in object"]),
    (b"[1 2]\n", [PARSE + "expected separator in list"]),
    (b"# \n", [PARSE + "stray '#'"]),
    (b'{"execute":"query-status" @ }\n', [PARSE + "stray '@'", PARSE + "expecting value"]),
    (b'{"a":"x\xff', [PARSE + "stray '\"x\ufffd'"]),
    (b'{"execute":"query-status","execute":"query-status"}', [PARSE + "duplicate key"]),
    (b"null\n", [NO_OBJECT]),
    (b'"\\u0000"\n', [NO_OBJECT]),
    (b'"\xc0\x80"\n', [NO_OBJECT]),
]


def read(*pieces: bytes) -> list[Value | Broken]:
    reader = Reader()
    return [item for piece in pieces for item in reader.feed(piece)]


def complaints(items: list[Value | Broken]) -> list[str]:
    found = []
    for item in items:
        if isinstance(item, Broken):
            found.append(item.reason)
        elif not isinstance(item.value, dict):
            found.append(NO_OBJECT)
    return found


@pytest.mark.parametrize(("data", "expected"), BROKEN)
def test_complaints_are_qemus_and_reading_goes_on(data: bytes, expected: list[str]) -> None:
    after = b'\n{"execute":"query-status"}'
    for pieces in ([data + after], [bytes([b]) for b in data + after]):
        items = read(*pieces)
        assert complaints(items) == expected
        assert items[-1] == Value({"execute": "query-status"})


def test_values_need_no_lines_between_them() -> None:
    assert read(b"{'a':'it\"s'}{\"b\":[1,-2,2.5e1,true,null]} \t\r\n[] 7 ") == [
        Value({"a": 'it"s'}),
        Value({"b": [1, -2, 25.0, True, None]}),
        Value([]),
        Value(7),
    ]


def test_integers_beyond_64_bits_are_floats() -> None:
    text = b"[18446744073709551615,18446744073709551616,-9223372036854775808," + b"9" * 5000 + b"]"
    [item] = read(text)
    assert isinstance(item, Value)
    assert [type(x) for x in item.value] == [int, float, int, float]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
        max_leaves=20,
    ),
    st.booleans(),
    st.lists(st.integers(0, 200), max_size=5),
)
def test_json_comes_whole_however_it_is_cut(value: Any, plain: bool, cuts: list[int]) -> None:
    data = json.dumps([value], ensure_ascii=plain).encode() + b'{"next": 1}'
    borders = sorted({0, len(data), *(min(c, len(data)) for c in cuts)})
    pieces = [data[a:b] for a, b in itertools.pairwise(borders)]
    assert read(*pieces) == [Value([value]), Value({"next": 1})]


@given(st.binary(max_size=200))
def test_any_bytes_leave_the_reader_alive(data: bytes) -> None:
    reader = Reader()
    for item in reader.feed(data):
        assert isinstance(item, Value | Broken)
    # A quote may be open; what closes it and any bracket leads back to commands.
    closing = b"\x01" + b"}]" * 200 + b"\n"
    list(reader.feed(closing))
    assert list(reader.feed(b'{"execute":"x"}'))[-1] == Value({"execute": "x"})


def test_what_a_client_makes_us_keep_is_bounded() -> None:
    reader = Reader()
    piece = b"x" * 65536
    items = list(reader.feed(b'{"a":"'))
    for _ in range(MAX_BYTES // len(piece) + 1):
        items += reader.feed(piece)
        assert reader.pending <= MAX_BYTES + len(piece)
    assert complaints(items) == ["JSON token size limit exceeded"]
    assert reader.pending == 0
    items = list(reader.feed(b"[" + b"1," * (MAX_BYTES // 2 + 1)))
    assert "JSON token size limit exceeded" in complaints(items)


def test_nesting_is_bounded() -> None:
    deep = MAX_NESTING
    assert isinstance(read(b"[" * deep + b"]" * deep)[0], Value)
    assert complaints(read(b"[" * (deep + 1))) == ["JSON nesting depth limit exceeded"]


def test_a_deep_id_comes_back() -> None:
    deep = b"[" * (MAX_NESTING - 1) + b"]" * (MAX_NESTING - 1)
    [item] = read(b'{"execute":"x","id":' + deep + b"}")
    assert isinstance(item, Value)
    assert encode(answer({}, item.value)) == b'{"return": {}, "id": ' + deep + b"}\r\n"


@pytest.mark.parametrize(
    ("value", "oob", "expected"),
    [
        ({"execute": 5}, False, "QMP input member 'execute' must be a string"),
        ({"exec-oob": "x"}, False, "QMP input member 'exec-oob' is unexpected"),
        ({"execute": "x", "exec-oob": "x"}, True, "QMP input member 'execute' clashes with 'exec-oob'"),
        ({"execute": "x", "arguments": []}, False, "QMP input member 'arguments' must be an object"),
        ({"execute": "x", "y": 1}, False, "QMP input member 'y' is unexpected"),
        ({"arguments": {}}, False, "QMP input lacks member 'execute'"),
        ([], False, NO_OBJECT),
    ],
)
def test_what_is_no_command_is_refused(value: Any, oob: bool, expected: str) -> None:
    with pytest.raises(QmpError) as caught:
        request(value, oob=oob)
    assert (str(caught.value), caught.value.error_class) == (expected, "GenericError")


def test_commands() -> None:
    assert request({"execute": "x", "id": None}, oob=False).name == "x"
    assert request({"exec-oob": "x", "arguments": {"a": 1}}, oob=True).out_of_band


def test_marks_take_no_memory_each() -> None:
    """A message may have half a million of them."""
    reader = Reader()
    assert list(reader.feed(b"[" + b"[]," * 1000)) == []
    assert len({id(token) for token in reader._tokens}) == 3
