"""What the columns of the config database may hold, said so that SQLite and PostgreSQL promise the same.

SQLite keeps any value in any column, so its constraints ask for the type; PostgreSQL has typed columns, in which NaN is a
number above all others, and takes a condition that is NULL as kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from sqlalchemy import DOUBLE_PRECISION, REAL, BigInteger, CheckConstraint, Integer, MetaData, Text
from sqlalchemy.orm import DeclarativeBase

if TYPE_CHECKING:
    from sqlalchemy.types import TypeEngine

NAMING = {
    "pk": "pk_%(table_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
}
SQLITE, POSTGRESQL = "sqlite", "postgresql"
# 8 bytes on both: PostgreSQL's REAL has 4, in which 50.123456789 us is another number, and its INTEGER ends at 2 GiB.
NUMBER: TypeEngine[float] = REAL().with_variant(DOUBLE_PRECISION(), POSTGRESQL)
COUNTER: TypeEngine[int] = Integer().with_variant(BigInteger(), POSTGRESQL)


class Base(DeclarativeBase):
    """Base of the models: texts are TEXT, numbers have 8 bytes, constraints have names."""

    metadata: ClassVar[MetaData] = MetaData(naming_convention=NAMING)
    type_annotation_map: ClassVar = {str: Text, float: NUMBER, int: COUNTER}


Checks = tuple[CheckConstraint, ...]


def _per_dialect(name: str, sqlite: str, postgresql: str) -> Checks:
    return (
        CheckConstraint(sqlite, name=name).ddl_if(dialect=SQLITE),
        CheckConstraint(postgresql, name=name).ddl_if(dialect=POSTGRESQL),
    )


def one_of(column: str, values: tuple[str, ...]) -> str:
    """The condition that a column has one of the values."""
    return f"{column} IN ({', '.join(repr(v) for v in values)})"


def integers(low: int, *columns: str) -> Checks:
    """The columns are integers, ``low`` at least; each constraint has its column's name."""
    return tuple(
        check
        for c in columns
        for check in _per_dialect(c, f"typeof({c}) = 'integer' AND {c} >= {low}", f"{c} >= {low}")
    )


def flags(*columns: str) -> Checks:
    """The columns are true or false, which PostgreSQL's type says already."""
    return tuple(CheckConstraint(f"{c} IN (0, 1)", name=c).ddl_if(dialect=SQLITE) for c in columns)


def _sqlite_number(column: str) -> str:
    return f"typeof({column}) IN ('integer', 'real') AND {column} >= 0"


def _postgresql_number(column: str) -> str:
    return f"{column} IS NOT NULL AND {column} >= 0 AND {column} <> CAST('NaN' AS float8)"


_NUMBERS = {SQLITE: _sqlite_number, POSTGRESQL: _postgresql_number}


def number(column: str) -> Checks:
    """The column is a number, 0 at least."""
    return _per_dialect(column, *(number(column) for number in _NUMBERS.values()))


def numbers_or_null(name: str, columns: tuple[str, ...], also: str = "") -> Checks:
    """All of the columns are numbers >= 0 and ``also`` holds, or none of them has a value."""
    none = " AND ".join(f"{c} IS NULL" for c in columns)
    conditions = (
        f"({none}) OR ({' AND '.join(number(c) for c in columns)}{also})"
        for number in _NUMBERS.values()
    )
    return _per_dialect(name, *conditions)


def interval_ends(*columns: str) -> Checks:
    """The columns are numbers of a timing, or have no value."""
    return tuple(
        check
        for c in columns
        for check in _per_dialect(
            c,
            *(
                f"{c} IS NULL OR (median_us IS NOT NULL AND {number(c)})"
                for number in _NUMBERS.values()
            ),
        )
    )


def same(name: str, column: str, expression: str) -> Checks:
    """The column is what the expression is, NULL included."""
    return _per_dialect(
        name, f"{column} IS {expression}", f"{column} IS NOT DISTINCT FROM {expression}"
    )
