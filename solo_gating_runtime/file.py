"""The bytes of an .sgx file: one path of an encoder, with everything that running it needs.

All numbers are little-endian. A word has 8 bytes and is an int64, or a float64 where it says so (NaN
for none):

    magic               89 53 47 58 0D 0A 1A 0A
    version             3 if a gate boosts, else 2 if weights are stored in bfloat16, else 1: what each
                        of them adds
    size                of the file in bytes, a multiple of 64
    checksum            Σ (2 i + 1) · word_i modulo 2^64 over all words behind it, i from 0 on
    words               number of those of the description, which follows
    description         words, see below
    arrays              one behind the other, in the order in which the description names them; each
                        begins at a multiple of 64 bytes; zeros are between them and behind the last

The description, word by word:

    type                of the convolutions: 0 float32; 1 bfloat16; 2 int8
    path                0 dense, 1 gated
    dial                0 none, 1 threshold, 2 budget
    lowest, highest     float64, of the budgets that gates can be told
    threshold, budget   float64, until others are set
    image, stem         float64, scales of an int8 network, else 0
    max_pool            1 if a 3×3 max-pool of stride 2 and padding 1 follows the stem, else 0
    stages, blocks ...  number of stages, and number of blocks in each
    stem                a convolution
    blocks              all of them, one after another
    classes             of the classifier, 0 without one; weight (classes × channels) and bias, float32

    a convolution       C_out, C_in, k, stride, padding, and how its weight is stored: 0 float32, 1
                        int8, 2 bfloat16 (the upper halves of float32). Arrays: weight (C_out × C_in ×
                        k × k), for int8 scale (C_out, float32), bias (C_out, float32)
    a block             number of convolutions N, those, 1 and a convolution as shortcut or 0 for the
                        identity, on the gated path N − 1 gates, for int8 N scales (float64)
    a gate              hidden units H, hidden units E of the budget's embedding, count (−1 none, −2
                        as the budget says, −3 the same of a gate that boosts). Arrays, float32: reduce
                        (H × C_in of the block), bias (H), expand (C_out × H), shift (C_out), and
                        weight (E), bias (E) and expand (C_out × E) of the embedding. One that boosts
                        has H = C_out and E = 0; arrays: reduce, bias, beta (C_out)

`network.py` says what they compute.
"""

import math
import os
import secrets
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import InputError
from .network import BUDGET, Block, Convolution, Embedding, Gate, Network

SUFFIX = ".sgx"
VERSION = 3  # the newest that is read, back to the first

_MAGIC = b"\x89SGX\r\n\x1a\n"
_SEALED = 32  # magic, version, size, checksum: what follows is summed
_LINE = 64
_TYPES = ("float32", "bfloat16", "int8")
_STORED = ("float32", "int8", "bfloat16")
_PATHS = ("dense", "gated")
_DIALS = (None, "threshold", "budget")
_BY_THRESHOLD, _BY_BUDGET, _BOOSTING = -1, -2, -3

_DAMAGED = "got a damaged file, expected one as it was saved"
_OTHER = "got another kind of file, expected an encoder that was saved as .sgx"
_SHORT = "got only a part of a file, expected all of it"


def to_bytes(net: Network) -> bytes:
    """A network as a file's content."""
    writer = _Writer(net)
    writer.network(net)
    return writer.content()


class _Writer:
    def __init__(self, net: Network) -> None:
        self._bfloat16 = net.bfloat16
        boosts = any(gate.beta is not None for gate in net.gates)
        self._version = 3 if boosts else 2 if net.bfloat16 else 1
        self._words: list[np.int64] = []
        self._arrays: list[NDArray[Any]] = []

    def content(self) -> bytes:
        words = np.array([len(self._words), *self._words], "<i8").tobytes()
        parts, place = [words], _SEALED + len(words)
        for array in (np.zeros(0), *self._arrays):
            parts += [bytes(-place % _LINE), array.tobytes()]
            place += len(parts[-2]) + len(parts[-1])
        parts.append(bytes(-place % _LINE))
        body = b"".join(parts)
        head = np.array([self._version, _SEALED + len(body)], "<i8").tobytes()
        return _MAGIC + head + _checksum(body).tobytes() + body

    def network(self, net: Network) -> None:
        self._add(_TYPES.index(net.dtype), _PATHS.index(net.path), _DIALS.index(net.dial))
        self._numbers(*(net.budget_range or (None, None)), net.threshold, net.budget)
        self._numbers(net.image_scale or 0.0, net.stem_scale or 0.0)
        stages = net.stages or (len(net.blocks),)
        self._add(int(net.max_pool), len(stages), *stages)
        self._convolution(net.stem)
        for block in net.blocks:
            self._block(block)
        self._add(0 if net.linear is None else len(net.linear[1]))
        self._floats(*(net.linear or ()))

    def _convolution(self, conv: Convolution) -> None:
        out, channels, kernel, _ = conv.weight.shape
        stored = "bfloat16" if self._bfloat16 else str(conv.weight.dtype)
        self._add(out, channels, kernel, conv.stride, conv.padding, _STORED.index(stored))
        if conv.scale is not None:
            self._arrays.append(conv.weight)
            self._floats(conv.scale)
        elif self._bfloat16:
            self._arrays.append(_upper_halves(conv.weight))
        else:
            self._floats(conv.weight)
        self._floats(conv.bias)

    def _block(self, block: Block) -> None:
        self._add(len(block.convolutions))
        for conv in block.convolutions:
            self._convolution(conv)
        self._add(int(block.shortcut is not None))
        if block.shortcut is not None:
            self._convolution(block.shortcut)
        for gate in block.gates:
            self._gate(gate)
        self._numbers(*block.scales)

    def _gate(self, gate: Gate) -> None:
        if gate.beta is not None:
            self._add(len(gate.bias), 0, _BOOSTING)
            self._floats(gate.reduce, gate.bias, gate.beta)
            return
        none = np.zeros(0, np.float32)
        embedding = gate.embedding or Embedding(none, none, none)
        count = _BY_THRESHOLD if gate.count is None else gate.count
        self._add(
            len(gate.bias), len(embedding.bias), _BY_BUDGET if count == BUDGET else int(count)
        )
        self._floats(gate.reduce, gate.bias, gate.expand, gate.shift)
        self._floats(embedding.weight, embedding.bias, embedding.expand)

    def _add(self, *words: int) -> None:
        self._words += map(np.int64, words)

    def _numbers(self, *numbers: float | None) -> None:
        floats = [math.nan if number is None else number for number in numbers]
        self._words += np.array(floats, "<f8").view("<i8").tolist()

    def _floats(self, *arrays: NDArray[Any]) -> None:
        self._arrays += [np.ascontiguousarray(array, "<f4") for array in arrays]


def from_bytes(content: bytes | bytearray, name: str = "file", sealed: bool = True) -> Network:
    """What a file's content says; arrays are views of it.

    Args:
        content: of the file.
        name: of the file, for messages.
        sealed: whether to compare the checksum; the kernel does, too.

    Raises:
        InputError: if it is no such file, is damaged, or is of a newer version.
    """
    try:
        return _Reader(content, sealed).network()
    except _FileError as error:
        raise InputError(f"{name}: {error}") from None


class _FileError(ValueError):
    """Why bytes are no network."""


class _Reader:
    def __init__(self, content: bytes | bytearray, sealed: bool):
        if content[: len(_MAGIC)] != _MAGIC:
            raise _FileError(_OTHER)
        if len(content) < _SEALED + 8:
            raise _FileError(_SHORT)
        version, size = np.frombuffer(content, "<i8", 2, len(_MAGIC)).tolist()
        self._least_count = _BY_BUDGET if version < 3 else _BOOSTING
        if not 1 <= version <= VERSION:
            raise _FileError(f"got a file of version {version}, expected 1 to {VERSION}")
        if size > len(content):
            raise _FileError(_SHORT)
        _require(size == len(content) and size % 8 == 0)
        if sealed:
            sum_ = np.frombuffer(content, "<u8", 1, _SEALED - 8)[0]
            _require(sum_ == _checksum(memoryview(content)[_SEALED:]))
        (number,) = np.frombuffer(content, "<i8", 1, _SEALED).tolist()
        _require(0 <= number <= (size - _SEALED - 8) // 8)
        words = np.frombuffer(content, "<i8", number, _SEALED + 8)
        self._content = content
        self._words: Iterator[tuple[int, float]] = zip(
            words.tolist(), words.view("<f8").tolist(), strict=True
        )
        self._place = -(-(_SEALED + 8 + 8 * number) // _LINE) * _LINE

    def network(self) -> Network:
        dtype, path, dial = self._of(_TYPES), self._of(_PATHS), self._of(_DIALS)
        low, high, threshold, budget, image, stem = (self._number() for _ in range(6))
        max_pool = bool(self._word(0, 1))
        stages = tuple(self._word(1) for _ in range(self._word(1)))
        int8, gated = dtype == "int8", path == "gated"
        net = Network(
            path=path,
            stem=self._convolution(),
            max_pool=max_pool,
            blocks=tuple(self._block(gated, int8) for _ in range(sum(stages))),
            linear=None,
            budget_range=None if math.isnan(low) else (low, high),
            dial=dial,
            image_scale=image if int8 else None,
            stem_scale=stem if int8 else None,
            stages=stages,
            threshold=threshold,
            budget=None if math.isnan(budget) else budget,
            bfloat16=dtype == "bfloat16",
        )
        if classes := self._word(0):
            weight = self._floats(classes, net.features)
            net = replace(net, linear=(weight, self._floats(classes)))
        _require(next(self._words, None) is None and self._place == len(self._content))
        return net

    def _convolution(self) -> Convolution:
        out, channels, kernel, stride = (self._word(1) for _ in range(4))
        padding, stored = self._word(0), self._of(_STORED)
        shape = (out, channels, kernel, kernel)
        weight: NDArray[Any]
        scale = None
        if stored == "int8":
            weight, scale = self._array("i1", *shape), self._floats(out)
        elif stored == "bfloat16":
            weight = _widened(self._array("<u2", *shape))
        else:
            weight = self._floats(*shape)
        return Convolution(weight, self._floats(out), stride, padding, scale)

    def _block(self, gated: bool, int8: bool) -> Block:
        convolutions = tuple(self._convolution() for _ in range(self._word(2)))
        shortcut = self._convolution() if self._word(0, 1) else None
        channels = convolutions[0].weight.shape[1]
        hidden = [len(conv.bias) for conv in convolutions[:-1]] if gated else []
        gates = tuple(self._gate(channels, out) for out in hidden)
        scales = tuple(self._number() for _ in convolutions) if int8 else ()
        return Block(convolutions, shortcut, gates, scales)

    def _gate(self, channels: int, out: int) -> Gate:
        hidden, units, count = self._word(0), self._word(0), self._word(self._least_count)
        reduce, bias = self._floats(hidden, channels), self._floats(hidden)
        if count == _BOOSTING:
            _require(hidden == out and units == 0)
            return Gate.boosting(reduce, bias, self._floats(out))
        expand, shift = self._floats(out, hidden), self._floats(out)
        embedding = Embedding(self._floats(units), self._floats(units), self._floats(out, units))
        counts: dict[int, Any] = {_BY_THRESHOLD: None, _BY_BUDGET: BUDGET}
        return Gate(
            *(reduce, bias, expand, shift), embedding if units else None, counts.get(count, count)
        )

    def _word(self, least: int, most: float = math.inf) -> int:
        word, _ = self._next()
        _require(least <= word <= min(most, len(self._content)))
        return word

    def _number(self) -> float:
        return self._next()[1]

    def _next(self) -> tuple[int, float]:
        for both in self._words:
            return both
        raise _FileError(_DAMAGED)

    def _of(self, names: Any) -> Any:
        return names[self._word(0, len(names) - 1)]

    def _floats(self, *shape: int) -> Any:
        return self._array("<f4", *shape)

    def _array(self, dtype: str, *shape: int) -> Any:
        count = math.prod(shape)
        size = count * np.dtype(dtype).itemsize
        _require(size <= len(self._content) - self._place)
        array = np.frombuffer(self._content, dtype, count, self._place).reshape(shape)
        self._place += -(-size // _LINE) * _LINE
        return array


def _upper_halves(numbers: NDArray[Any]) -> NDArray[np.uint16]:
    """Finite numbers in bfloat16: rounded to the nearest, halves to the even one."""
    bits = np.ascontiguousarray(numbers, "<f4").view("<u4")
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")


def _widened(upper: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (upper.astype("<u4") << 16).view("<f4")


def _require(accepted: bool) -> None:
    if not accepted:
        raise _FileError(_DAMAGED)


def _checksum(body: Any) -> Any:
    words = np.frombuffer(body, "<u8")
    piece = 1 << 15  # which fits into an inner cache
    factors = np.arange(1, 2 * piece, 2, dtype=np.uint64)
    total = np.zeros((), "<u8")
    for first in range(0, len(words), piece):
        part = words[first : first + piece]
        # (2 (first + i) + 1) · word
        with np.errstate(over="ignore"):
            total += np.dot(factors[: len(part)], part) + np.uint64(2 * first) * part.sum()
    return total


def read_file(file: str | Path) -> bytes:
    """A file's content.

    Raises:
        InputError: if it cannot be read.
    """
    try:
        return Path(file).read_bytes()
    except (OSError, TypeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{file}: got no file that can be read ({reason})") from error


def write_file(file: str | Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        InputError: if it cannot be written.
    """
    try:
        target = Path(file)
        part = target.with_name(f".{target.name}-{secrets.token_hex(8)}")
        try:
            with open(part, "xb") as opened:
                opened.write(content)
                opened.flush()
                os.fsync(opened.fileno())
            os.replace(part, target)
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)
    except (OSError, TypeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot write {str(file)!r} ({reason})") from error
