"""Where in a completion its answer stands."""

import re

OPENINGS = ("<think>", "<thinking>", "<reasoning>")
CLOSINGS = ("</think>", "</thinking>", "</reasoning>")
CONNECTIVE = re.compile(r"[\s$,;.]*(?:(?:and|or)[\s$]*)?")  # between the boxes of one answer
ANNOUNCED = re.compile(
    r"(?:final\s+answer|answer)(?:\s+is)?\**\s*[:=]?\**[ \t]*(?:\n[ \t]*)?([^\n]+)|####[ \t]*([^\n]+)", re.IGNORECASE
)


def after_thinking(prompt: str, completion: str) -> str | None:
    """What follows the last closed thinking block; None where one was opened, by the prompt or by the completion, and
    never closed."""
    ends = [completion.rfind(tag) + len(tag) for tag in CLOSINGS if tag in completion]
    rest = completion[max(ends) :] if ends else completion
    opened = not ends and prompt.rstrip().endswith(OPENINGS)
    return None if opened or any(tag in rest for tag in OPENINGS) else rest


def tagged(text: str, tag: str = "answer") -> str | None:
    """What stands in the last <tag></tag>."""
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return found[-1].strip() if found else None


def boxed(text: str) -> list[str]:
    """The contents of the last \\boxed{} and of those that only commas, "and" or "or" part from it, in their order."""
    found: list[tuple[int, int, str]] = []
    closings = _closings(text)
    for start in re.finditer(r"\\f?boxed\s*\{", text):
        if found and start.start() < found[-1][1]:
            continue  # a box within a box
        if (end := closings.get(start.end() - 1)) is not None:
            found.append((start.start(), end + 1, text[start.end() : end].strip()))
    kept = found[-1:]
    for before in reversed(found[:-1]):
        if not CONNECTIVE.fullmatch(text, before[1], kept[0][0]):
            break
        kept.insert(0, before)
    return [content for _, _, content in kept]


def _closings(text: str) -> dict[int, int]:
    """The places of the braces that are closed, and of those that close them; in time linear in a hostile text."""
    opened: list[int] = []
    closings = {}
    for brace in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if brace[0] == "{":
            opened.append(brace.start())
        elif brace[0] == "}" and opened:
            closings[opened.pop()] = brace.start()
    return closings


def announced(text: str) -> str | None:
    """The last line that "final answer", "the answer is", "answer:" or "####" announces, without its full stop."""
    found = ANNOUNCED.findall(text)
    line = (found[-1][0] or found[-1][1]).strip() if found else ""
    return line.rstrip(".*").strip() or None
