"""The .sgx format: what is written is read, and whatever else there is, is refused in one sentence."""

import dataclasses
import hashlib
import struct

import numpy as np
import pytest
import torch

from solo_gating_runtime import InputError
from solo_gating_runtime.encoder import Encoder, Kernel, load
from solo_gating_runtime.file import from_bytes, to_bytes, write_file
from solo_gating_runtime.network import Block, Convolution, Embedding, Gate, Network

RANDOM = np.random.default_rng(0)


def floats(*shape):
    return RANDOM.standard_normal(shape, np.float32)


def convolution(out, channels, kernel, stride=1, int8=False):
    weight = floats(out, channels, kernel, kernel)
    if int8:
        weight = np.clip(weight * 50, -127, 127).astype(np.int8)
    scale = np.abs(floats(out)) + 0.1 if int8 else None
    return Convolution(weight, floats(out), stride, kernel // 2, scale)


def gate(channels, out, **kwargs):
    return Gate(floats(3, channels), floats(3), floats(out, 3), floats(out), **kwargs)


def boosting(channels, out):
    return Gate.boosting(floats(out, channels), floats(out), floats(out))


def network(int8=False, **changes):
    embedding = Embedding(floats(4), floats(4), floats(6, 4))
    scales = (0.1, 0.2, 0.3) if int8 else ()
    kinds = {"int8": int8}
    blocks = (
        Block(
            (convolution(6, 5, 3, 2, **kinds), convolution(7, 6, 3, **kinds)),
            convolution(7, 5, 1, 2, **kinds),
            (gate(5, 6, embedding=embedding),),
            scales[:2],
        ),
        Block(
            (
                convolution(6, 7, 1, **kinds),
                convolution(4, 6, 3, **kinds),
                convolution(7, 4, 1, **kinds),
            ),
            None,
            (gate(7, 6, count=3), gate(7, 4, count="budget")),
            scales,
        ),
    )
    linear = (floats(9, 7), floats(9))
    net = Network("gated", convolution(5, 3, 3, **kinds), True, blocks, linear, (0.1, 0.9))
    net = dataclasses.replace(net, stages=(1, 1), budget=0.3, threshold=0.25)
    if int8:
        net = dataclasses.replace(net, image_scale=0.02, stem_scale=0.03)
    return dataclasses.replace(net, **changes)


def same(a, b):
    if dataclasses.is_dataclass(a):
        names = [field.name for field in dataclasses.fields(a)]
        return type(a) is type(b) and all(same(getattr(a, n), getattr(b, n)) for n in names)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and (a == b).all()
    return a == b


def rounded(net):
    """With convolutions' weights that bfloat16 can hold, as PyTorch rounds them."""
    if isinstance(net, Convolution):
        weight = torch.from_numpy(net.weight).bfloat16().float().numpy()
        return dataclasses.replace(net, weight=weight)
    if isinstance(net, Block):
        shortcut = None if net.shortcut is None else rounded(net.shortcut)
        convolutions = tuple(map(rounded, net.convolutions))
        return dataclasses.replace(net, convolutions=convolutions, shortcut=shortcut)
    blocks = tuple(map(rounded, net.blocks))
    return dataclasses.replace(net, stem=rounded(net.stem), blocks=blocks)


def with_boosts(net):
    """With gates that boost in its second block."""
    first, second = net.blocks
    gates = (boosting(7, 6), boosting(7, 4))
    return dataclasses.replace(net, blocks=(first, dataclasses.replace(second, gates=gates)))


CASES = {
    "float32": network(),
    "bfloat16": rounded(network(bfloat16=True)),
    "int8": network(int8=True),
    "a float32 stem": network(int8=True, stem=convolution(5, 3, 3)),
    "no classifier": network(linear=None, max_pool=False, dial="budget"),
    "one stage": network(stages=(2,)),
    "boosts": with_boosts(network()),
    "boosts in bfloat16": with_boosts(rounded(network(bfloat16=True))),
    "boosts in int8": with_boosts(network(int8=True)),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_read(case):
    content = to_bytes(CASES[case])
    assert same(from_bytes(content), CASES[case])
    assert len(content) % 64 == 0


def test_bfloat16_weights_are_rounded_to_the_nearest_and_take_half_of_the_bytes():
    net = network(bfloat16=True)
    content = to_bytes(net)
    assert same(from_bytes(content), rounded(net))
    assert to_bytes(from_bytes(content)) == content
    halfway = (np.arange(0x3F80, 0x3F80 + 5 * 3 * 4, dtype="<u4") << 16 | 0x8000).view("<f4")
    stem = dataclasses.replace(net.stem, weight=halfway.reshape(5, 3, 2, 2))
    found = from_bytes(to_bytes(dataclasses.replace(net, stem=stem))).stem
    assert same(found, rounded(stem))
    weights = [net.stem, *(conv for block in net.blocks for conv in block.convolutions)]
    weights.append(net.blocks[0].shortcut)
    saved = len(to_bytes(dataclasses.replace(net, bfloat16=False))) - len(content)
    assert abs(saved - 2 * sum(conv.weight.size for conv in weights)) < 64 * len(weights)


def test_versions():
    versions = {name: to_bytes(net)[8] for name, net in CASES.items()}
    boosts = {name: 3 for name in CASES if name.startswith("boosts")}
    assert versions == dict.fromkeys(CASES, 1) | {"bfloat16": 2} | boosts


def counted(net):
    """With 0, 1/8, 2/8, ... in every array."""
    if isinstance(net, np.ndarray):
        whole = np.arange(net.size).reshape(net.shape) % 100
        return whole.astype(net.dtype) if net.dtype == np.int8 else np.float32(whole / 8)
    if isinstance(net, tuple):
        return tuple(map(counted, net))
    if dataclasses.is_dataclass(net):
        fields = [field.name for field in dataclasses.fields(net)]
        return dataclasses.replace(net, **{name: counted(getattr(net, name)) for name in fields})
    return net


@pytest.mark.parametrize(
    ("case", "digest"),
    [
        ("float32", "e1879edbae3f02d2"),
        ("bfloat16", "48693e8cd90e361c"),
        ("int8", "4956aa0ab073e11e"),
    ],
)
def test_files_without_boosts_are_those_of_earlier_releases(case, digest):
    assert hashlib.sha256(to_bytes(counted(CASES[case]))).hexdigest()[:16] == digest


def test_earlier_versions_have_no_boosts():
    whole = to_bytes(CASES["boosts"])
    for version in (1, 2):
        content = with_checksum(whole[:8] + struct.pack("<q", version) + whole[16:])
        with pytest.raises(InputError, match="got a damaged file"):
            from_bytes(content)
        with pytest.raises(InputError, match="got a damaged file"):
            Kernel(CASES["boosts"], content, "portable")


def test_the_kernel_reads_stored_bfloat16_as_rounded_float32():
    net = network(bfloat16=True)
    content = to_bytes(net)
    # As version 1 wrote it: float32 weights in a file of this type.
    plain = to_bytes(dataclasses.replace(net, bfloat16=False))
    old = with_checksum(plain[:40] + struct.pack("<q", 1) + plain[48:])
    assert same(from_bytes(old), net)
    x = floats(2, 3, 9, 9)
    results = [Encoder(net, Kernel(net, c, "portable"), "portable")(x) for c in (content, old)]
    assert np.isfinite(results[0]).all()
    assert (results[0] == results[1]).all()


def test_arrays_begin_at_multiples_of_64_bytes():
    net = from_bytes(to_bytes(network()))
    whole = np.frombuffer(to_bytes(network()), np.uint8)
    assert whole.ctypes.data % 8 == 0
    places = [net.stem.weight, net.stem.bias, net.blocks[1].gates[0].expand, net.linear[0]]
    distances = [place.ctypes.data - net.stem.weight.ctypes.data for place in places]
    assert all(distance % 64 == 0 for distance in distances)


def with_checksum(content):
    """The file of one who knows the format."""
    size = len(content)
    body = np.frombuffer(content[32:], "<u8")
    total = sum((2 * i + 1) * int(word) for i, word in enumerate(body)) % 2**64
    return content[:16] + struct.pack("<qQ", size, total) + content[32:]


WHOLE = to_bytes(network())


def test_the_checksum_is_as_documented():
    assert with_checksum(WHOLE) == WHOLE


DAMAGED = {
    "nothing": (b"", "another kind of file"),
    "another kind": (b"PK\x03\x04" + WHOLE[4:], "another kind of file"),
    "a text file's line ends": (WHOLE.replace(b"\r\n", b"\n"), "another kind of file"),
    "the first bytes": (WHOLE[:20], "only a part of a file"),
    "half": (WHOLE[: len(WHOLE) // 2], "only a part of a file"),
    "all but one byte": (WHOLE[:-1], "only a part of a file"),
    "more": (WHOLE + bytes(64), "a damaged file"),
    "a weight": (WHOLE[:2000] + bytes([WHOLE[2000] ^ 1]) + WHOLE[2001:], "a damaged file"),
    "a newer version": (WHOLE[:8] + struct.pack("<q", 4) + WHOLE[16:], "a file of version 4"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_anything_else_is_refused_in_one_sentence(case, tmp_path):
    content, message = DAMAGED[case]
    with pytest.raises(InputError, match=f"^file: got [^\n]*{message}, expected [^\n]*$"):
        from_bytes(content)
    file = tmp_path / "encoder.sgx"
    file.write_bytes(content)
    with pytest.raises(InputError, match=f"encoder.sgx: got [^\n]*{message}, expected "):
        load(file)
    with pytest.raises(InputError, match=f"encoder.sgx: got [^\n]*{message}, expected "):
        Kernel(network(), content, "portable", "encoder.sgx")


@pytest.mark.parametrize("what", ["a folder", "nothing", None, 3])
def test_what_is_no_file(what, tmp_path):
    path = {"a folder": tmp_path, "nothing": tmp_path / "missing.sgx"}.get(what, what)
    with pytest.raises(InputError, match="got no file that can be read"):
        load(path)


@pytest.mark.parametrize("case", ["float32", "bfloat16", "boosts"])
def test_whatever_bytes_are_changed_it_is_the_network_or_refused(case):
    """With a checksum that fits, so that every check behind it is reached."""
    net = CASES[case]
    whole = to_bytes(net)
    words = 40 + 8 * struct.unpack_from("<q", whole, 32)[0]
    wrong = 0
    values = (0, 1, -1, -2, -3, 2, 3, 7, 64, 2**31, 2**62, -(2**63))
    for place in range(32, words, 8):
        for value in values:
            content = whole[:place] + struct.pack("<q", value) + whole[place + 8 :]
            try:
                Kernel(net, with_checksum(content), "portable")
            except InputError:
                wrong += 1
    assert wrong > 0.7 * (words - 32) / 8 * len(values)


def altered(**changes):
    """The second block with other convolutions."""
    net = network()
    return dataclasses.replace(
        net, blocks=(net.blocks[0], dataclasses.replace(net.blocks[1], **changes))
    )


UNKNOWN = {
    "kernels of 5": altered(
        convolutions=(convolution(6, 7, 5), convolution(4, 6, 3), convolution(7, 4, 1))
    ),
    "a shortcut that is too narrow": altered(shortcut=convolution(6, 7, 1)),
    "other channels": altered(
        convolutions=(convolution(6, 8, 1), convolution(4, 6, 3), convolution(7, 4, 1))
    ),
    "a stride without a shortcut": altered(
        convolutions=(convolution(6, 7, 1, 2), convolution(4, 6, 3), convolution(7, 4, 1))
    ),
    "no budget": network(budget=None),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_a_network_that_the_kernel_does_not_run_is_refused(case):
    with pytest.raises(InputError, match=r"file: got a .*, expected "):
        Kernel(UNKNOWN[case], to_bytes(UNKNOWN[case]), "portable")


def test_a_library_of_another_dtype_refuses_it():
    with pytest.raises(InputError, match="got weights in bfloat16, expected float32"):
        Kernel(network(), to_bytes(network(bfloat16=True)), "portable")


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "encoder.sgx"
    write_file(file, b"before")
    write_file(file, WHOLE)
    assert file.read_bytes() == WHOLE
    with pytest.raises(InputError, match=r"cannot write .*no/encoder\.sgx"):
        write_file(tmp_path / "no" / "encoder.sgx", WHOLE)
    with pytest.raises(InputError, match="cannot write"):
        write_file(tmp_path, WHOLE)
    assert list(tmp_path.iterdir()) == [file]
