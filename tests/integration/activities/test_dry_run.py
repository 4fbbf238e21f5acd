"""The dry run's verdict in the real sandbox: what passes, fails, or cannot be checked."""

import dataclasses
import textwrap
from datetime import timedelta

import pytest
from temporalio.testing import ActivityEnvironment

from activities.checks.activities import Checks
from activities.checks.sandbox import Limits, Sandbox
from workflows.models.agents import Proposal
from workflows.models.deliberation import Check, CheckInput


async def dry_run(content: str, limits: Limits | None = None) -> Check:
    environment = ActivityEnvironment()
    environment.info = dataclasses.replace(
        environment.info, heartbeat_timeout=timedelta(seconds=30)
    )
    checks = Checks(sandbox=Sandbox(limits=limits))
    request = CheckInput(agent_id="dev-1", proposal=Proposal(approach="x", content=content))
    report = await environment.run(checks.check_proposal, request)
    return next(check for check in report.checks if check.name == "dry_run")


def python(code: str) -> str:
    return f"```python\n{textwrap.dedent(code)}\n```\n"


# --- programs that wait are not checked -----------------------------------------------------------

PERSON, ARGUMENT, CLIENT = "a person's input", "an argument", "a client"


@pytest.mark.parametrize(
    ("code", "who"),
    [
        ("input('Name? ')", PERSON),
        ("try:\n    input()\nexcept EOFError:\n    raise SystemExit(1) from None", PERSON),
        ("import sys, json\njson.loads(sys.stdin.read())", PERSON),
        ("import sys\nint(sys.stdin.readline())", PERSON),
        ("import sys\nnext(line for line in sys.stdin)", PERSON),
        ("import sys\nassert sys.stdin.buffer.read()", PERSON),
        ("import sys\nassert sys.__stdin__.readlines()", PERSON),
        ("assert open(0).read()", PERSON),
        ("assert open('/dev/stdin').read()", PERSON),
        ("import getpass\nassert getpass.getpass()", PERSON),
        ("breakpoint()\nassert False", PERSON),
        ("import sys\nprint(sys.argv[1])", ARGUMENT),
        ("import sys\nprint(sys.argv[1:][0])", ARGUMENT),
        (
            """
            import sys
            try:
                name = sys.argv[1]
            except IndexError:
                sys.exit("usage: greet NAME")
            """,
            ARGUMENT,
        ),
        (
            """
            import sys
            def main():
                if len(sys.argv) != 2:
                    print("usage: greet NAME")
                    sys.exit(1)
            main()
            """,
            ARGUMENT,
        ),
        (
            """
            import argparse
            parser = argparse.ArgumentParser()
            parser.add_argument("name")
            parser.parse_args()
            """,
            ARGUMENT,
        ),
        (
            """
            import argparse
            parser = argparse.ArgumentParser()
            parser.add_subparsers(required=True, dest="command").add_parser("run")
            parser.parse_args()
            """,
            ARGUMENT,
        ),
    ],
)
async def test_code_that_waits_for_a_person_or_an_argument_is_not_checked(
    code: str, who: str
) -> None:
    check = await dry_run(python(code))

    assert (check.outcome, check.score) == ("not_checked", None)
    assert check.findings == [f"not checked: it waits for {who}"]


@pytest.mark.parametrize(
    "code",
    [
        """
        import socket
        server = socket.create_server(("127.0.0.1", 8080))
        server.accept()
        """,
        """
        import asyncio
        async def main():
            server = await asyncio.start_server(lambda r, w: w.close(), "127.0.0.1", 8080)
            async with server:
                await server.serve_forever()
        asyncio.run(main())
        """,
        """
        from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
        ThreadingHTTPServer(("", 8080), BaseHTTPRequestHandler).serve_forever()
        """,
        """
        import threading, time
        from http.server import BaseHTTPRequestHandler, HTTPServer
        server = HTTPServer(("", 8080), BaseHTTPRequestHandler)
        threading.Thread(target=server.serve_forever).start()
        """,
        """
        import socket
        server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        server.bind(("127.0.0.1", 8080))
        server.recvfrom(100)
        """,
        """
        import socket
        server = socket.socket(socket.AF_UNIX)
        server.bind("/tmp/server")
        server.listen()
        server.accept()
        """,
    ],
    ids=["accept", "asyncio", "http.server", "thread", "datagrams", "unix"],
)
async def test_a_server_that_waits_for_its_clients_is_not_checked(code: str) -> None:
    check = await dry_run(python(code), Limits(wall_s=60))

    assert check.outcome == "not_checked"
    assert check.findings == [f"not checked: it waits for {CLIENT}"]


@pytest.mark.parametrize(
    ("code", "outcome", "finding"),
    [
        ("while True:\n    pass", "failed", "used up its CPU time"),
        (
            """
            import socket
            server = socket.create_server(("127.0.0.1", 8080))
            while True:
                pass
            """,
            "failed",
            "used up its CPU time",
        ),
        ("import threading\nthreading.Event().wait()", "failed", "ran for more than 8 s"),
        (
            """
            import threading
            lock = threading.Lock()
            with lock, lock:
                pass
            """,
            "failed",
            "ran for more than 8 s",
        ),
        (
            """
            import multiprocessing
            with multiprocessing.get_context("fork").Manager() as manager:
                manager.Event().wait()
            """,
            "failed",
            "ran for more than 8 s",
        ),
        ("names = []\nprint(names[1])", "failed", "exit code 1: IndexError: list index"),
        (
            """
            import sys
            try:
                size = int(sys.argv[1])
            except IndexError:
                size = 5
            assert size == 6
            """,
            "failed",
            "exit code 1: AssertionError",
        ),
        (
            """
            import sys
            def main():
                sys.exit(1)
            if len(sys.argv) == 1:
                main()
            """,
            "failed",
            "exit code 1: ",
        ),
        ("raise EOFError('EOF when reading a line')", "failed", "exit code 1: EOFError"),
        (
            """
            import argparse
            parser = argparse.ArgumentParser()
            parser.add_argument("name")
            parser.parse_args([])
            """,
            "failed",
            "exit code 2: ",
        ),
        ("import sys\nassert len(sys.argv) == 1 and not sys.argv[1:]", "passed", ""),
        ("import io, sys\nsys.stdin = io.StringIO('5')\nassert input() == '5'", "passed", ""),
        (
            """
            import socket, threading
            server = socket.create_server(("127.0.0.1", 8080))
            threading.Thread(target=lambda: server.accept()[0].sendall(b"x")).start()
            assert socket.create_connection(("127.0.0.1", 8080)).recv(1) == b"x"
            """,
            "passed",
            "",
        ),
    ],
)
async def test_what_waits_for_no_one_passes_or_fails(code: str, outcome: str, finding: str) -> None:
    waits = finding.startswith("ran for")
    check = await dry_run(python(code), Limits(cpu_s=1, wall_s=8 if waits else 60))

    assert (check.outcome, "".join(check.findings)[: len(finding)]) == (outcome, finding)


# --- blocks that are files ------------------------------------------------------------------------

PRICE = "def price(cents: int) -> str:\n    return f'{cents / 100:.2f}'\n"


@pytest.mark.parametrize(
    "content",
    [
        f"```python title=price.py\n{PRICE}```\n" + python("from price import price"),
        f"```python:price.py\n{PRICE}```\n" + python("from .price import price"),
        f"```price.py\n{PRICE}```\n" + python("from . import price\nprice = price.price"),
        python(f"# price.py\n{PRICE}") + python("import price as p\nprice = p.price"),
        python(f"# file: src/price.py\n{PRICE}") + python("from src.price import price"),
        python(f"# shop/price.py\n{PRICE}") + python("from shop.price import price"),
        python(f"# shop/price.py\n{PRICE}")
        + python("# shop/cart.py\nfrom .price import price")
        + python("from shop.cart import price"),
        python(f"# src/shop/price.py\n{PRICE}")
        + python("# src/shop/__init__.py\nfrom .price import price")
        + python("import shop\nprice = shop.price"),
        # Used before its definition in the text.
        python("# test_price.py\nfrom price import price") + python(f"# price.py\n{PRICE}"),
        # In two parts, and without an import, as in a notebook.
        python("# price.py\nimport math") + python(f"# price.py\n{PRICE}") + python("math.pi"),
    ],
)
async def test_blocks_that_name_a_file_import_each_other(content: str) -> None:
    passing = await dry_run(content + python("assert price(150) == '1.50'"))
    failing = await dry_run(content + python("assert price(150) == '1.5'"))

    assert (passing.outcome, passing.findings) == ("passed", [])
    assert (failing.outcome, failing.findings) == ("failed", ["exit code 1: AssertionError"])


async def test_a_file_runs_once_and_its_main_part_at_its_place() -> None:
    price = "# price.py\nprint('loaded')\nif __name__ == '__main__':\n    print('main')"

    check = await dry_run(python("from price import *") + python(price) + python("import price"))

    assert (check.outcome, check.output) == ("passed", "loaded\nmain\n")


async def test_the_tests_of_a_file_are_run() -> None:
    tests = (
        "# test_price.py\nimport unittest\nfrom price import price\n"
        "class Test(unittest.TestCase):\n"
        "    def test_it(self):\n        self.assertEqual(price(150), '{}')\n"
        "if __name__ == '__main__':\n    unittest.main()"
    )
    content = python(f"# price.py\n{PRICE}")

    assert (await dry_run(content + python(tests.format("1.50")))).outcome == "passed"
    assert (await dry_run(content + python(tests.format("1.5")))).outcome == "failed"


async def test_a_file_that_exits_at_its_end_does_not_end_the_others() -> None:
    program = "# price.py\nimport sys\nif __name__ == '__main__':\n    sys.exit({})\n"

    for code, rest, outcome in (
        (0, "assert True", "passed"),
        (0, "assert False", "failed"),
        (1, "assert True", "failed"),
    ):
        check = await dry_run(python(program.format(code)) + python(rest))

        assert check.outcome == outcome
    early = python("# price.py\nraise SystemExit\nassert False") + python("assert True")
    assert (await dry_run(early)).outcome == "failed"


async def test_data_files_are_there_under_their_names() -> None:
    content = '```json title="data/prices.json"\n{"tea": 150}\n```\n'
    code = "import json\nassert json.load(open('data/prices.json'))['tea'] == 150"

    assert (await dry_run(content + python(code))).outcome == "passed"


@pytest.mark.parametrize(
    ("content", "finding"),
    [
        (python("# price.py\nprice = 1") + python("from price import cost"), "failed"),
        (python("# price.py\nassert False"), "failed"),
        (python("# __main__.py\nassert False"), "failed"),
        (python("# shop/__main__.py\nassert False"), "failed"),
        (python("# conftest-1.py\nassert False"), "failed"),
        (python("# price.py\nprice = 1") + python("from .tax import rate"), "not_checked"),
        (python("# shop/price.py\nfrom .types import Money"), "not_checked"),
        (python("# shop/price.py\nprice = 1") + python("import shop.tax"), "not_checked"),
        (python("# ../price.py\nprice = 1") + python("import price"), "not_checked"),
        (python("# json.py\nprice = 1") + python("import json\njson.dumps(price)"), "passed"),
    ],
)
async def test_an_import_of_what_is_not_in_a_block(content: str, finding: str) -> None:
    assert (await dry_run(content)).outcome == finding


# --- attacks on the verdict -----------------------------------------------------------------------

EVERYWHERE = """
def write_everywhere(data):
    for descriptor in range(3, 256):
        try:
            os.write(descriptor, data)
        except OSError:
            pass
"""


@pytest.mark.parametrize(
    "attack",
    [
        "raise SystemExit",
        "sys.exit(0)",
        "os._exit(0)",
        "os._exit(70)",
        "os._exit(71)",
        "os._exit(72)",
        "print('\\nfastapi')\nos._exit(71)",
        "print(\"ModuleNotFoundError: No module named 'x'\")\nsys.exit(1)",
        "write_everywhere(b'end')\nos._exit(0)",
        "write_everywhere(b'missing x')\nos._exit(0)",
        # Read the secret that a runner might keep in a pipe.
        """
for name in os.listdir("/proc/self/fd"):
    try:
        os.set_blocking(int(name), False)
        secret = os.read(int(name), 16)
        write_everywhere(secret + b"end")
        write_everywhere(secret + b"missing x")
    except OSError:
        pass
os._exit(0)
""",
        """
for process in os.listdir("/proc"):
    for descriptor in range(256):
        try:
            with open(f"/proc/{process}/fd/{descriptor}", "wb", 0) as file:
                file.write(b"end")
        except OSError:
            pass
os._exit(0)
""",
        # The child reaches the end, but the program does not.
        "if os.fork():\n    os._exit(0)\nelse:\n    BROKEN = False",
        *(
            f"import signal\nos.kill(os.getppid(), signal.{name})\nsignal.pause()"
            for name in ("SIGKILL", "SIGTERM", "SIGINT", "SIGSTOP", "SIGUSR1")
        ),
    ],
)
async def test_a_program_cannot_fake_its_completion(attack: str) -> None:
    code = f"import os, sys\nBROKEN = True\n{EVERYWHERE}\n{attack}\nassert not BROKEN"

    check = await dry_run(python(code), Limits(wall_s=8))

    assert (check.outcome, check.score) == ("failed", 0)


async def test_the_process_that_holds_the_verdict_cannot_be_read_or_written() -> None:
    check = await dry_run(
        python(
            """
            import os
            for name in ("mem", "fd/0", "fd/1", "environ", "maps"):
                try:
                    open(f"/proc/{os.getppid()}/{name}", "rb").close()
                    print("opened", name)
                except PermissionError:
                    pass
            print(*sorted(os.listdir("/proc/self/fd"), key=int)[:3])
            print(len(os.listdir("/proc/self/fd")))
            """
        )
    )

    # The three standard descriptors, and the one of the listing itself.
    assert (check.outcome, check.output) == ("passed", "0 1 2\n4\n")


async def test_what_a_program_leaves_running_adds_nothing_to_the_report() -> None:
    check = await dry_run(
        python(
            """
            import os
            if os.fork() == 0:
                while True:
                    os.write(1, b"x\\n")
            import fastapi
            """
        )
    )

    assert check.findings == [
        "not checked: it imports fastapi, and the sandbox has the standard library only"
    ]
