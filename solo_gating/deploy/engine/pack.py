"""Folded weights in the order in which the kernel reads them."""

import contextlib
import ctypes
import mmap
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from solo_gating_runtime import network
from solo_gating_runtime.network import MOST_CONVOLUTIONS

_HUGE_PAGE = 2 << 20
_CACHE_LINE = 64


class Convolution(ctypes.Structure):
    """`Convolution` of kernel/network.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("in_channels", "out_channels", "kernel", "stride")),
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
    ]


class Gate(ctypes.Structure):
    """`Gate` of kernel/network.h."""

    _fields_ = [
        ("channels", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("reduce", "bias", "expand")),
    ]


class Block(ctypes.Structure):
    """`Block` of kernel/network.h."""

    _fields_ = [
        ("num_convolutions", ctypes.c_int64),
        ("convolutions", Convolution * MOST_CONVOLUTIONS),
        ("shortcut", Convolution),
        ("gates", Gate * (MOST_CONVOLUTIONS - 1)),
    ]


class Network(ctypes.Structure):
    """`Network` of kernel/network.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("in_channels", "width")),
        *((name, ctypes.c_int64) for name in ("kernel", "stride", "padding", "max_pool")),
        *((name, ctypes.c_int64) for name in ("features", "in_planes", "num_blocks")),
        *((name, ctypes.c_void_p) for name in ("stem", "stem_bias", "linear", "linear_bias")),
        ("blocks", ctypes.POINTER(Block)),
    ]


@dataclass(frozen=True)
class Shapes:
    """How the kernel wants weights, in numbers of channels.

    Attributes:
        lanes: in one of the kernel's vectors; channels are padded to a multiple.
        group: output channels that its outer products compute at once.
        block: input channels that its dot products sum over at once.
        plane_group: output channels that are computed at once where pixels lie in the lanes.
    """

    lanes: int
    group: int
    block: int
    plane_group: int


class PackedNetwork:
    """A network's weights in one piece of memory, and the structure that tells where.

    Args:
        net: the folded network.
        shapes: of the kernel.

    Attributes:
        structure: for the kernel; valid as long as this object lives.
        nbytes: size of the weights.
    """

    def __init__(self, net: network.Network, shapes: Shapes):
        self._shapes, self._dtype = shapes, getattr(torch, net.dtype)
        self._memory = _Counter()
        self._fill(net)
        self.nbytes = self._memory.used
        self._memory = _Arena(self.nbytes)
        self.structure = self._fill(net)

    def _fill(self, net: network.Network) -> Network:
        in_planes = not all(_is_basic(block) for block in net.blocks)
        blocks = [self._block(block, in_planes) for block in net.blocks]
        self._blocks = (Block * len(blocks))(*blocks)
        weight = torch.from_numpy(net.stem.weight)
        linear, linear_bias = net.linear or (None, None)
        return Network(
            in_channels=weight.shape[1],
            width=weight.shape[0],
            kernel=weight.shape[2],
            stride=net.stem.stride,
            padding=net.stem.padding,
            max_pool=net.max_pool,
            features=net.features,
            in_planes=in_planes,
            num_blocks=len(net.blocks),
            stem=self._packed(weight),
            stem_bias=self._floats(net.stem.bias),
            linear=None if linear is None else self._floats(linear),
            linear_bias=None if linear_bias is None else self._floats(linear_bias),
            blocks=self._blocks,
        )

    def _block(self, block: network.Block, in_planes: bool) -> Block:
        *first, last = block.convolutions
        few, all_ = (self._plain, self._grouped) if in_planes else (self._blocked, self._packed)
        packed = [self._convolution(conv, few) for conv in first] + [self._convolution(last, all_)]
        shortcut = Convolution()
        if block.shortcut is not None:
            shortcut = self._convolution(block.shortcut, all_)
        gates = [
            Gate(
                channels=len(gate.bias),
                reduce=self._floats(gate.reduce),
                bias=self._floats(gate.bias),
                expand=self._floats(gate.expand.T),
            )
            for gate in block.gates
        ]
        most = MOST_CONVOLUTIONS
        return Block(
            num_convolutions=len(packed),
            convolutions=(Convolution * most)(*packed),
            shortcut=shortcut,
            gates=(Gate * (most - 1))(*gates),
        )

    def _convolution(self, conv: network.Convolution, pack: Callable[[Tensor], int]) -> Convolution:
        out, channels, kernel, _ = conv.weight.shape
        return Convolution(
            in_channels=channels,
            out_channels=out,
            kernel=kernel,
            stride=conv.stride,
            weight=pack(torch.from_numpy(conv.weight)),
            bias=self._floats(conv.bias),
        )

    def _padded(self, value: Tensor) -> Tensor:
        """The last axis padded with zeros to whole vectors."""
        return torch.nn.functional.pad(value, (0, -value.shape[-1] % self._shapes.lanes))

    def _floats(self, value: network.Floats) -> int:
        return self._memory.add(self._padded(torch.from_numpy(value)))

    def _blocked(self, weight: Tensor) -> int:
        """C_out × C_in × k × k as C_out × blocks of input channels × k² × channels of the block."""
        rows = self._padded(weight.flatten(2).transpose(1, 2))
        blocks = rows.split(self._shapes.block, dim=2)
        return self._memory.add(torch.cat([b.flatten(1) for b in blocks], 1).to(self._dtype))

    def _packed(self, weight: Tensor) -> int:
        """C_out × C_in × k × k, cut into groups of output channels, each C_in × k² × group."""
        groups = self._padded(weight.flatten(2).permute(1, 2, 0)).split(self._shapes.group, dim=2)
        return self._memory.add(torch.cat([group.flatten() for group in groups]).to(self._dtype))

    def _plain(self, weight: Tensor) -> int:
        """C_out × C_in × k × k as it is."""
        return self._memory.add(weight.to(self._dtype))

    def _grouped(self, weight: Tensor) -> int:
        """C_out × C_in × k × k, cut evenly into groups of output channels, each C_in × k² × group."""
        rows = weight.flatten(2).permute(1, 2, 0)
        channels = len(weight)
        number = -(-channels // self._shapes.plane_group)
        ends = [channels * i // number for i in range(1, number)]
        groups = rows.tensor_split(ends, dim=2)
        return self._memory.add(torch.cat([group.flatten() for group in groups]).to(self._dtype))


def _is_basic(block: network.Block) -> bool:
    kernels = [(conv.weight.shape[-1], conv.padding) for conv in block.convolutions]
    return kernels == [(3, 1), (3, 1)] and block.convolutions[1].stride == 1


class _Counter:
    """Counts what an `_Arena` will have to hold."""

    def __init__(self) -> None:
        self.used = 0

    def add(self, values: Tensor) -> int:
        """Room for a tensor; returns its address."""
        address = self.used
        self.used += -(-values.nbytes // _CACHE_LINE) * _CACHE_LINE
        return address


class _Arena(_Counter):
    """Memory on huge pages, where the system has them: rows of weights are read at random."""

    def __init__(self, size: int):
        super().__init__()
        self._map = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # Advice only: a system that has none goes on with small pages.
            with contextlib.suppress(OSError):
                self._map.madvise(mmap.MADV_HUGEPAGE)
        whole = torch.frombuffer(self._map, dtype=torch.uint8)
        self._bytes = whole[-whole.data_ptr() % _HUGE_PAGE :]

    def add(self, values: Tensor) -> int:
        """Copy a tensor; returns its address."""
        begin = super().add(values)
        target = self._bytes[begin : begin + values.nbytes]
        if values.numel() > 0:
            target.copy_(values.contiguous().flatten().view(torch.uint8))
        return target.data_ptr()
