"""Read token ids from a Parquet column of integers or of lists of integers, which are concatenated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaling_lab.core.errors import UserError, unknown


def read_token_column(path: Path, option: str, column: str) -> NDArray[np.integer]:
    """The token ids of a column, 1-d; with an empty name, of the file's only integer column.

    Raises `UserError` naming the option if the file is not Parquet, the column does not exist, or values are missing.
    """
    # The only dependency of core besides NumPy, imported only for Parquet files.
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        names = [field.name for field in file.schema_arrow if _holds_integers(pa, field.type)]
        if column and column not in names:
            raise unknown("data.column", column, names)
        if not column and len(names) != 1:
            raise UserError(
                f"{option}={str(path)!r} has {len(names)} integer columns: give data.column=NAME. "
                f"Choices: {', '.join(names) or 'none'}."
            )
        values: Any = file.read(columns=[column or names[0]]).column(0).combine_chunks()
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{option}={str(path)!r} cannot be read as Parquet: {' '.join(str(error).split())}."
        ) from None
    missing = values.null_count
    while pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        values = values.flatten()
        missing += values.null_count
    if missing:
        raise UserError(f"{option}={str(path)!r} has {missing:,} missing values in its token column.")
    tokens: NDArray[np.integer] = values.to_numpy(zero_copy_only=False)
    return tokens


def _holds_integers(pa: Any, kind: Any) -> bool:
    while pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    return bool(pa.types.is_integer(kind))
