"""Parses PTX into the tables of ``machine.cpp``: records of integers, with every name resolved.

Most instructions are one operation of the machine on their own operands, as ``FORMS`` says; a few
become several. Calls of functions pass their parameters on the stack and do not nest.
"""

import re
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

_HEADER = Path(__file__).with_name("arithmetic.h").read_text(encoding="utf-8")


def _enumeration(name: str) -> dict[str, int]:
    text = re.search(rf"enum {name} {{(.*?)}}", _HEADER, re.DOTALL)[1]
    return {name: i for i, name in enumerate(re.findall(r"\w+", re.sub("//.*", "", text)))}


OPERATIONS, KIND, MODE, SCOPE = map(_enumeration, ("Operation", "Kind", "Mode", "Scope"))
KINDS = {"b": "UNSIGNED", "u": "UNSIGNED", "s": "SIGNED", "f": "FLOAT", "bf": "BFLOAT"}
KINDS |= {"tf": "TFLOAT"}
# Operation and operands: a to d are those of the instruction, numbers have its type.
FORMS = {name: (name.upper(), "a b") for name in ("div", "rem", "min", "max", "shl", "shr")}
FORMS |= {name: (name.upper(), "a b") for name in ("and", "or", "xor")}
FORMS |= {name: (name.upper(), "a b c") for name in ("fma", "prmt", "selp")}
FORMS |= {name: (name.upper(), "a") for name in ("cvt", "ex2", "lg2", "rcp", "sqrt", "rsqrt")}
FORMS |= {"bfi": ("BFI", "a b c d"), "mov": ("CVT", "a"), "cvta": ("CVT", "a")}
FORMS |= {"mad": ("FMA", "a b c"), "mul": ("FMA", "a b -0"), "add": ("FMA", "a 1 b")}
FORMS |= {"sub": ("FMA", "b -1 a"), "neg": ("FMA", "a -1 -0"), "not": ("XOR", "a -1")}
# These move bits, whatever the type says.
BITS = {"mov", "selp", "and", "or", "xor", "not"}
MODIFIERS = {"full": "APPROXIMATE", "approx": "APPROXIMATE", "rmi": "FLOOR", "rzi": "TRUNCATE"}
MODIFIERS |= dict.fromkeys(("rn", "rna", "ftz", "lo", "wide", "to", "global", "param"), "EXACT")
# Bits of Comparison.
COMPARISONS = {"lt": 1, "eq": 2, "le": 3, "gt": 4, "ne": 5, "ge": 6, "num": 7, "nan": 8}
COMPARISONS |= {name + "u": bits | 8 for name, bits in COMPARISONS.items() if bits < 7}
IGNORED = {"fence", "wgmma.fence", "wgmma.commit_group", "wgmma.wait_group"}

SPECIAL = [f"%{name}.{axis}" for name in ("ctaid", "nctaid") for axis in "xyz"]
SPECIAL += ["%tid.x", "%ntid.x", "%cluster_ctarank", "%cluster_nctarank"]
SPECIAL += ["(vote)", "(shared)", "(stack)", "(return)"]
SHARED_ORIGIN, PARAMETERS = 1024, 3 << 60
SLOT, SLOTS = 8, 32  # bytes of a parameter of a function on the stack, and their number
END = 1 << 30  # a place behind every instruction

FIELDS = "operation kind bits to_kind to_bits flush mode count predicate unless"
FIELDS += " results sources first line"
INSTRUCTION = np.dtype([(name, "<i4") for name in FIELDS.split()])
OPERAND = np.dtype([("register", "<i8"), ("immediate", "<u8")])
FUNCTION = re.compile(r"\.(entry|func)\s+(\w+)\s*\(([^)]*)\)[^;{}]*\{")
STATEMENT = re.compile(r"\s*([{}]|[$\w]+:|[^;{}]*(?:\{[^{}]*\}[^;{}]*)*;)")

Operand = tuple[int, int | str]  # a register (-1: none) and a number, or the name of a label
ALL_LANES, ZERO, ONE = (-1, 2**32 - 1), (-1, 0), (-1, 1)


class Unsupported(Exception):
    """The machine does not know an instruction."""


def type_of(name: str) -> tuple[int, int]:
    """Kind and bits of a type such as ``b32``, ``bf16`` or ``pred``."""
    if name == "pred":
        return KIND["UNSIGNED"], 1
    match = re.fullmatch(r"(b|s|u|f|bf|tf)(\d+)", name)
    if match is None:
        raise Unsupported(f"the type {name}")
    return KIND[KINDS[match[1]]], int(match[2])


def constant(text: str, kind: int, bits: int) -> Operand:
    """A number of a type, from its decimal digits."""
    if kind >= KIND["FLOAT"]:
        return -1, int.from_bytes(struct.pack("<f" if bits == 32 else "<d", float(text)), "little")
    return -1, int(text) & (2**64 - 1)


class Assembly:
    """A program.

    Attributes:
        code, operands: arrays of INSTRUCTION and OPERAND.
        registers: their number, special ones included.
        parameters: offset and bytes of each parameter of the kernel.
        stack: bytes of the stack of a thread.
    """

    def __init__(self, text: str) -> None:
        text = re.sub(r"//.*|^\s*\.loc\s.*$", "", text, flags=re.MULTILINE)
        self._code: list[tuple[int, ...]] = []
        self._operands: list[Operand] = []
        self._labels: dict[str, int] = {}
        # Base of the memory that a name stands for, and its place there.
        self._symbols: dict[str, tuple[str, int]] = {}
        for name in re.findall(r"\.extern\s+\.shared\s[^;]*?(\w+)\[\]", text):
            self._symbols[name] = "(shared)", SHARED_ORIGIN
        self.parameters: list[tuple[int, int]] = []
        self.registers, self.stack, self._arrival = len(SPECIAL), SLOT * SLOTS, -1
        functions = sorted(FUNCTION.finditer(text), key=lambda match: match[1] != "entry")
        for match in functions:
            self._read_function(text, match)
        resolved = [(reg, self._labels.get(x, x)) for reg, x in self._operands]
        self.code = np.array(self._code, INSTRUCTION)
        self.operands = np.array(resolved, OPERAND)

    def _read_function(self, text: str, function: re.Match[str]) -> None:
        self._is_entry, end = function[1] == "entry", 0
        found = re.findall(r"(?:\.align (\d+) )?\.(\w\d+) [^,]*?(\w+)(?:\[(\d+)\])?\s*(?:,|$)", function[3])
        for align, kind, name, count in found:
            each = type_of(kind)[1] // 8
            start = -(-end // int(align or each)) * int(align or each)
            end = start + each * int(count or 1)
            if self._is_entry:
                self._symbols[name] = "", PARAMETERS + start
                self.parameters.append((start, end - start))
            else:
                self._place_argument(name)
        self._labels[function[2]] = len(self._code)
        self._scopes: list[dict[str, int]] = [{name: i for i, name in enumerate(SPECIAL)}]
        self._line = text.count("\n", 0, function.end()) + 1
        for match in STATEMENT.finditer(text, function.end()):
            self._line += match[0].count("\n")
            statement = match[1]
            if statement == "{":
                self._scopes.append({})
            elif statement == "}":
                self._scopes.pop()
                if not self._scopes:
                    break
            elif statement.endswith(":"):
                self._labels[statement[:-1]] = len(self._code)
            elif statement.startswith("."):
                self._read_declaration(statement.split())
            else:
                self._read_instruction(statement[:-1].strip())

    def _place_argument(self, name: str) -> None:
        self._symbols[name] = "(stack)", SLOT * int(re.search(r"param_?(\d+)$", name)[1])

    def _read_declaration(self, words: list[str]) -> None:
        name = words[-1].rstrip(";")
        if words[0] == ".param":
            self._place_argument(name)
        elif words[0] == ".local":
            self._symbols[name.split("[")[0]] = "(stack)", self.stack
            self.stack += -(-int(re.search(r"\[(\d+)\]", name)[1]) // 16) * 16
        elif words[0] == ".reg" and len(self._scopes) > 1:
            for local in " ".join(words[2:]).rstrip(";").split(","):
                self._scopes[-1][local.strip()] = self._new_register()

    def _new_register(self) -> int:
        self.registers += 1
        return self.registers - 1

    def _operand(self, text: str) -> Operand:
        text = text.strip()
        for scope in reversed(self._scopes):
            if text in scope:
                return scope[text], 0
        if text.startswith("%"):
            self._scopes[0][text] = self._new_register()
            return self._scopes[0][text], 0
        if text in self._symbols:
            return -1, self._symbols[text][1]
        if re.match("0[fFdD]", text):
            return -1, int(text[2:], 16)
        return ZERO if text == "_" else (-1, int(text.rstrip("U"), 0) & (2**64 - 1))

    def _list(self, text: str) -> list[Operand]:
        return [self._operand(x) for x in text.strip("{} ").split(",")]

    def _address(self, text: str, parts: Sequence[str]) -> list[Operand]:
        """The base of the memory, the register or symbol, and the offset."""
        name, _, offset = text.strip("[] ").partition("+")
        base = "(shared)" if "shared" in parts else "(stack)" if "local" in parts else ""
        base = self._symbols.get(name.strip(), (base, 0))[0]
        return [self._operand(x) for x in (base or "0", name, offset or "0")]

    def _emit(
        self,
        operation: str,
        results: Sequence[Operand],
        sources: Sequence[Operand],
        kind: tuple[int, int] = (0, 64),
        to: tuple[int, int] = (0, 64),
        *,
        flush: int = 0,
        mode: int = 0,
        count: int = 0,
    ) -> None:
        counts = len(results), len(sources), len(self._operands)
        record = OPERATIONS[operation], *kind, *to, flush, mode, count, *self._guard, *counts
        self._code.append((*record, self._line))
        self._operands += [*results, *sources]

    def _read_instruction(self, text: str) -> None:
        self._guard = -1, 0
        if text.startswith("@"):
            guard, text = text[1:].split(None, 1)
            self._guard = int(self._operand(guard.strip("!"))[0]), int(guard.startswith("!"))
        name, _, rest = text.partition(" ")
        name, _, more = name.partition("\t")
        parts = name.split(".")
        if parts[0] in IGNORED or ".".join(parts[:2]) in IGNORED:
            return
        arguments = re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s][^,]*", f"{more} {rest}")
        try:
            getattr(self, f"_read_{parts[0]}", self._read_plain)(parts, arguments)
        except (Unsupported, KeyError, IndexError, ValueError) as error:
            raise Unsupported(f"line {self._line}: {text} ({error!r})") from error

    # --- one method per family of instructions: its name with modifiers, and its arguments ----------

    def _read_plain(self, parts: list[str], arguments: list[str]) -> None:
        operation, template = FORMS[parts[0]]
        kind = type_of(parts[-1])
        if parts[0] in BITS:
            kind = KIND["UNSIGNED"], kind[1]
        to = (kind[0], 2 * kind[1]) if "wide" in parts else kind
        modifiers = parts[1:-1]
        if parts[0] == "cvt":
            to = type_of(modifiers.pop())
        mode = max(MODE[MODIFIERS[part]] for part in ("rn", *modifiers))
        result, *sources = (self._operand(x) for x in arguments)
        named = dict(zip("abcd", sources, strict=False))
        operands = [named.get(x) or constant(x, *kind) for x in template.split()]
        self._emit(operation, [result], operands, kind, to, flush="ftz" in parts, mode=mode)

    def _pack(self, result: Operand, parts: Sequence[Operand], bits: int, to_bits: int) -> None:
        """Join registers of ``bits`` bits, the lowest first."""
        shifted, kind = (self._new_register(), 0), (0, to_bits)
        self._emit("CVT", [result], parts[:1], kind, kind)
        for i, part in enumerate(parts[1:], 1):
            self._emit("SHL", [shifted], [part, (-1, bits * i)], kind, kind)
            self._emit("OR", [result], [result, shifted], kind, kind)

    def _read_mov(self, parts: list[str], arguments: list[str]) -> None:
        bits = type_of(parts[-1])[1]
        if arguments[0].startswith("{"):
            results, source = self._list(arguments[0]), self._operand(arguments[1])
            each = bits // len(results)
            for i, result in enumerate(results):
                self._emit("SHR", [result], [source, (-1, each * i)], (0, bits), (0, each))
        elif arguments[1].startswith("{"):
            sources = self._list(arguments[1])
            self._pack(self._operand(arguments[0]), sources, bits // len(sources), bits)
        else:
            self._read_plain(parts, arguments)

    def _read_cvt(self, parts: list[str], arguments: list[str]) -> None:
        if not parts[-2].endswith("x2"):
            return self._read_plain(parts, arguments)
        halves = [(self._new_register(), 0) for _ in range(2)]
        kind, to = type_of(parts[-1]), type_of(parts[-2][:-2])
        for half, source in zip(halves, reversed(arguments[1:]), strict=True):
            self._emit("CVT", [half], [self._operand(source)], kind, to)
        return self._pack(self._operand(arguments[0]), halves, 16, 32)

    def _read_cvta(self, parts: list[str], arguments: list[str]) -> None:
        result, source = (self._operand(x) for x in arguments)
        base = self._operand("(shared)") if parts[1] == "shared" else ZERO
        self._emit("FMA", [result], [source, ONE, base])

    def _read_mapa(self, _parts: list[str], arguments: list[str]) -> None:
        result, address, rank = (self._operand(x) for x in arguments)
        self._emit("BFI", [result], [rank, address, (-1, 24), (-1, 4)])

    def _read_abs(self, parts: list[str], arguments: list[str]) -> None:
        masks = {"f32": 2**31 - 1, "f64": 2**63 - 1, "bf16": 0x7FFF, "bf16x2": 0x7FFF7FFF}
        result, source = (self._operand(x) for x in arguments)
        self._emit("AND", [result], [source, (-1, masks[parts[-1]])])

    def _read_bfe(self, parts: list[str], arguments: list[str]) -> None:
        result, source = (self._operand(x) for x in arguments[:2])
        kind = type_of(parts[-1])
        place, length = (int(x, 0) for x in arguments[2:])
        left, right = (-1, kind[1] - place - length), (-1, kind[1] - length)
        self._emit("SHL", [result], [source, left], kind, kind)
        self._emit("SHR", [result], [result, right], kind, kind)

    def _read_setp(self, parts: list[str], arguments: list[str]) -> None:
        (_, comparison, kind), (result, *sources) = parts, map(self._operand, arguments)
        mode = COMPARISONS[comparison]
        self._emit("SETP", [result], sources, type_of(kind), type_of("pred"), mode=mode)

    def _read_ld(self, parts: list[str], arguments: list[str]) -> None:
        results, address = self._list(arguments[0]), self._address(arguments[1], parts)
        self._emit("LOAD", results, address, type_of(parts[-1]), count=len(results))

    def _read_st(self, parts: list[str], arguments: list[str]) -> None:
        address, values = self._address(arguments[0], parts), self._list(arguments[1])
        self._emit("STORE", [], address + values, type_of(parts[-1]), count=len(values))

    def _read_shfl(self, parts: list[str], arguments: list[str]) -> None:
        result = self._operand(arguments[0].split("|")[0])
        mode = {"bfly": 1, "idx": 0}[parts[2]]
        self._emit("SHUFFLE", [result], [self._operand(x) for x in arguments[1:]], mode=mode)

    def _read_redux(self, parts: list[str], arguments: list[str]) -> None:
        result, *sources = (self._operand(x) for x in arguments)
        combine = {"add": "FMA", "min": "MIN", "max": "MAX", "or": "OR", "any": "OR"}[parts[2]]
        kind = type_of(parts[-1])
        self._emit("REDUCE", [result], sources, kind, kind, mode=OPERATIONS[combine])

    _read_vote = _read_redux

    def _read_bar(self, parts: list[str], arguments: list[str]) -> None:
        if parts[1] == "warp":
            self._emit("SYNC", [], [self._operand(arguments[0])], mode=SCOPE["LANES"])
        elif parts[1:] == ["sync"] and arguments == ["0"]:
            self._emit("SYNC", [], [ALL_LANES], mode=SCOPE["BLOCK"])
        elif parts[1:] == ["red", "or", "pred"] and arguments[1] == "0":
            result, _, vote = (self._operand(x) for x in arguments)
            self._emit("SYNC", [], [vote, ALL_LANES], mode=SCOPE["BLOCK"])
            self._emit("CVT", [result], [self._operand("(vote)")])
        else:
            raise Unsupported("another barrier")

    def _read_barrier(self, parts: list[str], _arguments: list[str]) -> None:
        if parts[1:3] == ["cluster", "arrive"]:
            self._arrival = len(self._code)
        elif parts[1:3] == ["cluster", "wait"] and self._arrival == len(self._code):
            self._emit("SYNC", [], [ALL_LANES], mode=SCOPE["CLUSTER"])
        else:
            raise Unsupported("something between arrival and wait")

    def _read_bra(self, _parts: list[str], arguments: list[str]) -> None:
        self._emit("JUMP", [], [(-1, arguments[0])])

    def _read_call(self, _parts: list[str], arguments: list[str]) -> None:
        self._emit("CVT", [self._operand("(return)")], [(-1, len(self._code) + 2)])
        self._emit("JUMP", [], [(-1, arguments[0].strip())])

    def _read_ret(self, _parts: list[str], _arguments: list[str]) -> None:
        self._emit("JUMP", [], [(-1, END) if self._is_entry else self._operand("(return)")])

    def _read_mma(self, parts: list[str], arguments: list[str]) -> None:
        shape, kind = parts[3], type_of(parts[-2])
        if parts[-1] != "f32" or shape != f"m16n8k{256 // kind[1]}":
            raise Unsupported("another shape")
        result, a, b, c = (self._list(x) for x in arguments)
        self._emit("MULTIPLY", result, [*a, *b, ONE, *c, ALL_LANES], kind, count=8)

    def _read_wgmma(self, parts: list[str], arguments: list[str]) -> None:
        result, a, b, add, *scales = arguments
        # With A in registers only the transposition of B is given.
        transposed = [0, 0, *(int(x) for x in scales[2:])][-2:]
        if scales[:2] != ["1", "1"]:
            raise Unsupported("a negated operand")
        mode = 4 + 8 * transposed[1] + (0 if a.startswith("{") else 1 + 2 * transposed[0])
        columns, total = int(re.search(r"n(\d+)k", parts[4])[1]), self._list(result)
        sources = [*self._list(a), *map(self._operand, (b, add)), *total, ALL_LANES]
        self._emit("MULTIPLY", total, sources, type_of(parts[-1]), mode=mode, count=columns)

    def _read_ldmatrix(self, parts: list[str], arguments: list[str]) -> None:
        results, sources = self._list(arguments[0]), self._address(arguments[1], parts)
        options = {"mode": int("trans" in parts), "count": len(results)}
        self._emit("LDMATRIX", results, [*sources, ALL_LANES], **options)

    def _read_stmatrix(self, parts: list[str], arguments: list[str]) -> None:
        address, values = self._address(arguments[0], parts), self._list(arguments[1])
        options = {"mode": int("trans" in parts), "count": len(values)}
        self._emit("STMATRIX", [], [*address, *values, ALL_LANES], **options)

    def _read_cp(self, parts: list[str], arguments: list[str]) -> None:
        if parts[2] == "commit_group":
            self._emit("COMMIT", [], [])
        elif parts[2] in ("wait_group", "wait_all"):
            self._emit("AWAIT", [], [], count=int(arguments[0], 0) if arguments else -1)
        else:
            to, source, size, *copied = arguments
            places = [*self._address(to, ["shared"]), *self._address(source, ["global"])]
            sources = [*places, self._operand(copied[0] if copied else size)]
            self._emit("COPY", [], sources, count=int(size, 0))
