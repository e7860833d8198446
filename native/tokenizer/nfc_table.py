"""Write a C++ table of the characters that Unicode's quick check for NFC looks at: python nfc_table.py OUT.

Each row is a range of characters, their combining class, and whether the check lets them pass (Unicode Standard Annex
#15, "Detecting Normalization Forms"). Characters that are in no row have class 0 and pass.
"""

import sys
import unicodedata

LAST = 0x10FFFF


def second_of_pairs() -> set[int]:
    """Characters that may compose with one before them."""
    found = set(range(0x1161, 0x1176)) | set(range(0x11A8, 0x11C3))  # Hangul
    for number in range(LAST + 1):
        parts = unicodedata.decomposition(chr(number)).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            found.add(int(parts[1], 16))
    return found


def rows() -> list[tuple[int, int, int, bool]]:
    composing = second_of_pairs()
    found: list[tuple[int, int, int, bool]] = []
    for number in range(LAST + 1):
        letter = chr(number)
        if 0xD800 <= number <= 0xDFFF:
            continue
        kind = unicodedata.combining(letter)
        passes = number not in composing and unicodedata.is_normalized("NFC", letter)
        if kind == 0 and passes:
            continue
        if found and found[-1][1:] == (number - 1, kind, passes):
            found[-1] = (found[-1][0], number, kind, passes)
        else:
            found.append((number, number, kind, passes))
    return found


def main() -> None:
    lines = [f"{{{a}, {b}, {kind}, {str(passes).lower()}}}," for a, b, kind, passes in rows()]
    with open(sys.argv[1], "w") as file:
        file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
