"""Makes Triton's CPU interpreter do what the hardware does, so that interpreted kernels can be compared with torch bit for bit.

As shipped (Triton 3.6 to 3.9) the interpreter truncates float32 to bfloat16, rounds wrongly to float8, multiplies bfloat16 operands
of `tl.dot` as integers, and rounds the product in `tl.fma`. `install()` replaces these, before the first kernel is launched.
"""

# methods of Triton's are replaced, which type checkers take for a mistake
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import time

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

TORCH_TYPES = {
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
    tl.float8e5: torch.float8_e5m2,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e4b8: torch.float8_e4m3fnuz,
}
UNSIGNED = {1: (np.uint8, torch.uint8), 2: (np.uint16, torch.int16), 4: (np.uint32, torch.int32), 8: (np.uint64, torch.int64)}

Builder = interpreter.InterpreterBuilder
Handle = interpreter.TensorHandle


def as_torch(array: np.ndarray, dtype: tl.dtype) -> torch.Tensor:
    """The numbers that an interpreter array holds; it keeps narrow floats as unsigned bits."""
    bits = np.atleast_1d(np.ascontiguousarray(array))
    size = bits.dtype.itemsize
    signed = bits.view(UNSIGNED[size][0]).view(f"i{size}" if size > 1 else np.uint8)
    return torch.from_numpy(signed.copy()).view(TORCH_TYPES[dtype])


def convert(array: np.ndarray, source: tl.dtype, target: tl.dtype) -> np.ndarray:
    """A float conversion as the hardware does it: to nearest even, float8 saturating, NaN kept."""
    numbers = as_torch(array, source)
    if target.primitive_bitwidth == 8:
        limit = torch.finfo(TORCH_TYPES[target]).max
        numbers = numbers.float().clamp(-limit, limit)
    size = target.primitive_bitwidth // 8
    bits = numbers.to(TORCH_TYPES[target]).view(UNSIGNED[size][1]).numpy().view(UNSIGNED[size][0])
    return bits.reshape(np.shape(array))


def product(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """What `tl.dot` multiplies. Its order of additions, and so a row's bits, may depend on the row's place."""
    return np.matmul(a, b, dtype=dtype)


def product_by_rows(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`product`, with the same bits for a row in any place, as tensor cores have it; a test may put it in its place."""
    return np.stack([np.matmul(row.copy(), b, dtype=dtype) for row in a])


@functools.cache
def install() -> None:
    shipped_cast = Builder.cast_impl
    shipped_convert = interpreter._convert_float

    def convert_float(array, source, target, rounding_mode):
        if source in TORCH_TYPES and target in TORCH_TYPES and rounding_mode != interpreter._ir.ROUNDING_MODE.RTZ:
            return convert(array, source, target)
        return shipped_convert(array, source, target, rounding_mode)

    def cast(self, value, target):
        source, scalar = value.dtype.scalar, target.scalar
        if source in TORCH_TYPES and scalar in TORCH_TYPES and source != scalar:
            return Handle(convert(value.data, source, scalar).view(interpreter._get_np_dtype(target)), scalar)
        return shipped_cast(self, value, target)

    def fp_to_fp(self, value, target, rounding_mode):
        data = convert_float(value.data, value.dtype.scalar, target.scalar, rounding_mode)
        return Handle(data.view(interpreter._get_np_dtype(target)), target.scalar)

    def dot(self, a, b, acc, input_precision, max_num_imprecise_acc):
        def widen(operand):
            if operand.dtype.scalar in TORCH_TYPES and acc.data.dtype == np.float32:
                return as_torch(operand.data, operand.dtype.scalar).float().numpy().reshape(operand.data.shape)
            return operand.data.astype(acc.data.dtype)

        return Handle(product(widen(a), widen(b), acc.data.dtype) + acc.data, acc.dtype.scalar)

    def fma(self, x, y, z):
        # the product of two float32 is exact in float64; the sum is rounded to odd there, so that rounding it again does no harm
        product, addend = x.data.astype(np.float64) * y.data.astype(np.float64), z.data.astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            total = np.atleast_1d(product + addend)
            part = total - product
            lost = (product - (total - part)) + (addend - part)
            bits = total.view(np.int64)
            even = np.isfinite(total) & (lost != 0) & (bits & 1 == 0)
            odd = np.where(even, bits + np.where((lost > 0) == (total > 0), 1, -1), bits)
            return Handle(odd.view(np.float64).reshape(product.shape).astype(x.data.dtype), z.dtype.scalar)

    def splat(self, block, value):
        # a comparison's handle has the type of what it compares: of its truth values Triton 3.9 would make integers, which are no mask
        return Handle(np.full(block.shape, value.data.reshape(-1)[0]), value.dtype.scalar)

    interpreter._convert_float = convert_float
    Builder.create_splat = splat
    Builder.cast_impl = cast
    Builder.create_fp_to_fp = fp_to_fp
    Builder.create_dot = dot
    Builder.create_fma = fma
    for name in ("create_si_to_fp", "create_ui_to_fp", "create_fp_to_si", "create_fp_to_ui", "create_fp_ext", "create_fp_trunc"):
        setattr(Builder, name, lambda self, value, target: self.cast_impl(value, target))
    _accept_one_element_bounds()
    _give_a_clock()
    _remember_what_does_not_change()


def _remember_what_does_not_change() -> None:
    """Half of an interpreted kernel's time goes into a search for the language's builtins at each call of a device function, a table of
    NumPy's types at each operation, and sums in int64 for an assertion of overflow that is made with `debug` alone."""
    shipped_patch_lang, shipped_np_dtype = interpreter._patch_lang, interpreter._get_np_dtype
    builtins = {
        package: [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]
        for package in (tl, tl.core, tl.tensor, tl.math, tl.core.tensor_descriptor_base)
    }
    launch = interpreter.GridExecutor.__call__
    patched: set[str] = set()

    def patch_builtin(package, builder, scope):
        for name in builtins[package]:
            member = getattr(package, name)
            if tl.core.is_builtin(member):
                interpreter._patch_attr(package, name, member, builder, scope)

    @functools.cache
    def languages(fn) -> set[str]:
        return {value.__name__ for value in fn.__globals__.values() if value is tl or value is tl.core}

    def patch_lang(fn):
        # a device function's language is its kernel's, which is patched for the whole launch
        if languages(fn) and languages(fn) <= patched:
            return interpreter._LangPatchScope()
        patched.update(languages(fn))
        return shipped_patch_lang(fn)

    def begin(self, *args, **kwargs):
        patched.clear()
        try:
            return launch(self, *args, **kwargs)
        finally:
            # the language is restored, which another thread's kernel has to notice
            patched.clear()

    np_dtype = functools.cache(shipped_np_dtype)
    interpreter.GridExecutor.__call__ = begin
    interpreter._patch_lang = patch_lang
    interpreter._patch_builtin = patch_builtin
    # pointers' types have no hash
    interpreter._get_np_dtype = lambda dtype: np_dtype(dtype.scalar) if dtype.scalar.__hash__ else shipped_np_dtype(dtype)
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    _remember_types()


def _remember_types() -> None:
    """Most of the rest goes into types: each value of each operation makes tuples of its shape anew, and what two operands have in common
    is found step by step. What a type is its name says, so what follows from it is made once for each name; operands of one type and
    shape are what they are, and a number is of the type of the integers that it is added to."""
    semantic = interpreter.TritonSemantic
    shipped_block, shipped_tensor = tl.block_type.__init__, tl.tensor.__init__
    shipped_broadcast, shipped_operands = semantic.broadcast_impl_value, semantic.binary_op_type_checking_impl
    shipped_constant = semantic.scalar_constant
    blocks: dict[tuple, dict] = {}
    tensors: dict[str, dict] = {}
    constants: dict[tuple[int, str], tl.tensor] = {}

    @functools.wraps(shipped_block)
    def block(self, element_ty, shape):
        key = element_ty.name, *shape
        if key not in blocks:
            shipped_block(self, element_ty, shape)
            blocks[key] = dict(vars(self))
        vars(self).update(blocks[key])

    @functools.wraps(shipped_tensor)
    def tensor(self, handle, type):
        if type.name not in tensors:
            shipped_tensor(self, handle, type)
            tensors[type.name] = dict(vars(self))
        vars(self).update(tensors[type.name], handle=handle, type=type)

    @functools.wraps(shipped_constant)
    def constant(self, value, dtype):
        if type(value) is not int:
            return shipped_constant(self, value, dtype)
        key = value, dtype.name
        if key not in constants:
            constants[key] = shipped_constant(self, value, dtype)
        return constants[key]

    @functools.wraps(shipped_broadcast)
    def broadcast(self, lhs, rhs):
        a, b = lhs.type, rhs.type
        if list(a.shape) == list(b.shape) if a.is_block() and b.is_block() else not a.is_block() and not b.is_block():
            return lhs, rhs
        return shipped_broadcast(self, lhs, rhs)

    def fits(number, integers):
        return integers.dtype.name in ("int32", "int64") and -(1 << 31) <= number < 1 << 31

    @functools.wraps(shipped_operands)
    def operands(self, lhs, rhs, allow_lhs_ptr=False, allow_rhs_ptr=False, arithmetic_check=True, div_or_mod=False):
        left, right = type(lhs), type(rhs)
        if left is tl.tensor and right is tl.tensor:
            a, b = lhs.dtype, rhs.dtype
            same = a.name == b.name and (a.is_int() if div_or_mod else not a.is_ptr())
            if same or (a.is_ptr() and allow_lhs_ptr and b.is_int()):
                return self.broadcast_impl_value(lhs, rhs)
        elif arithmetic_check and left is tl.tensor and right is int and fits(rhs, lhs):
            return self.broadcast_impl_value(lhs, self.scalar_constant(rhs, lhs.dtype))
        elif arithmetic_check and left is int and right is tl.tensor and fits(lhs, rhs):
            return self.broadcast_impl_value(self.scalar_constant(lhs, rhs.dtype), rhs)
        return shipped_operands(self, lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)

    tl.block_type.__init__ = block
    tl.tensor.__init__ = tensor
    semantic.scalar_constant = constant
    semantic.broadcast_impl_value = broadcast
    semantic.binary_op_type_checking_impl = operands


def _give_a_clock() -> None:
    """The GPU's nanosecond clock is inline assembly. A launch that looks at it again and again waits for another rank: it sleeps, for
    longer and longer up to 4 ms, so that ranks can be more than there are cores."""
    looks = 0
    launch = interpreter.GridExecutor.__call__

    def begin(self, *args, **kwargs):
        nonlocal looks
        looks = 0
        return launch(self, *args, **kwargs)

    def globaltimer():
        nonlocal looks
        looks += 1
        if looks > 2:
            time.sleep(min(looks, 20) * 2e-4)
        return tl.tensor(Handle(np.array([time.monotonic_ns()], dtype=np.int64), tl.int64), tl.int64)

    interpreter.GridExecutor.__call__ = begin
    # triton.language.extra's attribute of that name is another module object
    cuda = importlib.import_module("triton.language.extra.cuda")
    cuda.globaltimer = globaltimer


def _accept_one_element_bounds() -> None:
    """NumPy 2.4 no longer turns an array of one element into an int, which Triton 3.6 does for `range(0, tensor)`."""
    shipped = interpreter._patch_lang_tensor
    if "lambda self: int(self.handle.data)" not in inspect.getsource(shipped):
        return

    def patched(tensor, scope):
        shipped(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
