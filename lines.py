"""Files of many lines: JSON lines as a sequence, without holding what they say in memory.

    table = Table("pool.jsonl", lambda row: (len(row["txt"]),), "q", "a candidate")
    len(table), table[5_000_000], table.columns[0]

In memory stay the byte offset of each line and the integers that `columns` makes of it, 8 bytes
each or less; the line is parsed again when its row is asked for. M-BEIR's pool of 5.6 million
candidates takes 100 MB so, and some 10 GB as dictionaries. Bad lines raise a ValueError
"file:line: expected ...".
"""

import json
from array import array
from pathlib import Path


def explain(error, expected):
    """What is wrong with a line, from the exception that parsing it raised."""
    if isinstance(error, KeyError):
        return f"expected a field {error}"
    return f"expected {expected} ({error})"


BAD_LINE = (AttributeError, KeyError, TypeError, ValueError)  # what parsing a line may raise


def parse_lines(path, parse, expected, header=0):
    """Yield (byte offset, parse(line)) of the lines that are not blank, after `header` lines.

    What fails in `parse` becomes a ValueError "file:line: expected ...".
    """
    number = offset = 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if number > header and not line.isspace():
                    yield offset, parse(line)
                offset += len(line)
    except OSError as error:
        raise ValueError(f"{path}: cannot read: {error.strerror}") from error
    except BAD_LINE as error:
        raise ValueError(f"{path}:{number}: {explain(error, expected)}") from error


def json_row(line):
    """One line (bytes) -> what it says. Decoding first is faster: json would guess the encoding."""
    return json.loads(line.decode())


class Table:
    """A JSON-lines file as a sequence of dictionaries, each parsed when it is asked for.

    `columns(row)` checks a row and returns integers; `self.columns` keeps an array of each, with
    the type codes of `codes` ("q": 8 bytes, "b": 1 byte). Raises ValueError on the first bad line.
    """

    def __init__(self, path, columns, codes, expected):
        self.path, self.starts = Path(path), array("q")
        self.columns = [array(code) for code in codes]
        appends = [column.append for column in self.columns]  # millions of lines: avoid look-ups
        for start, values in parse_lines(path, lambda line: columns(json_row(line)), expected):
            self.starts.append(start)
            for append, value in zip(appends, values):
                append(value)
        if not self.starts:
            raise ValueError(f"{path}: expected {expected} on each line, found no line")

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, index):
        with self.path.open("rb") as file:
            file.seek(self.starts[index])
            return json_row(file.readline())
