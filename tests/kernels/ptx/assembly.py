"""Parses PTX into the tables of ``machine.cpp``: records of integers, with every name resolved."""

import functools
import re
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

# How instructions are carried out, by the first parts of their names: operations, each with its
# results and sources. a to e are the arguments of the instruction, {a} all registers of a list, and
# [a] an address: the base of its memory, a register and an offset. Numbers have the last type.
FORMS = """
add: FMA a = b 1 c                             mma: MULTIPLY {a} = {b} {c} true {d} all
sub: FMA a = c -1 b                            wgmma.mma_async: MULTIPLY {a} = {b} c d {a} all
mul: FMA a = b c -0                            cp.async.ca: COPY = [a] global[b] c last
neg: FMA a = b -1 -0                           cp.async.cg: COPY = [a] global[b] c last
fma mad: FMA a = b c d                         cp.async.commit_group: COMMIT =
not: XOR a = b -1                              cp.async.wait_group: AWAIT = a
abs: AND a = b magnitude                       cp.async.wait_all: AWAIT = -1
mov cvta: CVT a = b                            shfl: SHUFFLE a = b c d e
cvta.shared: FMA a = b 1 (shared)              redux vote: REDUCE a = b c
div rem min max: NAME a = b c                  bar.warp.sync: MEET_LANES = a
and or xor shl shr setp: NAME a = b c          bar.sync: MEET_BLOCK = all
selp prmt bfe: NAME a = b c d                  bar.red: MEET_BLOCK = c all; CVT a = (vote)
cvt ex2 lg2 rcp sqrt rsqrt: NAME a = b         barrier.cluster.wait: MEET_CLUSTER = all
bfi: BFI a = b c d e                           bra: JUMP = a
mapa: BFI a = c b 24 4                         call: CVT (caller) = next; JUMP = a
ld: LOAD {a} = [b]                             ret: JUMP = return
st: STORE = [a] {b}                            barrier.cluster.arrive fence wgmma.fence:
ldmatrix: LDMATRIX {a} = [b] all               wgmma.commit_group wgmma.wait_group:
stmatrix: STMATRIX = [a] {b} all               (join): JOIN a = {b}
(join2): JOIN a = c b
"""
_HEADER = Path(__file__).with_name("arithmetic.h").read_text(encoding="utf-8")
OPERATIONS, SPECIAL = (
    {name: i for i, name in enumerate(re.findall(r"\w+", re.sub("//.*", "", body)))}
    for body in re.findall(r"enum (?:Operation|Special) {(.*?)}", _HEADER, re.DOTALL)
)
ROWS = [row.partition(":") for row in re.split(r"\n|  +", FORMS) if row]
STEPS = {
    name: [[side.split() for side in step.split("=")] for step in body.split(";") if step.strip()]
    for names, _, body in ROWS
    for name in names.split()
}
# Numbers of Kind; operations on bits do not look at it.
KINDS = {"b": 0, "u": 0, "pred": 0, "s": 1, "f": 2, "bf": 3, "tf": 4}
BITWISE = {"mov", "selp", "and", "or", "xor", "not", "shl", "abs"}
UNTYPED = {"LOAD", "SHUFFLE", "LDMATRIX", "MULTIPLY"}  # results have up to 64 bits
# Parts of names that change what an operation does add up to its mode; others are known.
MODES = {"approx": 1, "full": 1, "rmi": 2, "rzi": 3, "trans": 1, "bfly": 1}
MODES |= {"lt": 1, "eq": 2, "le": 3, "gt": 4, "ne": 5, "ge": 6, "num": 7, "nan": 8}
MODES |= {name + "u": MODES[name] | 8 for name in ("lt", "eq", "le", "gt", "ne", "ge")}
COMBINED = {"add": "FMA", "min": "MIN", "max": "MAX", "or": "OR", "any": "OR"}
MODES |= {name: OPERATIONS[operation] for name, operation in COMBINED.items()}
KNOWN = "rn rna ftz lo wide to global shared param local sync aligned row col idx uni acquire"

FIELDS = "operation kind bits to_kind to_bits flush mode guard unless results sources first line"
INSTRUCTION = np.dtype([(name, "<i4") for name in FIELDS.split()])
OPERAND = np.dtype([("register", "<i8"), ("immediate", "<u8")])
FUNCTION = re.compile(r"\.(entry|func)\s+(\w+)\s*\(([^)]*)\)[^;{}]*\{")
STATEMENT = re.compile(r"\s*([{}]|[$\w]+:|[^;{}]*(?:\{[^{}]*\}[^;{}]*)*;)")
TYPE = re.compile(r"(pred|b|u|s|f|bf|tf)(\d*)(x2)?")
SHARED_ORIGIN, PARAMETERS, END = 1024, 3 << 60, 1 << 30  # END: a place behind all instructions
Operand = tuple[int, int | str]  # a register (-1: none) and a number, or the name of a label


class Form(NamedTuple):
    """A decoded name of an instruction: types of its sources and of its result, and modifiers."""

    name: str
    kind: tuple[int, int]
    to: tuple[int, int]
    flush: bool
    mode: int
    text: str


class Unsupported(Exception):
    """The machine does not know an instruction."""


def constant(number: str, kind: int, bits: int) -> Operand:
    """A number of a type, from its decimal digits."""
    if kind < KINDS["f"]:
        return -1, int(number) & (2**64 - 1)
    return -1, int.from_bytes(struct.pack("<f" if bits == 32 else "<d", float(number)), "little")


@functools.cache
def decode(text: str) -> Form:
    """Decode the name of an instruction.

    Raises:
        Unsupported, LookupError: the machine does not know it.
    """
    parts = text.split(".")
    prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    name = next((x for x in prefixes if x in STEPS), "")
    if not name:
        raise Unsupported(text)
    rest = parts[name.count(".") + 1 :] if STEPS[name] else []
    types = [match.groups() for part in rest if (match := TYPE.fullmatch(part))]
    kinds = [(KINDS[kind], int(bits or 1) * (2 if two else 1)) for kind, bits, two in types]
    others = [x for x in rest if not TYPE.fullmatch(x) and not re.fullmatch(r"[vx\dmnk]+", x)]
    mode = sum(MODES[x] for x in others if x not in KNOWN.split())
    kind = kinds[-2 if name == "mma" else -1] if kinds else (0, 64)
    to = {"cvt": kinds[:1], "setp": [(0, 1)]}.get(name, [kind])[0]
    if "wide" in rest:
        to = kind[0], 2 * kind[1]
    if name in BITWISE:
        kind = to = 0, kind[1]
    if name == "cvt" and types[0][2]:
        name = "(join2)"
    return Form(name, kind, to, "ftz" in rest, mode, text)


class Assembly:
    """A program. Functions get their parameters on the stack, and calls do not nest.

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
        self.parameters: list[tuple[int, int]] = []
        self.registers, self.stack = len(SPECIAL), 256
        # The memory that a name belongs to, and its place there.
        self._symbols: dict[str, tuple[str, int]] = {}
        for name in re.findall(r"\.extern\s+\.shared\s[^;]*?(\w+)\[\]", text):
            self._symbols[name] = "(shared)", SHARED_ORIGIN
        for function in sorted(FUNCTION.finditer(text), key=lambda match: match[1] != "entry"):
            self._read_function(text, function)
        resolved = [(i, self._labels[x] if isinstance(x, str) else x) for i, x in self._operands]
        self.code, self.operands = np.array(self._code, INSTRUCTION), np.array(resolved, OPERAND)

    def _read_function(self, text: str, function: re.Match[str]) -> None:
        self._is_entry = function[1] == "entry"
        self._labels[function[2]] = len(self._code)
        self._scopes = [{re.sub("_(.)$", r".\1", f"%{x.lower()}"): i for x, i in SPECIAL.items()}]
        for parameter in filter(None, map(str.strip, function[3].split(","))):
            self._read_declaration(parameter)
        self._line = text.count("\n", 0, function.end()) + 1
        for match in STATEMENT.finditer(text, function.end()):
            self._line += match[0].count("\n")
            statement = " ".join(match[1].strip(";").split())
            if statement == "{":
                self._scopes.append({})
            elif statement == "}":
                self._scopes.pop()
                if not self._scopes:
                    return
            elif statement.endswith(":"):
                self._labels[statement[:-1]] = len(self._code)
            elif statement.startswith("."):
                self._read_declaration(statement)
            else:
                self._read_instruction(statement)

    def _read_declaration(self, text: str) -> None:
        """Place parameters and arrays; give names to the registers of an inner scope."""
        names = re.sub(r"^.* ", "", re.sub(r",\s*", ",", text))
        name, count = re.fullmatch(r"(.*?)(?:\[(\d+)\])?", names).groups()
        align, kind = re.match(r"\.\w+ (?:\.align (\d+) )?(?:\.\w(\d+))?", text).groups()
        if text.startswith(".reg") and len(self._scopes) > 1:
            self._scopes[-1] |= {local: self._new_register() for local in name.split(",")}
        elif text.startswith(".local"):
            self._symbols[name] = "(stack)", self.stack
            self.stack += -(-int(count) // 16) * 16
        elif text.startswith(".param") and self._is_entry and len(self._scopes) == 1:
            size = int(kind) // 8
            start = -(-sum((self.parameters or [(0, 0)])[-1]) // int(align or size))
            start *= int(align or size)
            self.parameters.append((start, size * int(count or 1)))
            self._symbols[name] = "", PARAMETERS + start
        elif text.startswith(".param"):  # of a function, or the value of one in a call
            self._symbols[name] = "(stack)", 8 * int(re.search(r"\d+$", name)[0])

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
        if text == "_":
            return -1, 0
        if text.startswith("("):
            return SPECIAL[text.strip("()").upper()], 0
        if re.match("0[fFdD]", text):
            return -1, int(text[2:], 16)
        if re.match(r"-?\d", text):
            return -1, int(text.rstrip("U"), 0) & (2**64 - 1)
        return -1, self._symbols.get(text, ("", text))[1]

    def _emit(
        self, operation: str, results: list[Operand], sources: list[Operand], *types: int
    ) -> None:
        places = len(results), len(sources), len(self._operands), self._line
        self._code.append((OPERATIONS[operation], *types, *self._guard, *places))
        self._operands += results + sources

    def _read_instruction(self, text: str) -> None:
        name, arguments = "", []
        try:
            guard = re.match(r"@(!?)(%\w+)\s+", text)
            self._guard = (self._operand(guard[2])[0], int(guard[1] == "!")) if guard else (-1, 0)
            name, _, rest = text[guard.end() if guard else 0 :].partition(" ")
            arguments = re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s][^,]*", rest)
            self._read_parts(decode(name), arguments)
        except (Unsupported, LookupError, ValueError) as error:
            raise Unsupported(f"line {self._line}: {text} ({error!r})") from error

    def _read_parts(self, form: Form, arguments: list[str]) -> None:
        name, kind, to, flush, mode, _ = form
        if name == "mov" and arguments[0].startswith("{"):
            results, source = (self._list(x) for x in arguments)
            bits = kind[1] // len(results)
            for i, result in enumerate(results):
                shift = [*source, (-1, bits * i)]
                self._emit("SHR", [result], shift, *kind, 0, bits, 0, 0)
            return
        if name == "mov" and arguments[1].startswith("{"):
            name = "(join)"
        if name == "wgmma.mma_async":
            # Bits: A in shared memory, A transposed, the same of B. With A in registers only the
            # transposition of B is given.
            flags = [0, 0, *map(int, arguments[6:])][-2:]
            if arguments[4:6] != ["1", "1"]:
                raise Unsupported("a negated operand")
            mode = 4 + 8 * flags[1] + (0 if arguments[1].startswith("{") else 1 + 2 * flags[0])
        if name.startswith("barrier.cluster"):
            if name.endswith("wait") and self._arrival != len(self._code):
                raise Unsupported("an instruction between arrival and wait")
            self._arrival = len(self._code)
        for (operation, *results), sources in STEPS[name]:
            resolved = [
                [x for word in words for x in self._resolve(word, form, arguments)]
                for words in (results, sources)
            ]
            operation = operation.replace("NAME", name.upper())
            width = (0, 64) if operation in UNTYPED else to
            self._emit(operation, *resolved, *kind, *width, flush, mode)

    def _list(self, text: str) -> list[Operand]:
        return [self._operand(x.split("|")[0]) for x in text.strip("{} ").split(",")]

    def _resolve(self, word: str, form: Form, arguments: list[str]) -> list[Operand]:
        """The operands that a word of a form stands for."""
        if match := re.fullmatch(r"(global)?(\W?)([a-e])\W?", word):
            text = arguments["abcde".index(match[3])]
            if match[2] != "[":
                return self._list(text)
            name, _, offset = text.strip("[] ").partition("+")
            spaces = {".shared": "(shared)", ".local": "(stack)"}
            base = next((x for part, x in spaces.items() if part in form.text), "")
            base = self._symbols.get(name.strip(), ("" if match[1] else base, 0))[0]
            return [self._operand(x) for x in (base or "0", name, offset or "0")]
        if word == "last":
            return [self._operand(arguments[-1])]
        if word == "return":
            return [(-1, END) if self._is_entry else self._operand("(caller)")]
        if word.startswith("("):
            return [self._operand(word)]
        bits = form.kind[1]
        signs = 0x80008000 if form.text.endswith("x2") else 1 << (bits - 1)
        values = {"all": 2**32 - 1, "true": 1, "next": len(self._code) + 2}
        values["magnitude"] = (1 << bits) - 1 - signs
        return [(-1, values[word]) if word in values else constant(word, *form.kind)]
