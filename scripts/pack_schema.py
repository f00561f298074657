"""Writes the JSON Schema of packs, `patune/configs/pack.schema.json`, from the records that the parser builds.

    python scripts/pack_schema.py [--check]

Fields, their types and which of them have a default come from the records; what values are allowed comes from their constants.
The schema says less than the parser (dates that exist, knobs that fit together, printable texts): what it refuses, the parser does.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patune.configs import pack_parser
from patune.configs.block import FAULTS, Block
from patune.configs.candidate import MAX_CANDIDATES, Candidate
from patune.configs.pack import MAX_TEXT, SCHEMA
from patune.configs.winner import ROBUST_OBJECTIVES, WINNER_EVIDENCE, RobustWinner, Speedup, Winner
from patune.environment import Environment
from patune.kernels import knobs
from patune.kernels.knobs import CdnaKnobs, HopperKnobs
from patune.problem import (
    BLOCK_SIZES,
    DTYPES,
    HEAD_DIMS,
    KV_LAYOUTS,
    KV_QUANTS,
    MAX_QUERY_LENGTH,
    MAX_ROWS,
    Problem,
    Workload,
)
from patune.target import ARCHS, Target
from patune.trial import CountedWork, Timing

if TYPE_CHECKING:
    from patune.record import Record

FILE = Path(__file__).parents[1] / "patune" / "configs" / "pack.schema.json"
PARTS: tuple[type[Record], ...] = (
    *(Target, Environment, Problem, Workload, HopperKnobs, CdnaKnobs),
    *(Timing, CountedWork, Speedup, Candidate, Winner, RobustWinner, Block),
)
TEXT = {"type": "string", "minLength": 1, "maxLength": MAX_TEXT}
TYPES: dict[str, dict[str, Any]] = {
    "str": TEXT,
    "bool": {"type": "boolean"},
    "int": {"type": "integer", "minimum": 0, "maximum": pack_parser.MAX_INTEGER},
    "float": {"type": "number", "minimum": 0},
    "Knobs": {"$ref": "#/$defs/Knobs"},
    "tuple[Workload, ...]": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/Workload"}},
    "tuple[float, ...]": {
        "type": "array",
        "minItems": 1,
        "items": {"type": "number", "minimum": 0},
    },
    **{kind.__name__: {"$ref": f"#/$defs/{kind.__name__}"} for kind in PARTS},
}
ARCH = {"enum": list(ARCHS)}
CREATED = {
    "type": "string",
    "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z$",
    "description": "UTC, to the second.",
}
COUNT = {"type": "integer", "minimum": 1, "maximum": pack_parser.MAX_INTEGER}
TILES: dict[str, dict[str, Any]] = {
    "partition_tokens": {"enum": [64, 128, 256]},
    "num_splits": {"type": "integer", "minimum": 1, "maximum": knobs.MAX_SPLITS},
    "num_stages": {"type": "integer", "minimum": 1, "maximum": 4},
    "num_warps": {"enum": [1, 2, 4, 8]},
    "reduce_chunk": {"enum": list(knobs.REDUCE_CHUNKS)},
    "reduce_warps": {"enum": list(knobs.REDUCE_WARPS)},
}
ALLOWED: dict[type[Record], dict[str, dict[str, Any]]] = {
    Target: {"arch": ARCH, "compute_units": COUNT},
    Problem: {
        "block_size": {"enum": list(BLOCK_SIZES)},
        "head_dim": {"enum": list(HEAD_DIMS)},
        "qg": {"type": "integer", "minimum": 1, "maximum": MAX_ROWS},
        "query_length": {"type": "integer", "minimum": 1, "maximum": MAX_QUERY_LENGTH},
        "query_dtype": {"enum": list(DTYPES)},
        "kv_dtype": {"enum": list(DTYPES)},
        "kv_quant": {"enum": list(KV_QUANTS)},
        "kv_layout": {"enum": list(KV_LAYOUTS)},
    },
    Workload: dict.fromkeys(("batch", "kv_heads", "context"), COUNT),
    HopperKnobs: TILES | {"maxnreg": {"enum": [0, 96, 128, 168]}},
    CdnaKnobs: TILES
    | {
        "waves_per_eu": {"type": "integer", "minimum": 0, "maximum": knobs.MAX_WAVES_PER_SIMD},
        "mfma_rows": {"enum": [16, 32]},
        "program_rows": {"enum": [0, 16, 32]},
        "cache_modifier": {"enum": list(knobs.CACHE_MODIFIERS)},
    },
    Timing: {"replays": COUNT},
    Candidate: {"gate_cases": COUNT},
    Winner: {
        "evidence": {"enum": list(WINNER_EVIDENCE)},
        "trials": COUNT,
        "gate_cases": COUNT,
        "created": CREATED,
    },
    RobustWinner: {"objective": {"enum": list(ROBUST_OBJECTIVES)}, "created": CREATED},
    Block: {
        "arch": ARCH,
        "status": {"enum": list(FAULTS)},
        "reason": {"type": "string", "maxLength": MAX_TEXT},
        "created": CREATED,
    },
}
ABSENT: dict[type[Record], tuple[str, ...]] = {Winner: ("imported_from",)}  # a fact of a database
MEASURED = {"properties": {"timing": {"$ref": "#/$defs/Timing"}}}
EMULATED = {"properties": {"timing": {"type": "null"}, "counted": {"$ref": "#/$defs/CountedWork"}}}


def main() -> int:
    """Write the file, or with --check say whether it is as it would be written."""
    if "--check" in sys.argv[1:]:
        fresh = FILE.read_text(encoding="utf-8") == schema_text()
        print(f"{FILE} is {'up to date' if fresh else 'out of date: run scripts/pack_schema.py'}")
        return 0 if fresh else 1
    FILE.write_text(schema_text(), encoding="utf-8")
    print(f"written to {FILE}")
    return 0


def schema_text() -> str:
    """The file's content."""
    return json.dumps(pack_schema(), indent=2) + "\n"


def pack_schema() -> dict[str, Any]:
    """The JSON Schema, draft 2020-12."""
    entries = {"type": "array", "maxItems": pack_parser.MAX_ENTRIES}
    newest = {name: since for name, since in pack_parser.SECTIONS.items() if since == SCHEMA}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "patune config pack",
        "description": f"Launch configurations with their evidence. Packs are written with schema {SCHEMA}; 1 to {SCHEMA - 1} are read, too.",
        "type": "object",
        "properties": {
            "schema": {"enum": list(range(1, SCHEMA + 1))},
            "winners": entries | {"items": {"$ref": "#/$defs/Winner"}},
            "robust": entries | {"items": {"$ref": "#/$defs/RobustWinner"}},
            "blocklist": entries | {"items": {"$ref": "#/$defs/Block"}},
        },
        "required": ["schema", "winners"],
        "additionalProperties": False,
        "if": {"properties": {"schema": {"const": SCHEMA}}},
        "then": {"required": list(newest)},
        "else": {"properties": dict.fromkeys(newest, False)},
        "$defs": {"Knobs": _knobs(), **{kind.__name__: _record(kind) for kind in PARTS}},
    }


def _knobs() -> dict[str, Any]:
    return {"oneOf": [{"$ref": "#/$defs/HopperKnobs"}, {"$ref": "#/$defs/CdnaKnobs"}]}


def _record(kind: type[Record]) -> dict[str, Any]:
    """A record's object: no other field, and none missing that has no default."""
    fields = [
        f
        for f in dataclasses.fields(kind)  # type: ignore[arg-type]
        if f.name not in ABSENT.get(kind, ())
    ]
    properties = {f.name: _field(kind, f) for f in fields}
    required = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]
    if kind in (HopperKnobs, CdnaKnobs):
        properties = {"family": {"const": kind.family}, **properties}
        required.insert(0, "family")
    about = (kind.__doc__ or "").split("\n")[0]
    schema = {
        "description": about,
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }
    if kind is Winner:
        properties["candidates"] = {
            "type": "array",
            "maxItems": MAX_CANDIDATES,
            "items": {"$ref": "#/$defs/Candidate"},
        }
        by_kind = {"properties": {"evidence": {"const": "measured"}}}
        schema |= {"if": by_kind, "then": MEASURED, "else": EMULATED}
    if kind is Candidate:
        schema["anyOf"] = [MEASURED, EMULATED]
    return schema


def _field(kind: type[Record], field: dataclasses.Field[Any]) -> dict[str, Any]:
    name = str(field.type).removesuffix(" | None")
    schema = ALLOWED.get(kind, {}).get(field.name, TYPES[name])
    if name == field.type:
        return schema
    if "type" in schema:
        return schema | {"type": [schema["type"], "null"]}
    return {"anyOf": [schema, {"type": "null"}]}


if __name__ == "__main__":
    sys.exit(main())
