"""Reads the FLOPs and bytes of each operation of a program compiled for a TPU.

XLA's own cost analysis gives only sums over a program, so this parses the program's
text.
"""

import itertools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

ARRAY = re.compile(r"\b([a-z]+)(\d*)(\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
# These opcodes move no data, except the end of a copy, which is counted at its start.
FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element"}
FREE |= {"copy-done", "slice-done", "after-all", "optimization-barrier"}
COPIES = {"copy-start", "slice-start"}


class Array(NamedTuple):
    """An operand or a result."""

    shape: tuple[int, ...]
    nbytes: int
    hbm: bool  # False: in an on-chip memory, such as VMEM, which is S(1)


class Line(NamedTuple):
    """An instruction of the text."""

    arrays: list[Array]  # its results
    opcode: str
    inside: str  # the text between its parentheses
    attributes: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.inside)

    @property
    def op_name(self) -> str:
        """The position in the traced function that the instruction comes from."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


class Product(NamedTuple):
    """A matrix product, or a convolution."""

    flops: int
    shortest: int  # the least of its row, column and contracted dimensions
    op_name: str


class Operation(NamedTuple):
    """One operation of the chip: a line of the entry, with everything that it calls."""

    name: str
    op_name: str
    products: list[Product]
    nbytes: int  # read from and written to HBM
    moved: int  # copied between HBM and VMEM, while other operations run
    cycles: int  # XLA's estimate; 0 if it has none

    @property
    def flops(self) -> int:
        return sum(x.flops for x in self.products)


Computation = dict[str, Line]


def operations(text: str) -> list[Operation]:
    """Returns the operations that a compiled program runs.

    FLOPs are those of products. Bytes are those of operands and results in HBM, each
    counted once; of an operand whose rows are looked up, only these rows count. Arrays
    in VMEM count no bytes: the copies between HBM and VMEM, which overlap with other
    operations, are `moved`. The body of a loop counts once.

    Raises:
      ValueError: If the text is not that of a compiled program.
    """
    computations, entry = parse(text)
    return list(run(computations, entry))


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Returns the instructions of every computation, and the name of the entry."""
    computations, entry = {}, None
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%([\w.-]+) \(.*\{$", line):
            computations[head[2]] = own = {}
            entry = head[2] if head[1] else entry
        elif computations and (
            found := re.match(r"\s+(?:ROOT )?%([\w.-]+) = (.*)", line)
        ):
            name, rest = found.groups()
            end = closing(rest) if rest.startswith("(") else rest.index(" ")
            opcode, _, _ = rest[end:].strip().partition("(")
            start = rest.index("(", end)
            end_of_call = start + closing(rest[start:])
            own[name] = Line(
                arrays(rest[:end]),
                opcode,
                rest[start + 1 : end_of_call - 1],
                rest[end_of_call:],
            )
    if entry is None:
        raise ValueError("No line begins with ENTRY: this is not a program's text.")
    return computations, entry


def closing(text: str) -> int:
    """Returns the end of the parenthesis that the text begins with."""
    depth = itertools.accumulate((x == "(") - (x == ")") for x in text)
    return 1 + next(i for i, n in enumerate(depth) if not n)


def arrays(text: str) -> list[Array]:
    """Parses a type, or a tuple of types."""
    found = []
    for kind, bits, more, sizes, layout in ARRAY.findall(text):
        if kind == "token":
            continue
        shape = tuple(int(n) for n in sizes.split(",") if n)
        # `pred` has no number of bits, and float8 types have letters after theirs.
        each = 8 if more or not bits else int(bits)
        nbytes = -(-math.prod(shape) * each // 8)
        found.append(Array(shape, nbytes, "S(" not in layout))
    return found


def run(computations: dict[str, Computation], name: str) -> Iterator[Operation]:
    """Yields the operations of a computation, in order."""
    own = computations[name]
    for name, line in own.items():
        if line.opcode in FREE or '"ConcatBitcast"' in line.attributes:
            continue
        if line.opcode in ("while", "call", "conditional"):
            for callee in called(line):
                yield from run(computations, callee)
            continue
        cycles = re.search(r'"estimated_cycles":"(\d+)"', line.attributes)
        copies = line.opcode in COPIES
        yield Operation(
            name,
            line.op_name,
            list(products(computations, own, line)),
            0 if copies else accessed(computations, own, line),
            # A copy moves the smaller of its two ends, a slice of the other one.
            min(x.nbytes for x in line.arrays[:2]) if copies else 0,
            int(cycles[1]) if cycles else 0,
        )


def called(line: Line) -> list[str]:
    """Returns the names of the computations that an instruction calls."""
    branches = re.search(r"branch_computations=\{([^}]*)\}", line.attributes)
    one = re.findall(r"(?:calls|body|to_apply)=%([\w.-]+)", line.attributes)
    return one + re.findall(r"%([\w.-]+)", branches[1] if branches else "")


def accessed(computations: dict[str, Computation], own: Computation, line: Line) -> int:
    """Returns the bytes in HBM that an instruction reads and writes."""
    total = sum(x.nbytes for x in line.arrays if x.hbm)
    inside = computations[called(line)[0]] if line.opcode == "fusion" else {}
    for i, name in enumerate(line.operands):
        parameter = next(
            (
                k
                for k, x in inside.items()
                if (x.opcode, x.inside) == ("parameter", str(i))
            ),
            None,
        )
        for x in own[name].arrays:
            if x.hbm:
                total += min(x.nbytes, looked_up(inside, parameter) or x.nbytes)
    return total


def looked_up(inside: Computation, parameter: str | None) -> int | None:
    """Returns the bytes that are read of a parameter, if all its uses are slices."""
    uses = [x for x in inside.values() if parameter in x.operands]
    sliced = all(
        x.opcode in ("gather", "dynamic-slice", "slice") and x.operands[0] == parameter
        for x in uses
    )
    return sum(x.arrays[0].nbytes for x in uses) if uses and sliced else None


def products(
    computations: dict[str, Computation], own: Computation, line: Line
) -> Iterator[Product]:
    """Yields the matrix products of an instruction and of everything that it calls."""
    if line.opcode == "convolution":
        yield convolution(own, line)
    elif line.opcode == "dot":
        yield dot(own, line)
    for name in called(line):
        for other in computations[name].values():
            yield from products(computations, computations[name], other)


def convolution(own: Computation, line: Line) -> Product:
    """Returns the product that XLA for TPU writes as a convolution.

    Batch dimensions become window dimensions there. The rows and columns are the
    convolution's batch and output features, and the input features are contracted.
    """
    lhs, rhs = (own[name].arrays[0].shape for name in line.operands)
    out = line.arrays[0].shape
    of_lhs, of_rhs, of_out = re.search(
        r"dim_labels=(\w+)_(\w+)->(\w+)", line.attributes
    ).groups()
    window = dict(re.findall(r"(\w+)=([\dx_-]+)", in_window(line)))
    count = sum(x.isdigit() for x in of_out)
    read = lambda key, other: [
        x for x in window.get(key, "x".join([other] * count)).split("x") if x
    ]
    inner = 1  # pairs of window and output positions that hit an element of the input
    each = zip(
        *(read("stride", "1"), read("pad", "0_0"), read("lhs_dilate", "1")),
        read("rhs_dilate", "1"),
        strict=True,
    )
    outer = 1
    for d, (stride, pad, lhs_dilate, rhs_dilate) in enumerate(each):
        n, k = lhs[of_lhs.index(str(d))], rhs[of_rhs.index(str(d))]
        m, low = out[of_out.index(str(d))], int(pad.split("_")[0])
        inner *= pairs(n, k, m, int(stride), low, int(lhs_dilate), int(rhs_dilate))
        outer *= m
    rows, columns = out[of_out.index("b")], out[of_out.index("f")]
    contracted = rhs[of_rhs.index("i")]
    flops = 2 * rows * columns * contracted * inner
    # Window positions that are not batched are rows, or contracted.
    shortest = min(rows * outer, columns, max(1, contracted * inner // outer))
    return Product(flops, shortest, line.op_name)


def in_window(line: Line) -> str:
    """Returns the text of an instruction's window attribute."""
    found = re.search(r"window=\{([^}]*)\}", line.attributes)
    return found[1] if found else ""


def pairs(
    n: int, k: int, m: int, stride: int, low: int, lhs_dilate: int, rhs_dilate: int
) -> int:
    """Counts the pairs of window and output positions that hit an input element.

    Args:
      n: Elements of the input along one dimension, `lhs_dilate` apart.
      k: Positions of the window.
      m: Positions of the output.
      stride: Between two positions of the window on the input.
      low: Padding at the lower end.
      lhs_dilate: Dilation of the input.
      rhs_dilate: Dilation of the window.
    """
    if n == m == 1 and k == 1:
        return 1
    found = 0
    for at in range(k):
        for to in range(m):
            position = to * stride - low + at * rhs_dilate
            found += position % lhs_dilate == 0 and 0 <= position < n * lhs_dilate
    return found


def dot(own: Computation, line: Line) -> Product:
    """Returns the product of a `dot` instruction."""
    lhs, rhs = (own[name].arrays[0].shape for name in line.operands)
    read = lambda key: [
        int(d)
        for found in re.findall(key + r"=\{([\d,]*)\}", line.attributes)
        for d in found.split(",")
        if d
    ]
    contracted = math.prod(lhs[d] for d in read("lhs_contracting_dims"))
    batch = math.prod(lhs[d] for d in read("lhs_batch_dims"))
    rows = math.prod(lhs) // (contracted * batch)
    columns = math.prod(rhs) // (contracted * batch)
    flops = 2 * batch * rows * columns * contracted
    return Product(flops, min(rows, columns, contracted), line.op_name)
