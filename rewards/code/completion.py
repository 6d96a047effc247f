"""The program in a completion."""

import re

# Possessive, so that hostile text takes linear time.
FENCE = re.compile(r"^([ \t]*+)```[ \t]*+([\w+#.-]*+)[^\n]*+\n(.*?)^[ \t]*+```", re.DOTALL | re.MULTILINE)
TAGS = {"python": ("python", "python3", "py"), "cpp": ("cpp", "c++", "cc", "cxx")}


def program(completion: str, language: str) -> str:
    """The last fenced block in `language`, else the last without one, after the last `</think>`; without any fence all
    of that text. Empty where there is only code of other languages, or thinking that never ends."""
    thought, _, rest = completion.rpartition("</think>")
    if not thought and "<think>" in rest:
        return ""
    blocks = [(tag.lower(), _without(indent, code)) for indent, tag, code in FENCE.findall(rest)]
    if not blocks:
        return "" if "```" in rest else rest
    for tags in (TAGS[language], ("",)):
        if found := [code for tag, code in blocks if tag in tags]:
            return found[-1]
    return ""


def _without(indent: str, code: str) -> str:
    """The lines of a block without the indentation of its fence, which stands within a list, say."""
    return "".join(line.removeprefix(indent) for line in code.splitlines(keepends=True)) if indent else code
