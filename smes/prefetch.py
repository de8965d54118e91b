"""Asks the processor to fetch memory before a compiled loop needs it.

A loop that reads a large array at random waits for memory at every element. When it asks for the elements of a block
before it reads the first of them, these waits pass side by side.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_READ, _KEEP, _DATA = 0, 3, 1  # arguments of LLVM's intrinsic: for reading, into all caches, data


@intrinsic
def prefetch(typing_context: Any, array: Any, index: Any) -> Any:
    """``prefetch(array, index)``: fetch the cache line of ``array[index]``. For compiled code.

    The array is contiguous. Only its first axis is indexed; the index is not checked, and never faults.
    """
    signature = types.void(array, index)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values = context.make_array(signature.args[0])(context, builder, arguments[0])
        strides = cgutils.unpack_tuple(builder, values.strides)
        start = builder.ptrtoint(values.data, strides[0].type)
        address = builder.add(start, builder.mul(builder.zext(arguments[1], strides[0].type), strides[0]))
        pointer = builder.inttoptr(address, cgutils.voidptr_t)
        i32 = ir.IntType(32)
        type_of = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, i32, i32, i32])
        function = cgutils.get_or_insert_function(builder.module, type_of, "llvm.prefetch.p0")
        builder.call(function, [pointer, i32(_READ), i32(_KEEP), i32(_DATA)])
        return context.get_dummy_value()

    return signature, generate
