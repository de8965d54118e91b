"""Arithmetic on eight neighbouring floats at once, for compiled loops over short rows.

A compiler that does not know how long a row is, and whether the arrays overlap, handles such rows float by float. Every
function here reads and writes :data:`LANES` elements of flat float32 arrays from the given places on. Places are uint64
and are not checked.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 8

_F32, _I64 = ir.FloatType(), ir.IntType(64)
_EIGHT = ir.VectorType(_F32, LANES)
_EPSILON = 1e-10  # added to roots, so that nothing is divided by zero


@intrinsic
def copy8(typing_context: Any, source: Any, at: Any, target: Any, to: Any) -> Any:
    """``target[to:to+8] = source[at:at+8]``."""

    def generate(lanes: "_Lanes", source: Any, at: Any, target: Any, to: Any) -> None:
        lanes.store(lanes.load(source, at), target, to)

    return types.void(source, at, target, to), _on_lanes(generate)


@intrinsic
def add8(typing_context: Any, source: Any, at: Any, target: Any, to: Any) -> Any:
    """``target[to:to+8] += source[at:at+8]``."""

    def generate(lanes: "_Lanes", source: Any, at: Any, target: Any, to: Any) -> None:
        lanes.store(lanes.builder.fadd(lanes.load(target, to), lanes.load(source, at)), target, to)

    return types.void(source, at, target, to), _on_lanes(generate)


@intrinsic
def subtract8(typing_context: Any, source: Any, at: Any, factor: Any, target: Any, to: Any) -> Any:
    """``target[to:to+8] -= factor * source[at:at+8]``."""

    def generate(lanes: "_Lanes", source: Any, at: Any, factor: Any, target: Any, to: Any) -> None:
        step = lanes.builder.fmul(lanes.load(source, at), lanes.all(factor))
        lanes.store(lanes.builder.fsub(lanes.load(target, to), step), target, to)

    return types.void(source, at, types.float32, target, to), _on_lanes(generate)


@intrinsic
def square8(typing_context: Any, source: Any, at: Any) -> Any:
    """The sum of the squares of ``source[at:at+8]``, by halves: always in the same order."""

    def generate(lanes: "_Lanes", source: Any, at: Any) -> Any:
        x, builder = lanes.load(source, at), lanes.builder
        square = builder.fmul(x, x)
        for half in (4, 2, 1):
            order = [(lane + half) % LANES for lane in range(LANES)]
            other = builder.shuffle_vector(square, square, ir.Constant(ir.VectorType(ir.IntType(32), LANES), order))
            square = builder.fadd(square, other)
        return builder.extract_element(square, ir.IntType(32)(0))

    return types.float32(source, at), _on_lanes(generate)


@intrinsic
def adagrad8(typing_context: Any, source: Any, at: Any, rate: Any, target: Any, sums: Any, weights: Any) -> Any:
    """Adagrad's step: the squares of ``source[at:at+8]`` are added to the sums, and the weights move.

    ``target[sums:sums+8] += source**2``; ``target[weights:weights+8] -= rate * source / (sqrt(sums) + 1e-10)``.
    """

    def generate(lanes: "_Lanes", source: Any, at: Any, rate: Any, target: Any, sums: Any, weights: Any) -> None:
        x, builder = lanes.load(source, at), lanes.builder
        total = builder.fadd(lanes.load(target, sums), builder.fmul(x, x))
        lanes.store(total, target, sums)
        root = builder.fadd(lanes.root(total), ir.Constant(_EIGHT, [_EPSILON] * LANES))
        step = builder.fdiv(builder.fmul(x, lanes.all(rate)), root)
        lanes.store(builder.fsub(lanes.load(target, weights), step), target, weights)

    return types.void(source, at, types.float32, target, sums, weights), _on_lanes(generate)


class _Lanes:
    """Loads and stores of eight floats, in the function that is being compiled."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def load(self, start: Any, at: Any) -> Any:
        value = self.builder.load(self._place(start, at))
        value.align = 4
        return value

    def store(self, value: Any, start: Any, at: Any) -> None:
        self.builder.store(value, self._place(start, at)).align = 4

    def all(self, value: Any) -> Any:
        """A float in every lane."""
        result = ir.Constant(_EIGHT, ir.Undefined)
        for lane in range(LANES):
            result = self.builder.insert_element(result, value, ir.IntType(32)(lane))
        return result

    def root(self, value: Any) -> Any:
        type_of = ir.FunctionType(_EIGHT, [_EIGHT])
        function = cgutils.get_or_insert_function(self.builder.module, type_of, f"llvm.sqrt.v{LANES}f32")
        return self.builder.call(function, [value])

    def _place(self, start: Any, at: Any) -> Any:
        builder = self.builder
        address = builder.add(builder.ptrtoint(start, _I64), builder.mul(at, _I64(4)))
        return builder.inttoptr(address, _EIGHT.as_pointer())


def _on_lanes(generate: Callable[..., Any]) -> Callable[..., Any]:
    """Numba's way to generate a function: arrays come as the addresses of their first elements."""

    def generate_call(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values = [
            context.make_array(kind)(context, builder, value).data if isinstance(kind, types.Array) else value
            for kind, value in zip(signature.args, arguments, strict=True)
        ]
        result = generate(_Lanes(builder), *values)
        return context.get_dummy_value() if result is None else result

    return generate_call
