#!/usr/bin/env python3
"""Lint of dsa.h, and the way out of the single file.

    sections.py [FILE]               checks FILE (default: dsa.h), prints one line a fault, exit status 1 if any
    sections.py [FILE] --split DIR   also writes DIR/dsa.h and DIR/dsa.c and checks that they rejoin byte for byte

A section starts with a banner: a comment line of '=', then its marker `>>name`. The contents at the top list the same
markers in the same order, so that one search goes anywhere in the file and no line number ever goes stale.
"""
import argparse
import os
import re
import sys

LONGEST_SECTION = 1200
LONGEST_LINE = 140
MARKER = re.compile(r"^[ *]*>>([a-z][a-z0-9_]*)\b")
GUARD_END = "#endif /* DSA_H_INCLUDED */\n"
PAIR_HEAD = '#define DSA_IMPLEMENTATION\n#include "dsa.h"\n'


def sections_of(lines):
    """Contents [(line number, name)] and sections [(line number, name)], both in file order, lines counted from 1."""
    contents, sections = [], []
    for number, line in enumerate(lines, 1):
        found = MARKER.match(line)
        if not found:
            continue
        if number > 1 and re.match(r"^/\* =+$", lines[number - 2].rstrip()):
            sections.append((number, found.group(1)))
        else:
            contents.append((number, found.group(1)))
    return contents, sections


def check_sections(lines):
    contents, sections = sections_of(lines)
    if not sections:
        yield 1, "no section found: a section is a banner '/* ====' with '>>name' on the next line"
        return
    for number, name in contents:
        if number > sections[0][0]:
            yield number, f">>{name} stands alone in a line, without the banner of a section"
    listed = [name for number, name in contents if number < sections[0][0]]
    found = [name for _, name in sections]
    if listed != found:
        yield sections[0][0], f"the contents list {' '.join(listed)}; the file has {' '.join(found)}"
    ends = [number for number, _ in sections[1:]] + [len(lines) + 1]
    for (number, name), end in zip(sections, ends):
        if end - number > LONGEST_SECTION:
            yield number, f">>{name} has {end - number} lines, more than {LONGEST_SECTION}"


def check_lines(lines):
    for number, line in enumerate(lines, 1):
        if "\t" in line:
            yield number, "tab"
        if len(line.rstrip("\n")) > LONGEST_LINE:
            yield number, f"{len(line) - 1} characters, more than {LONGEST_LINE}"
        if line.rstrip() != line.rstrip("\n"):
            yield number, "space at the end of the line"


def without_comments(text):
    """Comments and strings blanked, line numbers kept."""
    blank = lambda found: re.sub(r"[^\n]", " ", found.group(0))
    return re.sub(r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"', blank, text, flags=re.S)


def without_macro_bodies(code):
    """The lines that continue a #define blanked: names in there are pasted together when it is used."""
    blank = lambda found: found.group(1) + re.sub(r"[^\n]", " ", found.group(2))
    return re.sub(r"^([ ]*#[ ]*define[^\n]*\\\n)((?:[^\n]*\\\n)*[^\n]*)", blank, code, flags=re.M)


def check_names(text):
    """Whatever a file that includes dsa.h can see starts with dsa_ or DSA_; what is not for users with dsa__ or DSA__."""
    code = without_macro_bodies(without_comments(text))
    patterns = [
        (r"^DSA_API\b[^;{=]*?\b(\w+)\s*\(", r"dsa_[a-z]\w*", "public function"),
        (r"^static\b[^;{(=]*?\b(\w+)\s*(?:\[[^\]]*\]\s*)*[=;(]", r"dsa__\w+", "private name"),
        (r"^[ ]*#[ ]*define[ ]+(\w+)", r"DSA_\w+", "macro"),
        (r"^(?:typedef[ ]+)?(?:struct|enum|union)[ ]+(\w+)\s*\{", r"dsa_\w+", "tag"),
        (r"^\}[ ]*(\w+);", r"dsa_\w+", "type"),
    ]
    for pattern, wanted, what in patterns:
        for found in re.finditer(pattern, code, flags=re.M):
            if not re.fullmatch(wanted, found.group(1)):
                yield code.count("\n", 0, found.start(1)) + 1, f"{what} {found.group(1)} does not match {wanted}"


def split(text, folder):
    """dsa.h ends with the include guard, dsa.c is the rest behind two lines of its own."""
    cut = text.index(GUARD_END) + len(GUARD_END)
    os.makedirs(folder, exist_ok=True)
    for name, part in (("dsa.h", text[:cut]), ("dsa.c", PAIR_HEAD + text[cut:])):
        with open(os.path.join(folder, name), "w", encoding="utf-8", newline="") as file:
            file.write(part)


def rejoin(folder):
    with open(os.path.join(folder, "dsa.h"), "rb") as file:
        head = file.read()
    with open(os.path.join(folder, "dsa.c"), "rb") as file:
        rest = file.read()
    if not rest.startswith(PAIR_HEAD.encode()):
        raise ValueError("dsa.c does not start with its two lines")
    return head + rest[len(PAIR_HEAD):]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", default="dsa.h")
    parser.add_argument("--split", metavar="DIR", help="write the pair DIR/dsa.h, DIR/dsa.c")
    arguments = parser.parse_args()

    with open(arguments.file, "rb") as file:
        data = file.read()
    text = data.decode("utf-8")
    lines = text.splitlines(keepends=True)

    faults = sorted([*check_sections(lines), *check_lines(lines), *check_names(text)])
    if arguments.split:
        if text.count(GUARD_END) != 1:
            faults.append((1, f"no single line {GUARD_END.strip()!r} to split at"))
        else:
            split(text, arguments.split)
            if rejoin(arguments.split) != data:
                faults.append((1, "the pair does not rejoin to the same bytes"))
    for number, fault in faults:
        print(f"{arguments.file}:{number}: {fault}", file=sys.stderr)
    if not faults:
        print(f"{arguments.file}: {len(lines)} lines, sections {' '.join(name for _, name in sections_of(lines)[1])}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
