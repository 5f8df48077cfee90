"""A CSV file as people have it: packed or not, in UTF-8, UTF-16 or GB18030, with any usual delimiter.

    columns, numbers = read_columns("train.csv", required=["uuid", "title"])   # {name: cells}, the row of each cell
"""

import csv
import gzip
import io
import re
import zipfile
import zlib
from pathlib import Path

from lib.cli import FIELDS, InputError, few

NOT_CSV = {  # what a file is that begins with these bytes, in lower case
    b"\xd0\xcf\x11\xe0": "an Excel workbook, not a CSV file: in Excel, save it as 'CSV UTF-8'",
    b"version https://git-lfs": "a git-lfs pointer, not the file itself: run `git lfs pull` where it came from",
    b"<": "a web page, not a CSV file: download it again (a log-in page is often the cause)",
}


def refuse(path, fault, rows, remedy):
    """Raise InputError if any rows have this fault. `rows`: their numbers."""
    if rows:
        raise InputError(f"{path}: {fault} in row {few(rows)}; {remedy}")


def read_bytes(path):
    """The bytes of a CSV file, unpacked if it was packed with zip or gzip. Raises InputError for other files."""
    data = Path(path).read_bytes()
    start = data[:100].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for magic, kind in NOT_CSV.items():
        if start.startswith(magic):
            raise InputError(f"{path} is {kind}")
    try:
        if data.startswith(b"PK\x03\x04"):
            return unzip(path, data)
        return gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error):
        raise InputError(f"{path} is a damaged zip or gzip file: copy it again") from None


def unzip(path, data):
    """The bytes of the one CSV file in a zip file. What macOS puts beside it, __MACOSX/._train.csv, is none."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        inside = [name for name in archive.namelist() if re.search(r"(^|/)(?!\._)[^/]+\.csv$", name, re.IGNORECASE)]
        if len(inside) != 1:
            raise InputError(f"{path} is an Excel workbook or a zip file with {len(inside)} CSV files: save it as "
                             "'CSV UTF-8', or unpack it and give one of them")  # fmt: skip
        return archive.read(inside[0])


def decode(path, data):
    """The text of a CSV file in UTF-8, UTF-16 or GB18030, without byte-order marks. Raises InputError for others."""
    encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8"
    fault = "it contains NUL bytes"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        fault = f"byte 0x{data[error.start]:02x} is not valid {encoding.upper()}"
        text = data.decode("gb18030") if is_gb18030(data) else "\0"
    if "\0" in text:
        raise InputError(f"{path} is damaged or in an unknown encoding ({fault}): copy it again, or save it as "
                         "'CSV UTF-8'")  # fmt: skip
    return text.lstrip("\ufeff")


def is_gb18030(data):
    """Whether bytes that are not UTF-8 are GB18030, rather than UTF-8 with a few damaged bytes, or Windows-1252."""
    try:
        text = data.decode("gb18030")
    except UnicodeDecodeError:
        return False
    # GB18030 read as UTF-8 is nearly all replacement characters; damaged UTF-8 has few of them.
    as_utf8 = [c for c in data.decode("utf-8", "replace") if not c.isascii()]
    if as_utf8.count("\ufffd") <= 0.2 * len(as_utf8):
        return False
    # "é" or "’" of Windows and the letter after it look like one Chinese character, but one that is rare in Chinese.
    # Rows 0xA8 and 0xA9 hold signs such as the dash, which are not rare.
    encoded = [c.encode("gb18030") for c in text if not c.isascii()]
    pairs = [pair for pair in encoded if len(pair) == 2 and pair[0] not in (0xA8, 0xA9)]
    return sum(pair[1] < 0x80 for pair in pairs) <= 0.2 * len(pairs)


def parse_rows(path, text):
    """The rows of a CSV file's text, header first, and their numbers: the header is row 1, as in a spreadsheet. Blank
    rows are skipped. Raises InputError that names the row.
    """
    first = next((line for line in io.StringIO(text, newline="") if line.strip()), "")
    delimiter = max(",;\t|", key=first.count)  # a European Excel writes ';'
    spaced = f'{delimiter} "' in first  # "uuid", "title": the blank belongs to no cell
    rows, numbers, number = [], [], 0
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=spaced)
        for number, row in enumerate(reader, 1):
            if not any(map(str.strip, row)) or (not rows and row[0] == "sep="):  # a line that only Excel reads
                continue
            if not rows:  # bare delimiters at the end of the header are not columns
                width = max(place for place, name in enumerate(row, 1) if name.strip())
            if len(row) < width or any(row[width:]):
                raise InputError(f"{path}: row {number} has {len(row)} cells, the header has {width}: the file was "
                                 "cut off or a quote is missing; fix the row or copy the file again")  # fmt: skip
            rows.append(row[:width])
            numbers.append(number)
    except csv.Error as error:
        raise InputError(f"{path}: row {number + 1}: {error}; fix the row or copy the file again") from None
    if not rows:
        raise InputError(f"{path} is empty: copy the file again")
    return rows, numbers


def read_columns(path, required):
    """The columns of a CSV file, {name: cells}, and the row number of each cell. The names that the kit knows may be
    written in any case. Raises InputError unless each of `required` is there.
    """
    csv.field_size_limit(2**31 - 1)  # the default is shorter than an abstract that lost its closing quote
    rows, numbers = parse_rows(path, decode(path, read_bytes(path)))
    known = {name.casefold(): name for name in ("uuid", *FIELDS, "label", "prob")}
    header = [name.replace("\ufeff", "").strip() for name in rows[0]]  # also a byte-order mark within the quotes
    header = [known.get(name.casefold(), name) for name in header]
    missing = [name for name in required if name not in header]
    repeated = [name for name in known.values() if header.count(name) > 1]
    if missing:
        raise InputError(f"{path}: no column {few(missing)}; the header has {few(header, 8)}")
    if repeated:
        raise InputError(f"{path}: column {few(repeated)} appears more than once in the header; remove one")
    if len(rows) == 1:
        raise InputError(f"{path} has a header but no rows: copy the file again")
    return dict(zip(header, zip(*rows[1:]))), numbers[1:]
