"""The processes below another."""

import os
from pathlib import Path


def descendants(ancestor: int | None = None) -> dict[int, str]:
    """Names by process id of all that run below `ancestor`, or below this process."""
    children: dict[int, list[int]] = {}
    names = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text()
        except OSError:  # it has just ended
            continue
        number, name = int(text.partition(" ")[0]), text[text.index("(") + 1 : text.rindex(")")]
        state, parent = text[text.rindex(")") + 2 :].split()[:2]
        children.setdefault(int(parent), []).append(number)
        if state != "Z":
            names[number] = name
    found, level = {}, [os.getpid() if ancestor is None else ancestor]
    while level:
        level = [child for parent in level for child in children.get(parent, [])]
        found |= {child: names[child] for child in level if child in names}
    return found
