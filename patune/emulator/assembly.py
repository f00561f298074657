"""One line of LLVM's amdgcn text as a value: mnemonic, operands, modifiers.

Nothing here knows what an instruction does. Builders take the modifiers that they implement from an instruction;
what is left over afterwards is refused, so that no modifier is ignored by accident.
"""

from __future__ import annotations

import functools
import re
import struct
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from patune.errors import EmulatorError

OperandKind = Literal["vector", "accumulator", "scalar", "constant", "off"]

# Special scalar registers by their number in the instruction encoding (CDNA3 ISA, "scalar operands").
VCC = 106
M0 = 124
EXEC = 126
SCC = 128  # a condition bit of its own in hardware; a register here, so that src_scc is an ordinary operand

_NAMED = {
    "vcc": (VCC, 2),
    "vcc_lo": (VCC, 1),
    "vcc_hi": (VCC + 1, 1),
    "exec": (EXEC, 2),
    "exec_lo": (EXEC, 1),
    "exec_hi": (EXEC + 1, 1),
    "m0": (M0, 1),
    "scc": (SCC, 1),
    "src_scc": (SCC, 1),
}
_REGISTER = re.compile(r"^([vas])(?:(\d+)|\[(\d+):(\d+)\])$")
_INTEGER = re.compile(r"^-?(?:0x[0-9a-f]+|\d+)$")
_FLOAT = re.compile(r"^-?(?:\d+\.\d*|\d*\.\d+|\d+(?=e))(?:e[-+]?\d+)?$")
# 1 / (2 pi) is an inline constant whose printed digits round to another float32 than the hardware's.
_INVERSE_TWO_PI = {"0.15915494": 0x3E22F983, "0.15915494309189532": 0x3E22F983}
_SOURCE_MODIFIERS: dict[str, re.Pattern[str]] = {
    "negate": re.compile(r"^(?:neg\((.*)\)|-((?:[vas][\d\[]|\|).*))$"),
    "absolute": re.compile(r"^(?:\|(.*)\||abs\((.*)\))$"),
    "sign_extend": re.compile(r"^sext\((.*)\)$"),
}
_COMMA = re.compile(r",\s*(?![^\[(]*[\])])")  # outside of brackets
_FILES: dict[str, OperandKind] = {"v": "vector", "a": "accumulator", "s": "scalar"}
# First words of modifiers that follow the last operand after a blank, or stand alone in its place.
_MODIFIER_ONLY = re.compile(r"^(?:offset|vmcnt|lgkmcnt|expcnt)\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Operand:
    """One parsed operand.

    Attributes:
        text: as written.
        kind: register file, constant, or ``off`` (no register: ``off``, ``null``).
        index: first register.
        count: registers.
        value: of a constant.
        negate, absolute, sign_extend: source modifiers.
    """

    text: str
    kind: OperandKind
    index: int = 0
    count: int = 1
    value: int | float = 0
    negate: bool = False
    absolute: bool = False
    sign_extend: bool = False

    @property
    def in_vector_file(self) -> bool:
        """A VGPR or an AGPR."""
        return self.kind in ("vector", "accumulator")

    @property
    def is_modified(self) -> bool:
        """Carries a source modifier."""
        return self.negate or self.absolute or self.sign_extend

    def constant_bits(self, width: Literal[16, 32, 64]) -> int:
        """Bit pattern of a constant read as an operand of that width.

        Raises:
            EmulatorError: a literal whose extension or truncation to that width depends on the instruction.
        """
        if isinstance(self.value, float):
            codes: dict[int, tuple[str, str]] = {
                16: ("<e", "<H"),
                32: ("<f", "<I"),
                64: ("<d", "<Q"),
            }
            pack, unpack = codes[width]
            return int(struct.unpack(unpack, struct.pack(pack, self.value))[0])
        fits = {16: (-0x8000, 0x1_0000), 32: (-(1 << 31), 1 << 32), 64: (-16, 1 << 31)}[width]
        if not fits[0] <= self.value < fits[1]:
            raise EmulatorError(f"{width}-bit use of the literal {self.text}: not verified.")
        return self.value & ((1 << width) - 1)


@functools.lru_cache(maxsize=1 << 14)  # the same few registers are named thousands of times
def parse_operand(text: str) -> Operand:
    """Parse one operand.

    Raises:
        EmulatorError: the operand has a form that the emulator does not know.
    """
    if match := _REGISTER.match(text):
        first = int(match[2] or match[3])
        last = int(match[2] or match[4])
        return Operand(text=text, kind=_FILES[match[1]], index=first, count=last - first + 1)
    if text in _NAMED:
        index, count = _NAMED[text]
        return Operand(text=text, kind="scalar", index=index, count=count)
    if text in ("off", "null"):
        return Operand(text=text, kind="off")
    if text in _INVERSE_TWO_PI:
        return Operand(text=text, kind="constant", value=_INVERSE_TWO_PI[text])
    if _INTEGER.match(text):
        return Operand(text=text, kind="constant", value=int(text, 0))
    if _FLOAT.match(text):
        return Operand(text=text, kind="constant", value=float(text))
    for modifier, pattern in _SOURCE_MODIFIERS.items():
        if match := pattern.match(text):
            inner = parse_operand(next(group for group in match.groups() if group))
            changes: dict[str, Any] = {"text": text, modifier: True}
            return replace(inner, **changes)
    raise EmulatorError(f"operand {text!r}: not verified.")


@dataclass(slots=True)
class Instruction:
    """One assembly line.

    Attributes:
        text: the line, blanks normalised.
        mnemonic: first word.
        operands: operand texts, modifiers removed.
        modifiers: ``name`` -> value text, "" where the modifier has none; builders take what they implement.
    """

    text: str
    mnemonic: str = ""
    operands: tuple[str, ...] = ()
    modifiers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.mnemonic, _, rest = self.text.partition(" ")
        if "(" in rest:  # the blanks of "hwreg(HW_REG_MODE, 23, 1)" do not separate modifiers
            rest = re.sub(r"\(([^)]*)\)", lambda m: "(" + m[1].replace(" ", "") + ")", rest)
        if rest:
            parts = _COMMA.split(rest)
            head, *tail = parts[-1].split()
            if _MODIFIER_ONLY.match(head):
                head, tail = "", [head, *tail]
            parts[-1:] = [head] if head else []
            for item in tail:
                name, separator, value = item.partition(":")
                if not separator and "(" in name:  # vmcnt(0)
                    name, _, value = name.rstrip(")").partition("(")
                self.modifiers[name] = value
            self.operands = tuple(parts)

    def operand(self, position: int) -> Operand:
        """Parse one operand; an instruction with fewer operands is refused."""
        if position >= len(self.operands):
            raise self.refusal("operand missing")
        return parse_operand(self.operands[position])

    def take(self, name: str, default: str | None = None) -> str | None:
        """Remove a modifier and return its value text."""
        return self.modifiers.pop(name, default)

    def take_flag(self, name: str) -> bool:
        """Remove a modifier that has no value; True if it was there."""
        return self.modifiers.pop(name, None) is not None

    def take_int(self, name: str, default: int = 0) -> int:
        """Remove a modifier with an integer value."""
        value = self.modifiers.pop(name, None)
        return default if value is None else int(value, 0)

    def take_bits(self, name: str, count: int, default: int = 0) -> list[int]:
        """Remove a modifier of the form ``[0,1,1]``, padded with the default to ``count`` entries."""
        value = self.modifiers.pop(name, None)
        bits = [] if value is None else [int(item) for item in value.strip("[]").split(",")]
        return bits + [default] * (count - len(bits))

    def refusal(self, what: str = "") -> EmulatorError:
        """The error for an instruction, or a use of it, that nobody has checked against the ISA document."""
        return EmulatorError(
            f"instruction `{self.text}`{': ' + what if what else ''}: not verified."
        )
