"""Find the program in an answer, and put it together with its tests; nothing is run here."""

import re
from collections.abc import Sequence

_BLOCK = re.compile(r"```[ \t]*(?:python|py|Python)?[ \t]*\r?\n(?P<code>.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)
_SORSA_BLOCK = re.compile(r"```python\s*([\s\S]*?)\s```")
_TRIPLE = re.compile("\"\"\"|'''")
_CODE_LINE = re.compile(
    r"(?:def|class|import|from|async|if|for|while|try|with|return|else|elif|except|finally|assert|print)\b"
    r"|[A-Za-z_][\w.]*(?:\[[^\]]*\])?\s*[-+*/]?[=(]|[@#)\]}\"']"
)


def written_code(answer: str, name: str) -> str | None:
    """The code in `answer`: the first fenced block that defines `name`, else the first block, else the text.

    Of a text without a block, the part from its first to its last line of code. The indentation of the
    first line is kept. None if nothing is left.
    """
    answer = answer.replace("\r", "")
    blocks = [match["code"] for match in _BLOCK.finditer(answer)]
    for block in blocks:
        if defines(block, name):
            return block
    code = blocks[0] if blocks else _code_lines(answer)
    return code if code.strip() else None


def defines(code: str, name: str) -> bool:
    """True if the code has a function or class of that name on its outermost level."""
    return re.search(rf"^(?:async\s+def|def|class)\s+{re.escape(name)}\b", code, re.MULTILINE) is not None


def _code_lines(text: str) -> str:
    """The lines of a text without fences that look like code, up to the first that does not."""
    kept: list[str] = []
    quotes = ""
    for line in text.split("\n"):
        is_code = not line.strip() or line[0] in " \t" or _CODE_LINE.match(line) is not None
        if is_code or quotes:
            kept.append(line)
        elif any(one.strip() for one in kept):
            break
        else:
            kept.clear()
        quotes = _open_quotes(line, quotes)
    return "\n".join(kept).strip("\n")


def _open_quotes(line: str, quotes: str) -> str:
    """The triple quotes that are open after the line, if `quotes` were before it."""
    for mark in _TRIPLE.findall(line):
        quotes = "" if quotes == mark else quotes or mark
    return quotes


def completed_function(prompt: str, code: str, name: str) -> str:
    """The problem's prompt completed by `code`: a whole function of that name, or only its body.

    A whole function gets the prompt's imports and other functions in front of it.
    """
    if not defines(code, name):
        return f"{prompt}{_indented(code)}"
    start = re.search(rf"^(?:async\s+)?def\s+{re.escape(name)}\b", prompt, re.MULTILINE)
    return f"{prompt[: start.start()] if start else prompt}\n{code}"


def _indented(body: str) -> str:
    """A body that lost the indentation of its first line, or of all lines, gets it back."""
    lines = body.split("\n")
    first = next((line for line in lines if line.strip()), "")
    if not first or first[0] in " \t":
        return body
    others = [line for line in lines[lines.index(first) + 1 :] if line.strip()]
    if others and all(line[0] in " \t" for line in others):
        return body.replace(first, f"    {first}", 1)
    return "\n".join(f"    {line}" if line.strip() else line for line in lines)


def sorsa_code(answer: str) -> str:
    """What SORSA's script takes for the code: the first block, or the whole answer.

    The blanks behind "```python" are dropped, the indentation of the first line among them, so that an
    answer with the body of the function alone is never right.
    """
    match = _SORSA_BLOCK.search(answer)
    return answer if match is None else match[1]


def pissa_code(answer: str) -> str:
    """What PiSSA's script takes for the code: up to the first line of tests, also inside a docstring."""
    code = answer.replace("\r", "")
    if "```python" in code:
        code = code[code.index("```python") :].strip().replace("```python", "")
        before, end, _ = code.partition("\n```")
        code = before.strip() if end else code
    if '__name__ == "__main__"' in code:
        if 'if __name__ == "__main__":' not in code:
            raise ValueError("the script stops here with an error")
        code = code.partition('if __name__ == "__main__":')[0].strip()
    for mark in ("# Example usage", "assert"):
        before, end, _ = code.partition(mark)
        code = before.strip() if end else code
    return code


def joined(*parts: str | Sequence[str]) -> str:
    """The parts of a program, one after another, each from a line of its own."""
    texts = ["\n".join([part] if isinstance(part, str) else part) for part in parts]
    return "\n".join(text for text in texts if text) + "\n"
