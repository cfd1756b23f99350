"""The dtypes of the safetensors format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["float", "integer", "bool", "scaled", "complex"]


@dataclass(frozen=True, slots=True)
class DType:
    """One dtype as the safetensors header names it.

    Attributes:
        name: The header's name, for example "BF16".
        bits: Bits of one element; 4 and 6 for packed formats.
        kind: "float" allows arithmetic; "integer" and "bool" are copied; "scaled" (fp8, fp4 and
            kin) means nothing without its scales and is copied; "complex" is copied.
        torch_name: Attribute of the torch module, empty if torch has none.
    """

    name: str
    bits: int
    kind: Kind
    torch_name: str


_ROWS: tuple[tuple[str, int, Kind, str], ...] = (
    ("F64", 64, "float", "float64"),
    ("F32", 32, "float", "float32"),
    ("F16", 16, "float", "float16"),
    ("BF16", 16, "float", "bfloat16"),
    ("I64", 64, "integer", "int64"),
    ("I32", 32, "integer", "int32"),
    ("I16", 16, "integer", "int16"),
    ("I8", 8, "integer", "int8"),
    ("U64", 64, "integer", "uint64"),
    ("U32", 32, "integer", "uint32"),
    ("U16", 16, "integer", "uint16"),
    ("U8", 8, "integer", "uint8"),
    ("BOOL", 8, "bool", "bool"),
    ("C64", 64, "complex", "complex64"),
    ("F8_E4M3", 8, "scaled", "float8_e4m3fn"),
    ("F8_E5M2", 8, "scaled", "float8_e5m2"),
    ("F8_E8M0", 8, "scaled", "float8_e8m0fnu"),
    ("F8_E4M3FNUZ", 8, "scaled", "float8_e4m3fnuz"),
    ("F8_E5M2FNUZ", 8, "scaled", "float8_e5m2fnuz"),
    ("F6_E2M3", 6, "scaled", ""),
    ("F6_E3M2", 6, "scaled", ""),
    ("F4", 4, "scaled", "float4_e2m1fn_x2"),
)

DTYPES: dict[str, DType] = {row[0]: DType(*row) for row in _ROWS}
"""Every dtype of the format by its name in a header."""

RECIPE_DTYPES: dict[str, str] = {
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
}
"""Output dtypes that a recipe may name, with or without the prefix `torch.`."""


def config_name(dtype: str) -> str:
    """Return the name that config.json uses, for example "bfloat16" for "BF16"."""
    return DTYPES[dtype].torch_name


def is_float(dtype: str) -> bool:
    """Return whether arithmetic is possible on this dtype."""
    return DTYPES[dtype].kind == "float"


def promoted(dtypes: list[str]) -> str:
    """Return the narrowest float dtype that holds all of these float dtypes.

    F16 with BF16 gives F32, as in torch.
    """
    kinds = set(dtypes)
    if len(kinds) == 1:
        return dtypes[0]
    return "F64" if "F64" in kinds else "F32"
