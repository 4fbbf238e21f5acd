import pytest
from hypothesis import given
from hypothesis import strategies as st

from activities.checks.fences import code_blocks, without_prompts

CODE = st.text(alphabet=st.characters(exclude_categories=["Cs", "Cc"], include_characters="\n"))


@given(CODE)
def test_a_fenced_block_gives_its_code_back(code: str) -> None:
    fence = "`" * (max(map(len, code.split("\n"))) + 3)

    [block] = code_blocks(f"{fence}python\n{code}\n{fence}\n")

    assert block.text.replace("\x00", "�") == f"{code}\n"
    assert block.language == "python"


@given(st.text())
def test_any_text_has_blocks_that_lie_in_it_one_after_the_other(text: str) -> None:
    blocks = code_blocks(text)

    end = 1
    for block in blocks:
        assert block.line >= end
        end = block.line + block.lines


@pytest.mark.parametrize(
    ("info", "language"),
    [
        ("python", "python"),
        ("Python", "python"),
        ("py title=x", "python"),
        ("{.python}", "python"),
        ("{python}", "python"),
        ("python:app.py", "python"),
        ("python3", "python"),
        ("yml", "yaml"),
        ("bash", "shell"),
        ("sh", "shell"),
        ("postgresql", "sql"),
        ("rust", "rust"),
        ("", ""),
    ],
)
def test_a_block_is_of_the_language_that_its_fence_names(info: str, language: str) -> None:
    [block] = code_blocks(f"```{info}\nx\n```")

    assert block.language == language


@pytest.mark.parametrize(
    ("info", "text", "file"),
    [
        ("python title=price.py", "x = 1", "price.py"),
        ('python title="src/Shop/price.py"', "x = 1", "src/Shop/price.py"),
        ("python:price.py", "x = 1", "price.py"),
        ("./price.py", "x = 1", "price.py"),
        ("{.python file=price.py}", "x = 1", "price.py"),
        ("python", "# price.py\nx = 1", "price.py"),
        ("python", "\n# File: `shop/price.py`\nx = 1", "shop/price.py"),
        ("sql", "-- schema.sql\nSELECT 1;", "schema.sql"),
        ("python", "# like price.py\nx = 1", ""),
        ("python", "x = 1\n# price.py", ""),
        ("python3.11", "x = 1", ""),
        ("python", "# /etc/price.py\nx = 1", ""),
        ("python", "# ../price.py\nx = 1", ""),
    ],
)
def test_a_block_has_the_file_name_of_its_label_or_first_comment(
    info: str, text: str, file: str
) -> None:
    [block] = code_blocks(f"```{info}\n{text}\n```")

    assert block.file == file


def test_a_block_has_the_number_of_its_first_line_of_code() -> None:
    text = "intro\n\n```json\n{}\n```\n\n1. item\n\n   ~~~py\n   a = 1\n   b = 2\n   ~~~\n"

    blocks = code_blocks(text)

    assert [(block.line, block.text) for block in blocks] == [(4, "{}\n"), (10, "a = 1\nb = 2\n")]


def test_indented_code_is_a_block_without_a_language() -> None:
    [block] = code_blocks("Run:\n\n    rm -rf /\n")

    assert (block.language, block.text, block.line) == ("", "rm -rf /\n", 3)


def test_a_fence_that_was_cut_off_runs_to_the_end() -> None:
    [block] = code_blocks("```python\nx = 1\ny = ")

    assert block.text == "x = 1\ny = "


def test_inline_code_is_not_a_block() -> None:
    assert code_blocks("Call `f()` and ```g()``` now.") == []


@pytest.mark.parametrize(
    "info",
    ["", "text", "python3.11", "pycon", "{code-cell} python", "app.py", "src/app.py", "rust", "sh"],
)
def test_python_is_python_whatever_its_label(info: str) -> None:
    [block] = code_blocks(f"```{info}\nimport ctypes\n```")

    assert block.language == "python"


def test_code_that_cannot_be_parsed_under_no_label_is_unclear_and_prose_is_not() -> None:
    texts = ["def f(:\nimport os", "Import the parts, then call them.", "a -> b"]

    blocks = code_blocks("".join(f"```\n{text}\n```\n" for text in texts))

    assert [block.language for block in blocks] == ["unclear", "", ""]


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ('console.log("x")', "unclear"),
        ('System.out.println("x");', "unclear"),
        ("entry(1)", "unclear"),
        ("print(entry(1))", "python"),
        ("total = price(1)\nassert total", "python"),
        ('{"cents": 150}', "json"),
        ("[1, 2, true]", "json"),
        ("ls -la", ""),
        ("pip install ratelimit", ""),
    ],
)
def test_a_line_of_another_language_is_not_read_as_python(text: str, language: str) -> None:
    [block] = code_blocks(f"```\n{text}\n```")

    assert block.language == language


def test_raw_html_is_a_block() -> None:
    [block] = code_blocks("Run\n\n<pre>\nls\n</pre>\n")

    assert (block.language, block.text, block.line) == ("html", "<pre>\nls\n</pre>\n", 3)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (">>> 1 + 1\n2\n>>> print(3)\n3\n", "1 + 1\n\nprint(3)\n\n"),
        (">>> def f():\n...     return 1\n...\n>>> f()\n1\n", "def f():\n    return 1\n\nf()\n\n"),
        ('"""Adds.\n\n>>> 1\n1\n"""\nimport ctypes\n', None),
        (">>> 1\nimport ctypes\n", None),
    ],
)
def test_a_prompt_hides_no_code(text: str, code: str | None) -> None:
    assert without_prompts(text) == (text if code is None else code)
