# SPDX-License-Identifier: Apache-2.0
"""`interop.torch.load`: files of `torch.save`, without torch; damaged and hostile ones."""

import io
import pickle
import random
import struct
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from adamfn.interop.torch import from_state_dict, load

SAVED = Path(__file__).parent / "data" / "torch_adamw.pt"
"""What torch 2.14 saved of `{"optimizer": optimizer.state_dict(), "epoch": 3}`, an
AdamW's after three steps on a float32 parameter, (3, 2), and a bfloat16 one, (3,)."""


def test_a_saved_file_is_read_without_torch():
    saved = load(SAVED)
    assert saved["epoch"] == 3
    kept = saved["optimizer"]["state"]
    assert [kept[k]["exp_avg_sq"].dtype for k in (0, 1)] == [np.float32, jnp.bfloat16]
    # The gradient is 2 p, and p moves by a rate of 0.01 a step.
    start = np.array([[1.540996, -0.2934289], [-2.1787894, 0.56843126], [-1.0845224, -1.3985955]])
    p, m, v = start, 0.0, 0.0
    for t in (1, 2, 3):
        m, v = 0.9 * m + 0.1 * 2 * p, 0.999 * v + 0.001 * (2 * p) ** 2
        u = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        p = p * (1 - 0.01 * 0.1) - 0.01 * u
    np.testing.assert_allclose(kept[0]["exp_avg"], m, rtol=1e-5)
    np.testing.assert_allclose(kept[0]["exp_avg_sq"], v, rtol=1e-5)
    params = {"w": jnp.ones((3, 2)), "z": jnp.ones(3, jnp.bfloat16)}
    _, state = from_state_dict(saved["optimizer"], params, paths=["w", "z"])
    assert state[0].count == 3
    np.testing.assert_array_equal(state[0].mu["w"], kept[0]["exp_avg"])


def put(value):
    """The pickle of a value, without its beginning and end, to be part of another."""
    return pickle.dumps(value, 2)[2:-1]


def tensor(shape, strides, *, offset=0, count=4, kind="Float", key="0", metadata=None):
    storage = b"(" + put("storage") + b"ctorch\n%sStorage\n" % kind.encode()
    storage += put(key) + put("cpu") + put(count) + b"tQ"
    end = put(offset) + put(shape) + put(strides) + put(False) + put(None)
    end += b"" if metadata is None else put(metadata)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + end + b"tR"


FLOATS = np.array([1.25, -2.5, 3.75, 5.5], np.float32)


def write(path, body, data=None, **members):
    """A file as torch.save writes it, of a pickle's body."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", body if body[:1] == b"\x80" else b"\x80\x02" + body + b".")
        archive.writestr("x/data/0", FLOATS.tobytes() if data is None else data)
        for name, content in members.items():
            archive.writestr(f"x/{name}", content)
    return path


@pytest.mark.parametrize(("kind", "dtype"), [
    *[("Double", np.float64), ("Half", np.float16), ("BFloat16", jnp.bfloat16)],
    *[("Long", np.int64), ("Short", np.int16), ("Char", np.int8), ("Byte", np.uint8)],
])  # fmt: skip
def test_numbers_of_any_type_and_byte_order_are_read(tmp_path, kind, dtype):
    values = np.arange(1, 7).astype(dtype)
    body = tensor((2, 2), (1, 2), offset=1, count=6, kind=kind)
    for order, data in (("little", values), ("big", values.byteswap())):
        read = load(write(tmp_path / "x.pt", body, data.tobytes(), byteorder=order))
        assert read.dtype == dtype
        np.testing.assert_array_equal(read, values[np.array([[1, 3], [2, 4]])])


def test_tensors_of_any_shape_are_read(tmp_path):
    body = put({}) + b"("
    for name, part in {
        "empty": tensor((0, 3), (3, 1)),
        "scalar": tensor((), (), offset=2),
        "parameter": b"ctorch._utils\n_rebuild_parameter\n(" + tensor((4,), (1,)) + b"\x89NtR",
        "reversed": tensor((2, 2), (1, 2)),
    }.items():
        body += put(name) + part
    read = load(write(tmp_path / "x.pt", body + b"u"))
    assert (read["empty"].shape, read["scalar"]) == ((0, 3), 3.75)
    np.testing.assert_array_equal(read["reversed"], FLOATS.reshape(2, 2).T)
    read["parameter"][0] = 7  # as in torch: it can be written, and shares its storage
    assert read["reversed"][0, 0] == 7
    flags = load(write(tmp_path / "x.pt", tensor((4,), (1,), kind="Bool"), b"\0\1\2\0"))
    np.testing.assert_array_equal(flags, [False, True, True, False])


def test_a_module_state_dict_and_protocol_4_are_read(tmp_path):
    ordered = b"ccollections\nOrderedDict\n)R" + put("w") + tensor((4,), (1,)) + b"s"
    ordered += b"}" + put("_metadata") + put({"": {"version": 1}}) + b"sb"
    np.testing.assert_array_equal(load(write(tmp_path / "x.pt", ordered))["w"], FLOATS)
    plain = {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "params": [0, 1],
        "x": None,
        "y": (True, 2**80),
    }
    for protocol in (2, 3, 4, 5):
        assert load(write(tmp_path / "x.pt", pickle.dumps(plain, protocol))) == plain


NEST = b"]" * 200 + b"a" * 199
CYCLE = b"]q\1h\1a"
LAUGHS = b"]" + b"".join(b"q%c]h%ch%ca\x86a" % (k, k, k) for k in range(1, 60))
DOUBLED = b"K\0\x85qP" + b"hP\x86qP" * 60  # to print or to hash it takes 2^60 steps
DTYPE = b"ctorch\nBFloat16Storage\n"


@pytest.mark.parametrize(("body", "message"), {
    "outside": (tensor((64,), (1,)), r"a tensor of the shape \(64,\), strides \(1,\) and offset 0"),
    "last": (tensor((2, 2), (2, 1), offset=1), "a tensor of the shape"),
    "far": (tensor((2,), (2**61,)), "a tensor of the shape"),
    "wraps": (tensor((2**33, 2**33), (2**33, 2**33)), "a tensor of the shape"),
    "backwards": (tensor((2,), (-1,), offset=1), "a tensor of the shape"),
    "negative": (tensor((1,), (1,), offset=-1), "a tensor of the shape"),
    "expanded": (tensor((10**9,), (0,)), "a tensor of the shape"),
    "ranks": (tensor((2, 2), (1,)), "a tensor of the shape"),
    "not a size": (tensor((1.0,), (1,)), "a tensor of the shape"),
    "impossible": (tensor((0, 2**62, 2**62), (1, 1, 1)), "found"),
    "count": (tensor((64,), (1,), count=64), "4 elements of float32 in a storage of 64"),
    "kind": (tensor((2,), (1,), kind="Double"), "2 elements of float64 in a storage of 4"),
    "absent": (tensor((4,), (1,), key="1"), "KeyError"),
    "two kinds": (tensor((4,), (1,)) + tensor((4,), (1,), kind="Int") + b"\x86", "of int32"),
    "negated": (tensor((4,), (1,), metadata={"neg": True}), "other arguments than torch's"),
    "build of a dtype": (DTYPE + put((3, "<", None, None, None, 64, 64, 0)) + b"b", "attributes"),
    "build of a function": (
        b"ctorch._utils\n_rebuild_tensor_v2\n" + put((None, {"__code__": 1})) + b"b",
        "attributes of an object",
    ),
    "build of an array": (tensor((4,), (1,)) + put((1, (9,), False)) + b"b", "attributes"),
    "a name": (DTYPE, "found a .*, which is no value"),
    "a call of a dtype": (DTYPE + put(()) + b"R", "is not callable"),
    "a storage without words": (put("storage") + b"Q", "a storage that is not described"),
    "another name": (b"cos\nsystem\n" + put(("true",)) + b"R", r"found a os\.system"),
    "memo": (b"}r" + struct.pack("<I", 2**32 - 1) + b"h\0", "Memo value not found"),
    "length": (b"\x8e" + struct.pack("<Q", 2**62), "found"),
    "bytearray": (b"\x96" + struct.pack("<Q", 2**62), "found"),
    "deep": (NEST, "containers in 100 others"),
    "cyclic": (CYCLE, "containers in 100 others"),
    "repeated": (LAUGHS, "containers in 100 others, or with 10000000 elements"),
    "key": (b"}" + put((1, 2)) + b"Ns", "a key that is neither a number nor text"),
    "doubled key": (b"}" + DOUBLED + b"Ns", "a key that is neither a number nor text"),
    "doubled shape": (
        tensor((4,), (1,)).replace(put((4,)), DOUBLED),
        r"a tensor of the shape \(\(\(",
    ),
    "doubled shape in a dict": (
        tensor((4,), (1,)).replace(put((4,)), b"}" + put(0) + DOUBLED + b"s"),
        "other arguments than torch's",
    ),
    "no key": (b"}(NNNu", "found"),
    "append to a dict": (b"}Na", "no attribute 'append'"),
    "nothing": (b"", "IndexError"),
    "no mark": (b"t", "IndexError"),
    "an instruction": (b"\x8f", "the pickle instruction EMPTY_SET"),
    "no end": (b"\x80\2}", "found"),
    "text": (put(np.float64(1.0)), r"found a numpy\S*; expected what torch\.save writes"),
}.values())  # fmt: skip
def test_a_hostile_pickle_is_refused(tmp_path, body, message):
    with pytest.raises(ValueError, match=rf"load: in .*x\.pt, .*{message}"):
        load(write(tmp_path / "x.pt", body))


def test_a_damaged_archive_is_refused(tmp_path):
    path, body = tmp_path / "x.pt", tensor((4,), (1,))
    with pytest.raises(FileNotFoundError):
        load(path)
    path.write_bytes(pickle.dumps({}))
    with pytest.raises(ValueError, match=r"found no zip archive; .* by torch 1\.6 or later"):
        load(path)
    with pytest.raises(ValueError, match=r"the byte order b'middle'"):
        load(write(path, body, byteorder="middle"))
    with pytest.warns(UserWarning, match="Duplicate"), pytest.raises(ValueError, match="two memb"):
        load(write(path, body, **{"data/0": FLOATS.tobytes()}))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(10**6))
    with pytest.raises(ValueError, match="compressed or overlapping members"):
        load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/version", "3")
        archive.writestr("x/y/data.pkl", body)
        archive.writestr("y/data.pkl", body)
    with pytest.raises(ValueError, match=r"no data\.pkl in the folder"):
        load(path)


def test_declared_sizes_are_not_believed(tmp_path):
    path = write(tmp_path / "x.pt", tensor((4,), (1,)))
    content = path.read_bytes()
    entry = content.rindex(b"PK\1\2")  # of data/0; its two sizes begin at byte 20
    path.write_bytes(
        content[: entry + 20] + struct.pack("<II", 2**31, 2**31) + content[entry + 28 :]
    )
    with pytest.raises(ValueError, match="compressed or overlapping members"):
        load(path)


def leaves(node):
    parts = node.values() if isinstance(node, dict) else node
    return (
        [x for y in parts for x in leaves(y)] if isinstance(node, dict | list | tuple) else [node]
    )


def mutated(data, rng):
    """A few bytes changed, inserted, removed or moved."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        at, to = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        to = min(to, at + rng.choice([1, 2, 8, 40]))
        new = rng.choice([b"", rng.randbytes(1), rng.randbytes(to - at), data[to : 2 * to - at]])
        new = rng.choice([new, bytes(255 - x for x in data[at:to]), rng.choice(OPCODES)])
        data[at:to] = new
    return bytes(data)


OPCODES = [b"b", b"R", b"Q", b"a", b"s", b"u", b"h\0", b"0", b"\x81", b"\x86", b"(", b"\x8a\1\xff"]
OPCODES += [b"r\xff\xff\xff\xff", DTYPE, put(2**63), put(-1), put(10**6), b"\x93", b"N", b"]", b"."]


@pytest.mark.parametrize("seed", range(2))
def test_a_mutated_file_is_refused_or_read_right(tmp_path, seed):
    """No crash, no other error, and no number that the storages of the file do not hold."""
    read = read_mutated(tmp_path / "x.pt", random.Random(seed), number=300)
    assert read > 6  # the mutations are not all too coarse


def read_mutated(path, rng, number):
    with zipfile.ZipFile(SAVED) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    expected, read = leaves(load(SAVED)), 0
    held = {2: set(), 4: set()}
    for name, data in members.items():
        if "/data/" in name and len(data) % 4 == 0:
            held[4] |= {data[k : k + 4] for k in range(0, len(data), 4)}
        held[2] |= {data[k : k + 2] for k in range(0, len(data), 2)} if "/data/" in name else set()
    for _ in range(number):
        in_pickle = rng.random() < 0.7
        if in_pickle:  # with a right checksum
            file = io.BytesIO()
            with zipfile.ZipFile(file, "w") as archive:
                for name, data in members.items():
                    archive.writestr(name, mutated(data, rng) if "pkl" in name else data)
            path.write_bytes(file.getvalue())
        else:
            path.write_bytes(mutated(SAVED.read_bytes(), rng))
        try:
            found = leaves(load(path))
        except ValueError:
            continue
        read += 1
        if not in_pickle:  # each byte is under a checksum, or of no importance
            for a, b in zip(found, expected, strict=True):
                np.testing.assert_array_equal(a, b, strict=isinstance(a, np.ndarray))
        for array in (x for x in found if isinstance(x, np.ndarray) and x.size):
            words = {word.tobytes() for word in array.ravel()}
            assert words <= held[array.itemsize]
    return read
