"""Rows scattered over many files on local disk by a number, read back one file at a time."""

from pathlib import Path
from threading import Lock

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


class Partitions:
    """A folder with a file a number, each holding the rows that were given that number.

    Safe to use from many threads. No file is held open, so that there may be thousands.
    """

    def __init__(self, folder: Path, schema: pa.Schema, count: int) -> None:
        folder.mkdir()
        self.count = count
        self._folder = folder
        self.schema = schema
        self._locks = [Lock() for _ in range(count)]

    def scatter(self, rows: pa.Table, numbers: NDArray[np.uint16]) -> None:
        """Append each row to the file of its number."""
        order = np.argsort(numbers, kind="stable")
        ordered = rows.take(pa.array(order))
        bounds = np.searchsorted(numbers[order], np.arange(self.count + 1))
        for number in np.flatnonzero(np.diff(bounds)).tolist():
            start, stop = int(bounds[number]), int(bounds[number + 1])
            self.write(number, ordered.slice(start, stop - start))

    def write(self, number: int, rows: pa.Table) -> None:
        """Append rows to one file."""
        with (
            self._locks[number],
            pa.OSFile(str(self._path(number)), mode="ab") as file,
            pa.ipc.new_stream(file, self.schema, options=_OPTIONS) as writer,
        ):
            writer.write_table(rows)

    def take(self, number: int) -> pa.Table:
        """The rows of one file, in no particular order, and remove the file."""
        path = self._path(number)
        if not path.exists():
            return self.schema.empty_table()
        batches: list[pa.RecordBatch] = []
        with pa.memory_map(str(path)) as file:
            while file.tell() < file.size():
                batches += pa.ipc.open_stream(file)
        path.unlink()
        return pa.Table.from_batches(batches, schema=self.schema).combine_chunks()

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:05}"


_OPTIONS = pa.ipc.IpcWriteOptions(compression="zstd", use_threads=False)
