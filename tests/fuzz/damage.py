"""Ways to damage a file, as Hypothesis strategies."""

import json
import struct

from hypothesis import strategies as st

# Values of every kind that JSON has.
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from([0, 1, -1, 2**31, 2**63, 10**400, "", "1", "none", "\ud800"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)


@st.composite
def damaged(draw, data):
    """`data` with bytes changed, cut off, put in, or put elsewhere."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        # the first bytes are of headers, where a change does most
        at = draw(st.integers(0, len(data)) | st.integers(0, min(len(data), 300)))
        match draw(st.sampled_from(["flip", "set", "cut", "drop", "insert", "repeat"])):
            case "flip" if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "set" if at < len(data):
                data[at] = draw(st.integers(0, 255))
            case "cut":
                del data[at:]
            case "drop":
                del data[at : at + draw(st.integers(1, 64))]
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=64))
            case "repeat":
                data[at:at] = data[at : at + draw(st.integers(1, 64))]
    return bytes(data)


def paths_in(value, before=()):
    """The path of every value in nested lists and dictionaries."""
    yield before
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths_in(inner, (*before, key))


def changed(value, path, new):
    """A copy of `value` with `new` at `path`; nothing there if `new` is `...`."""
    if not path:
        return new
    copy = json.loads(json.dumps(value))
    holder = copy
    for key in path[:-1]:
        holder = holder[key]
    if new is ...:
        del holder[path[-1]]
    else:
        holder[path[-1]] = new
    return copy


def edits(value):
    """`value` with one thing in it deleted or replaced by anything."""
    paths = [path for path in paths_in(value) if path]
    return st.builds(changed, st.just(value), st.sampled_from(paths), st.just(...) | values)


def header_of(data):
    """The header of a safetensors file, and what follows it."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header, rest):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest
