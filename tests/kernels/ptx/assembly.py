"""Parses the PTX of one kernel into the tables of ``machine.cpp``.

Triton writes one instruction per line; inline assembly may hold several, in braces.
"""

import re
import struct
from pathlib import Path

import numpy as np

KINDS = {"b": 0, "s": 1, "u": 2, "f": 3, "bf": 4, "tf": 5, "pred": 6}
COMPARISONS = {"eq": 0, "ne": 1, "lt": 2, "le": 3, "gt": 4, "ge": 5, "num": 6, "nan": 7}
UNORDERED = 8
COMBINATIONS = {"and": 1, "or": 2, "xor": 3}
ROUNDING = {"rmi": 1, "rpi": 2, "rzi": 3, "rni": 4}
# Operations with the same operands in PTX and in the machine, by the name in PTX.
PLAIN = {*("mov", "add", "sub", "mul", "mad", "fma", "div", "rem", "min", "max", "neg", "abs")}
PLAIN |= {*("and", "or", "xor", "not", "shl", "shr", "bfe", "prmt", "selp")}
PLAIN |= {*("ex2", "lg2", "rcp", "sqrt", "rsqrt")}
IGNORED = ("fence", "membar", "griddepcontrol", "setmaxnreg")
SPECIAL = [f"%{name}.{axis}" for name in ("ctaid", "nctaid", "tid", "ntid") for axis in "xyz"]
SHARED_ORIGIN = 1024

FIELDS = "operation kind bits from_kind from_bits flush mode detail predicate unless"
FIELDS += " results sources first vector line"
INSTRUCTION = np.dtype([(name, "<i4") for name in FIELDS.split()])
OPERAND = np.dtype([("reg", "<i4"), ("negated", "<i4"), ("immediate", "<u8")])
_HEADER = Path(__file__).with_name("arithmetic.h").read_text(encoding="utf-8")
_NAMES = re.search(r"enum Operation \{(.*?)\}", _HEADER, re.DOTALL)[1].replace("\n", " ").split(",")
OPERATIONS = {name.strip(): i for i, name in enumerate(_NAMES) if name.strip()}


class Unsupported(Exception):
    """The machine does not know an instruction."""


def type_of(name: str) -> tuple[int, int]:
    """Kind and bits of a type such as ``b32``, ``bf16x2`` or ``pred``."""
    if name == "pred":
        return KINDS["pred"], 1
    match = re.fullmatch(r"(b|s|u|f|bf|tf)(\d+)(x2)?", name)
    if match is None:
        raise Unsupported(f"the type {name}")
    # TF32 is a float32 whose last bits do not count.
    return KINDS[match[1]], int(match[2])


def split(text: str) -> list[str]:
    """Split operands at the commas outside of brackets."""
    parts = re.findall(r"(?:\{[^}]*\}|\[[^]]*\]|[^,{\[])+", text)
    return [part.strip() for part in parts if part.strip()]


class Assembly:
    """The instructions of a kernel.

    Attributes:
        code, operands: arrays of INSTRUCTION and OPERAND.
        registers: number of registers, special ones included.
        parameters: (offset, bytes) of each parameter of the kernel, and in all ``parameter_bytes``.
        threads: threads per block.
    """

    def __init__(self, text: str) -> None:
        self._registers = {name: i for i, name in enumerate(SPECIAL)}
        self._code: list[tuple[int, ...]] = []
        self._operands: list[tuple[int, int, int]] = []
        self._labels: dict[str, int] = {}
        self._branches: list[tuple[int, str]] = []
        self._offsets: dict[str, int] = {}
        self.parameters: list[tuple[int, int]] = []
        self.threads = int(re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", text)[1])
        head, body = text[text.index(".entry") :].split("{", 1)
        self._read_parameters(head)
        first_line = text[: text.index(body)].count("\n") + 1
        for i, line in enumerate(re.sub(r"/\*.*?\*/", "", body).split("\n")):
            self._line = first_line + i
            for statement in line.split("//")[0].split(";"):
                self._read_statement(statement.strip())
        for place, label in self._branches:
            row = list(self._code[place])
            row[FIELDS.split().index("mode")] = self._labels[label]
            self._code[place] = tuple(row)
        self.code = np.array(self._code, INSTRUCTION)
        self.operands = np.array(self._operands, OPERAND)
        self.registers = len(self._registers)

    def _read_parameters(self, head: str) -> None:
        end = 0
        for kind, name in re.findall(r"\.param\s+\.(\w+)[^,)]*?(\w+_param_\d+)", head):
            size = type_of(kind)[1] // 8
            start = -(-end // size) * size
            self._offsets[name], end = start, start + size
            self.parameters.append((start, size))
        self.parameter_bytes = end

    def _operand(self, text: str, negated: int = 0) -> tuple[int, int, int]:
        if text.startswith("!"):
            return self._operand(text[1:], 1)
        if text == "_":
            return -1, 0, 0
        if text == "global_smem":
            return -1, 0, SHARED_ORIGIN
        if text.startswith(("0f", "0F", "0d", "0D")):
            return -1, 0, int(text[2:], 16)
        if re.match(r"-?\d", text):
            number = struct.unpack("<Q", struct.pack("<d", float(text)))[0] if "." in text else None
            return -1, 0, (int(text.rstrip("U"), 0) & (2**64 - 1)) if number is None else number
        return self._registers.setdefault(text, len(self._registers)), negated, 0

    def _list(self, text: str) -> list[tuple[int, int, int]]:
        return [self._operand(x.strip()) for x in text.strip("{}").split(",")]

    def _address(self, text: str) -> list[tuple[int, int, int]]:
        base, _, offset = text.strip("[]").replace(" ", "").partition("+")
        return [self._operand(base), self._operand(offset or "0")]

    def _read_statement(self, text: str) -> None:
        # Inline assembly puts braces around its registers.
        if text.count("{") > text.count("}"):
            text = text.lstrip("{ ")
        elif text.count("}") > text.count("{"):
            text = text.rstrip("} ")
        while match := re.match(r"([$\w]+):\s*", text):
            self._labels[match[1]] = len(self._code)
            text = text[match.end() :]
        if text.startswith((".", ")")) or not text.strip("{} "):
            return
        self._guard = (-1, 0)
        if match := re.match(r"@(!?)(%?\w+)\s+", text):
            self._guard = self._operand(match[2])[0], int(match[1] == "!")
            text = text[match.end() :]
        name, _, rest = text.partition(" ")
        parts = name.split(".")
        if parts[0] in IGNORED:
            return
        arguments = split(rest)
        read = getattr(self, f"_read_{parts[0]}", self._read_plain)
        try:
            read(parts, arguments)
        except (Unsupported, KeyError, IndexError) as error:
            raise Unsupported(f"line {self._line}: {text} ({error})") from error

    def _emit(
        self,
        operation: str,
        results: list[tuple[int, int, int]],
        sources: list[tuple[int, int, int]],
        type_name: str = "b64",
        source_type: str = "b64",
        **options: int,
    ) -> None:
        values = {"operation": OPERATIONS[operation], "line": self._line, "vector": 1}
        values["kind"], values["bits"] = type_of(type_name)
        values["from_kind"], values["from_bits"] = type_of(source_type)
        values["predicate"], values["unless"] = self._guard
        values |= {"results": len(results), "sources": len(sources), "first": len(self._operands)}
        values |= options
        self._code.append(tuple(int(values.get(field, 0)) for field in FIELDS.split()))
        self._operands += results + sources

    def _read_plain(self, parts: list[str], arguments: list[str]) -> None:
        name, modifiers = parts[0], parts[1:-1]
        if name not in PLAIN or {"sat", "NaN", "cc", "hi", "up", "down"} & set(modifiers):
            raise Unsupported(".".join(parts))
        result, *sources = (self._operand(x) for x in arguments)
        operation = name.upper() + ("WIDE" if "wide" in modifiers else "")
        options = {"flush": "ftz" in modifiers, "mode": bool({"full", "approx"} & set(modifiers))}
        self._emit(operation, [result], sources, parts[-1], **options)

    def _read_mov(self, parts: list[str], arguments: list[str]) -> None:
        to, source = arguments
        bits = type_of(parts[-1])[1]
        if to.startswith("{"):
            results = self._list(to)
            self._emit("UNPACK", results, [self._operand(source)], f"b{bits // len(results)}")
        elif source.startswith("{"):
            sources = self._list(source)
            self._emit("PACK", [self._operand(to)], sources, f"b{bits // len(sources)}")
        else:
            self._read_plain(parts, arguments)

    def _read_ld(self, parts: list[str], arguments: list[str]) -> None:
        results = self._list(arguments[0])
        if "param" in parts:
            name, _, offset = arguments[1].strip("[]").partition("+")
            place = (-1, 0, self._offsets[name.strip()] + int(offset or 0))
            self._emit("PARAM", results, [place], parts[-1])
        elif {"global", "shared"} & set(parts):
            options = {"mode": "shared" in parts, "vector": len(results)}
            self._emit("LOAD", results, self._address(arguments[1]), parts[-1], **options)
        else:
            raise Unsupported("a generic address")

    def _read_st(self, parts: list[str], arguments: list[str]) -> None:
        if not {"global", "shared"} & set(parts):
            raise Unsupported("a generic address")
        values = self._list(arguments[1])
        options = {"mode": "shared" in parts, "vector": len(values)}
        self._emit("STORE", [], self._address(arguments[0]) + values, parts[-1], **options)

    def _read_setp(self, parts: list[str], arguments: list[str]) -> None:
        comparison, combination = parts[1], COMBINATIONS.get(parts[2], 0)
        # Unsigned comparisons have names of their own.
        comparison = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(comparison, comparison)
        if comparison in COMPARISONS:
            mode = COMPARISONS[comparison]
        else:
            mode = COMPARISONS[comparison[:-1]] + UNORDERED
        result, *sources = (self._operand(x) for x in arguments)
        options = {"mode": mode, "detail": combination, "flush": "ftz" in parts}
        self._emit("SETP", [result], sources, parts[-1], **options)

    def _read_cvt(self, parts: list[str], arguments: list[str]) -> None:
        result, *sources = (self._operand(x) for x in arguments)
        mode = next((ROUNDING[part] for part in parts if part in ROUNDING), 0)
        options = {"mode": mode, "flush": "ftz" in parts}
        operation = "CVTPACK" if parts[-2].endswith("x2") else "CVT"
        self._emit(operation, [result], sources, *parts[-2:], **options)

    def _read_shfl(self, parts: list[str], arguments: list[str]) -> None:
        result = self._operand(arguments[0].split("|")[0])
        sources = [self._operand(x) for x in arguments[1:3]]
        self._emit("SHFL", [result], sources, parts[-1], mode={"bfly": 0, "idx": 1}[parts[2]])

    def _read_redux(self, parts: list[str], arguments: list[str]) -> None:
        result, source, _ = (self._operand(x) for x in arguments)
        self._emit("REDUX", [result], [source], parts[-1], mode=OPERATIONS[parts[2].upper()])

    def _read_bra(self, _parts: list[str], arguments: list[str]) -> None:
        self._branches.append((len(self._code), arguments[0]))
        self._emit("BRA", [], [])

    def _read_ret(self, _parts: list[str], _arguments: list[str]) -> None:
        self._emit("RET", [], [])

    def _read_bar(self, parts: list[str], arguments: list[str]) -> None:
        if "warp" in parts:
            self._emit("WARPBAR", [], [])
        else:
            self._emit("BAR", [], [], mode=int(arguments[0], 0))

    def _read_mma(self, parts: list[str], arguments: list[str]) -> None:
        shape, kind = parts[3], parts[-2]
        if parts[-1] != "f32" or shape != ("m16n8k8" if kind == "tf32" else "m16n8k16"):
            raise Unsupported(".".join(parts))
        result, a, b, c = (self._list(x) for x in arguments)
        self._emit("MMA", result, a + b + c, source_type=kind, vector=8)

    def _read_wgmma(self, parts: list[str], arguments: list[str]) -> None:
        if parts[1] != "mma_async":
            return
        result, a, b, add, scale_a, scale_b, *transposed = arguments
        columns = int(re.search(r"n(\d+)k", ".".join(parts))[1])
        in_registers = a.startswith("{")
        if (scale_a, scale_b) != ("1", "1"):
            raise Unsupported("a negated operand")
        # With A in registers only the transposition of B is given.
        flags = [0, 0, *(int(x) for x in transposed)][-2:]
        detail = int(in_registers) | 2 * flags[0] | 4 * flags[1]
        sources = [*self._list(a), self._operand(b), self._operand(add)]
        options = {"detail": detail, "vector": columns}
        self._emit("WGMMA", self._list(result), sources, source_type=parts[-1], **options)

    def _read_ldmatrix(self, parts: list[str], arguments: list[str]) -> None:
        registers = self._list(arguments[0])
        options = {"mode": "trans" in parts, "vector": len(registers)}
        self._emit("LDMATRIX", registers, self._address(arguments[1]), **options)

    def _read_stmatrix(self, parts: list[str], arguments: list[str]) -> None:
        registers = self._list(arguments[1])
        options = {"mode": "trans" in parts, "vector": len(registers)}
        self._emit("STMATRIX", [], self._address(arguments[0]) + registers, **options)

    def _read_cp(self, parts: list[str], arguments: list[str]) -> None:
        if parts[2] == "commit_group":
            self._emit("CPCOMMIT", [], [])
        elif parts[2] == "wait_group":
            self._emit("CPWAIT", [], [], mode=int(arguments[0], 0))
        elif parts[2] in ("ca", "cg"):
            to, source, size, *copied = arguments
            sources = self._address(to) + self._address(source)
            sources += [self._operand(x) for x in copied]
            self._emit("CPASYNC", [], sources, mode=int(size, 0))
        else:
            raise Unsupported(".".join(parts))
