"""From masks, lengths, offsets or masses of one side to the log-masses of a ``Problem``.

Values are inspected only where they are at hand: concrete CPU tensors outside tracing. Elsewhere,
a mask entry that is neither 0 nor 1 makes the outputs of its problem NaN.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from optical.backends import cpu, library, registry, structs
from optical.ot.checks import (
    CONCRETE,
    check_device,
    check_floating,
    check_integers,
    check_shape,
    dispatched,
    tracing,
    values_available,
)


class SideNames(NamedTuple):
    """Names of the arguments of one side (rows or columns), as its caller wrote them.

    Attributes:
        source: the argument whose shape the masses follow, such as "cost" or "x".
        size: the letter of the side's size in shapes, "n" or "m".
        log_mass, mass, mask, lengths, offsets: the other arguments.
    """

    source: str
    size: str
    log_mass: str
    mass: str
    mask: str
    lengths: str
    offsets: str


COST_ROWS = SideNames("cost", "n", "log_a", "a", "mask_a", "lengths_a", "")
COST_COLUMNS = SideNames("cost", "m", "log_b", "b", "mask_b", "lengths_b", "")
X = COST_ROWS._replace(source="x", offsets="cu_seqlens_a")
Y = COST_COLUMNS._replace(source="y", offsets="cu_seqlens_b")
STUDENT = X._replace(source="student", mask="student_mask")
TEACHER = Y._replace(source="teacher", mask="teacher_mask")


class Masses(NamedTuple):
    """The arguments that determine the log-masses of one side, as given by the user.

    Attributes:
        names: names of these arguments, for error messages.
        log_mass: (batch, n) or packed (N,).
        mask: (batch, n), bool or 0/1 numbers.
        lengths: (batch,) integers.
        offsets: (batch + 1,) integers, for packed problems.
        mass: (batch, n) or packed (N,), non-negative; instead of ``log_mass``.
    """

    names: SideNames
    log_mass: Tensor | None = None
    mask: Tensor | None = None
    lengths: Tensor | None = None
    offsets: Tensor | None = None
    mass: Tensor | None = None

    def fold(self, own: tuple[int, ...], lead: tuple[int, ...], size: int) -> Masses:
        """Merge the leading dimensions of every argument.

        Arguments may have the leading dimensions ``own`` of their source or those of the problem,
        ``lead``, to which the source was broadcast.
        """
        names = self.names

        def merge(name: str, value: Tensor | None, *trailing: int) -> Tensor | None:
            if not isinstance(value, Tensor):
                return value
            if tuple(value.shape) == (*own, *trailing):
                value = value.expand((*lead, *trailing))
            check_shape(name, value, (*lead, *trailing), f"as in {names.source}")
            return value.flatten(0, len(lead) - 1) if lead else value.unsqueeze(0)

        return Masses(
            names,
            merge(names.log_mass, self.log_mass, size),
            merge(names.mask, self.mask, size),
            merge(names.lengths, self.lengths),
            self.offsets,
            merge(names.mass, self.mass, size),
        )

    def log_masses(
        self,
        source: Tensor,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        balanced: bool,
        backend: str = "auto",
    ) -> Tensor:
        """Return the log-masses, (batch, n) or packed (N,), -inf for padding.

        Masses given by the user are kept where a mask or a length leaves them. Otherwise the valid
        rows (or columns) of a problem weigh the same and 1 together.

        Args:
            source: the cost or the vectors, whose device the masses share.
            shape: that of the result.
            dtype: that of the result.
            balanced: whether both marginals are fixed.
            backend: the name of the backend that the caller asked for.
        """
        _, log_mass, mask, lengths, offsets, mass = self
        if mask is None and lengths is None and log_mass is None and mass is None:
            return _uniform(source, shape, dtype, offsets)
        self._check_combination()
        given = lengths if mask is None else mask
        at_hand = isinstance(given, Tensor) and values_available(given)
        if log_mass is None and mass is None and at_hand:
            return self._uniform_of_valid(source, shape, dtype, backend)
        valid = None
        if mask is not None:
            valid = self._valid_by_mask(source, shape)
        elif lengths is not None:
            valid = self._valid_by_length(source, shape)
        if mass is not None:
            log_mass = self._logarithm(source, shape)
        elif log_mass is not None:
            self._check_log_mass(log_mass, source, shape, balanced)
        else:
            assert valid is not None
            uniform = _uniform_where(valid, dtype)
            return uniform if mask is None else uniform + _spoilt(mask, dtype)
        log_mass = log_mass.to(dtype)
        if valid is None:
            return log_mass
        log_mass = torch.where(valid, log_mass, -math.inf)
        return log_mass if mask is None else log_mass + _spoilt(mask, dtype)

    def _check_combination(self) -> None:
        names = self.names
        for name, value in ((names.mask, self.mask), (names.lengths, self.lengths)):
            if value is not None and self.offsets is not None:
                raise ValueError(
                    f"{name} is given together with {names.offsets}; expected one of them"
                )
        for first, second, one, other in (
            (names.lengths, names.mask, self.lengths, self.mask),
            (names.mass, names.log_mass, self.mass, self.log_mass),
        ):
            if one is not None and other is not None:
                raise ValueError(f"{first} is given together with {second}; expected one of them")

    def _uniform_of_valid(
        self, source: Tensor, shape: tuple[int, ...], dtype: torch.dtype, backend: str
    ) -> Tensor:
        """Log-masses of equal masses for a mask or lengths whose values are at hand."""
        batch, size = shape
        lengths, mask = self.lengths, self.mask
        if mask is not None:
            self._check_mask(mask, source, shape)
        else:
            self._check_lengths(lengths, source, shape)
        if registry.requested(backend) in ("auto", "cpu") and library.load_cpu().reason is None:
            if mask is None and lengths is not None:
                return cpu.equal_masses(batch, size, dtype, lengths=lengths.to(torch.int64))
            if mask is not None and mask.dtype in structs.MASK_CODES:
                with contextlib.suppress(cpu.InvalidMask):
                    return cpu.equal_masses(batch, size, dtype, mask=mask)
        if mask is not None:
            _check_binary(self.names.mask, mask)
            return _uniform_where(mask != 0, dtype)
        return _uniform_where(_before(lengths, size), dtype)

    def _valid_by_mask(self, source: Tensor, shape: tuple[int, ...]) -> Tensor:
        mask = self.mask
        assert mask is not None
        self._check_mask(mask, source, shape)
        if mask.dtype == torch.bool:
            return mask
        if values_available(mask):
            _check_binary(self.names.mask, mask)
        return mask == 1

    def _check_mask(self, mask: Tensor, source: Tensor, shape: tuple[int, ...]) -> None:
        names = self.names
        if not isinstance(mask, Tensor):
            found = type(mask).__name__
            raise TypeError(f"{names.mask} is a {found}; expected a bool tensor {tuple(shape)}")
        if mask.shape == shape and mask.device == source.device and not mask.is_complex():
            return
        check_shape(names.mask, mask, shape, f"(batch, {names.size}) of {names.source}")
        check_device(names.mask, mask, names.source, source)
        if mask.is_complex():
            expected = "bool, or 0/1 integers or floats"
            raise TypeError(f"{names.mask} has dtype {mask.dtype}; expected {expected}")

    def _valid_by_length(self, source: Tensor, shape: tuple[int, ...]) -> Tensor:
        self._check_lengths(self.lengths, source, shape)
        return _before(self.lengths, shape[1])

    def _check_lengths(self, lengths: Any, source: Tensor, shape: tuple[int, ...]) -> None:
        name = self.names.lengths
        check_integers(name, lengths, f"({shape[0]},)")
        check_shape(name, lengths, shape[:1], f"(batch,) of {self.names.source}")
        check_device(name, lengths, self.names.source, source)
        if values_available(lengths):
            for i, length in enumerate(lengths.tolist()):
                if not 0 <= length <= shape[1]:
                    raise ValueError(f"{name} is {length} at {i}; expected 0 to {shape[1]}")

    def _check_values(self, name: str, value: Any, source: Tensor, shape: tuple[int, ...]) -> None:
        names = self.names
        layout = f"(batch, {names.size})" if self.offsets is None else f"({names.size.upper()},)"
        check_floating(name, value, layout, len(shape))
        check_shape(name, value, shape, f"{layout} of {names.source}")
        check_device(name, value, names.source, source)

    def _check_log_mass(
        self, log_mass: Tensor, source: Tensor, shape: tuple[int, ...], balanced: bool
    ) -> None:
        """Check log-masses; refuse those of a balanced problem that plainly are probabilities."""
        names = self.names
        self._check_values(names.log_mass, log_mass, source, shape)
        if not (balanced and self.offsets is None and values_available(log_mass)):
            return
        if shape[1] < 2 or not log_mass.numel() or log_mass.detach().min() < 0:
            return
        total = log_mass.detach().sum(1, dtype=torch.float64)
        if bool(((total - 1).abs() <= 1e-3).all()):
            raise ValueError(
                f"{names.log_mass} is non-negative and sums to 1, like probabilities; expected "
                f"their logarithms (pass probabilities as {names.mass}=)"
            )

    def _logarithm(self, source: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Logarithm of the masses, with a gradient of 0, not NaN, where a mass is 0."""
        name, mass = self.names.mass, self.mass
        self._check_values(name, mass, source, shape)
        assert mass is not None
        if values_available(mass):
            valid = mass.detach() >= 0
            if not bool(valid.all()):
                worst = mass.detach()[~valid][0].item()
                raise ValueError(f"{name} holds {worst}; expected masses >= 0")
        mass = mass if mass.dtype == torch.float64 else mass.float()
        # NaN and negative masses whose values nobody could look at become NaN.
        return torch.where(mass == 0, -math.inf, torch.where(mass == 0, 1.0, mass).log())


def in_one_launch(
    rows: Masses,
    columns: Masses,
    source: Tensor,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    epsilon: float | Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return the log-masses of both sides and the temperatures, from one launch on a device.

    None if masses or temperatures are given as tensors, or no Triton kernel can run: then each is
    made by operations of PyTorch. ``shape`` is (batch, n, m).
    """
    if source.is_cpu and backend != "triton":
        return None
    _, log_a, mask_a, lengths_a, offsets, a = rows
    _, log_b, mask_b, lengths_b, _, b = columns
    if not (log_a is log_b is offsets is a is b is None) or isinstance(epsilon, Tensor):
        return None
    if tracing() or dispatched() or registry.requested(backend) == "reference":
        return None
    given = mask_a, mask_b, lengths_a, lengths_b
    for tensor in given:
        if tensor is not None and not (
            type(tensor) in CONCRETE and tensor.dtype in structs.MASK_CODES
        ):
            return None
    if type(source) not in CONCRETE or not registry.runs_triton(source):
        return None
    batch, n, m = shape
    for side, size in ((rows, n), (columns, m)):
        if side.lengths is not None:
            side._check_combination()
            side._check_lengths(side.lengths, source, (batch, size))
        elif side.mask is not None:
            side._check_mask(side.mask, source, (batch, size))
            if source.is_cpu:
                _check_binary(side.names.mask, side.mask)
    made: tuple[Tensor, Tensor, Tensor] = _triton_masses().equal_masses(
        batch, n, m, dtype, float(epsilon), *given, device=source.device
    )
    return made


@functools.cache
def _triton_masses() -> Any:
    return importlib.import_module("optical.kernels.tokens.masses")


def offsets_of(side: Masses, vectors: Tensor) -> Tensor | None:
    """Return (batch + 1,) int64: the offset of each packed problem, and their total length."""
    name, offsets = side.names.offsets, side.offsets
    if offsets is None:
        return None
    check_integers(name, offsets, "(batch + 1,)")
    if offsets.dim() != 1 or offsets.shape[0] < 1:
        raise ValueError(f"{name} has shape {tuple(offsets.shape)}; expected (batch + 1,)")
    check_device(name, offsets, side.names.source, vectors)
    if values_available(offsets):
        values = offsets.tolist()
        if values[0] != 0:
            raise ValueError(f"{name} begins with {values[0]}; expected 0")
        for i, (before, after) in enumerate(itertools.pairwise(values)):
            if after < before:
                raise ValueError(f"{name} falls from {before} to {after} at {i + 1}; it must not")
        if values[-1] != vectors.shape[0]:
            expected = f"{vectors.shape[0]}, the length of {side.names.source}"
            raise ValueError(f"{name} ends with {values[-1]}; expected {expected}")
    return _as_int64(offsets)


# Offsets -> (their version, version of the copy, stream of the copy, their int64 copy).
_copies: Any = WeakTensorKeyDictionary()


def _as_int64(offsets: Tensor) -> Tensor:
    """Return offsets as int64, with one copy per tensor rather than one per call.

    A backend that has read the longest lengths of a tensor knows them for as long as it lives; a
    new tensor in each call would make it wait for the device each time. A CUDA graph must contain
    the conversion, because its inputs change in place between replays.
    """
    plain = type(offsets) in CONCRETE and not (tracing() or dispatched() or offsets.is_inference())
    if offsets.dtype == torch.int64 or not plain or torch.is_inference_mode_enabled():
        return offsets.to(torch.int64)
    stream = None
    if offsets.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return offsets.to(torch.int64)
        stream = torch.cuda.current_stream(offsets.device).cuda_stream
    version, copy_version, copy_stream, copy = _copies.get(offsets, (None,) * 4)
    if copy is None or (version, copy_version, copy_stream) != (
        offsets._version,
        copy._version,
        stream,
    ):
        copy = offsets.to(torch.int64)
        _copies[offsets] = offsets._version, copy._version, stream, copy
    kept: Tensor = copy
    return kept


def _uniform(
    source: Tensor, shape: tuple[int, ...], dtype: torch.dtype, offsets: Tensor | None
) -> Tensor:
    """Log-masses where every row (or column) is valid."""
    if offsets is not None:
        position = torch.arange(shape[0], device=source.device)
        problem = torch.searchsorted(offsets[1:], position, right=True)
        # Offsets on a device are not checked; vectors beyond the last one belong to the last
        # problem.
        problem = problem.clamp(max=offsets.shape[0] - 2)
        return -offsets.diff().to(dtype).log()[problem]
    if tracing():
        # Arithmetic on the size in Python would fix it in the graph.
        return _uniform_where(torch.ones(shape, dtype=torch.bool, device=source.device), dtype)
    return constant(source, shape, -math.log(max(shape[1], 1)), dtype)


def constant(like: Tensor, shape: tuple[int, ...], value: float, dtype: torch.dtype) -> Tensor:
    """Return a tensor filled with a value on the device of ``like``.

    Small ones on a CPU are kept: filling a tensor takes as long as solving a small problem. One
    that has been written to in place, as a field of ``SinkhornResult.problem``, is replaced.
    """
    kept = like.is_cpu and type(like) in CONCRETE and math.prod(shape) <= 1024
    if not kept or tracing() or torch.is_inference_mode_enabled() or dispatched():
        return like.new_full(shape, value, dtype=dtype)
    filled = _constant(tuple(shape), value, dtype)
    if filled._version:
        _constant.cache_clear()
        filled = _constant(tuple(shape), value, dtype)
    return filled


@functools.lru_cache(maxsize=256)
def _constant(shape: tuple[int, ...], value: float, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, value, dtype=dtype, device="cpu")


def _uniform_where(valid: Tensor, dtype: torch.dtype) -> Tensor:
    count = valid.sum(1, keepdim=True).clamp(min=1).to(dtype)
    log_mass: Tensor = torch.where(valid, -count.log(), -math.inf)
    return log_mass


def _before(lengths: Any, size: int) -> Tensor:
    before: Tensor = torch.arange(size, device=lengths.device) < lengths[:, None]
    return before


def _spoilt(mask: Tensor, dtype: torch.dtype) -> Tensor | float:
    """NaN where a mask whose values were not inspected is neither 0 nor 1, 0 elsewhere."""
    if mask.dtype == torch.bool or values_available(mask):
        return 0.0
    return torch.where((mask == 0) | (mask == 1), 0.0, math.nan).to(dtype)


def _check_binary(name: str, mask: Tensor) -> None:
    if mask.dtype == torch.bool:
        return
    wrong = (mask != 0) & (mask != 1)
    if bool(wrong.any()):
        found = mask[wrong][0].item()
        raise ValueError(
            f"{name} holds {found}; expected 0 (padding) and 1 (valid), or bool; for an additive "
            f"mask pass {name} == 0"
        )
