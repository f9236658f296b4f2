"""Changes of bytes, texts and JSON values by chance."""

# ruff: noqa: RUF001

import json
import random
from typing import Any

TEXTS = (
    *("", " ", "\n", "\0", "\ud800", "a\0b", "\u202egnp.exe", "\x1b[31mred", "\u2028", "🍎" * 50, "ﷺ", "e\u0301"),
    *("../../etc/passwd", "/etc/passwd", "/dev/zero", "NUL", "con.txt", "..", ".", "~", "a/../../b", "file:///x"),
    *("<script>alert(1)</script>", "'\"><img src=x onerror=alert(1)>", "&lt;", "{{data}}", "%s%n", "$HOME", "`id`"),
    *("${oc.env:HOME}", "${name}", "${", "!!python/object/apply:os.system [id]", "*a", "&a", "- - -", "a: b: c", "?"),
    *(
        "nan",
        "inf",
        "-inf",
        "1e999",
        "-1",
        "0",
        "-0.0",
        "1_000",
        "0x10",
        "٣",
        "１２",
        "9" * 5000,
        "1.5",
        "true",
        "null",
    ),
    *(
        "[",
        "]",
        "{}",
        "[]",
        "{",
        "[[1]]",
        "a,b",
        "a=b",
        "=",
        ",",
        ";",
        "#",
        "--help",
        "-",
        "--",
        "a" * 70000,
        "x" * 300,
    ),
)
"""Texts that programs get wrong."""

NUMBERS = (0, -1, 1, 2, 3, 2**31, 2**63, 2**64, 10**30, -(2**63), 0.5, -0.5, 1e-300, 1e308, float("nan"), float("inf"))
INTEGERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def deep(levels: int) -> list[Any]:
    """Return lists in lists."""
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


def any_value(rng: random.Random) -> Any:
    """Return a value that JSON can hold, or nearly."""
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice(TEXTS)
    if kind == 1:
        return rng.choice(NUMBERS)
    if kind == 2:
        return rng.choice([None, True, False, [], {}, [None], [[]], {"": None}])
    if kind == 3:
        return [rng.choice(NUMBERS) for _ in range(rng.randrange(4))]
    if kind == 4:
        return {rng.choice(TEXTS): rng.choice(NUMBERS)}
    return deep(rng.choice([3, 30, 400]))


def mutated_value(rng: random.Random, value: Any) -> Any:
    """Return a JSON value in which one place is another value, is missing, or is there twice."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
        return any_value(rng)
    if isinstance(value, list):
        copy = list(value)
        place = rng.randrange(len(copy))
        match rng.randrange(5):
            case 0:
                del copy[place]
            case 1:
                copy.insert(place, copy[place])
            case 2:
                copy.insert(place, any_value(rng))
            case _:
                copy[place] = mutated_value(rng, copy[place])
        return copy
    fields = dict(value)
    name = rng.choice(list(fields))
    match rng.randrange(6):
        case 0:
            del fields[name]
        case 1:
            fields[rng.choice(TEXTS)] = fields[name]
        case 2:
            fields[name] = any_value(rng)
        case _:
            fields[name] = mutated_value(rng, fields[name])
    return fields


def as_json(rng: random.Random, value: Any) -> bytes:
    """Return a value as JSON, sometimes damaged, sometimes in UTF-16 or with bytes that are no text."""
    data = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    return maybe_damaged(rng, data)


def maybe_damaged(rng: random.Random, text: bytes) -> bytes:
    """Return a text file as it is, in another encoding, or with changed bytes."""
    match rng.randrange(8):
        case 0:
            return mutated_bytes(rng, text)
        case 1:
            return text.decode("utf-8", "replace").encode("utf-16")
        case 2:
            return b"\xef\xbb\xbf" + text
        case 3:
            return text.replace(b"\n", b"\r\n")
        case _:
            return text


def mutated_bytes(rng: random.Random, data: bytes) -> bytes:
    """Return bytes with one to four changes."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place, length = rng.randrange(len(changed) + 1), rng.choice([1, 2, 4, 8, 64, 1000])
        match rng.randrange(8):
            case 0:
                del changed[place:]
            case 1:
                del changed[place : place + length]
            case 2:
                changed[place : place + length] = bytes(length)
            case 3:
                changed[place:place] = changed[place : place + length]
            case 4:
                changed[place:place] = rng.randbytes(length)
            case 5:
                order = rng.choice(["little", "big"])
                changed[place : place + 4] = rng.choice(INTEGERS).to_bytes(4, order)  # type: ignore[arg-type]
            case _:
                if changed:
                    changed[place % len(changed)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def mutated_text(rng: random.Random, text: str) -> str:
    """Return a text in which a line is changed, missing, there twice, or another text."""
    lines = text.split("\n")
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(lines)) if lines else 0
        match rng.randrange(6):
            case 0 if lines:
                del lines[place]
            case 1:
                lines.insert(place, rng.choice(TEXTS))
            case 2 if lines:
                lines.insert(place, lines[rng.randrange(len(lines))])
            case 3 if lines:
                cut = rng.randrange(len(lines[place]) + 1)
                lines[place] = lines[place][:cut] + rng.choice(TEXTS) + lines[place][cut:]
            case 4 if lines:
                key, colon, _ = lines[place].partition(rng.choice([":", ",", "="]))
                lines[place] = key + colon + " " + rng.choice(TEXTS)
            case _ if lines:
                lines[place] = lines[place][: rng.randrange(len(lines[place]) + 1)]
    return "\n".join(lines)
